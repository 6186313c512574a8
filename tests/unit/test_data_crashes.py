"""Runs that are killed, processes that die, a disk that is full: the same bytes afterwards, or a clear word."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nemotron_recipes.data.job import Progress
from nemotron_recipes.errors import JobFailed
from tests.helpers.data_jobs import cut, job, run, varied
from tests.helpers.data_prep import bytes_of, write_rows

ROOT = Path(__file__).parents[2]


SCRIPT = """
import sys
from pathlib import Path
from nemotron_recipes.data import cuts
from tests.helpers import data_jobs as t
cuts.SHARD_BYTES = 1500
if __name__ == "__main__":
    file, output, spools, workers = sys.argv[1:]
    t.run(t.job(Path(file), Path(spools), workers=int(workers)), Path(output))
"""


def start(tmp_path: Path, file: Path, name: str, workers: int) -> subprocess.Popen[bytes]:
    script = tmp_path / "crash.py"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(file), str(tmp_path / name), str(tmp_path / "spools"), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, env=environment, cwd=ROOT, stderr=subprocess.PIPE)


def finished(spools: Path) -> list[Path]:
    return sorted(path.parent for path in spools.glob("[!.]*/facts.json"))


def crash_and_compare(tmp_path: Path, kills: int, workers: int, seed: int) -> None:
    """Runs are killed at random moments; each takes over what the ones before have left; the last one is let be.
    A run that was done before its moment came doesn't count."""
    file = write_rows(tmp_path / "rows.jsonl", varied(400))
    run(job(file), tmp_path / "undisturbed")
    random_ = random.Random(seed)
    spools = tmp_path / "spools"
    killed = number = 0
    while killed < kills:
        number += 1
        process = start(tmp_path, file, f"killed-{number}", workers)
        wanted = len(finished(spools)) + random_.randint(0, 20)
        while process.poll() is None and len(finished(spools)) < wanted:
            time.sleep(0.002)
        with suppress(subprocess.TimeoutExpired):
            process.wait(random_.choice([0, random_.uniform(0, 0.05), random_.uniform(0, 1)]))
        process.kill()
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        for path in finished(spools):  # else all would soon be done
            if random_.random() < 0.5:
                path.rename(tmp_path / f"away-{number}-{path.name}")
    process = start(tmp_path, file, "after", workers)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, (seed, errors)
    assert bytes_of(tmp_path / "after") == bytes_of(tmp_path / "undisturbed"), seed
    assert len(finished(spools)) >= 20


def test_after_kills_the_bytes_are_the_same(tmp_path: Path) -> None:
    crash_and_compare(tmp_path, kills=3, workers=1, seed=int(time.time()))


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_after_many_kills_the_bytes_are_the_same(tmp_path: Path, workers: int) -> None:
    crash_and_compare(tmp_path, kills=50, workers=workers, seed=int(time.time()))


def spawned(parent: int) -> list[psutil.Process]:
    """The worker processes of a run."""
    found = []
    for child in psutil.Process(parent).children():
        with suppress(psutil.Error):  # a process that is just going
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_no_process_outlives_a_killed_run(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", varied(3000))
    process = start(tmp_path, file, "killed", 2)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not children and process.poll() is None and time.monotonic() < deadline:
        children = spawned(process.pid)
        time.sleep(0.02)
    assert children
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_killed_worker_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 1_500)
    file = write_rows(tmp_path / "rows.jsonl", varied(3000))

    class Kill(Progress):
        def update(self, rows: int, share: float) -> None:
            for child in spawned(os.getpid()):
                with suppress(psutil.Error):
                    child.send_signal(signal.SIGKILL)

    with pytest.raises(JobFailed, match=r"rows.jsonl was killed by signal 9 \(out of memory\?\); run again"):
        run(job(file, workers=2), tmp_path / "out", Kill())


def test_a_full_disk_is_said_plainly(tmp_path: Path) -> None:
    """A limit on the size of files fails where a full disk would."""
    file = write_rows(tmp_path / "rows.jsonl", varied(400))
    assert limited(file, tmp_path).startswith("JobFailed: rows.jsonl: its tokens can't be written: [Errno 27]")
    assert not list((tmp_path / "spools").glob("*/facts.json"))
    assert run(job(file, tmp_path / "spools"), tmp_path / "later").total.read == 400
    shutil.rmtree(tmp_path / "out")  # as whoever asks discards it
    assert limited(file, tmp_path).startswith("JobFailed: the data can't be written: [Errno 27]")


def limited(file: Path, folder: Path) -> str:
    code = "import sys; from tests.unit.test_data_crashes import full; full(*sys.argv[1:])"
    words = [sys.executable, "-c", code, str(file), str(folder / "out"), str(folder / "spools")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def full(file: str, output: str, spools: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        run(job(Path(file), Path(spools)), Path(output))
    except JobFailed as error:
        print(f"JobFailed: {error}")
