"""A real docker daemon for tests: its own socket, images and containers; no network, no registry, nobody else's."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMAGE = "nemotron-test:1"
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/sbin")
_NEEDED = ("dockerd", "docker", "containerd", "runc")
_SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None)


@dataclass
class Daemon:
    """A daemon that is up; `stop` and `start` take it down and up again."""

    folder: Path
    flags: tuple[str, ...] = ()
    before: tuple[str, ...] = ()  # a command that runs it elsewhere
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.folder}/socket"

    @property
    def env(self) -> dict[str, str]:
        """Makes commands speak to this daemon."""
        return {"DOCKER_HOST": self.host}

    def docker(self, *argv: str, code: int | None = 0, **options: Any) -> str:
        """stdout of a docker command; `code` is the exit status that it must have (None: any)."""
        done = subprocess.run(
            ("docker", *argv),
            **{"env": {**os.environ, **self.env}, "capture_output": True, "text": True, "timeout": 120, **options},
        )
        assert code is None or done.returncode == code, f"docker {argv}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Returns when it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.before,
                    *("dockerd", f"--host={self.host}", f"--pidfile={self.folder}/pid"),
                    *(f"--data-root={self.folder}/data", f"--exec-root={self.folder}/exec"),
                    *(
                        "--bridge=none",
                        "--iptables=false",
                        "--ip6tables=false",
                        "--ip-masq=false",
                        "--ip-forward=false",
                    ),
                    *self.flags,
                ],
                env={**os.environ, "PATH": _SEARCH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        deadline = time.monotonic() + 120
        while subprocess.run(
            ("docker", "version"), env={**os.environ, **self.env}, capture_output=True, timeout=60
        ).returncode:
            said = (self.folder / "log").read_text(errors="replace")[-3000:]
            assert self.process.poll() is None, f"dockerd ended:\n{said}"
            assert time.monotonic() < deadline, f"dockerd does not answer:\n{said}"
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it by that signal; returns when it has."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(120)
        supervised = self.folder / "exec" / "containerd" / "containerd.pid"
        if supervised.exists():  # killed with its parent; where no init buries it, the next dockerd takes it for alive
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(supervised.read_text()), signal.SIGKILL)
            supervised.unlink()

    def import_image(self, name: str = IMAGE, *changes: str, **files: str) -> None:
        """An image that holds nothing but folders, links as this system has them, and `files` (name -> text)."""
        root = Path(tempfile.mkdtemp(dir=self.folder))
        for folder in ("tmp", "etc", "proc", "sys", "dev"):
            (root / folder).mkdir()
        (root / "tmp").chmod(0o1777)
        for path in _SYSTEM:
            if os.path.islink(path):
                (root / path[1:]).symlink_to(os.readlink(path))
        for file, text in files.items():
            (root / file).write_text(text)
            (root / file).chmod(0o755)
        archive = self.folder / "image.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(root, arcname=".")
        path = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
        lines = (f"ENV PATH={path}", f"ENV PYTHONPATH={ROOT}", "ENV LC_ALL=C.UTF-8", *changes)
        self.docker("import", *(word for line in lines for word in ("--change", line)), str(archive), name)
        shutil.rmtree(root)

    def load_foreign_image(self, name: str, architecture: str) -> None:
        """An empty image for another architecture, as `docker save` writes one."""
        layer = io.BytesIO()
        tarfile.open(fileobj=layer, mode="w").close()
        digest = hashlib.sha256(layer.getvalue()).hexdigest()
        config = {"architecture": architecture, "os": "linux", "config": {}}
        config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
        files = {
            "layer.tar": layer.getvalue(),
            "config.json": json.dumps(config).encode(),
            "manifest.json": json.dumps(
                [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
            ).encode(),
        }
        archive = self.folder / "foreign.tar"
        with tarfile.open(archive, "w") as tar:
            for file, content in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        self.docker("load", "--input", str(archive))


def mounts() -> list[str]:
    """What a container needs of this system to run this Python with its packages, read-only."""
    folders = [path for path in _SYSTEM if os.path.isdir(path) and not os.path.islink(path)]
    folders += [sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix), str(ROOT)]
    found: list[str] = []
    for folder in dict.fromkeys(folders):
        if not any(Path(folder).is_relative_to(other) for other in found):
            found.append(folder)
    return [f"{folder}:{folder}:ro" for folder in found]


def profile(**fields: Any) -> dict[str, Any]:
    """Of a profile that runs this Python in a container of `IMAGE`."""
    limits = ["stack=67108864"]  # not every root may raise memlock
    own = {"python": sys.executable, "mounts": mounts(), "network": "none", "ulimits": limits, "gpus": "none"}
    return {"executor": "docker", "container_image": IMAGE, **own, **fields}


def require() -> None:
    """Skip the test where there can be no daemon."""
    missing = [name for name in _NEEDED if shutil.which(name, path=_SEARCH) is None]
    if missing:
        pytest.skip(f"no docker here: {', '.join(missing)} missing; make test-system")
    if os.geteuid() != 0:
        pytest.skip("a docker daemon of its own needs root")


@contextlib.contextmanager
def daemon(*flags: str, before: tuple[str, ...] = ()) -> Iterator[Daemon]:
    """A daemon with `IMAGE`, which ends with the block, or else with this process."""
    made = Daemon(Path(tempfile.mkdtemp(prefix="docker-")), flags, before)
    try:
        made.start()
        made.import_image()
        yield made
    finally:
        if made.process is not None:
            if made.process.poll() is None:
                for container in made.docker("ps", "--quiet", code=None).split():
                    made.docker("kill", container, code=None)
                made.stop()
            _unmount_below(made.folder)
        shutil.rmtree(made.folder, ignore_errors=True)


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _unmount_below(folder: Path) -> None:
    """What a daemon that was killed left mounted."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed([point for point in points if Path(point).is_relative_to(folder)]):
        subprocess.run(("umount", "--lazy", point), check=False, capture_output=True)
