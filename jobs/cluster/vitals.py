"""Whether the Ray that a run works on is still there.

Without its control store, Ray goes on for a minute and then ends the driver's process without a
word; a question that needs the store, such as `ray.nodes()`, waits for that end. A run therefore
looks before it asks, and ends in order before Ray ends it.
"""

import socket
import time

import ray

SILENCE_SECONDS = 30.0
"""The head may be silent for this long: it may come back. Of Ray's minute, what is left is for
telling the user and for leaving Ray, which takes some seconds."""
CONNECT_SECONDS = 2.0
PROBE_SECONDS = 2.0
"""Between two looks at a head that answered."""


class RayEndedError(Exception):
    """The Ray of a run is gone, and no worker will ever answer again: the reason is the message."""


class Vitals:
    """Watches what all workers of the Ray that this process has joined depend on."""

    def __init__(self) -> None:
        self._node = ray._private.worker.global_worker.node
        self._address: str = ray.get_runtime_context().gcs_address
        self._looked_at = time.monotonic()
        self._silent_since: float | None = None

    def check(self) -> None:
        """Raise `RayEndedError` if a process of the run's own Ray has ended, or a head is silent.

        Takes up to `CONNECT_SECONDS` where a head does not answer, and no time at all otherwise.
        """
        if process := self._ended_process():
            raise RayEndedError(
                f"{process}, a process of the Ray that this run started, has ended (out of memory, "
                "say): start the same command again"
            )
        if time.monotonic() - self._looked_at >= PROBE_SECONDS:
            self.is_answering()
        if self._silent_since is None:
            return
        silence = time.monotonic() - self._silent_since
        if silence >= SILENCE_SECONDS:
            raise RayEndedError(
                f"the head of the Ray cluster, {self._address}, has not answered for "
                f"{silence:.0f} s: when it is back, start the same command again"
            )

    def is_answering(self) -> bool:
        """Whether the control store takes a connection now; if not, nothing must be asked of it."""
        host, _, port = self._address.rpartition(":")
        self._looked_at = time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except OSError:
            self._silent_since = self._silent_since or self._looked_at
            return False
        self._silent_since = None
        return True

    def _ended_process(self) -> str | None:
        """Of a Ray that this run started: a process that has ended without which none works."""
        if self._node is None:
            return None
        ended = {name for name, _ in self._node.dead_processes()}
        return next((name for name in ("raylet", "gcs_server") if name in ended), None)
