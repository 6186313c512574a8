"""Power cuts, for real: an ext4 on a loop device is shut down in the middle of commits and mounted again.

It proves our order of writes on ext4, not on a network file system. Root and a loop device are needed.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.fsio import files_below
from nemotron_recipes.mirror.journal import Journal
from nemotron_recipes.rundir import StageDir, read_json, write_record

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), linux/fs/ext4/ext4.h
NO_LOG_FLUSH = 2
CUTS = 300

pytestmark = [pytest.mark.long, pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root")]


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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        found = Disk(tmp_path)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no loop-mounted ext4 here: {error}")
    yield found
    found.unmount()


def write_for_ever(root: Path, turn: int, report: int) -> None:
    """Versions, records and journal entries; each is reported once it is acknowledged."""
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


def test_what_was_acknowledged_survives_power_cuts(disk: Disk) -> None:
    seed = random.Random(4)
    told: set[str] = set()
    for turn in range(CUTS):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                write_for_ever(disk.path, turn, writer)
            finally:
                os._exit(0)
        os.close(writer)
        time.sleep(seed.uniform(0.01, 0.06))
        disk.cut()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader) as pipe:
            lines = [line.rstrip("\n") for line in pipe if line.endswith("\n")]
        told |= {line[1:] for line in lines if line.startswith("j")}
        disk.unmount()
        disk.mount()
        _check(disk.path, lines, told)
    assert len(told) > CUTS / 3, "the cuts have to come between commits, not before all of them"


def _check(root: Path, lines: list[str], told: set[str]) -> None:
    store = Store(root / "store")
    versions = store.versions("rows")
    assert versions == list(range(1, len(versions) + 1))
    for line in lines:
        if line.startswith("v"):
            assert int(line[1:]) in versions, f"{line} was acknowledged"
    for version in versions[-5:]:
        store.verify(store.resolve(f"rows:v{version}"))
    records = [int(line[1:]) for line in lines if line.startswith("r")]
    if records:
        record = read_json(StageDir(root / "stage").record)
        assert record is not None and record["attempt"] >= records[-1]
    assert told <= {entry["key"] for entry in Journal(root).entries()}
    before = sorted(files_below(root))
    assert store.versions("rows") == versions and sorted(files_below(root)) == before, "a second look repairs nothing"
