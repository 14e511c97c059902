"""An S3 server on loopback: moto's, over real HTTP, behind a proxy that has bad nights."""

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from faulty_proxy import FaultyProxy

START_PATIENCE_S = 60.0


@contextmanager
def s3_server() -> Iterator[FaultyProxy]:
    """A running proxy before a running server."""
    with _moto() as port, FaultyProxy(port).running() as proxy:
        yield proxy


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
