"""One folder behind two caching network mounts: sshfs over the protocol of a real sftp-server, without ssh between.

    unshare --mount --propagation private python -m tests.helpers.caching_mounts FOLDER PROCESSES|blocked

What one mount has written the other may deny for a while, as on NFS. Needs root, /dev/fuse, sshfs and sftp-server.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
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


@contextmanager
def mounted(folder: Path, point: Path, options: str = CACHING) -> Iterator[subprocess.Popen[bytes]]:
    """`folder` at `point`; yields the sftp-server, which may be stopped."""
    point.mkdir()
    ours, theirs = socket.socketpair()
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
        yield server
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
    old = staging.OLD + 10 + held.stat().st_mtime
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
    with mounted(shared, folder / "a") as server:

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, timeout=120)

        assert "rows:v1" in run("artifacts", "list").stdout
        os.kill(server.pid, signal.SIGSTOP)
        try:
            for words in (("artifacts", "list"), ("lineage", "rows"), ("gc", "--dry-run"), ("runs", "list")):
                done = run(*words)
                assert done.returncode == 2 and "did not answer for 8 s" in done.stderr, (words, done)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert "rows:v1" in run("artifacts", "list").stdout
    print("no command hung")


if __name__ == "__main__":
    if sys.argv[2] == "blocked":
        blocked(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), int(sys.argv[2]))
