"""A real registry on this machine (Debian's docker-registry), open or with one user."""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

USER, PASSWORD = "$oauthtoken", "s3cr3t-of-the-registry"
_HTPASSWD = "$2y$05$9VFkvbqxXKk2incHJ1gQkOOXN2WbomcphWqglK.HISsqIR.gJrEPC"  # bcrypt of PASSWORD
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_INDEX = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class Registry:
    """host: `127.0.0.1:PORT`, as references have it."""

    host: str
    private: bool

    @property
    def auth(self) -> str:
        return base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def put_image(self, name: str, tag: str, *architectures: str, note: str = "") -> str:
        """An image that is empty, of one architecture or an index of several; its digest. `note` makes it another."""
        entries = []
        content = io.BytesIO()
        tarfile.open(fileobj=content, mode="w").close()
        rootfs = {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(content.getvalue()).hexdigest()]}
        packed = gzip.compress(content.getvalue(), mtime=0)
        layer = {"mediaType": _LAYER, "digest": self._blob(name, packed), "size": len(packed)}
        for architecture in architectures:
            tree = {"architecture": architecture, "os": "linux", "config": {"Labels": {"note": note}}, "rootfs": rootfs}
            config = json.dumps(tree).encode()
            blob = self._blob(name, config)
            manifest = {"schemaVersion": 2, "mediaType": _MANIFEST, "layers": [layer]}
            manifest["config"] = {"mediaType": _CONFIG, "digest": blob, "size": len(config)}
            body = json.dumps(manifest).encode()
            digest = self._manifest(name, f"{tag}-{architecture}" if len(architectures) > 1 else tag, body, _MANIFEST)
            platform = {"architecture": architecture, "os": "linux"}
            entries.append({"mediaType": _MANIFEST, "digest": digest, "size": len(body), "platform": platform})
        if len(entries) == 1:
            return str(entries[0]["digest"])
        index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": entries}
        return self._manifest(name, tag, json.dumps(index).encode(), _INDEX)

    def _blob(self, name: str, content: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        _, headers = self._send("POST", f"/v2/{name}/blobs/uploads/")
        place = headers["Location"]
        self._send("PUT", f"{place}{'&' if '?' in place else '?'}digest={digest}", content, "application/octet-stream")
        return digest

    def _manifest(self, name: str, tag: str, body: bytes, kind: str) -> str:
        _, headers = self._send("PUT", f"/v2/{name}/manifests/{tag}", body, kind)
        return headers["Docker-Content-Digest"]

    def _send(self, method: str, url: str, body: bytes = b"", kind: str = "") -> tuple[int, dict[str, str]]:
        url = url if url.startswith("http") else f"http://{self.host}{url}"
        request = urllib.request.Request(url, data=body, method=method)
        if kind:
            request.add_header("Content-Type", kind)
        if self.private:
            request.add_header("Authorization", f"Basic {self.auth}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers)


@contextlib.contextmanager
def registry(folder: Path, private: bool = False) -> Iterator[Registry]:
    """One that ends with the block; it keeps its images in `folder`."""
    program = shutil.which("docker-registry", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    if program is None:
        pytest.skip("no docker-registry here; make test-system")
    folder.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {"version": "0.1", "storage": {"filesystem": {"rootdirectory": str(folder / "data")}}}
    config["http"] = {"addr": host}
    if private:
        (folder / "users").write_text(f"{USER}:{_HTPASSWD}\n")
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "users")}}
    (folder / "config.yml").write_text(json.dumps(config))
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not _answers(host):
            said = (folder / "log").read_text(errors="replace")[-2000:]
            assert process.poll() is None, f"the registry ended:\n{said}"
            assert time.monotonic() < deadline, f"the registry does not answer:\n{said}"
            time.sleep(0.05)
        yield Registry(host, private)
    finally:
        process.terminate()
        process.wait(60)


def _answers(host: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{host}/v2/", timeout=10).close()
    except urllib.error.HTTPError as error:
        return error.code == 401
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
    return True
