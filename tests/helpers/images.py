"""Small container images for tests: squashfs files with a Python, a shell, and what else a test puts in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

SHELL = "/bin/sh"
# Large, or with libraries that are, and of no use to a launcher.
LEFT_OUT = (
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "pydoc_data", "__pycache__"),
    *("distutils", "sqlite3", "_tkinter*", "_sqlite3*", "_dbm*", "_gdbm*", "_curses*", "readline*", "nis*", "_test*"),
    *("_codecs_*", "_xx*", "xx*", "site-packages", "dist-packages", "config-*", "*.a"),
)


def make_tree(root: Path) -> Path:
    """A root file system out of this machine's interpreter, at the same paths, and nothing that is installed for it."""
    python, library = Path(sys.executable).resolve(), Path(sysconfig.get_path("stdlib"))
    inside = _inside(root, library)
    shutil.copytree(library, inside, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    make_shell_tree(root, python, extensions=[*inside.glob("lib-dynload/*.so")])
    for name in (Path("/usr/bin/python3"), *_names_of(Path(sys.executable))):
        link = _inside(root, name)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(python)
    return root


def make_shell_tree(root: Path, *programs: Path, extensions: Sequence[Path] = ()) -> Path:
    """One with a shell and those programs, and the libraries that they need, and `extensions`."""
    wanted = [Path(SHELL), *programs]
    for path in [*wanted, *_libraries([*wanted, *extensions])]:
        target = _inside(root, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path.resolve(), target)
    return root


def make_image(image: Path, tree: Path, environment: Mapping[str, str], files: Mapping[str, str]) -> Path:
    """`tree` with an environment, as `enroot import` writes it, and more files, as a squashfs file."""
    root = image.with_suffix(".root")
    subprocess.run(["cp", "--archive", "--link", str(tree), str(root)], check=True)
    text = "".join(f"{name}={value}\n" for name, value in {"PATH": "/usr/bin:/bin", **environment}.items())
    for name, content in {"/etc/environment": text, **files}.items():
        path = _inside(root, Path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be the tree's own, by another name
        path.write_text(content)
    plain = ("-noI", "-noD", "-noF", "-noX", "-no-progress", "-no-xattrs", "-quiet", "-processors", "1")
    argv = ["mksquashfs", str(root), str(image), *plain]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    shutil.rmtree(root)
    return image


def _names_of(program: Path) -> list[Path]:
    """The links that lead to it, outside a virtual environment, which a test may mount."""
    found = []
    while program.is_symlink():
        program = program.parent / program.readlink()
        found.append(program)
    return found[:-1]


def _inside(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _libraries(binaries: Sequence[Path]) -> list[Path]:
    """What the dynamic loader would load for them, and the loader itself."""
    argv = ["ldd", *map(str, binaries)]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    return sorted({Path(found) for found in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", done.stdout, re.MULTILINE)})
