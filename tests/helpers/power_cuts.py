"""Power cuts, for real: an ext4 on a loop device is shut down in the middle of commits and mounted again.

    unshare --mount --propagation private python -m tests.helpers.power_cuts FOLDER CUTS [MUTANT]

In a mount namespace of its own: a copy of the mount in somebody else's would keep the dead file system alive. It proves
our order of writes on ext4, not on a network file system.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

from nemotron_recipes import checkpoints, closing
from nemotron_recipes.artifacts import contents
from nemotron_recipes.artifacts.stages import read_events
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.fsio import files_below
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import (
    RunDir,
    StageDir,
    append_event,
    latest_checkpoint,
    read_json,
    write_record,
    write_sealed,
)
from nemotron_recipes.worker.trl.checkpoints import commit_checkpoint, staging_folder

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), linux/fs/ext4/ext4.h
NO_LOG_FLUSH = 2
CHECKPOINT = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "model.safetensors")


class Disk:
    """An ext4 in a file, mounted at `path`."""

    def __init__(self, folder: Path):
        self.image, self.path = folder / "image", folder / "disk"
        self.path.mkdir()
        with open(self.image, "wb") as image:
            image.truncate(64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self.image)], check=True)
        self.mount()

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.path)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)

    def cut(self) -> None:
        """Nothing that isn't on the disk by now gets there any more."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)


def write_for_ever(root: Path, turn: int, report: int) -> None:
    """Versions, records, journal entries, checkpoints and ends of runs; each is reported once it is acknowledged."""
    store, stage, journal = Store(root / "store"), StageDir(root / "stage"), Journal(root)
    for number in range(1000):
        staged = store.stage("rows")
        (staged.content / "a").write_bytes(os.urandom(3000))
        version = store.commit(staged, kind="data").version
        os.write(report, f"v{version}\n".encode())
        write_record(stage, {"attempt": turn * 1000 + number})
        os.write(report, f"r{turn * 1000 + number}\n".encode())
        journal.output("sft", "model", f"m{turn}", number)
        os.write(report, f"joutput m{turn}:v{number}\n".encode())
        staging = staging_folder(root / "checkpoints") / f"checkpoint-{number + 1}"
        staging.mkdir(parents=True)
        for name in CHECKPOINT:
            (staging / name).write_bytes(os.urandom(3000))
        commit_checkpoint(root / "checkpoints", number + 1, keep=2)
        os.write(report, f"k{number + 1}\n".encode())
        end_run(RunDir(root / "runs" / f"{turn}-{number}"))
        os.write(report, f"e{turn}-{number}\n".encode())


def end_run(run: RunDir) -> None:
    """A stage logs, measures and ends, and so does its run."""
    stage = run.stage("sft")
    write_sealed(run.plan, {"id": run.path.name})
    append_event(run.events, "stage-started", stage="sft", attempt=1, pid=1)
    stage.logs(1).mkdir(parents=True)
    stage.log(1, 0).write_bytes(os.urandom(3000))
    stage.metrics.write_bytes(b'{"step": 1, "loss": 2.5}\n' * 100)
    write_record(stage, {"attempt": 1})
    closing.end(run, "finished", state="succeeded")


def cut_often(disk: Disk, cuts: int) -> None:
    """AssertionError: something acknowledged was lost, or something is neither whole nor absent."""
    seed = random.Random(4)
    told: set[str] = set()
    acknowledged = 0
    for turn in range(cuts):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                write_for_ever(disk.path, turn, writer)
            finally:
                os._exit(0)
        os.close(writer)
        said = _lines(reader, seed.randrange(12))
        time.sleep(seed.uniform(0.0, 0.03))  # somewhere in what follows
        lines = [*said, *_said_so_far(reader)]  # whoever outlives the power, as this process does, may be told anything
        disk.cut()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        acknowledged += len(lines)
        told |= {line[1:] for line in lines if line.startswith("j")}
        disk.unmount()
        disk.mount()
        _check(disk.path, lines, told)
    assert acknowledged > 3 * cuts, "the cuts have to come between commits, not before all of them"
    print(f"{cuts} cuts, {acknowledged} acknowledged writes")


def _lines(reader: int, number: int) -> list[str]:
    """The next `number` lines, waited for."""
    text = b""
    while text.count(b"\n") < number:
        piece = os.read(reader, 1)
        assert piece, "the writer has ended"
        text += piece
    return text.decode().splitlines()


def _said_so_far(reader: int) -> list[str]:
    os.set_blocking(reader, False)
    try:
        text = os.read(reader, 1 << 16).decode()
    except BlockingIOError:
        return []
    return text.split("\n")[:-1]


def _check(root: Path, lines: list[str], told: set[str]) -> None:
    store = Store(root / "store")
    versions = store.versions("rows")
    assert versions == list(range(1, len(versions) + 1))
    for line in lines:
        if line.startswith("v"):
            assert int(line[1:]) in versions, f"{line} was acknowledged"
    for version in versions[-5:]:
        store.verify(made := store.resolve(f"rows:v{version}"))
        assert (store.content(made).parent / contents.FILES).is_file()
    records = [int(line[1:]) for line in lines if line.startswith("r")]
    if records:
        record = read_json(StageDir(root / "stage").record)
        assert record is not None and record["attempt"] >= records[-1]
    assert told <= {entry["key"] for entry in Journal(root).entries()}
    _check_checkpoints(root / "checkpoints", [int(line[1:]) for line in lines if line.startswith("k")])
    _check_runs(root / "runs", [line[1:] for line in lines if line.startswith("e")])
    before = sorted(files_below(root))
    assert store.versions("rows") == versions and sorted(files_below(root)) == before, "a second look repairs nothing"


def _check_checkpoints(root: Path, saved: list[int]) -> None:
    newest = latest_checkpoint(root)
    assert newest is not None or not saved
    if newest is not None:
        assert not saved or int(newest.name.rpartition("_")[2]) >= saved[-1]
        found = checkpoints.check(newest)
        assert found is not None and not found.unread
    shutil.rmtree(root, ignore_errors=True)  # the next writer begins anew


def _check_runs(root: Path, ended: list[str]) -> None:
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        run = RunDir(folder)
        told = [event["event"] for event in read_events(run.events)]
        assert [str(error) for error in closing.changed(run)] == [], "what stood there at the end stands there"
        if folder.name in ended:
            assert told[-1] == "finished" and (read_json(run.stage("sft").record) or {})["attempt"] == 1
            assert read_json(folder / closing.CLOSED), "nobody noted what stood there"
        shutil.rmtree(folder)


def without(mutant: str) -> None:
    """Take one precaution out of the code, which the cuts have to notice."""
    module, _, name = mutant.rpartition(".")
    setattr(import_module(f"nemotron_recipes.{module}"), name, lambda *_: None)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        without(sys.argv[3])
    cut_often(Disk(Path(sys.argv[1])), int(sys.argv[2]))
