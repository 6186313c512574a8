"""The quick way (fast rendering, another engine) gives what the reference gives, or is not taken."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_recipes.data import fast_render
from nemotron_recipes.data.chat import ChatEncoder
from nemotron_recipes.data.encoder import Encoded, Encoder
from nemotron_recipes.data.messages import BadRow
from nemotron_recipes.data.rows import Row
from nemotron_recipes.data.template import Rendered
from nemotron_recipes.errors import UserError
from tests.helpers.data_jobs import job, run, varied
from tests.helpers.data_prep import TEMPLATE, bytes_of, encoder, merging_folder, write_rows
from tests.unit.test_data_encoder import conversations, hostile_text, text

ENGINES = ("tokenizers", "fastokens")


@cache
def with_engine(name: str) -> Encoder:
    return Encoder(merging_folder(), TEMPLATE, name)


TALKS = st.lists(conversations(st.one_of(hostile_text, text)), min_size=1, max_size=3)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=50, deadline=None)
@given(talks=TALKS, prompt=st.booleans())
def test_the_quick_way_is_the_references(engine: str, talks: list[list[dict[str, Any]]], prompt: bool) -> None:
    quick_and_reference(engine, talks, prompt)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=2000, deadline=None)
@given(talks=TALKS, prompt=st.booleans())
def test_the_quick_way_is_the_references_thousands_of_times(
    engine: str, talks: list[list[dict[str, Any]]], prompt: bool
) -> None:
    quick_and_reference(engine, talks, prompt)


def quick_and_reference(engine: str, talks: list[list[dict[str, Any]]], prompt: bool) -> None:
    one = with_engine(engine)
    assert one.engine.name == engine
    assert one.fast_render is not None
    rows = [Row(messages=messages) for messages in talks]
    quick, reference = ChatEncoder(one, prompt), ChatEncoder(one, prompt, quick=False)
    for ours, theirs in zip(quick.conversations(rows), reference.conversations(rows), strict=True):
        assert isinstance(ours, BadRow) == isinstance(theirs, BadRow)
        for a, b in zip(ours, theirs, strict=True) if not isinstance(ours, BadRow) else ():  # type: ignore[arg-type]
            assert isinstance(a, Encoded)
            assert a.ids.tolist() == b.ids.tolist()
            assert a.mask.tolist() == b.mask.tolist()
            assert a.blocks == b.blocks
    for ours, theirs in zip(quick.prompts(rows), reference.prompts(rows), strict=True):
        assert isinstance(ours, BadRow) or ours.tolist() == theirs.tolist()


def test_the_quick_way_is_taken() -> None:
    one = encoder("merging")
    assert one.fast_render is not None
    plain = one.fast_render([{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}], [], False, True)
    assert isinstance(plain, Rendered)
    assert isinstance(one.encode([plain])[0], Encoded)


@pytest.mark.parametrize("fault", ["text", "mask"])
def test_one_differing_row_hands_the_shard_to_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(60))
    run(job(file), tmp_path / "right")
    render = fast_render._Nemotron3.render

    def wrong(self: Any, *args: Any) -> Rendered | None:
        found = render(self, *args)
        if found is None:
            return None
        if fault == "text":
            return found._replace(text=found.text.replace("What", "Who"))
        return found._replace(generated=tuple((start + 1, end) for start, end in found.generated))

    monkeypatch.setattr(fast_render._Nemotron3, "render", wrong)
    report = run(job(file), tmp_path / "wrong")
    assert "the reference" in report.warnings[0]
    assert bytes_of(tmp_path / "wrong") == bytes_of(tmp_path / "right")


@pytest.mark.parametrize("about", ["all text", "special tokens that don't act"])
def test_engines_that_disagree_are_refused(monkeypatch: pytest.MonkeyPatch, about: str) -> None:
    from nemotron_recipes.data.engine import Fastokens

    right = Fastokens.encode

    def wrong(self: Any, texts: Any, plain: bool = False) -> tuple[np.ndarray, np.ndarray]:
        if about == "all text":
            return np.zeros(len(texts), dtype=np.int32), np.arange(len(texts) + 1)
        return right(self, texts, False)

    monkeypatch.setattr(Fastokens, "encode", wrong)
    with pytest.raises(UserError, match="gives other ids for this tokenizer than the reference"):
        Encoder(merging_folder(), TEMPLATE, "fastokens")


ONE_THREAD = """
import os, sys
from pathlib import Path
import orjson
from nemotron_recipes.data.engine import Fastokens
path = Path(sys.argv[1])
engine = Fastokens(orjson.loads(path.read_bytes()), path)
engine.encode([f"some words, {n} of many" for n in range(2000)])
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_fast_engine_keeps_to_one_thread() -> None:
    """Others would keep caches of their own, and memory would grow with the data."""
    words = [sys.executable, "-c", ONE_THREAD, str(merging_folder() / "tokenizer.json")]
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "FASTOKENS_BPE_THREADS"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "1\n", done.stderr
