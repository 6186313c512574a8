"""What every backend must do, whichever it is: parametrised over the registry, a later backend has to pass as well."""

import copy
import json

import pytest
import yaml

from nemotron_recipes.backends import REGISTRY, get_backend
from nemotron_recipes.config.schema import KINDS
from nemotron_recipes.spec import Artifact, Output, StageSpec

RUN = {"id": "run-1", "stage": "stage-1", "dir": "/runs/run-1/stage-1", "store": "/store", "fingerprint": "sha256:0"}
HOSTILE = (
    "a b",
    "it's",
    'say "x"',
    "$(touch /tmp/x)",
    "`id`",
    "line\nbreak",
    "größe",
    "日本",
    "a: b # c",
    "- x",
    "1e-5",
)
DATA_PREP = {
    "kind": "data_prep",
    "data": {"sources": [{"path": "rows.jsonl"}], "tokenizer": "tiny"},
    "outputs": {"data": "made"},
}
TRAIN = {
    "kind": "train",
    "model": {"path": "artifact:base"},
    "data": {"path": "artifact:rows"},
    "train": {"train_iters": 7, "global_batch_size": 16, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-5},
    "outputs": {"model": "made"},
}
CONVERT = {
    "kind": "convert",
    "model": {"path": "artifact:base"},
    "outputs": {"model": "made"},
}
CHECKPOINTS = {"import": {}, "export": {"path": "a"}, "merge": {"path": "a", "base": "b"}}
KIND_OF = {"data_prep": DATA_PREP, "train": TRAIN, "convert": CONVERT}

# What a backend needs beside that.
NEEDS = {
    "megatron_bridge": {
        "train": {"train_iters": 7, "global_batch_size": 16, "micro_batch_size": 1},
        "data": {"path": "artifact:rows", "pack_size": 64},
        "checkpoint": {"pretrained_checkpoint": "artifact:base"},
        "parallel": {},
        "peft": {"target_modules": ["linear_qkv"]},
        "evaluation": {"rows": 0},
        "backend": {"native": {"recipe": "nemotron_3_nano_sft_config"}},
    },
    "nemo_rl": {
        "parallel": {},
        "peft": {"target_modules": ["q_proj"]},
        "evaluation": {"rows": 0},
    },
    "automodel": {
        "data": {"path": "artifact:rows", "pack_size": 64},
        "parallel": {},
        "peft": {"target_modules": ["*_proj"]},
        "evaluation": {"rows": 0},
    },
}


def cases(kind=None):
    return [
        pytest.param(name, method, id=f"{name}-{method}")
        for name in REGISTRY
        if kind is None or kind in get_backend(name).kinds
        for method in sorted(get_backend(name).methods)
    ]


def config_for(name, method):
    """A complete, valid config, as the planner hands it over."""
    backend = get_backend(name)
    (kind,) = backend.kinds
    tree = copy.deepcopy(KIND_OF[kind]) | {"method": method}
    if kind == "convert":
        tree["checkpoint"], tree["backend"] = CHECKPOINTS[method], {"name": name}
    if (kind, method) == ("data_prep", "pretrain"):
        tree["data"] |= {"chat_template": None, "end_of_document": "</s>"}
    if kind == "train":
        tree |= copy.deepcopy(NEEDS.get(name, {}))
        tree["backend"] = {**tree.get("backend", {}), "name": name}
        if method == "pretrain":
            tree["peft"] = None
        if method in ("dpo", "kto", "grpo"):
            tree[method] = {"rewards": ["math"]} if (name, method) == ("nemo_rl", "grpo") else {}
    return KINDS[kind].model_validate(tree).model_dump()


def worker_tree(launch):
    """The worker file: the one that the arguments name."""
    return yaml.safe_load(launch.files[launch.args[1].rpartition("/")[2]])


def everything(launch):
    """All that the launch writes, file by file."""
    return {name: yaml.safe_load(text) for name, text in launch.files.items()}


def launch_for(name, method, config=None, inputs=None, run=None, nproc=1, resume_from=None):
    config = config or config_for(name, method)
    kind = "model" if config["kind"] == "train" else "data"
    outputs = (Output(kind, "made", kind),)
    return get_backend(name).describe(StageSpec(config, inputs or {}, outputs, run or RUN, nproc, resume_from))


@pytest.mark.parametrize("name", REGISTRY)
def test_it_says_what_it_is(name):
    backend = get_backend(name)
    assert backend.name == name
    assert backend.kinds and backend.kinds <= KIND_OF.keys()
    assert backend.methods


