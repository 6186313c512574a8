"""FakeWandb: a local server that answers only the HTTP and GraphQL calls that the real wandb SDK makes for us.

It keeps what W&B keeps: runs with their history by line number, artifacts deduplicated by digest within a collection,
aliases that move, which run used and which run made an artifact. Faults: `down` (connections are cut), `refuse_key`,
`delay` (seconds before each answer), `failing` ((status, n): the next n requests are answered with it, such as 429),
`cut_at` (the n-th request from now is carried out, but its answer is cut off), `refuse` ((operation, text): a request
of that name whose variables hold the text is answered with an error).
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from tests.helpers.fake_wandb_answers import Answers, Artifact, Run, Tree

KEY = "0123456789abcdef" * 2 + "01234567"


class FakeWandb(ThreadingHTTPServer, Answers):
    """`with FakeWandb() as server:`; `server.url` is WANDB_BASE_URL, KEY the only key that it takes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.RLock()
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.unknown: list[str] = []
        self.down = self.refuse_key = False
        self.delay = 0.0
        self.failing: tuple[int, int] | None = None
        self.cut_at: int | None = None
        self.refuse: tuple[str, str] | None = None

    def __enter__(self) -> FakeWandb:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""

    @property
    def asked(self) -> list[str]:
        """The requests that count: no telemetry of the SDK's own."""
        return [request for request in list(self.requests) if "/sdk/otel/" not in request]

    def named(self, alias: str) -> Artifact:
        """The artifact `COLLECTION:ALIAS`."""
        collection, _, wanted = alias.partition(":")
        found = [
            a
            for a in self.artifacts.values()
            if a.collection == collection and (wanted in a.aliases or wanted == f"v{a.number}") and a.state != "PENDING"
        ]
        assert len(found) == 1, f"{alias}: {found}"
        return found[0]

    def edges(self) -> set[tuple[str, str, str]]:
        """("used" or "made", run, COLLECTION:vN)"""
        label = {a.id: f"{a.collection}:v{a.number}" for a in self.artifacts.values()}
        return {
            (what, run.name, label[i])
            for run in self.runs.values()
            for what, ids in (("used", run.used), ("made", run.made))
            for i in ids
        }

    def wait_for(self, count: int, process: subprocess.Popen[bytes]) -> None:
        """Until so many more requests have come, or the process has ended."""
        until = len(self.asked) + count
        while len(self.asked) < until and process.poll() is None:
            time.sleep(0.005)

    def stream(self, run: str, body: Tree) -> None:
        with self.lock:
            found = self.runs[run]
            for name, chunk in (body.get("files") or {}).items():
                lines = [json.loads(line) for line in chunk["content"]] if name.endswith((".json", ".jsonl")) else []
                if name == "wandb-history.jsonl":
                    for number, line in enumerate(lines, chunk["offset"]):
                        same = json.dumps(found.history.get(number, line)) == json.dumps(line)  # NaN is not NaN
                        assert same, f"line {number} was something else"
                        found.history[number] = line
                elif name == "wandb-summary.json":
                    found.summary = lines[-1]
            if body.get("complete"):
                found.complete, found.exit_code = True, body.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if server.down:
            self.close_connection = True
            self.connection.close()
            return None
        time.sleep(server.delay)
        operation = ""
        if self.path.startswith("/graphql"):
            request = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            operation = request.get("operationName") or (found[1] if found else "")
        with server.lock:
            server.requests.append(operation or f"{self.command} {self.path}")
            server.bodies.append(body)
        if server.failing is not None and "/sdk/otel/" not in self.path:
            status, left = server.failing
            server.failing = (status, left - 1) if left > 1 else None
            return self._reply(status, {"errors": [{"message": "try again later"}]})
        if server.refuse_key or not self._has_key():
            return self._reply(401, {"errors": [{"message": "user is not logged in"}]})
        if operation and server.refuse and operation == server.refuse[0] and server.refuse[1].encode() in body:
            answer: Tree = {"errors": [{"message": f"{operation} refused: storage quota exceeded"}]}
        elif operation:
            data = server.answer(operation, request["query"], request.get("variables") or {})
            answer = {"data": data} if data else {"errors": [{"message": f"{operation} isn't faked"}]}
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            server.stream(unquote(found[1]), json.loads(body))
            answer = {}
        elif self.path.startswith("/sdk/otel/"):
            answer = {}
        elif self.path.startswith("/blob/"):
            if self.command == "GET":
                return self._bytes(server.blobs[self.path])
            server.blobs[self.path] = body
            answer = {}
        else:
            server.unknown.append(f"{self.command} {self.path}")
            answer = {}
        if server.cut_at is not None:
            server.cut_at -= 1
            if server.cut_at <= 0:
                server.cut_at = None
                self.close_connection = True
                self.connection.close()
                return None
        return self._reply(200, answer)

    do_GET = do_POST = do_PUT = _any

    def _has_key(self) -> bool:
        if self.path.startswith("/blob/"):
            return True
        if self.path.startswith("/sdk/otel/"):
            return True
        given = self.headers.get("Authorization", "")
        return given == "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()

    def _reply(self, status: int, answer: Tree) -> None:
        self._bytes(json.dumps(answer).encode(), status)

    def _bytes(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
