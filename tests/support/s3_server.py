"""An S3 server on loopback, and a proxy before it that has bad nights.

The server is moto's, over real HTTP. The proxy passes requests on and, on demand, answers with
500s, closes in the middle of a body, says nothing until the client gives up, or does the work and
loses the answer.
"""

import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "truncated", "timeout", "lost answer")
SILENCE_S = 2.0
"""Longer than the clients under test wait; see `AWS_TIMEOUT` in test_storage.py."""
START_PATIENCE_S = 60.0
HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class FaultyProxy(ThreadingHTTPServer):
    """Passes on to `port`; each request meets a fault with the probability asked for.

    injected: how often each fault was.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream_port = port
        self.injected: Counter[str] = Counter()
        self._random = random.Random(0)
        self._share = 0.0
        self._kinds: tuple[str, ...] = FAULTS
        self._mutex = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

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
        if fault == "500":
            self._answer(500, {}, b"<Error><Code>InternalError</Code></Error>")
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


@contextmanager
def s3_server() -> Iterator[FaultyProxy]:
    """A running proxy before a running server."""
    with _moto() as port:
        proxy = FaultyProxy(port)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.shutdown()


@contextmanager
def _moto() -> Iterator[int]:
    """The port of a server in a process of its own.

    Not in this one: vLLM asks every object of every loaded module for its attributes, and those
    of moto's web framework raise outside of a request.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _wait_for(port, server)
            yield port
        finally:
            server.terminate()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert server.poll() is None, f"moto's server ended with {server.returncode}"
            assert time.monotonic() < end, "moto's server does not answer"
            time.sleep(0.1)


def make_bucket(proxy: FaultyProxy, name: str) -> None:
    """moto takes any signature, but wants one."""
    scope = "Credential=key/20260101/us-east-1/s3/aws4_request"
    signature = f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=x"
    connection = http.client.HTTPConnection("127.0.0.1", proxy.upstream_port)
    connection.request("PUT", f"/{name}", headers={"Authorization": signature})
    assert connection.getresponse().status == 200
    connection.close()
