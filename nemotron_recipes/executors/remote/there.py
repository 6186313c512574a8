"""What is done on the machine that has a cluster's commands and its files; called through `transport.call`.

Arguments and results are plain data, paths are text: on a machine that is reached over SSH these very functions run, by
agent.py. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nemotron_recipes.closing import close
from nemotron_recipes.executors import folders
from nemotron_recipes.executors.images import squashfs
from nemotron_recipes.executors.remote.left_behind import remove_secrets
from nemotron_recipes.fsio import fsync_folder, write_atomic
from nemotron_recipes.redact import reads_like_a_secret
from nemotron_recipes.rundir import RunDir, append_event, write_sealed

_SRUN_SECONDS = 30.0  # for srun to end its step
PIECE = 4_000_000  # bytes of files in one answer

# Slurm's commands take options from these; what a job gets is what the script and the command say, nothing unseen.
_OPTIONS = ("SBATCH_", "SRUN_", "SALLOC_", "SLURM_")


def run(argv: Sequence[str], seconds: float, more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a command: {code, out, err}; `missing` where there is no such program, `late` where it took too long."""
    try:
        done = subprocess.run(
            [*argv],
            env={**os.environ, **(more or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except FileNotFoundError:
        return {"missing": True}
    except subprocess.TimeoutExpired:
        return {"late": True}
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr}


def variable(name: str) -> str:
    """A variable of the environment there; "" where it is not set."""
    return os.environ.get(name, "")


def submit(argv: Sequence[str], seconds: float, cwd: str, answer: str, secrets: Sequence[str]) -> dict[str, Any]:
    """`run` for sbatch: its answer goes to files `answer`.out and .err first, so that it outlives whoever waits for it.

    sbatch holds a lock on the first of them for as long as it lives: a later reader knows whether it has spoken its
    last word. It inherits all of this machine's environment but secrets, and options of Slurm's commands.
    """
    environ = inherited(os.environ, secrets)
    Path(answer).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{answer}.out", "xb") as out, open(f"{answer}.err", "wb") as err:
        fsync_folder(Path(answer).parent)
        with suppress(OSError):  # a file system without locks: the scheduler alone is asked later
            fcntl.flock(out.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            process = subprocess.Popen(
                [*argv],
                cwd=cwd,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C is for whoever waits: sbatch must say what became of the job
            )
        except FileNotFoundError:
            write_atomic(Path(f"{answer}.code"), "127")
            return {"missing": True}
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return {"late": True}
        finally:
            os.utime(out.fileno())  # from here on it is quiet; before the lock goes
    write_atomic(Path(f"{answer}.code"), str(code))
    return {"code": code, **_said(answer)}


def step(argv: Sequence[str], seconds: float, secrets: Sequence[str]) -> dict[str, Any]:
    """`run` for an srun of its own, with the environment that `submit` gives; what takes too long is ended by srun."""
    environ = inherited(os.environ, secrets)
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen([*argv], env=environ, encoding="utf-8", errors="replace", **pipes)
    except FileNotFoundError:
        return {"missing": True}
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"late": True}
    finally:
        if process.poll() is None:  # a signal that srun hears: what it holds is given back
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_SRUN_SECONDS)
            process.kill()
            process.wait()
    return {"code": process.returncode, "out": out, "err": err}


def inherited(environ: Mapping[str, str], secrets: Sequence[str]) -> dict[str, str]:
    """What sbatch, and so the job, inherits: all but secrets and options of Slurm's commands."""
    return {
        name: value
        for name, value in environ.items()
        if name not in secrets and not reads_like_a_secret(name) and not _is_option(name)
    }


def answered(answer: str) -> dict[str, Any]:
    """What became of a `submit`: {begun, alive, out, err}.

    `code` where it came to its end; `quiet` is for how many seconds it has been over, or has said nothing.
    """
    try:
        with open(f"{answer}.out", "rb") as out:
            try:
                fcntl.flock(out.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return {"begun": True, "alive": True, "out": "", "err": ""}
            except OSError:
                pass
    except FileNotFoundError:
        return {"begun": False, "alive": False, "out": "", "err": ""}
    found = {"begun": True, "alive": False, **_said(answer)}
    last = os.stat(f"{answer}.out").st_mtime
    with suppress(FileNotFoundError):  # where it has outlived whoever would have noted its end
        last = max(last, os.stat(f"{answer}.err").st_mtime)
    found["quiet"] = max(0.0, time.time() - last)
    with suppress(FileNotFoundError, ValueError):
        found["code"] = int(Path(f"{answer}.code").read_text())
    return found


def forestall(answer: str) -> bool:
    """Make sure that no `submit` of that answer begins any more; False when one has begun."""
    Path(answer).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(f"{answer}.out", "xb"):
            pass
    except FileExistsError:
        return False
    fsync_folder(Path(answer).parent)
    write_atomic(Path(f"{answer}.code"), "127")  # as of what could not be started
    return True


def user() -> str:
    """The name of the user there."""
    return pwd.getpwuid(os.getuid()).pw_name


def write(path: str, data: str | bytes, mode: int = 0o644) -> None:
    """Replace a file: whole, and durable."""
    write_atomic(Path(path), data, mode)


def write_document(path: str, tree: dict[str, Any]) -> None:
    """The same of a document with its seal."""
    write_sealed(Path(path), tree)


def forget_secrets(run_dir: str, file: str) -> None:
    """Remove the secrets of a run that nobody runs any more."""
    remove_secrets(RunDir(Path(run_dir)), Path(file))


def event(path: str, name: str, fields: Mapping[str, Any]) -> None:
    """Append one event to the events of a run; its last one closes it."""
    append_event(Path(path), name, **fields)
    if name in ("finished", "cancelled"):
        close(RunDir(Path(path).parent))


def remove(path: str) -> None:
    """Remove a file; nothing happens where there is none."""
    Path(path).unlink(missing_ok=True)


def make_folder(path: str) -> None:
    """With those above it."""
    Path(path).mkdir(parents=True, exist_ok=True)


def make_stage_folders(stage: str, code: str, sources: str) -> None:
    """Where Slurm writes, which it makes no folder for; and `code`, a link to the run's sources where it has some."""
    Path(stage, "logs").mkdir(parents=True, exist_ok=True)
    link = Path(stage, code)
    if os.path.isdir(sources) and not link.is_symlink():
        link.symlink_to(sources)
    elif not link.exists():
        link.mkdir()


def receive(root: str, files: Sequence[tuple[str, bytes, int]]) -> None:
    """Write files below a folder that nobody reads yet: (relative name, content, mode). Durable when it returns."""
    for name, data, mode in files:
        write_atomic(Path(root, name), data, mode)


def look_at(name: str, path: str) -> list[list[str]]:
    """The findings about a folder: topic, state, text."""
    return [[found.topic, found.state, found.text] for found in folders.look_at(name, Path(path))]


def clock(path: str) -> float:
    """By how many seconds the server of a folder is ahead of this machine. OSError."""
    return folders.ahead(Path(path))


def texts(path: str) -> dict[str, str]:
    """The files that lie right in a folder, huge ones left out."""
    files = [each for each in Path(path).iterdir() if each.is_file() and each.stat().st_size <= PIECE]
    return {each.name: each.read_text("utf-8", "replace") for each in files}


def document(path: str) -> dict[str, Any] | None:
    """What a JSON file holds; None where there is none that can be read, or it holds no object."""
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def remove_folder(path: str) -> None:
    """With all that is below it; nothing happens where there is none."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def refusal(path: str) -> str:
    """Why nothing can be written there; "" when something can."""
    return folders.refusal(Path(path))


def room(path: str) -> tuple[str, int]:
    """(the folder, or the nearest above it that exists; bytes that are free there)."""
    place = folders.nearest_existing(Path(path))
    return str(place), shutil.disk_usage(place).free


def missing(paths: Sequence[str], run_dir: str) -> list[str]:
    """Those that are not there, as far as this machine can know: where nodes would see the same as it."""
    return [path for path in paths if not os.path.exists(path) and folders.shared(os.path.realpath(path), run_dir)]


def whole_image(path: str) -> bool | None:
    """Whether it is a whole squashfs file; None where this machine does not see it."""
    return squashfs.is_whole(path) if os.path.exists(path) else None


def unreadable(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(path, why) of files, folders and globs that are gone, or that this user may not read."""
    found = []
    for path in paths:
        for name in [path] if os.path.exists(path) else glob.glob(path, recursive=True) or [path]:
            if not os.path.exists(name):
                found.append((path, os.strerror(errno.ENOENT)))
            elif not os.access(name, os.R_OK | (os.X_OK if os.path.isdir(name) else 0)):
                found.append((name, os.strerror(errno.EACCES)))
    return found


def is_program(path: str) -> bool:
    """Whether it can be run."""
    return os.access(path, os.X_OK)


def is_file(path: str) -> bool:
    """Whether there is such a file; `~` is the home there."""
    return os.path.isfile(os.path.expanduser(path))


def _said(answer: str) -> dict[str, str]:
    texts = {}
    for part in ("out", "err"):
        texts[part] = ""
        with suppress(FileNotFoundError):
            texts[part] = Path(f"{answer}.{part}").read_text(encoding="utf-8", errors="replace")
    return texts


def _is_option(name: str) -> bool:
    return name != "SLURM_CONF" and name.startswith(_OPTIONS)
