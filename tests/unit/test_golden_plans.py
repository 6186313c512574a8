"""Whole plans, as people see them, compared in full. Refreshed only by `pytest --update-golden`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemotron_recipes import lifecycle
from nemotron_recipes.cli import plan_text
from nemotron_recipes.planning import plan as planning
from nemotron_recipes.rundir import TRACKER
from nemotron_recipes.spec import Code, Request

GOLDEN = Path(__file__).parents[1] / "golden"
ENV = (
    '[desk]\nexecutor = "local"\nnproc_per_node = 2\nenv = {GREETING = "hello $(world)"}\nsecrets = ["PLANTED_TOKEN"]\n'
    '[h100]\ntime = "04:00:00"\nexecutor = "slurm"\naccount = "lab"\n'
    'nodes = 2\nnproc_per_node = 8\ngpus_per_node = 8\ngpu = "H100"\n'
    '[gb200]\ntime = "04:00:00"\nexecutor = "slurm"\naccount = "lab"\n'
    'nodes = 4\nnproc_per_node = 4\ngpus_per_node = 4\ngpu = "GB200"\n'
)

CASES = {
    "pipe-tiny": Request("nano3", ("pipe",), "tiny"),
    "pipe-tiny-desk": Request(
        "nano3",
        ("pipe",),
        "tiny",
        mode="batch",
        profile="desk",
        overrides=("sft.optimizer.lr=1e-5", "rl.peft={dim: 4}", "run.nproc_per_node=1"),
    ),
    "data-prep-sft-own-rows": Request(
        "nano3",
        ("data", "prep", "sft"),
        "default",
        overrides=("data.sources=[{path: 'my chats.jsonl'}]", "data.pack_size=512"),
        offline=True,
    ),
    "nano3-sft-2x8-h100": Request(
        "nano3",
        ("sft",),
        mode="batch",
        profile="h100",
        overrides=("data.path=packs", "checkpoint.pretrained_checkpoint=base"),
        offline=True,
    ),
    "nano3-rl-nemo-gym-32x8-h100": Request(
        "nano3",
        ("rl",),
        "nemo-gym",
        mode="batch",
        profile="h100",
        overrides=("data.path=packs", "model.path=ORG/NAME", "run.nodes=32"),
        offline=True,
    ),
    "ultra3-lora-4x4-gb200": Request("ultra3", ("lora",), "gb200", mode="batch", profile="gb200", offline=True),
}


@pytest.mark.parametrize("name", CASES)
def test_golden_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    code = Code("sha256:" + "0" * 64, "0.0.0", "c0ffee" + "0" * 34, uncommitted=("nemotron_recipes/spec.py",))
    monkeypatch.setattr(planning, "describe_code", lambda: code)
    monkeypatch.setattr(planning.secrets, "token_hex", lambda size: "1d" * size)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PLANTED_TOKEN", "s3cr3t-value")
    (tmp_path / "env.toml").write_text(ENV)
    (tmp_path / "my chats.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "base" / "iter_0000000").mkdir(parents=True)
    (tmp_path / "base" / TRACKER).write_text("0")
    (tmp_path / "packs").mkdir()
    request = CASES[name]
    prepared = lifecycle.prepare(Request(**{**request.__dict__, "cwd": str(tmp_path)}))
    text = plan_text.describe(prepared) + "\n"
    text = text.replace(str(tmp_path), "/project").replace(sys.executable, "python")
    assert "s3cr3t" not in text
    file = GOLDEN / f"{name}.txt"
    if pytestconfig.getoption("--update-golden"):
        file.write_text(text)
    assert file.exists(), f"{file} is missing: make it with pytest --update-golden"
    assert text == file.read_text(), "the plan changed; if that is meant: pytest --update-golden, and read the diff"