@pytest.mark.parametrize(("name", "method"), cases())
def test_the_table_is_one_to_one_and_covers_the_schema(name, method):
    backend = get_backend(name)
    table = backend.table(method)
    assert len(set(table.values())) == len(table), "two envelope keys mean one native key"
    assert set(table.values()) <= backend.native_keys(method)
    config = config_for(name, method)
    for key in table:
        section, _, leaf = key.partition(".")
        assert leaf in config[section], f"{key} isn't in the schema"


@pytest.mark.parametrize(("name", "method"), cases())
def test_a_valid_config_has_no_problem_and_is_left_alone(name, method):
    config = config_for(name, method)
    before = copy.deepcopy(config)
    assert get_backend(name).check(config, nproc=1) == []
    launch_for(name, method, config)
    assert config == before


@pytest.mark.parametrize(("name", "method"), cases())
def test_describe_is_pure(name, method):
    first, second = launch_for(name, method), launch_for(name, method)
    assert first == second
    assert first.launcher in ("plain", "torchrun")
    assert all(isinstance(value, str) for value in (*first.args, *first.env, *first.env.values()))


@pytest.mark.parametrize(("name", "method"), cases())
def test_the_worker_file_follows_the_contract(name, method):
    launch = launch_for(name, method, inputs={"data.path": Artifact("path", "data", uri="/rows", digest="sha256:1")})
    assert launch.module == "nemotron_recipes.worker"
    assert launch.args[0] == "--config"
    assert launch.args[1] in [f"{RUN['dir']}/files/{file}" for file in launch.files]
    tree = worker_tree(launch)
    assert tree["run"] == RUN
    assert tree["outputs"] == [{"slot": tree["outputs"][0]["slot"], "name": "made", "kind": tree["outputs"][0]["kind"]}]
    assert Artifact(**tree["inputs"]["data.path"]) == Artifact("path", "data", uri="/rows", digest="sha256:1")
    json.dumps(tree)


@pytest.mark.parametrize(("name", "method"), cases())
def test_every_path_that_is_written_lies_in_the_stage_folder_or_the_store(name, method):
    launch = launch_for(name, method)

    def absolute(value):
        if isinstance(value, dict):
            return [path for item in value.values() for path in absolute(item)]
        if isinstance(value, list):
            return [path for item in value for path in absolute(item)]
        return [value] if isinstance(value, str) and value.startswith("/") else []

    found = set(absolute(everything(launch)))
    assert found and all(path == RUN["store"] or f"{path}/".startswith(f"{RUN['dir']}/") for path in found)


@pytest.mark.parametrize("word", HOSTILE)
@pytest.mark.parametrize(("name", "method"), cases())
def test_hostile_text_arrives_unchanged(name, method, word):
    run = {**RUN, "dir": f"/runs/{word}/stage", "store": f"/store/{word}"}
    artifact = Artifact("path", "data", uri=f"/data/{word}", digest="sha256:1")
    launch = launch_for(name, method, inputs={"data.path": artifact}, run=run)
    tree = worker_tree(launch)
    assert tree["run"] == run
    assert tree["inputs"]["data.path"]["uri"] == artifact.uri
    assert launch.args[1].startswith(run["dir"] + "/")


@pytest.mark.parametrize(("name", "method"), cases("train"))
def test_numbers_stay_numbers(name, method):
    config = config_for(name, method)
    for value in (1e-5, 5e-324, 1.0, 3e10):
        config["optimizer"]["lr"] = value
        tree = everything(launch_for(name, method, config))
        found = [number for number in _numbers(tree) if number == value and isinstance(number, float)]
        assert found, f"{value} got lost"


@pytest.mark.parametrize(("name", "method"), cases("train"))
def test_resuming_reaches_the_worker(name, method):
    assert "/elsewhere/iter_0000005" in str(
        worker_tree(launch_for(name, method, resume_from="/elsewhere/iter_0000005"))
    )
    assert "/elsewhere" not in str(everything(launch_for(name, method)))


@pytest.mark.parametrize(("name", "method"), cases("train"))
def test_a_batch_that_cannot_be_shared_out_is_a_problem(name, method):
    problems = get_backend(name).check(config_for(name, method), nproc=3)
    assert any("global_batch_size" in problem.what for problem in problems)
    assert all(problem.fix for problem in problems)


def _numbers(tree):
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else [tree]:
        if isinstance(value, (dict, list)):
            yield from _numbers(value)
        else:
            yield value
