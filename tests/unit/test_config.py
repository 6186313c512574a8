"""Composition, provenance and validation: nothing that a user types is ignored, and every value names its layer."""

from __future__ import annotations

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
        ("method=sftt", "'method' should be 'sft', 'dpo', 'kto' or 'grpo', not 'sftt'", ""),
        ("model=tinny", "unknown model 'tinny'", "did you mean 'tiny'?"),
        ("backend=megatron", "unknown backend 'megatron'", "valid: trl"),
        ("backend.name=trll", "unknown backend 'trll'", "did you mean 'trl'?"),
        ("backend.native.max_step=1", "unknown key 'backend.native.max_step' of trl", "did you mean"),
        ("backend.native.learning_rate=1", "'backend.native.learning_rate' and 'optimizer.lr' are one thing", "set"),
        ("run.nproc_per_nod=2", "unknown key 'run.nproc_per_nod'", "did you mean 'run.nproc_per_node'?"),
        ("run.executor=slrm", "unknown executor 'slrm'", "valid: local"),
        ("run.executor=local", "the executor is chosen by a profile", "use --run or --batch PROFILE"),
        ("x=${nope}", "'x' = '${nope}' can't be resolved: Interpolation key 'nope' not found", ""),
        ("train.seed=1,2", "override 'train.seed=1,2' sweeps over several values", "[a,b]"),
        ("tiny", "can't read override 'tiny'", "a config is chosen with -c NAME"),
        ("model.path=a$(b)", "can't read override 'model.path=a$(b)'", "quote"),
        ("hydra.run.dir=/x", "'hydra.run.dir' can't be set", ""),
        ("~train.nope", "Could not delete from config. 'train.nope' does not exist.", ""),
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
    assert [(p.what, p.where) for p in found] == [("unknown key 'run.nproc_per_nod'", "profile DESK")]


def test_missing_values_are_all_named() -> None:
    found = problems_of(path="recipe/nano3/data/prep/sft/default")
    assert [p.what for p in found] == ["'data.sources' has no default and must be set"]


def test_layers_in_order_of_strength() -> None:
    profile = ("DESK", {"executor": "local", "nproc_per_node": 2})
    composed = compose(CATALOG, SFT, ["optimizer.lr=0.5", "run.nproc_per_node=1", "model=nano3"], profile)
    origin = {key: str(composed.origin(key)) for key in flatten(composed.tree)}
    assert origin["optimizer.lr"] == "command line optimizer.lr=0.5"
    assert origin["optimizer.adam_beta1"] == "group optimizer/adamw"
    assert origin["model.path"] == "group model/nano3 (model=nano3)"
    assert origin["train.train_iters"] == "config recipe/nano3/sft/tiny"
    assert origin["kind"] == "config recipe/nano3/sft/default"
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
        tree = merge(tree, layer.tree)
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
    assert catalog.families == ("mine", "nano3")
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


def test_unknown_profile_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "env.toml").write_text(ENV)
    with pytest.raises(UserError, match="did you mean 'desk'"):
        read_environment(tmp_path, {}).profile("desc")
    with pytest.raises(UserError, match="is not a file"):
        read_environment(tmp_path, {"NEMOTRON_ENV": "nowhere.toml"})
