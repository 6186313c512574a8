"""Where the project's env.toml is. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError


def find_env_file(cwd: Path, environ: Mapping[str, str] = os.environ) -> Path | None:
    """$NEMOTRON_ENV, else the first env.toml upwards from `cwd`."""
    named = environ.get("NEMOTRON_ENV")
    if named:
        path = (cwd / os.path.expanduser(named)).absolute()
        if not path.is_file():
            raise UserError(Problem(f"$NEMOTRON_ENV names {named!r}, which is not a file", fix="unset it or mend it"))
        return path
    for folder in (cwd, *cwd.parents):
        if (folder / "env.toml").is_file():
            return folder / "env.toml"
    return None
