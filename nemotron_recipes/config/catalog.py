"""What recipes exist: families, stages, configs and group choices are the files below the config roots.

    <root>/recipe/<family>/<word>/.../<config>.yaml      -> nemotron <family> <word> ... -c <config>
    <root>/<group>/<choice>.yaml                         -> <group>=<choice>

Cheap (it lists folders), so that `--help` can show what is there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nemotron_recipes.errors import Problem, UserError, nearest


def package_root() -> Path:
    """`conf/` as installed with the package, or the checkout's when it runs from a source tree."""
    here = Path(__file__).resolve().parent.parent
    installed = here / "conf"
    return installed if installed.is_dir() else here.parent / "conf"


def config_roots(config_dirs: tuple[str, ...] = (), cwd: Path | None = None) -> tuple[Path, ...]:
    """Search order: every `--config-dir`, then `./conf` when present, then the package's own.

    UserError: a `--config-dir` that is not a folder.
    """
    cwd = cwd or Path.cwd()
    package = package_root()
    roots: list[Path] = []
    for name in config_dirs:
        folder = (cwd / name).resolve()
        if not folder.is_dir():
            raise UserError(Problem(f"--config-dir {name!r} is not a folder", fix="give a folder laid out like conf/"))
        roots.append(folder)
    local = (cwd / "conf").resolve()
    if local.is_dir():
        roots.append(local)
    roots.append(package)
    return tuple(dict.fromkeys(roots))


@dataclass(frozen=True)
class Catalog:
    """A view on the config roots; earlier roots win where two hold the same file."""

    roots: tuple[Path, ...]

    @cached_property
    def families(self) -> tuple[str, ...]:
        return tuple(sorted({p.name for root in self.roots for p in _folders(root / "recipe")}))

    def words(self, *path: str) -> tuple[str, ...]:
        """Names of the folders below `recipe/<path>`: the next words of a command."""
        found = {p.name for root in self.roots for p in _folders(root.joinpath("recipe", *path))}
        return tuple(sorted(found))

    def configs(self, *path: str) -> tuple[str, ...]:
        """Names of the configs of `recipe/<path>`; empty when the path is not a stage."""
        return self.choices("/".join(("recipe", *path)))

    def stages(self, family: str) -> tuple[tuple[str, ...], ...]:
        """Every path below a family that holds configs."""
        found: set[tuple[str, ...]] = set()
        for root in self.roots:
            base = root / "recipe" / family
            for folder, _, _ in os.walk(base):
                if _yamls(Path(folder)):
                    found.add(Path(folder).relative_to(base).parts)
        return tuple(sorted(found - {()}))

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group name -> its choices, `recipe` left out."""
        found: dict[str, set[str]] = {}
        for root in self.roots:
            for folder in _folders(root):
                if folder.name != "recipe":
                    found.setdefault(folder.name, set()).update(p.stem for p in _yamls(folder))
        return {name: tuple(sorted(choices)) for name, choices in sorted(found.items()) if choices}

    def choices(self, folder: str) -> tuple[str, ...]:
        """Names of the configs in a folder below the roots (`model`, `recipe/nano3/sft`)."""
        return tuple(sorted({p.stem for root in self.roots for p in _yamls(root / folder)}))

    def file(self, config_path: str) -> Path | None:
        """The file that Hydra's `config_path` (no ending) names."""
        for root in self.roots:
            candidate = root / f"{config_path}.yaml"
            if candidate.is_file():
                return candidate
        return None

    def makers(self, artifact: str) -> tuple[str, ...]:
        """Commands whose config names `artifact` as an output; found by reading the files as text."""
        named = re.compile(
            rf"^\s*(?:outputs:\s*\{{\s*)?\w+:\s*['\"]?{re.escape(artifact)}['\"]?\s*\}}?\s*$", re.MULTILINE
        )
        return tuple(
            f"nemotron {family} {' '.join(words)} -c {config}"
            for family in self.families
            for words in self.stages(family)
            for config in self.configs(family, *words)
            if (file := self.file("/".join(("recipe", family, *words, config))))
            and named.search(file.read_text(encoding="utf-8", errors="replace"))
        )

    def require(self, family: str, words: tuple[str, ...], config: str) -> str:
        """Hydra's config path of a config. UserError naming the nearest family, stage or config that exists."""
        if family not in self.families:
            raise UserError(Problem(f"unknown family '{family}'", fix=nearest(family, self.families)))
        configs = self.configs(family, *words)
        if not configs:
            stages = [" ".join(s) for s in self.stages(family)]
            raise UserError(
                Problem(f"unknown stage '{' '.join(words)}' of {family}", fix=nearest(" ".join(words), stages))
            )
        if config not in configs:
            where = f"recipe/{family}/{'/'.join(words)}"
            raise UserError(Problem(f"unknown config '{config}' of {where}", fix=nearest(config, configs)))
        return "/".join(("recipe", family, *words, config))


def _folders(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))] if path.is_dir() else []


def _yamls(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return [p for p in path.iterdir() if p.suffix == ".yaml" and not p.name.startswith(".") and p.is_file()]
