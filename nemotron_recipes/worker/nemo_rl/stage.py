"""One NeMo-RL stage from its inputs to its output: rank 0 starts NeMo-RL's own program on a Ray cluster of all nodes.

NeMo-RL saves on its own time alone: `checkpoint_must_save_by` follows from the job's deadline (launch.py), and a signal
ends it at once, so that what came after the newest checkpoint is done again by the next attempt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from nemotron_recipes.data.layouts import write_rows
from nemotron_recipes.errors import JobFailed, Problem, UserError
from nemotron_recipes.rundir import TRACKER
from nemotron_recipes.spec import Tree
from nemotron_recipes.worker.context import Context
from nemotron_recipes.worker.deadline import deadline_from, last_save_seconds
from nemotron_recipes.worker.event_files import VALIDATION, EventMetrics
from nemotron_recipes.worker.guest import LEAST_RESERVE, SAVES, CheckpointWatch, link_tree, step_of
from nemotron_recipes.worker.hub import folder_of
from nemotron_recipes.worker.nemo_rl import cluster
from nemotron_recipes.worker.nemo_rl.checkpoints import adopt, continue_from
from nemotron_recipes.worker.sealing import Sealing, given_checkpoint, own_newest, require_unchanged

FILE = "nemo_rl.yaml"  # in the stage's folder: the Plan's values, with what is known only here
TIME_IS_UP = "nemo_rl-time-is-up"  # beside it: launch.py's word that the time limit ended the program
LAUNCHER = Path(__file__).with_name("launch.py")
SPLITS = ("train", "validation")
_TAGS = {"timing/train/total_step_time": "seconds_per_step", "performance/tokens_per_sec": "tokens_per_second"}
GRACE = 30.0  # seconds from a wish to stop to the end by force


def run(config: Tree, context: Context) -> None:
    """Train with NeMo-RL, and keep the last checkpoint as the output."""
    if not context.is_main:
        if context.local_rank == 0:
            cluster.join(context, config["ray"])
        return
    root, source = context.dir.checkpoints, source_folder()
    root.mkdir(parents=True, exist_ok=True)
    own, named = adopt(root) or own_newest(root), config["resume_from"]
    given = given_checkpoint(named) if named and own is None else None
    if (resume := own or given) is not None:
        require_unchanged(context, resume, alone=True)
    continue_from(given, root)
    began = adopt(root)
    deadline = deadline_from(os.environ)
    save = last_save_seconds(context.dir, context.attempt)
    stop_at = None if deadline is None else deadline - max(LEAST_RESERVE, SAVES * save)
    values = complete(config, context, source)
    written = time.time()
    left = None if stop_at is None else duration(max(0.0, stop_at - written))
    values.setdefault("checkpointing", {})["checkpoint_must_save_by"] = left  # null: the example may have its own
    file, mark = context.dir.path / FILE, context.dir.path / TIME_IS_UP
    mark.unlink(missing_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    context.event("ready", resume_from=str(began) if began else None)
    # Its programs put them below logger.log_dir into exp_NNN/tensorboard, a new number each time (utils/logger.py).
    events = Path(values["logger"]["log_dir"])
    metrics = EventMetrics(context, events, metric_of, step_of(began) if began else 0, config["train_iters"])

    def look() -> None:
        adopt(root)
        metrics.look()

    with Sealing(context) as sealing:
        with metrics, CheckpointWatch(context, look, sealing.saw), cluster.head(context, config["ray"]) as ray:
            program = [config["script"], "--config", str(file)]
            argv = [sys.executable, str(LAUNCHER), repr(written), str(mark), *program]
            with tempfile.TemporaryDirectory(prefix="nemotron-wandb-") as staging:  # the sources that it would upload
                code = _train(argv, source, ray, context, {"WANDB_DATA_DIR": staging} if context.wandb else {})
        _conclude(code, mark.exists(), adopt(root), config, context)


def _conclude(code: int, marked: bool, newest: Path | None, config: Tree, context: Context) -> None:
    """JobFailed: it ended before its last step, with nobody's wish and no limit. marked: it said that time was up."""
    reached = step_of(newest) if newest else 0
    if reached < config["train_iters"] and not context.stop_seen:
        if code == 0 and marked:
            context.stop_seen = context.time_is_up = True
            context.event("stopped", step=reached, reason="time-limit")
        elif code != 0 or newest is None or config["passes"] is None:
            raise JobFailed(
                f"NeMo-RL ended with {code} after step {reached} of {config['train_iters']}; its log says more"
            )
    if not context.stop_seen:
        assert newest is not None
        output = context.output("checkpoint")
        link_tree(newest, output / newest.name)
        (output / TRACKER).write_text(f"{reached}\n")
        context.results["step"] = reached
        context.metadata["format"] = "nemo_rl"


def metric_of(tag: str) -> str | None:
    """What a tag of NeMo-RL's TensorBoard files (PREFIX/NAME, nemo_rl/algorithms/dpo.py and grpo.py) is called here.

    Those of other prefixes are left out: times of parts of a step, and figures that count no steps (`ray/`).
    """
    prefix, _, name = tag.partition("/")
    if prefix == "train":
        return name
    if prefix == "validation" or prefix.startswith("validation-"):  # DPO names its data set, and there is one
        return f"{VALIDATION}{name}"
    return _TAGS.get(tag)


