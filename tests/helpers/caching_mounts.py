"""One folder behind two caching network mounts: sshfs over the protocol of a real sftp-server, without ssh between.

    unshare --mount --propagation private python -m tests.helpers.caching_mounts FOLDER PROCESSES|blocked|falls-silent

What one mount has written the other may deny for a while, as on NFS. Needs root, /dev/fuse, sshfs and sftp-server.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from nemotron_recipes.artifacts import staging
from nemotron_recipes.artifacts.store import Store
from nemotron_recipes.spec import Producer

SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/lib/sftp-server")
CACHING = "cache=yes,dcache_timeout=3,entry_timeout=3,attr_timeout=3,negative_timeout=1"  # seconds
SERVER = next((server for server in SERVERS if Path(server).exists()), None)
ABLE = os.geteuid() == 0 and shutil.which("sshfs") and SERVER and Path("/dev/fuse").exists()
TURNS = 3
EVERY = (  # one of each command; the rest of the line need not mean anything, for nobody comes to read it
    *("artifacts list", "artifacts show rows --verify", "artifacts alias rows best", "artifacts sync", "lineage rows"),
    *("lineage rows --html page.html", "report rows", "gc", "gc --dry-run", "env list", "env show local"),
    *("runs list", "runs show x --verify", "runs logs x", "runs logs x -f", "runs watch", "runs explain x"),
    *("runs diff x y", "runs compare x y", "runs tensorboard x", "runs shell x", "runs cancel x", "rerun x"),
    *("data show rows", "data convert rows out --to nemo_rl", "data from-logs rows.jsonl --to sft --out out"),
    *("plan layouts nano3 sft run.nodes=2", "apply plan.json", "models fetch org/name", "images list", "images check"),
    *("images import x", "doctor local", "nano3 data prep sft -c tiny", "nano3 sft -c tiny -d", "nano3 sft -c tiny"),
    *("nano3 sft -c tiny --batch local", "nano3 sft -c tiny optimizer.lr=1e-3,1e-4 -m", "nano3 pipe -c tiny"),
    *("convert export -c default", "nano3 sft -c tiny train.resume=true"),
)


class Line(threading.Thread):
    """Between a mount and its server: passes on what both say, and falls silent after so many bytes when told to."""

    def __init__(self, ends: tuple[socket.socket, socket.socket]):
        super().__init__(daemon=True)
        self.other = {ends[0]: ends[1], ends[1]: ends[0]}
        self.left: int | None = None  # bytes until it falls silent
        self.silent, self.speaks = threading.Event(), threading.Event()
        self.speaks.set()

    def falls_silent_after(self, size: int) -> None:
        self.silent.clear()
        self.speaks.clear()
        self.left = size

    def speaks_again(self) -> None:
        self.left = None
        self.speaks.set()

    def run(self) -> None:
        while True:
            for end in select.select([*self.other], [], [])[0]:
                data = end.recv(1 << 16)
                if not data:
                    return
                if self.left is not None:
                    self.left -= len(data)
                    if self.left < 0:
                        self.silent.set()
                        self.speaks.wait()
                self.other[end].sendall(data)


@contextmanager
def mounted(
    folder: Path, point: Path, options: str = CACHING, line: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], Line | None]]:
    """`folder` at `point`; yields the sftp-server, which may be stopped, and the line to it where one is wanted."""
    point.mkdir()
    ours, theirs = socket.socketpair()
    between = None
    if line:
        ours, near = socket.socketpair()
        far, theirs = socket.socketpair()
        between = Line((near, far))
        between.start()
    server = subprocess.Popen([str(SERVER)], stdin=ours, stdout=ours)
    client = subprocess.Popen(
        ["sshfs", "-f", "-o", f"passive,{options}", f":{folder}", str(point)], stdin=theirs, stdout=theirs
    )
    ours.close()
    theirs.close()
    try:
        while not point.is_mount():
            assert client.poll() is None, "sshfs ended"
            os.sched_yield()
        yield server, between
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=False)
        server.kill()
        server.wait()
        client.kill()
        client.wait()


def register(store: Store, number: int) -> None:
    for turn in range(TURNS):
        staged = store.stage("rows")
        (staged.content / "a.txt").write_text(f"{number}.{turn}")
        store.commit(staged, kind="data", producer=Producer(f"f{number}", "r", "s", "data"))


def main(folder: Path, processes: int) -> None:
    """AssertionError: two got one number, a number is missing, or a version isn't whole."""
    shared = folder / "shared"
    shared.mkdir()
    with mounted(shared, folder / "a"), mounted(shared, folder / "b"):
        left = staging.create(folder / "a" / "store", "rows")  # of a process that ends without a word
        children = []
        for number in range(processes):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    register(Store(folder / "ab"[number % 2] / "store"), number)
                    code = 0
                except BaseException:  # noqa: BLE001  a child must not come back into the caller
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(pid)
        ends = [os.waitpid(pid, 0)[1] for pid in children]
        assert ends == [0] * processes, ends
    store = Store(shared / "store")
    versions = store.versions("rows")
    assert versions == list(range(1, TURNS * processes + 1)), versions
    said = []
    for version in versions:
        artifact = store.resolve(f"rows:v{version}")
        store.verify(artifact)
        assert store.describe(artifact)["version"] == version
        said.append((store.content(artifact) / "a.txt").read_text())
    assert sorted(said) == sorted(f"{number}.{turn}" for number in range(processes) for turn in range(TURNS))
    for number in range(processes):
        found = store.find(f"f{number}", "data", "rows")
        assert found is not None and (store.content(found) / "a.txt").read_text() == f"{number}.{TURNS - 1}"
    held = shared / "store" / left.folder.relative_to(folder / "a" / "store")
    assert held.exists(), "its owner is this process, which is alive"
    (held / "owner.json").write_text('{"pid": 1, "start": "0", "boot": "x", "namespace": "y"}')
    old = staging.OLD + 10 + (held / "owner.json").stat().st_mtime
    assert held in staging.clean(shared / "store", old), "an abandoned one goes by its age"
    assert list((shared / "store" / ".staging").iterdir()) == []
    print(f"{processes} processes over two mounts: {len(versions)} versions")


