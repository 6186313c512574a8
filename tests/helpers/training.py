"""Small prepared data, worker files of the trl backend, and starts of the real worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.backends.trl import TrlBackend
from nemotron_recipes.config.schema import TrainConfig
from nemotron_recipes.data.job import Job
from nemotron_recipes.data.metadata import write_metadata
from nemotron_recipes.data.prepare import prepare
from nemotron_recipes.data.settings import Settings, Source
from nemotron_recipes.data.template import template_source
from nemotron_recipes.rundir import ATTEMPT_ENV, StageDir, read_jsonl
from nemotron_recipes.spec import Artifact, Output, StageSpec
from nemotron_recipes.tiny.tokenizer import write_tokenizer
from nemotron_recipes.worker.context import Context

ROOT = Path(__file__).parent.parent.parent
ARCH = yaml.safe_load((ROOT / "conf" / "model" / "tiny.yaml").read_text(encoding="utf-8"))["arch"]
SAMPLE = "sample:largest_of_three"


def prepared(folder: Path, method: str, train: int = 96, held_out: int = 16, pack_size: int = 64) -> Path:
    """Data of the sample task for a data prep method, as the stage makes it."""
    folder.mkdir(parents=True)
    splits = (("train", train), ("validation", held_out), ("test", held_out))
    sources = [Source(SAMPLE, split=split, rows=rows, seed=3) for split, rows in splits]  # type: ignore[arg-type]
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    write_tokenizer(tokenizer)
    settings = Settings(sources=sources, tokenizer="tiny", pack_size=pack_size, thinking=False)
    job = Job(method, settings, (None,) * len(sources), tokenizer, template_source("nemotron3"))
    write_metadata(job, prepare(job, folder), folder)
    return folder


def worker_file(
    stage: Path, data: Path, method: str = "sft", nproc: int = 1, model: Path | None = None, **sections: Any
) -> Path:
    """Write the worker file that the backend makes of a tiny config; `sections` change it."""
    tree: dict[str, Any] = {
        "kind": "train",
        "method": method,
        "model": {"path": str(model) if model else "tiny", "dtype": "float32", "arch": {} if model else ARCH},
        "data": {"path": str(data)},
        "train": {"train_iters": 4, "global_batch_size": 8, "micro_batch_size": 8},
        "optimizer": {"lr": 5e-3},
        "evaluation": {"rows": 16, "max_new_tokens": 4},
        "backend": {"name": "trl", "native": {"gradient_checkpointing": False}},
        "outputs": {"model": "made"},
    }
    if method == "grpo":
        tree["grpo"] = {"max_completion_length": 4}
    elif method != "sft":
        tree[method] = {}
    for name, section in sections.items():
        tree[name] = {**(tree.get(name) or {}), **section} if isinstance(section, dict) else section
    config = TrainConfig.model_validate(tree).model_dump()
    assert TrlBackend().check(config, nproc) == []
    inputs = {
        "model.path": Artifact("path", "model", uri=str(model)) if model else Artifact("builtin", "model", "tiny"),
        "data.path": Artifact("path", "data", uri=str(data)),
    }
    run = {"id": "run", "stage": stage.name, "dir": str(stage), "store": str(stage.parent / "store")}
    run["fingerprint"] = f"fingerprint-of-{stage.name}"
    launch = TrlBackend().describe(StageSpec(config, inputs, (Output("model", "made", "model"),), run, nproc))
    path = StageDir(stage).files / "train.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(launch.files["train.yaml"], encoding="utf-8")
    return path


def context_for(path: Path) -> tuple[dict[str, Any], Context]:
    """The worker's own config and the context of a single rank, for a run inside the test's process."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    artifacts = {key: Artifact(**value) for key, value in tree["inputs"].items()}
    context = Context(
        rank=0,
        world_size=1,
        local_rank=0,
        attempt=1,
        dir=StageDir(Path(tree["run"]["dir"])),
        run=tree["run"],
        store=Store(Path(tree["run"]["store"])),
        declared={output["slot"]: Output(**output) for output in tree["outputs"]},
        inputs={key: Path(artifact.uri) for key, artifact in artifacts.items() if artifact.source == "path"},
        artifacts=artifacts,
    )
    own = {key: value for key, value in tree.items() if key not in ("worker", "run", "inputs", "outputs")}
    return own, context


def start(path: Path, nproc: int = 1, attempt: int = 1) -> subprocess.Popen[str]:
    """The real worker in processes of its own; under torchrun where there are several."""
    command = [sys.executable, "-m"]
    if nproc > 1:
        command += [
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={nproc}",
            "-m",
        ]
    command += ["nemotron_recipes.worker", "--config", str(path)]
    environment = {**os.environ, ATTEMPT_ENV: str(attempt), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 180) -> int:
    """Wait for the end; what the process printed goes to the test's output."""
    printed, _ = process.communicate(timeout=timeout)
    print(printed)
    return process.returncode


def losses(stage: Path) -> list[float]:
    """Training losses by step, each step exactly once."""
    lines = [line for line in read_jsonl(StageDir(stage).metrics) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def events(stage: Path, attempt: int = 1, rank: int = 0) -> list[dict[str, Any]]:
    return list(read_jsonl(StageDir(stage).events(attempt, rank)))
