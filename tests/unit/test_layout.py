"""Rules of a layout: every broken one at once, each with values that keep it."""

import pytest

from nemotron_recipes.backends.layout import Layout, batch_problems, layout_problems


def config(whole=128, micro=1, pack_size=4096):
    return {"train": {"global_batch_size": whole, "micro_batch_size": micro}, "data": {"pack_size": pack_size}}


def told(layout, **train):
    problems = [*layout_problems(layout), *batch_problems(layout, config(**train))]
    assert all(problem.fix for problem in problems)
    return [f"{problem.what} | {problem.fix}" for problem in problems]


@pytest.mark.parametrize(
    ("layout", "smallest", "replicas"),
    [
        (Layout(16, expert=8), 8, 16),  # Nano SFT, 2 nodes
        (Layout(32, tensor=4, expert=8, sequence_parallel=True), 8, 8),  # Nano pretraining, 4 nodes
        (Layout(16, tensor=8, expert=16, sequence_parallel=True), 16, 2),  # Super SFT, 2 nodes
        (Layout(64, tensor=2, pipeline=2, context=4, expert=8), 16, 4),
    ],
)
def test_published_layouts_keep_them(layout, smallest, replicas):
    assert told(layout) == []
    assert (layout.smallest, layout.data) == (smallest, replicas)


def test_every_broken_rule_is_told_at_once():
    found = told(Layout(24, tensor=16, expert=16, sequence_parallel=True), micro=3, pack_size=1000)
    assert len(found) == 4
    assert "24 process(es) can't be split into replicas of 16" in found[0] and "32, 48, ..." in found[0]
    assert "groups of 16 for the experts" in found[1] and "=1, 2, 3, 4, 6, 8, 12 or 24" in found[1]
    assert "train.global_batch_size 128 can't be shared out" in found[2]
    assert "need a multiple of 16 | data.pack_size=992 or 1008" in found[3]


@pytest.mark.parametrize(
    ("layout", "train", "message"),
    [
        (Layout(16, expert=8), {"whole": 120}, "no multiple of micro batch 1 x 16 data-parallel replicas"),
        (Layout(16, expert=8), {"whole": 120}, "train.global_batch_size=112 or 128"),
        (Layout(8), {"whole": 4}, "train.global_batch_size=8"),
        (Layout(8, sequence_parallel=True), {}, "tensor parallelism leaves whole"),
        (Layout(8, context=2), {"pack_size": 4098}, "a multiple of 4"),
        (Layout(8, virtual=2), {}, "a rank can't have 2 of 1 pipeline stage(s)"),
        (Layout(8, pipeline=2, virtual=-2), {}, "a rank can't have -2 of 2 pipeline stage(s)"),
    ],
)
def test_one_broken_rule(layout, train, message):
    found = told(layout, **train)
    assert len(found) == 1 and message in found[0], found


def test_packs_takes_one_pack_at_a_time():
    assert [p.fix for p in batch_problems(Layout(1), config(micro=2), packs=True)] == ["train.micro_batch_size=1"]
