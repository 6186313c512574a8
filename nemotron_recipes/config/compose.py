"""Compose one stage config with Hydra's compose API, and remember which layer set every value.

Layers, weakest first: group files and configs in the order of Hydra's defaults list, the profile (as `run`), the
command line. Hydra composes; the layers are then read one by one in that same order, so that every leaf has an origin.

Hydra alone would refuse `train.seed=1` where no file names the key (the schema does), and accept `+train.sede=1`. So
plain overrides are handed to it as `++key=value`, and the schema, which knows every key, judges them all
(planning/validate.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron_recipes.config.catalog import Catalog
from nemotron_recipes.config.explain import explained
from nemotron_recipes.config.tree import flatten, merge
from nemotron_recipes.errors import Problem, UserError, nearest
from nemotron_recipes.spec import Origin, Tree

# Configs that exist in memory only. The primary one lies at the root and includes the recipe, so that `+group=choice`
# means a group at the root; the profile stands behind the recipe in its defaults list and so wins over it.
PRIMARY = "nemotron_request"
PROFILE = "nemotron_profile"


@dataclass(frozen=True)
class Layer:
    """What one file, the profile or one override contributes. `removed`: dotted keys that it deletes."""

    origin: Origin
    tree: Tree
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Composed:
    """A composed config: plain, resolved, not yet validated; and the layers that explain it.

    problems: overrides that were left out because they can't be understood.
    """

    tree: Tree
    layers: tuple[Layer, ...]
    problems: tuple[Problem, ...] = ()

    def as_typed(self, typed: Mapping[str, str]) -> Composed:
        """The same with each override named as it was typed (`sft.train.seed=1` in a pipe, `train.seed=1` here)."""
        layers = (
            replace(layer, origin=replace(layer.origin, source=typed.get(layer.origin.source, layer.origin.source)))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    def origin(self, key: str) -> Origin | None:
        """The last layer that set `key`, something below it, or a section around it; None: no layer did."""
        for layer in reversed(self.layers):
            if any(key == gone or key.startswith(gone + ".") for gone in layer.removed):
                return layer.origin
            if _mentions(layer.tree, key.split(".")):
                return layer.origin
        return None


def compose(
    catalog: Catalog,
    config_path: str,
    overrides: Iterable[str] = (),
    profile: tuple[str, Tree] | None = None,
) -> Composed:
    """Compose `config_path` (`recipe/nano3/sft/tiny`). UserError: what Hydra refuses or can't resolve."""
    parsed, problems = parse_overrides(overrides, catalog)
    lines = [_for_hydra(o, catalog) for o in parsed]
    _store_primary(config_path, profile[1] if profile else {})
    with _hydra(catalog) as search, explained(catalog, config_path, parsed, problems):
        config = hydra_compose(PRIMARY, overrides=[*search, *lines])
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list(PRIMARY, [*search, *lines], RunMode.RUN)
    tree, unresolved = _plain(config, config_path, parsed)
    if unresolved:
        raise UserError(*problems, *unresolved)
    layers = [
        *_removed_groups(parsed, catalog),
        *_file_layers(catalog, defaults.defaults, parsed, profile),
        *_override_layers(parsed, catalog),
    ]
    return Composed(tree, tuple(layers), tuple(problems))


def base_tree(catalog: Catalog, config_path: str) -> Tree:
    """What a config's files set: of a recipe's `default`, the base that plans are compared with. {} without one."""
    _store_primary(config_path, {})
    with _hydra(catalog) as search, explained(catalog, config_path):
        loader = GlobalHydra.instance().config_loader()
        try:
            defaults = loader.compute_defaults_list(PRIMARY, search, RunMode.RUN)
        except HydraException:
            return {}
    tree: Tree = {}
    for layer in _file_layers(catalog, defaults.defaults, [], None):
        tree = merge(tree, layer.tree)
    return tree


def parse_overrides(overrides: Iterable[str], catalog: Catalog) -> tuple[list[Override], list[Problem]]:
    """Hydra's grammar: what can be used, and all mistakes. Sweeps and Hydra's own settings are refused."""
    parser = OverridesParser.create()
    parsed: list[Override] = []
    problems: list[Problem] = []
    for text in overrides:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            problems.append(Problem(f"override {text!r} is not valid UTF-8", "command line"))
            continue
        try:
            override = parser.parse_overrides([text])[0]
        except OverrideParseException as error:
            fix = "quote values that hold spaces or special characters: 'key=\"value\"'"
            if "=" not in text and not text.startswith("~"):
                fix = "overrides are key=value; a config is chosen with -c NAME"
            reason = str(error).splitlines()[0].rstrip(".")
            detail = "" if reason.startswith(("Lexer", "Error parsing")) else f": {reason}"
            problems.append(Problem(f"can't read override {text!r}{detail}", "command line", fix))
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            fix = f"--multirun makes a run of each; a list is written {key}=[a,b]"
            problems.append(Problem(f"override {text!r} sweeps over several values", "command line", fix))
        elif override.is_hydra_override() or key in ("recipe", "defaults", PRIMARY, PROFILE):
            problems.append(Problem(f"'{key}' can't be set", "command line"))
        elif _is_group(override, catalog) and not override.is_delete() and override.value() not in catalog.groups[key]:
            fix = nearest(str(override.value()), catalog.groups[key])
            problems.append(Problem(f"unknown {key} '{override.value()}'", f"command line {text}", fix))
        else:
            parsed.append(override)
    return parsed, problems


