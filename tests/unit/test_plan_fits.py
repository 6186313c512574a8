"""Plans that know whether they fit: refused with the smallest that would, listed, and against the disk's room."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.cli import main as cli
from nemotron_recipes.config.catalog import Catalog, package_root
from nemotron_recipes.config.profiles import Environment
from nemotron_recipes.errors import UserError
from nemotron_recipes.lifecycle import submitting
from nemotron_recipes.planning import disk
from nemotron_recipes.planning.layouts import layouts
from nemotron_recipes.planning.plan import make_plan
from nemotron_recipes.rundir import TRACKER
from nemotron_recipes.spec import Request

CATALOG = Catalog((package_root(),))
GOLDEN = Path(__file__).parents[1] / "golden"
NANO = ("data.path=packs", "checkpoint.pretrained_checkpoint=base")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "packs").mkdir()
    (tmp_path / "base" / "iter_0000000").mkdir(parents=True)
    (tmp_path / "base" / TRACKER).write_text("0")
    return tmp_path


def planned(place: Path, family: str, words: tuple[str, ...], config: str, *overrides: str, **profile: Any) -> Any:
    profile = {"executor": "slurm", "nodes": 1, "nproc_per_node": 8, "gpu": "H100", **profile}
    environment = Environment(place, profiles={"there": profile})
    request = Request(family, words, config, "batch", "there", overrides, offline=True, cwd=str(place))
    return make_plan(request, CATALOG, environment).stages[0]


def refused(*args: Any, **profile: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        planned(*args, **profile)
    return [f"{problem.what} | {problem.fix}" for problem in caught.value.problems]


def test_what_fits_says_how(place: Path) -> None:
    stage = planned(place, "nano3", ("sft",), "default", *NANO, nodes=2)
    memory = stage.estimate["memory"]
    assert (memory["verdict"], memory["capacity"]) == ("fits", 80 << 30)
    assert memory["needed"] == pytest.approx(sum(memory["parts"].values()), abs=5)
    assert sorted(memory["parts"]) == ["activations", "buffers", "gradients", "logits", "optimizer", "weights"]
    assert stage.estimate["disk"]["checkpoint"] == 14 * stage.estimate["model"]["total"]
    assert stage.estimate["disk"]["kept"] == 3 * stage.estimate["disk"]["checkpoint"]
    unknown = planned(place, "nano3", ("sft",), "default", *NANO, nodes=2, gpu=None)
    assert unknown.estimate["memory"] == {**memory, "verdict": None, "capacity": None}
    small = planned(place, "nano3", ("sft",), "default", *NANO, nodes=2, gpu=None, gpu_memory_gib=62.0)
    assert small.estimate["memory"]["verdict"] == "tight"


def test_what_cannot_fit_is_refused_with_the_smallest_that_would(place: Path) -> None:
    four = "parallel.expert_model_parallel_size=4"
    (said,) = refused(place, "nano3", ("sft",), "default", *NANO, four)
    assert said.startswith("nano3 on 8 GPU(s) takes at least 101.4 GiB of the fullest one, which has 80 | ")
    smallest = "parallel.tensor_model_parallel_size=4 parallel.expert_model_parallel_size=8"
    assert f"the smallest that would: {smallest}" in said
    assert "plan.allow_oom_risk=true runs it as it is" in said
    named = [word for word in said.split() if word.startswith("parallel.")]
    stage = planned(place, "nano3", ("sft",), "default", *NANO, *named)
    assert stage.estimate["memory"]["verdict"] == "fits", "what is named does fit"
    risky = planned(place, "nano3", ("sft",), "default", *NANO, four, "plan.allow_oom_risk=true")
    assert risky.estimate["memory"]["verdict"] == "impossible"
    (said,) = refused(place, "nano3", ("sft",), "default", *NANO, gpu=None, gpu_memory_gib=40.0)
    assert "the smallest that would: run.nodes=2 " in said, "where no layout of one node would do"
    whole = "parallel=null"  # is no way out: the layout of Megatron-Bridge's recipe would be another one
    (said,) = refused(place, "nano3", ("sft",), "default", *NANO, whole)
    assert "takes at least 224.1 GiB" in said and "parallel.expert_model_parallel_size=8" in said
    (said,) = refused(place, "nano3", ("sft",), "trl", NANO[0])
    assert "no layout that was tried would do: train adapters (peft)" in said
    one = ("parallel.expert_model_parallel_size=1",)
    (said,) = refused(place, "nano3", ("sft",), "lora", *NANO, *one, nproc_per_node=1, gpu=None, gpu_memory_gib=30.0)
    assert "the smallest that would: run.nproc_per_node=4 " in said and "expert_model_parallel_size=4 " in said


def test_figures_that_nobody_has_checked_refuse_nothing(place: Path) -> None:
    stage = planned(place, "ultra3", ("lora",), "h100", nodes=4, gpu=None, gpu_memory_gib=1.0)
    assert stage.estimate["memory"]["verdict"] == "impossible"
    assert "vocab" in stage.estimate["model"]["unverified"]


def test_rules_of_model_and_processes_are_told_together(place: Path) -> None:
    sizes = ("parallel.tensor_model_parallel_size=16", "parallel.expert_model_parallel_size=3")
    said = refused(place, "nano3", ("sft",), "default", *NANO, *sizes, gpu="H10")
    assert [line.partition(" | ")[0].partition(" (")[0] for line in said] == [
        "8 process(es) can't be split into replicas of 16",
        "8 process(es) can't be split into groups of 3 for the experts",
        "the memory of a GPU 'H10' is not known",
        "8 Mamba groups of nano3 can't be split by 16",
        "128 experts of nano3 can't be shared out over 3 ranks",
    ]
    assert "did you mean 'H100'?" in " ".join(said)


def test_layouts_of_the_issue(place: Path, pytestconfig: pytest.Config, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "layouts", "nano3", "sft", "run.nodes=4", "run.gpu=H100"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    file = GOLDEN / "layouts-nano3-sft-4x8-h100.txt"
    if pytestconfig.getoption("--update-golden"):
        file.write_text(text)
    assert text == file.read_text(), "the list changed; if that is meant: pytest --update-golden, and read the diff"
    with pytest.raises(SystemExit):
        cli.main(["plan", "layouts", "nano3", "sft", "run.nodes=4", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["nodes"], told["nproc_per_node"]) == ("nano3", 4, 8)
    needed = [row["needed"] for row in told["layouts"]]
    assert needed == sorted(needed) and told["layouts"][0]["verdict"] is None, "how large a GPU is nobody has said"


def test_every_layout_in_the_list_can_be_planned(place: Path) -> None:
    overrides = (*NANO, "run.nodes=2", "run.gpu=H100")
    found = layouts(Request("nano3", ("sft",), overrides=overrides, cwd=str(place)), CATALOG, Environment(place))
    fits = [one for one in found.found if one.verdict == "fits"]
    assert len(fits) > 10 and found.found[: len(fits)] == fits, "what fits comes first"
    for one in (fits[0], fits[-1]):
        stage = planned(place, "nano3", ("sft",), "default", *NANO, *one.overrides, nodes=2)
        assert stage.estimate["memory"]["needed"] == round(one.memory.needed)


@pytest.mark.parametrize(
    ("family", "words", "config", "overrides", "said"),
    [
        (
            "your-model",
            ("lora",),
            "default",
            ("model.path=ORG/NAME",),
            "the shape of hf://ORG/NAME@UNPINNED is not known",
        ),
        ("nano3", ("sft",), "default", ("run.nodes=none",), "run.nodes should be a whole number above 0"),
        (
            "nano3",
            ("sft",),
            "default",
            ("run.nproc_per_node=5",),
            "no layout of nano3 on 1 x 5 GPUs keeps every rule",
        ),
        ("nano3", ("data", "prep", "sft"), "default", (), "config sets no valid kind (data_prep)"),
    ],
)
def test_layouts_that_cannot_be_listed(
    place: Path, family: str, words: Any, config: str, overrides: Any, said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        layouts(Request(family, words, config, overrides=overrides, cwd=str(place)), CATALOG, Environment(place))


_VLLM = "policy.generation.vllm_cfg"
_SHARE, _TENSOR = f"{_VLLM}.gpu_memory_utilization", f"{_VLLM}.tensor_parallel_size"
NONSENSE = {  # native values that sizes are made of
    "share": ("nano3", ("rl",), "nemo-rl", (f"{_SHARE}=0",), "should be more than 0 and at most 1, not 0"),
    "no share": ("nano3", ("rl",), "nemo-rl", (f"{_SHARE}=null",), "should be float | int, not None"),
    "parts": ("nano3", ("rl",), "nemo-rl", (f"{_TENSOR}=0",), "should be a whole number above 0, not 0"),
    "word": ("nano3", ("rl",), "nemo-rl", (f"{_SHARE}=most",), "should be float | int, not 'most' (nemo_rl-0.7.0)"),
    "length": (
        "nano3",
        ("dpo",),
        "nemo-rl",
        ("policy.max_total_sequence_length=4k",),
        "should be int, not '4k'",
    ),
    "negative length": (
        "nano3",
        ("rl",),
        "nemo-rl",
        ("policy.max_total_sequence_length=-5",),
        "should be a whole number above 0, not -5",
    ),
    "pack": ("ultra3", ("lora",), "h100", ("packed_sequence.packed_sequence_size=2k",), "should be int, not '2k'"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_native_values_that_make_no_sense_are_told_once(place: Path, case: str) -> None:
    family, words, config, given, said = NONSENSE[case]
    model = ("model.path=nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "data.path=packs") if family == "nano3" else ()
    overrides = (*model, *(f"backend.native.{value}" for value in given))
    told = refused(place, family, words, config, *overrides, nproc_per_node=16)
    assert [said in problem for problem in told if "backend.native" in problem] == [True], told
    request = Request(family, words, config, overrides=(*overrides, "run.nodes=2"), cwd=str(place))
    with suppress(UserError):  # whether there are layouts is not asked here
        layouts(request, CATALOG, Environment(place))


def test_checkpoints_without_room_stop_a_submission(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "env.toml").write_text('[here]\nexecutor = "local"\nnproc_per_node = 8\n')
    request = Request("nano3", ("sft",), "lora", "run", "here", NANO, cwd=str(place), offline=True)
    prepared = lifecycle.prepare(request)
    kept = prepared.plan.stages[0].estimate["disk"]["kept"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(kept, 0, kept - 1))
    (problem,) = disk.disk_problems(prepared.plan)
    assert problem.what.startswith("sft: checkpoints take 37.1 GB (12.4 GB each), but 37.1 GB are free below ")
    assert "checkpoint.keep=1" in problem.fix
    with pytest.raises(UserError, match="checkpoints take"):
        submitting.refuse_unfit(prepared)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(kept, 0, kept))
    assert list(disk.disk_problems(prepared.plan)) == []
