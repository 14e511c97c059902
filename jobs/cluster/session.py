"""A Ray cluster to work on: one that is there, or this machine; how many workers fit on it.

The only difference between a GPU cluster and CPU machines is what a worker asks Ray for.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.ray_constants import RAY_WORKER_NICENESS
from ray._private.services import canonicalize_bootstrap_address

from rsr.jobs import interrupt
from rsr.jobs.cluster.address import LOCAL, cluster_to_join
from rsr.jobs.cluster.ray_folder import is_ray_folder, ray_folder, require_token
from rsr.jobs.errors import UsageError, first_line

OBJECT_STORE_BYTES = 128 << 20
"""Shared memory of a local Ray whose workers send nothing large."""
CONNECT_SECONDS = 10.0


@contextmanager
def ray_session(
    address: str | None, *, verbose: bool, object_store_bytes: int | None = OBJECT_STORE_BYTES
) -> Iterator[None]:
    """Join the cluster at `address`, else start Ray on this machine; leave it after.

    address: `auto`, host:port or `local`; None is what RAY_ADDRESS says, else `local`.
    object_store_bytes: shared memory of a Ray that is started; None is what Ray takes by itself.
    Raises `UsageError` if no cluster answers there.
    """
    address = cluster_to_join(address)
    if address:
        _require_answer(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with ExitStack() as held:
        local: dict[str, Any] = {}
        if not address:
            require_token()
            # Ray's own 15 would leave the work to whatever else the machine does.
            os.environ.setdefault(RAY_WORKER_NICENESS, "0")
            folder = held.enter_context(ray_folder())
            local = {
                "include_dashboard": False,
                "object_store_memory": object_store_bytes,
                "_temp_dir": str(folder),
            }
        with _keeping_signals():
            try:
                ray.init(
                    address or LOCAL,
                    log_to_driver=verbose,
                    logging_level=logging.INFO if verbose else logging.ERROR,
                    **local,
                )
            except Exception as error:
                # Of a cluster that is there but broken, Ray raises whatever it stumbles over.
                if address:
                    raise _no_cluster(address, error) from error
                raise
        # Ray tells of dead workers on stdout, which is for results.
        held.enter_context(redirect_stdout(sys.stderr))
        held.callback(ray.shutdown)
        yield


@contextmanager
def _keeping_signals() -> Iterator[None]:
    """While Ray starts: it puts a handler of its own in the driver's place.

    The processes that it starts do not listen to a hangup: the driver does, and ends them in order.
    """
    handlers = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def temporary_files_with_ray() -> Iterator[None]:
    """Let a worker's temporary files be removed together with the run's own Ray."""
    node = ray._private.worker.global_worker.node
    before = tempfile.tempdir
    if node is not None and is_ray_folder(Path(node.get_temp_dir_path())):
        tempfile.tempdir = node.get_temp_dir_path()
    try:
        yield
    finally:
        tempfile.tempdir = before


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes, at a head that has just ended, say."""
    try:
        # What `auto` finds: the last `ray start` of this machine, or any Ray that is running.
        found = canonicalize_bootstrap_address("auto") if address == "auto" else address
    except ConnectionError as error:
        raise _no_cluster(address, error) from error
    host, _, port = (found or "").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(
            f"--address {address}: expected auto, host:port of the head node, or local"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"no Ray cluster answers at {address} ({first_line(error)}): start one with `ray start`, "
        "give another --address (RAY_ADDRESS), or, if it wants a token, set RAY_AUTH_TOKEN"
    )


@dataclass(frozen=True, slots=True)
class Room:
    """What one worker asks Ray for, and by which every node's workers are counted."""

    resources: dict[str, float]

    @property
    def num_places(self) -> int:
        """How many workers the nodes that are alive hold; a worker is never spread over two."""
        return sum(self._on_node(node["Resources"]) for node in _nodes())

    def _on_node(self, available: dict[str, float]) -> int:
        if "num_gpus" in self.resources:
            return int(available.get("GPU", 0) // self.resources["num_gpus"])
        return int(available.get("CPU", 0) // self.resources["num_cpus"])


def room_for_workers(num_workers: int | None, tensor_parallel_size: int) -> Room:
    """One worker for each GPU or tensor-parallel group; without GPUs, one for each machine.

    num_workers: how many there will be, or None. Raises `UsageError` if no node, or on this
    machine alone not enough of it, is there for them.
    """
    nodes = [node["Resources"] for node in _nodes()]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if not any(gpus):
        # A Ray worker gets as many OpenMP threads as CPUs.
        cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
        if not cpus:
            raise UsageError(
                "the Ray cluster has neither GPUs nor CPUs yet; start its machines first"
            )
        each = -(-(num_workers or 1) // len(cpus))
        return Room({"num_cpus": max(1, min(cpus) // each)})
    room = Room({"num_gpus": tensor_parallel_size, "num_cpus": 1})
    if max(gpus) < tensor_parallel_size:
        raise UsageError(
            f"--tensor-parallel-size {tensor_parallel_size}: the GPUs of one copy of the model "
            f"must be in one machine, and none has more than {max(gpus)}"
        )
    if num_workers is not None and len(nodes) == 1 and num_workers > room.num_places:
        raise UsageError(
            f"{num_workers} workers of {tensor_parallel_size} GPUs need "
            f"{num_workers * tensor_parallel_size}; there are {sum(gpus)}"
        )
    return room


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]
