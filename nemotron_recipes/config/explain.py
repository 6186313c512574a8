"""What Hydra, OmegaConf and YAML say of a config, told as a Problem: what is wrong, in which layer, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf.errors import OmegaConfBaseException

from nemotron_recipes.config.catalog import Catalog
from nemotron_recipes.errors import Problem, UserError, nearest

_NO_GROUP = re.compile(r"Could not (?:override|delete) '([^']+)'\.")
_NO_KEY = re.compile(r"Could not delete from config\. '([^']+)' does not exist")
_NO_FILE = re.compile(r"In '([^']+)': Could not (?:load|find) '([^']+)'")
_THERE = re.compile(r"Could not append to config\. An item is already at '([^']+)'")
_TWICE = re.compile(r"Multiple values for ([^ ]+)\. ")


@contextmanager
def explained(
    catalog: Catalog, config_path: str, overrides: Sequence[Override] = (), found: Sequence[Problem] = ()
) -> Iterator[None]:
    """Raise UserError for all that a config file or an override can make Hydra raise, after the `found` problems."""
    try:
        yield
        return
    except (HydraException, OmegaConfBaseException) as error:
        problems = [_composition(error, catalog, config_path, overrides)]
    except yaml.YAMLError as error:
        problems = [_yaml(error, config_path)]
    except UnicodeDecodeError:
        problems = [
            Problem("a config file is not UTF-8", str(path), "save it as UTF-8") for path in _undecodable(catalog)
        ]
    except OSError as error:
        problems = [Problem(f"a config file can't be read: {error.strerror}", str(error.filename or config_path))]
    except RecursionError:
        fix = "look at its `defaults:`, and at those of every config named there"
        problems = [Problem("configs include each other in a circle", config_path, fix)]
    raise UserError(*found, *problems)


def _composition(error: Exception, catalog: Catalog, config_path: str, overrides: Sequence[Override]) -> Problem:
    text = str(error)
    if match := _NO_FILE.match(text):
        group, _, name = match[2].rpartition("/")
        fix = nearest(name, catalog.choices(group))
        return Problem(f"no config '{match[2]}'", f"the defaults of {match[1]}, or a config that includes it", fix)
    if match := _NO_GROUP.match(text):
        fix = f"to add the group: +{match[1]}=CHOICE" if "override" in match[0] else "leave it out"
        return Problem(f"this config chooses no '{match[1]}'", _said(overrides, match[1]) or config_path, fix)
    if match := _NO_KEY.match(text):
        return Problem(f"there is no '{match[1]}' to remove", _said(overrides, match[1]) or config_path)
    if match := _THERE.match(text):
        what, fix = f"'{match[1]}' is set already", f"leave the + out: {match[1]}=..."
        return Problem(what, _said(overrides, match[1]) or config_path, fix)
    if match := _TWICE.match(text):
        said = _said(overrides, match[1])
        fix = f"choose with {match[1]}=CHOICE, without the +" if said else f"write 'override /{match[1]}: CHOICE'"
        return Problem(f"'{match[1]}' is chosen twice", said or config_path, fix)
    if "Cannot merge DictConfig with ListConfig" in text:
        return Problem(
            "a config holds a list at its top", config_path, "write keys and values, as in the other configs"
        )
    lines = [line.strip() for line in text.partition("Config search path")[0].splitlines()]
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else None
    if isinstance(cause, OmegaConfBaseException):
        lines += str(cause).splitlines()[:1]
    told = [line for line in lines if line and not line.startswith(("full_key:", "object_type="))]
    return Problem("; ".join(dict.fromkeys(told[:3])) or type(error).__name__, config_path)


def _said(overrides: Sequence[Override], key: str) -> str:
    """The override of that key (`group@package` for a group), as the command line has it."""
    for override in overrides:
        package = f"@{override.package}" if override.package else ""
        if key in (override.key_or_group, override.key_or_group + package):
            return f"command line {override.input_line}"
    return ""


def _yaml(error: yaml.YAMLError, config_path: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    where = f"{mark.name}, line {mark.line + 1}" if mark else config_path
    return Problem(f"a config file is not YAML: {getattr(error, 'problem', None) or error}", where)


def _undecodable(catalog: Catalog) -> Iterator[Path]:
    for path in (path for root in catalog.roots for path in sorted(root.rglob("*.yaml"))):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield path
