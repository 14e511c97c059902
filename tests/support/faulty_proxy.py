"""A proxy that has bad nights, for any server of HTTP on loopback.

It passes requests on and, on demand, answers with 500s or 429s, closes in the middle of a body,
says nothing until the client gives up, or lets the work be done and loses the answer.
"""

import http.client
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "truncated", "timeout", "lost answer")
IS_FULL_SCALE = bool(os.environ.get("RSR_S3_FULL_SCALE"))
"""Whether objects of 1 GiB are written, whose parts the tests' server joins for many seconds."""
SILENCE_S = 60.0 if IS_FULL_SCALE else 2.0
"""Longer than the clients under test wait; see `AWS_TIMEOUT` in tests/jobs/conftest.py."""
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class FaultyProxy(ThreadingHTTPServer):
    """Passes on to `port`; each request meets a fault with the probability asked for.

    injected: how often each fault was. answered: by the body of a request, how many whole answers
    it got from the server behind.
    """

    daemon_threads = True
    # Clients connect many at a time, and one that the kernel turns away has met no fault of ours.
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = port
        self.injected: Counter[str] = Counter()
        self.answered: Counter[bytes] = Counter()
        self._random = random.Random(0)
        self._share = 0.0
        self._kinds: tuple[str, ...] = FAULTS
        self._mutex = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["FaultyProxy"]:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            self.shutdown()

    @contextmanager
    def faults(self, share: float, *kinds: str) -> Iterator[Counter[str]]:
        """While the block runs, each request fails in one of `kinds` with probability `share`."""
        self._share, self._kinds = share, kinds or FAULTS
        self.injected.clear()
        self._random.seed(0)
        try:
            yield self.injected
        finally:
            self._share = 0.0

    def draw(self) -> str | None:
        with self._mutex:
            if self._random.random() >= self._share:
                return None
            fault = self._random.choice(self._kinds)
            self.injected[fault] += 1
            return fault

    def count_answer(self, body: bytes) -> None:
        with self._mutex:
            self.answered[body] += 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away are the point of this server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def _pass_on(self) -> None:
        fault = self.server.draw()
        body = self._read_body()
        if fault == "timeout":
            time.sleep(SILENCE_S)
            self._hang_up()
            return
        if fault in ("500", "429"):
            self._answer(int(fault), {}, b"<Error><Code>InternalError</Code></Error>")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream_port)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        if fault == "lost answer":
            self._hang_up()
            return
        headers = {k: v for k, v in response.getheaders() if k.lower() not in HOP_HEADERS}
        length = int(response.getheader("Content-Length") or len(content))
        if fault is None:
            self.server.count_answer(body)
        self._answer(response.status, headers, content, length, cut=fault == "truncated")

    def _read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(
        self,
        status: int,
        headers: dict[str, str],
        content: bytes,
        length: int | None = None,
        *,
        cut: bool = False,
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def log_message(self, *_arguments: Any) -> None:
        """Nobody reads it."""
