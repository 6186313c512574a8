"""What a run needs on its other hosts, brought there before a stage starts; what its ranks write, brought back.

Copies lie below one folder on the other host, by the paths that they have here. Nothing else is written there.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

from nemotron_recipes.errors import JobFailed, NemotronError
from nemotron_recipes.executors.hosts import needed_files
from nemotron_recipes.executors.hosts.network import Host
from nemotron_recipes.executors.remote import replica, there
from nemotron_recipes.executors.remote.ssh import Remote
from nemotron_recipes.executors.remote.transport import Unreachable
from nemotron_recipes.fsio import file_digest
from nemotron_recipes.rundir import TRACKER, RunDir, StageDir, latest_checkpoint, read_json
from nemotron_recipes.spec import Tree

if TYPE_CHECKING:
    from typing_extensions import Buffer

READ_WHOLE = 16 << 20  # bytes; of larger files size and time tell whether the copy is still good
BACK = ("events", "logs", "heartbeats", "failures", "stacks")  # of a stage's folder: what each rank writes by itself


def needed(run: RunDir, plan: Tree, name: str) -> list[Path]:
    """Files and folders that the ranks of a stage read, beside hub models; those that exist by now."""
    stage = next(stage for stage in plan["stages"] if stage["name"] == name)
    folder, store = StageDir(Path(stage["directory"])), Path(plan["store"])
    found = [run.plan, run.rendered, run.path / "code", folder.files]
    newest = latest_checkpoint(folder.checkpoints)
    found += [newest, folder.checkpoints / TRACKER] if newest else []
    found += [Path(stage["resume_from"])] if stage["resume_from"] else []
    for artifact in stage["inputs"].values():
        if artifact["source"] == "pending":
            record = read_json(run.stage(artifact["producer"]["stage"]).record) or {"outputs": {}}
            made = record["outputs"].get(artifact["producer"]["slot"])
            found += [Path(made["uri"]).parent] if made else []
        elif artifact["source"] == "store":
            found.append(Path(artifact["uri"]).parent)
        elif artifact["source"] == "path":
            found += needed_files.matches(artifact["uri"])
    return [path for path in [*found, store / ".index"] if path.exists()]


class Abandoned(NemotronError):
    """Nobody wants the copy any more."""


def send(host: Host, paths: Iterable[Path], unwanted: Callable[[], bool] = lambda: False) -> int:
    """Bring files and folders below `host.root`, and compare what came; how many bytes went. Unreachable, JobFailed.

    unwanted   asked again and again, for this may take long: once it is true, Abandoned
    """
    files, stale = _stale(host, paths)
    if not stale:
        return 0
    assert isinstance(host.where, Remote)
    _stream(host, stale, unwanted)
    large = [name for name in stale if not files[name][2]]
    bad: list[str] = []
    for names in ([name for name in stale if files[name][2]], *([name] for name in large)):
        _check(unwanted)
        arrived = host.where.call(needed_files.digests, host.root, names)
        bad += [name for name in names if arrived[name] != file_digest(Path(name))]
    if bad:
        raise JobFailed(f"{host.name}: {bad[0]} did not arrive as it is here ({len(bad)} of {len(stale)} files)")
    return sum(Path(name).stat().st_size for name in stale)


def missing_bytes(host: Host, paths: Iterable[Path]) -> int:
    """What `send` would bring now. Unreachable."""
    return sum(Path(name).stat().st_size for name in _stale(host, paths)[1])


class Back(threading.Thread):
    """Brings what the ranks of one host write into the run folder here, until it is told to stop."""

    def __init__(self, host: Host, run: RunDir, seconds: float = 1.0):
        super().__init__(daemon=True)
        self.host, self.run_dir, self.seconds = host, run, seconds
        self.over = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        while not self.over.wait(self.seconds):
            with suppress(NemotronError, OSError):  # how long it has been away is for others to judge
                self.refresh()

    def refresh(self) -> None:
        """Now. Unreachable; OSError."""
        if not self.host.root:
            return
        with self._lock:
            far = self.host.place(str(self.run_dir.path))
            mark = f".copied.{self.host.node}.json"
            replica.refresh(self.host.where.call, far, self.run_dir.path, mark, _comes_back)

    def stop(self) -> None:
        self.over.set()
        self.join()


def clear(host: Host, run: RunDir) -> None:
    """Remove the copy of the run's folder there. Unreachable; OSError."""
    if host.root:
        host.where.call(there.remove_folder, host.place(str(run.path)))


def _comes_back(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 2 and parts[1] in BACK


def _stale(host: Host, paths: Iterable[Path]) -> tuple[dict[str, list[object]], list[str]]:
    """(what is known of every file; the names of those that are not there as they are here)."""
    files = {str(path): _known(path) for path in _files(paths)}
    return files, host.where.call(needed_files.stale, host.root, files)


def _files(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = [name for name in folders if name != "__pycache__"]
                yield from (Path(folder, name) for name in names)
        else:
            yield path


def _known(path: Path) -> list[object]:
    status = path.stat()
    return [status.st_size, int(status.st_mtime), file_digest(path) if status.st_size <= READ_WHOLE else ""]


def _check(unwanted: Callable[[], bool]) -> None:
    if unwanted():
        raise Abandoned("the copy was given up")


class _Pipe(io.RawIOBase):
    """What tarfile writes to: large files, too, can be given up between two of their pieces."""

    def __init__(self, pipe: IO[bytes], unwanted: Callable[[], bool]):
        super().__init__()
        self.pipe, self.unwanted = pipe, unwanted

    def write(self, piece: Buffer, /) -> int:
        _check(self.unwanted)
        return self.pipe.write(piece)


def _stream(host: Host, names: Sequence[str], unwanted: Callable[[], bool]) -> None:
    """tar's, over the connection that is open: nothing has to be installed, and it is as fast as ssh."""
    assert isinstance(host.where, Remote)
    host.where.call(there.make_folder, host.root)
    argv = ["tar", "--extract", "--no-same-owner", "--preserve-permissions", "--directory", host.root, "--file", "-"]
    # Of a full disk it has a line a file to say: nobody reads a pipe while it is fed, and both would wait for ever.
    with TemporaryFile() as words, host.where.feed(argv, words) as tar:
        assert tar.stdin is not None
        try:
            pipe = _Pipe(tar.stdin, unwanted)
            with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.GNU_FORMAT, dereference=True) as stream:
                for name in names:
                    stream.add(name, name.lstrip("/"), recursive=False, filter=_in_whole_seconds)
            tar.stdin.close()
        except BrokenPipeError:
            pass  # it says why
        code = tar.wait()
        words.seek(0)
        said = _reason(words.read().decode("utf-8", "replace").splitlines())
    if code == 255:
        raise Unreachable(f"the connection to {host.name} was lost while files were copied")
    if code:
        raise JobFailed(f"{host.name}: files can't be written below {host.root}: {said or f'tar ended with {code}'}")


def _reason(said: Sequence[str]) -> str:
    """One of tar's lines: the first of a disk that is filling up gives no reason ("Wrote only 4096 of 5120 bytes")."""
    return next((line for line in said if ": Cannot " in line), said[0] if said else "")


def _in_whole_seconds(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.mtime = int(member.mtime)
    return member