def complete(config: Tree, context: Context, source: Path) -> Tree:
    """The Plan's values, begun from NeMo-RL's example, with the folders of this machine."""
    values: Tree = yaml.safe_load(Path(config["config"]).read_text(encoding="utf-8"))
    base = source / config["base"]
    if not base.is_file():
        raise UserError(Problem(f"this NeMo-RL has no {config['base']}", "backend.native.base", "use another image"))
    model = folder_of(context, "model.path")
    tokenizer = folder_of(context, "model.tokenizer") if "model.tokenizer" in context.artifacts else model
    policy = values.setdefault("policy", {})
    policy["model_name"] = str(model)
    policy.setdefault("tokenizer", {})["name"] = str(tokenizer)
    data = data_folder(config, context)
    name = {"dpo": "PreferenceDataset", "grpo": "NemoGymDataset" if config["gym"] else "ResponseDataset"}
    for split in SPLITS:
        own = {"data_path": str(data / f"{split}.jsonl"), "dataset_name": name[config["method"]], "split": None}
        values.setdefault("data", {})[split] = own
    if context.wandb:
        values.setdefault("logger", {}).update(wandb_enabled=True, wandb=context.wandb.nemo_rl())
    if config["method"] == "grpo" and not config["gym"]:
        values["data"]["train"]["split_validation_size"] = 0  # the example takes its validation rows from these
    return {"defaults": str(base), **values}


def data_folder(config: Tree, context: Context) -> Path:
    """A folder with train.jsonl and validation.jsonl in NeMo-RL's layout: data prep's rows are brought into it."""
    given = folder_of(context, "data.path")
    if not (given / "metadata.json").is_file():
        missing = [f"{split}.jsonl" for split in SPLITS if not (given / f"{split}.jsonl").is_file()]
        if missing:
            fix = "data prep's output, or a folder with train.jsonl and validation.jsonl in NeMo-RL's layout"
            raise UserError(Problem(f"{given} holds no {' and no '.join(missing)}", "data.path", fix))
        _require_rows({split: given / f"{split}.jsonl" for split in SPLITS})
        return given
    if config["gym"]:
        fix = "a folder with train.jsonl and validation.jsonl in NeMo-Gym's layout"
        raise UserError(
            Problem("NeMo-Gym's environments need rows of their own kind, not data prep's", "data.path", fix)
        )
    method = json.loads((given / "metadata.json").read_text(encoding="utf-8")).get("method")
    wanted = {"dpo": "dpo", "grpo": "rl"}[config["method"]]
    if method != wanted:
        raise UserError(Problem(f"{given} was prepared for {method}, not for {wanted}", "data.path", "prepare it anew"))
    _require_rows({split: given / split / "rows.jsonl" for split in SPLITS})
    converted = context.dir.path / "data"
    converted.mkdir(exist_ok=True)
    for split in SPLITS:
        write_rows(given / split / "rows.jsonl", converted / f"{split}.jsonl", wanted, "nemo_rl")
    return converted


def _require_rows(files: dict[str, Path]) -> None:
    """UserError: a split is empty, on which NeMo-RL would end with a traceback when Ray has started."""
    empty = [f"the {split} split is empty: {file}" for split, file in files.items() if not _has_rows(file)]
    if empty:
        raise UserError(
            *(Problem(what, "data.path", "prepare data with rows for training and validation") for what in empty)
        )


def _has_rows(file: Path) -> bool:
    with file.open(encoding="utf-8") as lines:
        return any(line.strip() for line in lines)


def source_folder() -> Path:
    """NeMo-RL's folder, with its package and its examples. UserError: they are not here."""
    spec = importlib.util.find_spec("nemo_rl")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'nemo_rl'", name="nemo_rl")
    folder = Path(next(iter(spec.submodule_search_locations))).parent
    if not (folder / "examples").is_dir():
        raise UserError(Problem(f"there are no examples of NeMo-RL beside its package: {folder}", fix="use its image"))
    return folder


def duration(seconds: float) -> str:
    """DD:HH:MM:SS, as checkpoint_must_save_by is written."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours // 24:02d}:{hours % 24:02d}:{minute:02d}:{second:02d}"


def _train(argv: list[str], source: Path, ray: cluster.Head, context: Context, env: dict[str, str]) -> int:
    """NeMo-RL's program until it ends; a wish to stop ends it, for it has no way to save at once.

    JobFailed: Ray's head has ended, without which the program would wait for minutes.
    """
    process: subprocess.Popen[Any] = subprocess.Popen(
        argv, cwd=source, env={**cluster.environment(os.environ, ray.address), **env}, start_new_session=True
    )
    asked: float | None = None
    try:
        while True:
            try:
                return process.wait(timeout=cluster.POLL)
            except subprocess.TimeoutExpired:
                if not context.stop_requested():
                    ray.require()
                    continue
            if asked is None:
                asked = time.monotonic()
                os.killpg(process.pid, signal.SIGTERM)
            elif time.monotonic() - asked > GRACE:
                os.killpg(process.pid, signal.SIGKILL)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
