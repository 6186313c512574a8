"""A hub on this machine that speaks the few calls of huggingface_hub, and can fail on purpose.

It stands in for the hub alone; the client is the real library. `fail`: file or ORG/NAME -> what happens to the next
requests for it, first one first: "rate" (429, and how long to wait), "cut" (the connection ends in the middle; files
alone), "error" (500), "whole" (of a file all, whatever range was asked for), "" (nothing). A repository whose name
begins with `gated` tells what it has, and gives nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


class HubServer:
    """`with HubServer({"ORG/NAME": {"config.json": b"..."}}) as hub: hub.url`"""

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.fail: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str, str]] = []  # method, path, range
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *given: Any) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.asked.append((request.command, path, request.headers.get("Range", "")))
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(request, match[1], match[2])
        elif match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", path):
            self._tree(request, match[1], match[2] or "", "recursive=true" in request.path.lower())
        elif match := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(request, match[1], match[3], body)
        else:
            _send(request, 404, b"")

    def _info(self, request: BaseHTTPRequestHandler, name: str, revision: str | None) -> None:
        files = self.repositories.get(name)
        if self.fail.get(name):
            answers = {"rate": (429, {"RateLimit": '"api";r=0;t=0'}), "error": (500, {})}
            status, headers = answers[self.fail[name].pop(0)]
            _send(request, status, b"", headers)
            return
        if files is None or revision not in (None, "main", COMMIT):
            code = "RepoNotFound" if files is None else "RevisionNotFound"
            _send(request, 404, b"{}", {"X-Error-Code": code})
            return
        siblings = [{"rfilename": n, "size": len(c), "blobId": _etag(c)} for n, c in files.items()]
        told = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        _send(request, 200, json.dumps(told).encode(), {"Content-Type": "application/json"})

    def _tree(self, request: BaseHTTPRequestHandler, name: str, folder: str, deep: bool) -> None:
        """Files and folders in a folder, or all below it."""
        start = f"{folder}/" if folder else ""
        below = {n.removeprefix(start): c for n, c in self.repositories.get(name, {}).items() if n.startswith(start)}
        tree = [{"type": "file", "path": start + n, "size": len(c), "oid": _etag(c)}
                for n, c in below.items() if deep or "/" not in n]  # fmt: skip
        folders = sorted({n.partition("/")[0] for n in below if "/" in n})
        tree += [{"type": "directory", "path": start + n, "size": 0, "oid": _etag(n.encode())} for n in folders]
        _send(request, 200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _file(self, request: BaseHTTPRequestHandler, name: str, file: str, body: bool) -> None:
        content = self.repositories.get(name, {}).get(file)
        if content is None:
            _send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if name.partition("/")[2].startswith("gated"):
            _send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
            return
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        trouble = self.fail[file].pop(0) if body and self.fail.get(file) else ""
        if trouble == "rate":
            _send(request, 429, b"", {"Retry-After": "0"})
            return
        if trouble == "error":
            _send(request, 500, b"")
            return
        asked = re.match(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "") if trouble != "whole" else "")
        first = int(asked[1]) if asked else 0
        part = content[first : int(asked[2]) + 1 if asked and asked[2] else None]
        if asked:
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        if trouble == "cut":
            _send(request, 200, part, headers, written=len(part) // 2)
            request.close_connection = True
            return
        _send(request, 206 if asked else 200, part if body else b"", headers, length=len(part))


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    headers: dict[str, str] | None = None,
    length: int | None = None,
    written: int | None = None,
) -> None:
    request.send_response(status)
    for key, value in (headers or {}).items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(content) if length is None else length))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content[:written])