# Hydra's settings for the jobs of @hydra.main: nothing here reads their groups, and loading those is most of the work.
ConfigStore.instance().store(group="hydra", name="config", node=HydraConf(defaults=[]), provider="hydra")


def _store_primary(config_path: str, run: Tree) -> None:
    store = ConfigStore.instance()
    store.store(name=PRIMARY, node={"defaults": [f"/{config_path}", f"/{PROFILE}", "_self_"]})
    store.store(name=PROFILE, node={"run": run} if run else {}, package="_global_")


@contextmanager
def _hydra(catalog: Catalog) -> Iterator[list[str]]:
    """Hydra over the config roots; yields the override that names the roots behind the first."""
    first, *others = catalog.roots
    paths = ",".join(QuotedString(f"file://{p}", Quote.single).with_quotes() for p in others)
    with initialize_config_dir(str(first), version_base="1.3", job_name="nemotron"):
        yield [f"hydra.searchpath=[{paths}]"] if others else []


def _is_group(override: Override, catalog: Catalog) -> bool:
    return override.key_or_group in catalog.groups and not isinstance(override.value(), (dict, list))


def _for_hydra(override: Override, catalog: Catalog) -> str:
    line = override.input_line
    assert line is not None
    if override.is_delete() or line.startswith("+") or _is_group(override, catalog):
        return line
    return f"++{line}"


def _plain(config: DictConfig, config_path: str, overrides: list[Override]) -> tuple[Tree, list[Problem]]:
    """The resolved tree, or every value that is missing or can't be resolved: one leaf at a time, to name them all."""
    unresolved = flatten(OmegaConf.to_container(config, resolve=False))  # type: ignore[arg-type]
    problems = [
        Problem(f"'{key}' has no default and must be set", config_path, f"add '{key}=...'")
        for key, value in unresolved.items()
        if value == "???"
    ]
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException:
        for key, value in unresolved.items():
            try:
                selected = OmegaConf.select(config, key)
                if OmegaConf.is_config(selected):
                    OmegaConf.to_container(selected, resolve=True)
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                source = next((f"command line {o.input_line}" for o in overrides if o.key_or_group == key), config_path)
                problems.append(Problem(f"'{key}' = {value!r} can't be resolved: {reason}", source))
        tree = {}
    assert isinstance(tree, dict)
    return tree, problems  # type: ignore[return-value]


def _file_layers(
    catalog: Catalog, defaults: list[Any], overrides: list[Override], profile: tuple[str, Tree] | None
) -> Iterator[Layer]:
    """One layer per entry of Hydra's defaults list, Hydra's own configs left out."""
    chosen = {o.key_or_group: o.input_line for o in overrides if _is_group(o, catalog)}
    for default in defaults:
        path, package = default.config_path, default.package or ""
        if path is None or path == PRIMARY or package.split(".")[0] == "hydra":
            continue
        if path == PROFILE:
            if profile is not None:
                yield Layer(Origin("profile", profile[0]), {"run": profile[1]})
            continue
        file = catalog.file(path)
        if file is None:
            continue
        tree = {key: value for key, value in _read(file).items() if key != "defaults"}
        for part in reversed([p for p in package.split(".") if p]):
            tree = {part: tree}
        group = path.split("/")[0]
        if group == "recipe":
            origin = Origin("config", path)
        else:
            by = f" ({chosen[group]})" if group in chosen else ""
            origin = Origin("group", path + by)
        yield Layer(origin, tree)


@cache
def _read(file: Path) -> Tree:
    """As Hydra reads it: 1e-5 is a number. Once each, though a pipe's stages share many; not to be changed."""
    tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(tree, dict)
    return tree  # type: ignore[return-value]


def _removed_groups(overrides: list[Override], catalog: Catalog) -> Iterator[Layer]:
    """`~model` takes the group's file away, nothing that another layer sets below `model`: so it is the weakest."""
    for override in overrides:
        if override.is_delete() and _is_group(override, catalog):
            yield Layer(Origin("command line", str(override.input_line)), {}, (override.key_or_group,))


def _override_layers(overrides: list[Override], catalog: Catalog) -> Iterator[Layer]:
    for override in overrides:
        if _is_group(override, catalog):
            continue
        assert override.input_line is not None
        origin = Origin("command line", override.input_line)
        if override.is_delete():
            yield Layer(origin, {}, (override.key_or_group,))
            continue
        tree: Any = _unquoted(override.value())
        for part in reversed(override.key_or_group.split(".")):
            tree = {part: tree}
        yield Layer(origin, tree)


def _unquoted(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [_unquoted(v) for v in value]
    if isinstance(value, dict):
        return {k: _unquoted(v) for k, v in value.items()}
    return value


def _mentions(tree: Any, parts: list[str]) -> bool:
    """Whether a layer sets the key, or sets something that is not a section above it."""
    node = tree
    for part in parts:
        if not isinstance(node, dict):
            return True
        if part not in node:
            return False
        node = node[part]
    return True
