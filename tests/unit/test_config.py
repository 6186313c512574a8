"""Composition, provenance and validation: nothing that a user types is ignored, and every value names its layer."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_recipes.config.catalog import Catalog, config_roots, package_root
from nemotron_recipes.config.compose import Composed, compose
from nemotron_recipes.config.profiles import read_environment
from nemotron_recipes.config.tree import flatten, merge
from nemotron_recipes.errors import Problem, UserError
from nemotron_recipes.planning.validate import validate

SFT = "recipe/nano3/sft/tiny"
CATALOG = Catalog((package_root(),))


def problems_of(*overrides: str, path: str = SFT, profile: tuple[str, dict] | None = None) -> tuple[Problem, ...]:
    try:
        composed = compose(CATALOG, path, overrides, profile)
    except UserError as error:
        return error.problems
    return tuple(validate(composed, path)[1])


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("train.train_itres=5", "unknown key 'train.train_itres'", "did you mean 'train.train_iters'?"),
        ("+train.sede=5", "unknown key 'train.sede'", "did you mean 'train.seed'?"),
        ("++mdoel.path=x", "unknown key 'mdoel'", "did you mean 'model'?"),
        ("train.lr=1", "unknown key 'train.lr'", "did you mean 'optimizer.lr'?"),
        ("train=5", "'train' is a section, not 5", "set a key below it"),
        ("train.train_iters=abc", "'train.train_iters' should be a valid integer, not 'abc'", ""),
        ("train.train_iters=1.5", "'train.train_iters' should be a valid integer, not 1.5", ""),
        ("train.train_iters=-1", "'train.train_iters' should be greater than 0, not -1", ""),
        ("optimizer.lr=null", "'optimizer.lr' should be a valid number, not None", ""),
        ("method=sftt", "'method' should be 'pretrain', 'sft', 'dpo', 'kto' or 'grpo', not 'sftt'", ""),
        ("model=tinny", "unknown model 'tinny'", "did you mean 'tiny'?"),
        ("backend=megatron", "unknown backend 'megatron'", "did you mean 'megatron_bridge'?"),
        ("backend.name=trll", "unknown backend 'trll'", "did you mean 'trl'?"),
        ("backend.native.max_step=1", "unknown key 'backend.native.max_step' of trl", "did you mean"),
        ("backend.native.learning_rate=1", "'backend.native.learning_rate' and 'optimizer.lr' are one thing", "set"),
        ("run.nproc_per_nod=2", "unknown key 'run.nproc_per_nod'", "did you mean 'run.nproc_per_node'?"),
        ("run.executor=slrm", "unknown executor 'slrm'", "did you mean 'slurm'?"),
        ("run.executor=local", "the executor is chosen by a profile", "use --run or --batch PROFILE"),
        ("x=${nope}", "'x' = '${nope}' can't be resolved: Interpolation key 'nope' not found", ""),
        ("train.seed=1,2", "override 'train.seed=1,2' sweeps over several values", "[a,b]"),
        ("tiny", "can't read override 'tiny'", "a config is chosen with -c NAME"),
        ("model.path=a$(b)", "can't read override 'model.path=a$(b)'", "quote"),
        ("hydra.run.dir=/x", "'hydra.run.dir' can't be set", ""),
        ("~train.nope", "there is no 'train.nope' to remove", ""),
        ("~model", "'model' has no default and must be set", ""),
        ("~optimizer.lr", "'optimizer.lr' has no default and must be set", ""),
        ("+optimizer.lr=1", "'optimizer.lr' is set already", "leave the + out"),
        ("+model=nano3", "'model' is chosen twice", "model=CHOICE"),
        ("+a.b=1", "unknown key 'a'", "valid: backend, checkpoint"),
        ("model.path=\udcff", "override 'model.path=\\udcff' is not valid UTF-8", ""),
    ],
)
def test_a_wrong_override_is_one_clear_problem(override: str, what: str, fix: str) -> None:
    found = problems_of(override)
    assert any(p.what.startswith(what) and fix in p.fix for p in found), found
    assert all(p.where for p in found), "every problem says which layer it came from"


def test_all_problems_come_at_once() -> None:
    found = problems_of("train.sede=1", "optimizer.lr=abc", "model=nope", "a b c", "run.nproc=1")
    assert len(found) == 5, found


def test_a_mistake_in_a_profile_names_the_profile() -> None:
    found = problems_of(profile=("DESK", {"executor": "local", "nproc_per_nod": 2}))
    assert [(p.what, p.where) for p in found] == [("unknown key 'nproc_per_nod'", "profile DESK")]
    assert found[0].fix == "did you mean 'nproc_per_node'?", "as env.toml has it"


ROWS = "recipe/nano3/data/prep/sft/tiny"


@pytest.mark.parametrize(
    ("override", "what", "fix"),
    [
        ("data.sources=[{pth: x}]", "unknown key 'data.sources.0.pth'", "did you mean 'data.sources.0.path'?"),
        ("data.sources=[{pth: x}]", "'data.sources.0.path' has no default", "add 'path: ...' to that element"),
        ("data.sources=[my.jsonl]", "'data.sources.0' is a section, not 'my.jsonl'", "write {path: my.jsonl}"),
        ("data.sources=[{path: x, rows: '3'}]", "'data.sources.0.rows' should be a valid integer, not '3'", ""),
        ("model=tiny", "this config chooses no 'model'", "+model=CHOICE"),
    ],
)
def test_a_mistake_inside_a_list_or_a_missing_group(override: str, what: str, fix: str) -> None:
    found = [p for p in problems_of(override, path=ROWS) if p.what.startswith(what)]
    assert [(p.where, p.fix) for p in found if fix in p.fix] == [(f"command line {override}", found[0].fix)]


HEAD = b"# @package _global_\n"


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        (HEAD + b"defaults: [mine, _self_]\n", "configs include each other in a circle", "defaults"),
        (HEAD + b"defaults: [defalt, _self_]\n", "no config 'recipe/nano3/sft/defalt'", "did you mean 'default'?"),
        (HEAD + b"defaults: [default, override /model: tinny, _self_]\n", "no config 'model/tinny'", "'tiny'"),
        (HEAD + b"defaults: [default, _self_]\ntrain: {\n", "a config file is not YAML", "mine.yaml, line"),
        (HEAD + b"train: {seed: 1}\ntrain: {seed: 2}\n", "a config file is not YAML: found duplicate key", "line 3"),
        (HEAD + b"# \xff\n", "a config file is not UTF-8", "mine.yaml"),
        (HEAD + b"- a\n", "a config holds a list", "write keys and values"),
        (b"defaults: [default, _self_]\ntrain: {seed: 1}\n", "unknown key 'recipe'", "# @package _global_"),
        (b"", "config sets no valid kind", "# @package _global_"),
        (HEAD + b"defaults: [default, _self_]\nx: ${oc.env:NOT_SET_ANYWHERE}\n", "'x' = ", ""),
    ],
)
def test_a_broken_config_of_the_user_is_one_clear_problem(tmp_path: Path, text: bytes, what: str, hint: str) -> None:
    file = tmp_path / "recipe/nano3/sft/mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(text)
    catalog, path = Catalog((tmp_path, package_root())), "recipe/nano3/sft/mine"
    try:
        found = validate(compose(catalog, path), path)[1]
    except UserError as error:
        found = list(error.problems)
    (problem,) = found
    assert problem.what.startswith(what)
    assert hint in str(problem)
    assert "recipe/nano3/sft" in problem.where


def test_a_broken_config_disturbs_only_those_that_use_it(tmp_path: Path) -> None:
    for name, text in (("latin", b"# \xff"), ("bad", b"a: {")):
        (tmp_path / "recipe/nano3/sft").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"recipe/nano3/sft/{name}.yaml").write_bytes(text)
    catalog = Catalog((tmp_path, package_root()))
    assert compose(catalog, SFT).tree["method"] == "sft"
    assert "nemotron nano3 sft -c tiny" in catalog.makers("nano3-tiny-sft")


def test_missing_values_are_all_named() -> None:
    found = problems_of(path="recipe/nano3/data/prep/dpo/default")
    assert [p.what for p in found] == ["'data.sources' has no default and must be set"]


def test_layers_in_order_of_strength() -> None:
    profile = ("DESK", {"executor": "local", "nproc_per_node": 2})
    composed = compose(CATALOG, SFT, ["optimizer.lr=0.5", "run.nproc_per_node=1", "model=nano3"], profile)
    origin = {key: str(composed.origin(key)) for key in flatten(composed.tree)}
    assert origin["optimizer.lr"] == "command line optimizer.lr=0.5"
    assert origin["optimizer.adam_beta1"] == "group optimizer/adamw"
    assert origin["model.path"] == "group model/nano3 (model=nano3)"
    assert origin["train.train_iters"] == "config recipe/nano3/sft/tiny"
    assert origin["kind"] == "config recipe/nano3/sft/trl"
    assert origin["run.executor"] == "profile DESK"
    assert origin["run.nproc_per_node"] == "command line run.nproc_per_node=1"


VALUES = {
    "train.train_iters": st.integers(1, 10**6).map(str),
    "train.seed": st.integers(0, 99).map(str),
    "optimizer.lr": st.floats(1e-9, 1).map(repr),
    "optimizer": st.sampled_from(["{lr: 0.25}", "adamw"]),
    "scheduler.lr_decay_style": st.sampled_from(["linear", "cosine"]),
    "model": st.sampled_from(["tiny", "nano3", "{path: '/a b'}"]),
    "peft": st.sampled_from(["{dim: 4}", "null"]),
    "model.path": st.sampled_from(["'a b'", "x/y", '"$(id)"', "hf://a/b"]),
    "run.nproc_per_node": st.integers(1, 8).map(str),
    "backend.native": st.sampled_from(["{}", "{label_smoothing_factor: 0.1}"]),
}
OVERRIDE = st.sampled_from(sorted(VALUES)).flatmap(lambda key: VALUES[key].map(lambda value: f"{key}={value}"))


def folded(composed: Composed) -> dict:
    """The layers laid on one another, with what they remove taken out."""
    tree: dict = {}
    for layer in composed.layers:
        tree = merge(tree, deepcopy(layer.tree))  # layers are read once, for all who compose
        for key in layer.removed:
            *path, last = key.split(".")
            node = tree
            for part in path:
                node = node[part]
            del node[last]
    return tree


@settings(max_examples=60, deadline=None)
@given(
    overrides=st.lists(OVERRIDE, max_size=5, unique_by=lambda text: text.split("=")[0]),
    removed=st.booleans(),
    config=st.sampled_from(["tiny", "default"]),
    profile=st.sampled_from([None, ("DESK", {"executor": "local", "env": {"A": "1"}})]),
)
def test_the_layers_explain_every_leaf(overrides, removed, config, profile) -> None:
    if removed:
        overrides = [*overrides, "~train.global_batch_size"]
    composed = compose(CATALOG, f"recipe/nano3/sft/{config}", overrides, profile)
    assert folded(composed) == composed.tree
    for key, value in flatten(composed.tree).items():
        origin = composed.origin(key)
        assert origin is not None, key
        last = [layer for layer in composed.layers if layer.origin == origin][-1]
        flat = flatten(last.tree)
        assert key in flat and flat[key] == value, (key, origin)


def test_published_overrides_compose() -> None:
    composed = compose(CATALOG, SFT, ["train.train_iters=5000", "optimizer.lr=1e-5", "checkpoint.load=/some/where"])
    config, problems = validate(composed, SFT)
    assert not problems
    assert (config["train"]["train_iters"], config["optimizer"]["lr"]) == (5000, 1e-5)
    assert config["checkpoint"]["load"] == "/some/where"


def test_hostile_text_arrives_unchanged() -> None:
    for text in ["a b", "$(id)", 'say "hi"', "it's", "back\\slash", "tab\there", "ünïcode ☃", "#no", "a=b,c"]:
        quoted = text.replace("\\", "\\\\").replace('"', '\\"') if '"' in text else text
        composed = compose(CATALOG, SFT, [f'model.path="{quoted}"'])
        assert composed.tree["model"]["path"] == text


def test_users_own_conf_adds_and_shadows(tmp_path: Path) -> None:
    mine = tmp_path / "conf"
    (mine / "recipe/mine/sft").mkdir(parents=True)
    (mine / "optimizer").mkdir()
    (mine / "optimizer/gentle.yaml").write_text("name: adamw\nlr: 1e-7\n")
    (mine / "recipe/mine/sft/default.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /recipe/nano3/sft/tiny\n  - override /optimizer: gentle\n  - _self_\n"
        "outputs: {model: mine}\n"
    )
    catalog = Catalog(config_roots(("conf",), tmp_path))
    assert catalog.families == tuple(sorted(("mine", *CATALOG.families)))
    composed = compose(catalog, "recipe/mine/sft/default")
    assert composed.tree["outputs"]["model"] == "mine"
    assert str(composed.origin("optimizer.name")) == "group optimizer/gentle"
    assert composed.tree["train"]["train_iters"] == compose(CATALOG, SFT).tree["train"]["train_iters"]
    with pytest.raises(UserError, match="is not a folder"):
        config_roots(("nowhere",), tmp_path)


def test_unknown_family_stage_config() -> None:
    for arguments, text in [
        (("nano4", ("sft",), "tiny"), "did you mean 'nano3'"),
        (("nano3", ("sftt",), "tiny"), "did you mean 'sft'"),
        (("nano3", ("data", "prep", "sfd"), "tiny"), "did you mean 'data prep sft'"),
        (("nano3", ("sft",), "tinny"), "did you mean 'tiny'"),
    ]:
        with pytest.raises(UserError) as caught:
            CATALOG.require(*arguments)
        assert text in str(caught.value)


ENV = """
[wandb]
project = "p"
[artifacts]
output = "out"
store = "shared store"
[base]
executor = "local"
env = {A = "1", B = "2"}
[desk]
extends = "base"
env = {B = "3"}
"""


def test_env_toml_is_found_upwards_and_extended(tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text(ENV)
    below = tmp_path / "a/b"
    below.mkdir(parents=True)
    environment = read_environment(below, {})
    assert environment.profile("desk") == {"executor": "local", "env": {"A": "1", "B": "3"}}
    assert environment.output == tmp_path / "out"
    assert environment.store == tmp_path / "shared store"
    named = read_environment(tmp_path.parent, {"NEMOTRON_ENV": str(tmp_path / "env.toml")})
    assert named.profiles == environment.profiles


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("[a]\nexecutor='local'\nextends='b'\n[b]\nextends='a'\n", ["in a circle: a -> b -> a"]),
        ("[a]\nexecutor='local'\nextends='bb'\n[b]\nexecutor='local'\n", ["extends unknown profile 'bb'"]),
        ("[wandb]\nprojct='x'\n[artifacts]\nstore=5\n", ["unknown key 'projct'", "store must be a non-empty string"]),
        ("[wanbd]\nproject='x'\n", ["profile [wanbd] names no executor"]),
        ("executor='local'\n", ["'executor' stands outside any table"]),
        ("[a\n", ["can't be read"]),
    ],
)
def test_a_broken_env_toml_is_a_clear_error(tmp_path: Path, text: str, messages: list[str]) -> None:
    (tmp_path / "env.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_environment(tmp_path, {})
    for message in messages:
        assert message in str(caught.value)
    assert str(tmp_path / "env.toml") in str(caught.value)


def test_a_circle_of_profiles_is_told_once(tmp_path: Path) -> None:
    links = {"b": "c", "c": "a", "a": "b", "d": "a"}
    (tmp_path / "env.toml").write_text("".join(f'[{name}]\nextends = "{other}"\n' for name, other in links.items()))
    with pytest.raises(UserError) as caught:
        read_environment(tmp_path, {})
    assert [p.what for p in caught.value.problems] == ["profiles extend each other in a circle: a -> b -> c -> a"]


def test_an_unknown_home_is_text_as_in_a_shell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which is not a file"):
        read_environment(tmp_path, {"NEMOTRON_ENV": "~no-such-user-here/env.toml"})
    (tmp_path / "env.toml").write_text('[artifacts]\noutput = "~no-such-user-here/out"\n')
    assert read_environment(tmp_path, {}).output == tmp_path / "~no-such-user-here/out"


def test_unknown_profile_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text(ENV)
    with pytest.raises(UserError, match="did you mean 'desk'"):
        read_environment(tmp_path, {}).profile("desc")
    with pytest.raises(UserError, match="is not a file"):
        read_environment(tmp_path, {"NEMOTRON_ENV": "nowhere.toml"})
