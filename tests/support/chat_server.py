"""A small server with OpenAI's chat API, in a process of its own, that fails on request.

`python chat_server.py FAULTS DELAY_S`: FAULTS is a comma-separated list of 429, 500, drop, hang,
garbage and ok. The n-th different prompt meets the n-th fault, round and round, at its first
request, and none at a later one. What a trace says decides the rest: see `_reply`. GET /counts
tells how often each prompt was asked, and with which key.
"""

import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG_S = 30.0


@dataclass(frozen=True)
class ChatServer:
    """A running server. url: of the API, up to /v1."""

    url: str

    def counts(self) -> dict[str, Any]:
        """`requests`: by trace, how often it was asked about. `keys`: that were sent."""
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/counts", timeout=10) as reply:
            counts: dict[str, Any] = json.load(reply)
        return counts

    @property
    def requests(self) -> dict[str, int]:
        counts: dict[str, int] = self.counts()["requests"]
        return counts


@contextmanager
def chat_server(*faults: str, delay_s: float = 0.0) -> Iterator[ChatServer]:
    """A server while the block lasts."""
    command = [sys.executable, __file__, ",".join(faults) or "ok", str(delay_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield ChatServer(f"http://127.0.0.1:{int(process.stdout.readline())}/v1")
    finally:
        process.kill()
        process.wait()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: tuple[str, ...] = ()
    delay_s = 0.0
    lock = threading.Lock()
    counts: dict[str, int] = {}  # noqa: RUF012
    keys: set[str] = set()  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path == "/counts":
            with self.lock:
                self._send(200, {"requests": self.counts, "keys": sorted(self.keys)})
        else:
            self._send(200, {"object": "list", "data": [{"id": "oracle", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        found = re.search(r"<solution>\n(.*)\n</solution>", prompt, re.DOTALL)
        trace = found[1] if found else prompt
        with self.lock:
            self.keys.add(self.headers.get("Authorization", ""))
            times = self.counts[trace] = self.counts.get(trace, 0) + 1
            number = list(self.counts).index(trace)
        time.sleep(self.delay_s)
        fault = self.faults[number % len(self.faults)] if times == 1 else "ok"
        self._fail(fault) if fault != "ok" else self._reply(trace, body)

    def _fail(self, fault: str) -> None:
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "hang":
            time.sleep(HANG_S)
        elif fault == "garbage":
            self._send_bytes(200, b"<html>not an answer</html>", "text/html")
        else:
            headers = {"Retry-After": "0"} if fault == "429" else {}
            self._send(int(fault), {"error": {"message": f"injected {fault}"}}, headers)

    def _reply(self, trace: str, body: dict[str, Any]) -> None:
        if "REFUSE" in trace:
            self._send(400, {"error": {"message": "this row is too long for me"}})
            return
        if "NEVER" in trace:
            self._send(500, {"error": {"message": "always broken"}})
            return
        if "LOCKED" in trace:
            key = self.headers.get("Authorization", "")
            self._send(401, {"error": {"message": f"no entry with {key}"}})
            return
        better = trace.replace("wrong", "right")
        text = f"<think>\nhm\n</think>\n<refined_trace>\n{better}\n</refined_trace>"
        reason = "stop"
        if "CUT" in trace:
            text, reason = text[:-30], "length"
        if "PLAIN" in trace:
            text = better
        if "FILTER" in trace:
            reason = "content_filter"
        choice = {
            "index": 0,
            "finish_reason": reason,
            "message": {"role": "assistant", "content": text},
        }
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        self._send(
            200,
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [choice],
                "usage": usage,
            },
        )

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(value).encode(), "application/json", headers)

    def _send_bytes(
        self, status: int, content: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    # As many connections as a test opens at once: the standard library's 5 refuse some of them.
    request_queue_size = 128
    daemon_threads = True


def main(faults: str, delay_s: str) -> None:
    _Handler.faults, _Handler.delay_s = tuple(faults.split(",")), float(delay_s)
    server = _Server(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