def blocked(folder: Path) -> None:
    """AssertionError: a command hangs when the server of the store does not answer, or says something else."""
    shared = folder / "shared"
    (shared / "store").mkdir(parents=True)
    store = Store(shared / "store")
    staged = store.stage("rows")
    (staged.content / "a.txt").write_text("x")
    store.commit(staged, kind="data")
    (folder / "env.toml").write_text(f'[artifacts]\nstore = "{folder}/a/store"\n')
    command = [sys.executable, "-m", "nemotron_recipes"]
    with mounted(shared, folder / "a") as (server, _):

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=120)

        assert "rows:v1" in run("artifacts", "list").stdout
        os.kill(server.pid, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(len(EVERY)) as together:  # each waits for 8 s
                for line, done in zip(EVERY, together.map(lambda line: run(*line.split()), EVERY), strict=True):
                    assert done.returncode == 2 and "did not answer for 8 s" in done.stderr, (line, done)
            assert run("runs", "shell", "--help").returncode == 0
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert "rows:v1" in run("artifacts", "list").stdout
    print("no command hung")


def falls_silent(folder: Path) -> None:
    """AssertionError: a command that has begun hangs when the store falls silent, or says something else."""
    shared = folder / "shared"
    (shared / "store").mkdir(parents=True)
    store, parents = Store(shared / "store"), {}
    for number in range(40):
        staged = store.stage(f"rows-{number}")
        (staged.content / "a.txt").write_text("x")
        parents = {"data": store.commit(staged, kind="data", parents=parents)}
    (folder / "env.toml").write_text(f'[artifacts]\noutput = "{folder}/a"\n')
    commands = (
        *(("artifacts", "list"), ("lineage", "rows-39"), ("gc", "--dry-run"), ("artifacts", "list", "--json")),
        ("nano3", "data", "prep", "sft", "-c", "tiny"),  # is ended while it writes the run's folder
    )
    with mounted(shared, folder / "a", options="cache=no", line=True) as (_, line):
        assert line is not None
        for words in commands:
            for size in (8_000, 16_000, 32_000):
                line.falls_silent_after(size)
                process = subprocess.Popen(
                    [sys.executable, "-m", "nemotron_recipes", *words],
                    cwd=folder,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                assert line.silent.wait(300), (words, size, "it did not read that much")
                began = time.monotonic()
                said = process.communicate(timeout=300)  # also the ends of both pipes
                seconds = time.monotonic() - began
                line.speaks_again()
                assert process.returncode == 2 and "did not answer for 8 s" in said[1], (words, size, said)
                print(f"{' '.join(words)}, silent after {size} bytes: ended after {seconds:.1f} s")
        listed = [sys.executable, "-m", "nemotron_recipes", "artifacts", "list"]
        assert "rows-39:v1" in subprocess.run(listed, cwd=folder, capture_output=True, text=True, timeout=300).stdout
    print("no command hung")


MODES = {"blocked": blocked, "falls-silent": falls_silent}

if __name__ == "__main__":
    if sys.argv[2] in MODES:
        MODES[sys.argv[2]](Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
