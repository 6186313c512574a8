"""A server that speaks OpenAI's chat completions protocol: judges to test against."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a model answers: text, or (status, headers) instead.
Answer = Callable[[str, int], "str | tuple[int, dict[str, str]]"]


@contextmanager
def judge_server(models: dict[str, Answer]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(base_url, requests so far). An answer gets the prompt and how often the model was asked just that before."""
    requests: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with lock:
                before = sum(one["model"] == body["model"] and one["prompt"] == prompt for one in requests)
                entry = {"model": body["model"], "prompt": prompt, "authorization": self.headers.get("Authorization")}
                requests.append(entry)
            known = self.path == "/v1/chat/completions" and body["model"] in models
            answer = models[body["model"]](prompt, before) if known else (404, {})
            status, headers = (200, {}) if isinstance(answer, str) else answer
            message = {"role": "assistant", "content": answer if isinstance(answer, str) else ""}
            reply = {"id": "1", "object": "chat.completion", "model": body["model"],
                     "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}  # fmt: skip
            content = json.dumps(reply if status == 200 else {"error": {"message": "no"}}).encode()
            self.send_response(status)
            for name, value in {
                **headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
