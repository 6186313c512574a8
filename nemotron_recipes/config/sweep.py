"""Overrides that sweep over several values, in Hydra's grammar: `lr=1e-5,3e-5`, `seed=range(3)`, `model=glob(n*)`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException

from nemotron_recipes.config.catalog import Catalog
from nemotron_recipes.errors import Problem, UserError

MOST = 1000  # runs; more are a slip (range(0,100000)), or work for a tool that searches


def expand(overrides: Iterable[str], catalog: Catalog) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Per run: (all its overrides, those of them that the sweep has set). The first sweep varies slowest.

    What can't be parsed is left as it is: composing says what is wrong with it. UserError: nothing sweeps; a range of
    real numbers, which has no end; a key that sweeps twice; too many runs.
    """
    parser = OverridesParser.create()
    places: list[list[str]] = []
    swept: list[str] = []
    problems: list[Problem] = []
    sweeps: list[int] = []
    count = 1
    for place, text in enumerate(overrides):
        places.append([text])
        try:
            override = parser.parse_overrides([text])[0]
        except HydraException:
            continue
        if not override.is_sweep_override():
            continue
        key = override.get_key_element()
        if key in swept:
            problems.append(Problem(f"'{key}' sweeps twice", f"command line {text}", "name all its values at once"))
        swept.append(key)
        try:
            places[place] = [f"{key}={value}" for value in _values(override, catalog)]
            if len(set(places[place])) < len(places[place]):
                problems.append(Problem(f"{text!r} names a value twice", "command line", "name each value once"))
        except ValueError as error:
            problems.append(Problem(f"{text!r} can't be swept over: {error}", "command line", "name the values: a,b,c"))
        sweeps.append(place)
        count *= len(places[place])
    if not problems and not sweeps:
        fix = "give one several values, as in optimizer.lr=1e-5,3e-5, or leave out --multirun"
        problems.append(Problem("--multirun, but no override has several values", "command line", fix))
    if count > MOST:
        problems.append(
            Problem(f"that is {count} runs; {MOST} are the most at once", "command line", "sweep over less")
        )
    if problems:
        raise UserError(*problems)
    return [(chosen, tuple(chosen[place] for place in sweeps)) for chosen in itertools.product(*places)]


def _values(override: Override, catalog: Catalog) -> list[str]:
    """The values of a sweep as Hydra writes them. ValueError: there is no list of them."""
    value = override.value()
    if isinstance(value, Glob):
        found = value.filter([*catalog.groups.get(override.key_or_group, ())])
        if not found:
            raise ValueError(f"no choice of {override.key_or_group} is named so")
        return [str(name) for name in found]
    if not override.is_discrete_sweep():
        raise ValueError("a range of real numbers has no end")
    return [*override.sweep_string_iterator()]
