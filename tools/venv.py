#!/usr/bin/env python3
"""Make the project's virtual environment, or leave it alone when it is already what is asked for.

usage: python3 tools/venv.py [--venv DIR] --extra NAME [...]

Installs this checkout (editable) with the extras named and the exact versions of constraints.txt. pip runs with the
user's own settings: no index, proxy or cache is set here. A stamp in the environment says what it holds; while that
still fits, nothing is started and no network is used. Runs at the same time wait for one another. Standard library
only. The Makefile has checked that this Python is new enough.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, TextIO

ROOT = Path(__file__).resolve().parent.parent
STAMP = "nemotron-recipes.json"
CONSTRAINTS = ROOT / "constraints.txt"

# Building the editable install and antlr4 (a source-only dependency of Hydra) without pip's isolated build
# environments keeps every version under constraints.txt.
BUILD_TOOLS = ("setuptools", "wheel", "hatchling", "editables")

# Megabytes of wheels for CPython 3.11 on Linux x86-64, measured for the versions of constraints.txt; the CUDA and
# macOS figures are the size classes of those builds.
MB_OTHER = {"trl": 250, "test": 280}
MB_TORCH_CPU, MB_TORCH_CUDA, MB_TORCH_MAC = 190, 2500, 90


def main() -> int:
    parser = argparse.ArgumentParser(description="Make or refresh the project's virtual environment.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extra", action="append", required=True, choices=["trl", "test"])
    args = parser.parse_args()
    venv = args.venv.absolute()
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w", encoding="utf-8") as lock:
        wait_for(lock, venv)
        have = read_stamp(venv)
        want = {"digest": digest(), "root": str(ROOT), "python": sys.version, "extras": sorted(set(args.extra))}
        if have is not None and all(have[key] == want[key] for key in ("digest", "root", "python")):
            if set(want["extras"]) <= set(have["extras"]):
                return 0
            want["extras"] = sorted({*want["extras"], *have["extras"]})
        install(venv, want, have)
    return 0


def install(venv: Path, want: dict[str, Any], have: dict[str, Any] | None) -> None:
    """Bring the environment to `want`; its stamp is made whole last, so an interrupted install is repeated."""
    begun = time.monotonic()
    prepare(venv, want, have)
    announce(venv, want["extras"])
    # pip reads its configuration (files, PIP_* variables) as always; into a log it writes its errors only.
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--constraint", str(CONSTRAINTS)]
    if not sys.stdout.isatty():
        pip.append("-qq")
    target = f"{ROOT}[{','.join(want['extras'])}]"
    for step in ([*pip, *BUILD_TOOLS], [*pip, "--no-build-isolation", "--editable", target]):
        if subprocess.call(step, stdin=subprocess.DEVNULL) != 0:
            fail("pip could not install the packages (its own message is above).", "mend that and run the same again.")
    write_stamp(venv, want)
    say(f"Installed in {time.monotonic() - begun:.0f} s.")


def prepare(venv: Path, want: dict[str, Any], have: dict[str, Any] | None) -> None:
    """A usable environment: the one that is there, or a new one. A folder that is not ours is never touched."""
    unfinished = {**want, "digest": ""}
    if have is not None and all(have[key] == want[key] for key in ("root", "python")) and has_pip(venv):
        write_stamp(venv, unfinished)
        return
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        fail(
            f"{sys.executable} has no venv or no ensurepip module, so it can't make virtual environments.",
            "on Debian or Ubuntu: apt-get install python3-venv; or name another Python: PYTHON=/path/to/python3",
        )
    if have is not None:
        shutil.rmtree(venv)
    elif os.path.lexists(venv):
        fail(f"{venv} exists and was not made by this Makefile.", "move it away, or name another: VENV=DIR")
    say(f"Making the virtual environment {venv} with {sys.executable} ...")
    venv.mkdir()
    write_stamp(venv, unfinished)
    if subprocess.call([sys.executable, "-m", "venv", venv], stdin=subprocess.DEVNULL) != 0:
        fail("python3 -m venv failed (its own message is above).", "on Debian or Ubuntu: apt-get install python3-venv")


def has_pip(venv: Path) -> bool:
    """Whether the environment itself was made to its end: pip is the last thing that `python -m venv` puts there."""
    python = venv / "bin" / "python"
    return python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def announce(venv: Path, extras: list[str]) -> None:
    """Say what pip is about to download, before it does. Only torch's build varies: 0.2 GB or several."""
    rest = MB_OTHER["test" if "test" in extras else "trl"]
    say(f"Installing the versions of constraints.txt into {venv}, with your own pip settings.")
    say("To download, less what pip has cached:")
    say("  " + describe_torch(venv))
    say(f"  about {rest} MB in some 130 other packages; about 2 GB on disk when all is installed")


def describe_torch(venv: Path) -> str:
    """One sentence on the build of torch that pip will choose: the highest local version that it can see."""
    pins = re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    assert pins is not None, "constraints.txt pins torch"
    version = pins[1]
    listed = subprocess.run(
        [venv / "bin" / "python", "-m", "pip", "index", "versions", "torch"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    builds = re.findall(rf"(?<![\w.+]){re.escape(version)}(?:\+([\w.]+))?(?![\w.])", listed.stdout)
    if not builds:
        return f"torch {version}: pip lists no such version; if it can't be installed, pip says why below"
    local = max(builds)
    if local == "cpu":
        return f"about {MB_TORCH_CPU} MB for torch {version}+cpu, the CPU build that your pip settings offer"
    if sys.platform == "darwin":
        return f"about {MB_TORCH_MAC} MB for torch {version}"
    build = f"{version}+{local}" if local else version
    return (
        f"up to {MB_TORCH_CUDA} MB for torch {build} with CUDA libraries: pip finds no CPU build for this Python.\n"
        f"    A CPU build is about {MB_TORCH_CPU} MB: stop here (Ctrl-C), set PIP_EXTRA_INDEX_URL to the index of CPU\n"
        "    builds that pytorch.org/get-started names, and start again."
    )


def digest() -> str:
    """Of everything that decides what gets installed."""
    total = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        total.update(path.read_bytes() + b"\0")
    return total.hexdigest()


def read_stamp(venv: Path) -> dict[str, Any] | None:
    """What the environment holds (digest "" while an install is unfinished), or None where it is not ours."""
    try:
        return json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_stamp(venv: Path, content: dict[str, Any]) -> None:
    new = venv / f"{STAMP}.new"
    new.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    new.replace(venv / STAMP)


def wait_for(lock: TextIO, venv: Path) -> None:
    """Hold the lock until this process ends; say so when another one has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"Another run is installing into {venv}; waiting for it ...")
        fcntl.flock(lock, fcntl.LOCK_EX)


def say(text: str) -> None:
    print(text, flush=True)


def fail(problem: str, fix: str) -> NoReturn:
    print(f"error: {problem}\n  fix: {fix}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main())
