"""Object storage for long tests: servers that speak its protocols, and the packages that talk to it.

The clients are those of the extras s3 and gs, as constraints.txt pins them; moto asks for another antlr4 than the rest
of the environment has. Both lie in folders of their own, put in front for the processes that need them. Either in the
one that NEMOTRON_OBJECT_STORES names, or in one below .schemas/ that is made here (350 MB).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "clients": ("s3fs", "gcsfs", "--constraint", str(ROOT / "constraints.txt")),
    "servers": ("moto[server]==5.2.5", "gcp-storage-emulator==2026.7.19"),
}
LONGEST = 300  # seconds; the machine may be busy


def packages(kind: str) -> Path:
    """The folder with the clients, or the servers."""
    ready = os.environ.get("NEMOTRON_OBJECT_STORES")
    folder = Path(ready or ROOT / ".schemas" / "object-stores") / kind
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", f"{folder}.tmp", *PACKAGES[kind]]
        subprocess.run(pip, check=True)
        os.rename(f"{folder}.tmp", folder)
    return folder


@dataclass
class ObjectStore:
    """A server that runs. `environment`: what a process needs to speak with it."""

    scheme: str
    environment: dict[str, str]
    process: subprocess.Popen[str]

    def python(self, code: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run Python code; `words` are its arguments. A variable that is set to "" is left out."""
        told = {**self.environment, **environment}
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            env={name: value for name, value in told.items() if value},
            capture_output=True,
            text=True,
            timeout=LONGEST,
        )

    def put(self, files: dict[str, Path]) -> None:
        """Upload files: name in the bucket "rows" -> file."""
        code = (
            "import sys, fsspec\n"
            "store = fsspec.filesystem(sys.argv[1])\n"
            "if not store.exists('rows'): store.mkdir('rows')\n"
            "for name, file in zip(sys.argv[2::2], sys.argv[3::2]):\n"
            "    store.pipe('rows/' + name, open(file, 'rb').read())\n"
        )
        done = self.python(code, self.scheme, *(str(word) for pair in files.items() for word in pair))
        assert done.returncode == 0, done.stderr


@contextmanager
def object_store(scheme: str) -> Iterator[ObjectStore]:
    """An empty store: "s3" or "gs"."""
    environment = {**os.environ, "PYTHONPATH": f"{packages('clients')}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    server = [sys.executable, str(ROOT / "tests" / "helpers" / "object_store_server.py"), scheme]
    with subprocess.Popen(
        server,
        env={**environment, "PYTHONPATH": str(packages("servers"))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, f"the {scheme} server did not start"
            yield ObjectStore(scheme, environment | _told(scheme, address), process)
        finally:
            process.kill()


def _told(scheme: str, address: str) -> dict[str, str]:
    """What a user of this store would set."""
    if scheme == "gs":
        return {
            "STORAGE_EMULATOR_HOST": address,
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it speaks gRPC, which the emulator doesn't
        }
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # no credentials from a machine of Amazon's
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
