"""The worker's config file and its place among the ranks, read and checked before anything else happens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.rundir import ATTEMPT_ENV, StageDir, read_json
from nemotron_recipes.spec import Artifact, Output, Tree

REGISTRY = {  # worker -> (module with `run(config, context)`, the extra that installs what it imports or "": an image)
    "data_prep": ("nemotron_recipes.worker.data_prep", "data"),
    "trl": ("nemotron_recipes.worker.trl", "trl"),
    "megatron_bridge": ("nemotron_recipes.worker.megatron_bridge", ""),
    "megatron_convert": ("nemotron_recipes.worker.megatron_convert", ""),
    "nemo_rl": ("nemotron_recipes.worker.nemo_rl", ""),
    "nemo_rl_convert": ("nemotron_recipes.worker.nemo_rl_convert", ""),
    "automodel": ("nemotron_recipes.worker.automodel", ""),
}
RUN_KEYS = ("id", "stage", "dir", "store", "fingerprint")


@dataclass(frozen=True)
class WorkerFile:
    """A checked worker file. `config` is what belongs to the worker module."""

    path: Path
    worker: str
    run: dict[str, str]
    inputs: dict[str, Artifact]
    outputs: dict[str, Output]
    config: Tree

    @property
    def dir(self) -> StageDir:
        return StageDir(Path(self.run["dir"]))


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as torchrun tells it."""

    rank: int
    world_size: int
    local_rank: int


def load_worker_file(path: Path) -> WorkerFile:
    """Read and check a worker file (docs/contracts.md). Raises UserError with everything that is wrong."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem(f"can't read the worker file: {error}", str(path))) from None
    except yaml.YAMLError as error:
        raise UserError(Problem(f"the worker file isn't YAML: {error}", str(path))) from None
    problems = list(_problems(tree))
    if problems:
        raise UserError(*(Problem(what, str(path), fix) for what, fix in problems))
    own = {"worker", "run", "inputs", "outputs"}
    return WorkerFile(
        path=path,
        worker=tree["worker"],
        run={**tree["run"], "dir": os.path.abspath(tree["run"]["dir"]), "store": os.path.abspath(tree["run"]["store"])},
        inputs={key: Artifact.from_tree(value) for key, value in (tree.get("inputs") or {}).items()},
        outputs={value["slot"]: Output(**value) for value in tree.get("outputs") or []},
        config={key: value for key, value in tree.items() if key not in own},
    )


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """RANK, WORLD_SIZE and LOCAL_RANK; a process alone is rank 0 of 1."""
    values = [_number(environment, name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))]
    ranks = Ranks(values[0], values[1], _number(environment, "LOCAL_RANK", 0))
    if ranks.rank >= ranks.world_size:
        raise UserError(Problem(f"RANK {ranks.rank} of WORLD_SIZE {ranks.world_size} can't be", "environment"))
    return ranks


def attempt_from(environment: Mapping[str, str], stage: StageDir) -> int:
    """$NEMOTRON_ATTEMPT; a start by hand counts on from the recorded attempt."""
    record = read_json(stage.record)
    if environment.get(ATTEMPT_ENV):
        attempt = _number(environment, ATTEMPT_ENV, 1)
        if record and record["attempt"] == attempt and record["state"] == "succeeded":
            fix = f"set {ATTEMPT_ENV}={attempt + 1} to run it once more"
            raise UserError(Problem(f"attempt {attempt} of this stage has already succeeded", str(stage.record), fix))
        return attempt
    return record["attempt"] + 1 if record else 1


def _problems(tree: Any) -> Iterator[tuple[str, str]]:
    """(what, fix) for everything that is wrong with a worker file."""
    if not isinstance(tree, dict):
        yield "the worker file isn't a mapping", "start from the file that `--dry-run` shows"
        return
    worker = tree.get("worker")
    if "worker" not in tree:
        yield "'worker' is missing", f"one of {', '.join(REGISTRY)}"
    elif worker not in REGISTRY:
        yield f"worker: '{worker}' is unknown", nearest(str(worker), REGISTRY)
    run = tree.get("run")
    if not isinstance(run, dict):
        yield "'run' is missing or isn't a mapping", f"run: needs {', '.join(RUN_KEYS)}"
    else:
        for key in RUN_KEYS:
            if not isinstance(run.get(key), str) or not run[key]:
                yield f"run.{key} is missing or isn't text", ""
        for key in run.keys() - set(RUN_KEYS):
            yield f"run.{key} is unknown", nearest(str(key), RUN_KEYS)
    yield from _input_problems(tree.get("inputs") or {})
    yield from _output_problems(tree.get("outputs") or [])


def _input_problems(inputs: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(inputs, dict):
        yield "'inputs' isn't a mapping", "config key -> artifact"
        return
    for key, value in inputs.items():
        try:
            artifact = Artifact.from_tree(value)
        except (TypeError, AttributeError) as error:
            yield f"inputs.{key} isn't an artifact: {error}", f"fields: {', '.join(Artifact.__dataclass_fields__)}"
            continue
        if artifact.source not in ("store", "path", "remote", "hub", "wandb", "builtin", "pending"):
            yield f"inputs.{key}.source: '{artifact.source}' is unknown", ""
        elif artifact.source == "pending" and artifact.producer is None:
            yield f"inputs.{key} is pending but names no producer", ""
        elif artifact.source == "store" and not (artifact.name and isinstance(artifact.version, int)):
            yield f"inputs.{key} needs a name and a version", ""
        elif artifact.source in ("path", "remote") and not artifact.uri:
            yield f"inputs.{key} needs a uri", ""


def _output_problems(outputs: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(outputs, list):
        yield "'outputs' isn't a list", "a list of {slot, name, kind}"
        return
    for number, value in enumerate(outputs):
        if not isinstance(value, dict) or sorted(value) != ["kind", "name", "slot"]:
            yield f"outputs[{number}] isn't an output", "it needs just slot, name and kind"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(Problem(f"{name}='{text}' isn't a whole number", "environment"))
    return int(text)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two corrections: `1e-5` is a number (as in JSON), and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} isn't text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)
