"""A Ray cluster of several nodes on this machine, which loses workers and nodes.

Nothing here knows what the cluster works on.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

OBJECT_STORE_BYTES = 80 << 20
"""Of each node: the least that Ray takes."""


class SoakCluster:
    """Nodes of one CPU each. The head, which Ray cannot do without, is never killed."""

    def __init__(self, num_nodes: int) -> None:
        from ray.cluster_utils import Cluster

        head = self._node_options() | {"include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._num_nodes = num_nodes
        self.nodes = [self._add_node() for _ in range(num_nodes - 1)]

    @staticmethod
    def _node_options() -> dict[str, int]:
        return {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}

    @property
    def address(self) -> str:
        return self._cluster.address

    def _add_node(self):
        return self._cluster.add_node(**self._node_options())

    def kill_node(self, dice: random.Random, *, of: psutil.Process | None = None) -> None:
        """Kill the node of this worker, or any where none is given or it is the head's."""
        raylet = of.ppid() if of is not None else None
        nodes = [node for node in self.nodes if _raylet_of(node) == raylet] or self.nodes
        node = dice.choice(nodes)
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def complete(self) -> None:
        """Add the nodes that are missing."""
        while len(self.nodes) < self._num_nodes - 1:
            self.nodes.append(self._add_node())

    def workers(self, title: str) -> list[psutil.Process]:
        """Processes of this cluster that have a title of this beginning, and are not stopped."""
        raylets = {_raylet_of(node) for node in (self._cluster.head_node, *self.nodes)}
        return [
            process
            for process in _processes_titled(title)
            if _said(process.ppid) in raylets and _said(process.status) != psutil.STATUS_STOPPED
        ]

    def stop_worker(
        self, title: str, dice: random.Random, patience_s: float
    ) -> psutil.Process | None:
        """Stop a worker while it has a title of this beginning; None where none can be had."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end:
            workers = self.workers(title)
            if workers:
                worker = dice.choice(workers)
                if _signalled(worker, signal.SIGSTOP) and _has_title(worker.pid, title):
                    return worker
                _signalled(worker, signal.SIGCONT)
            time.sleep(0.002)
        return None

    @staticmethod
    def wake(worker: psutil.Process) -> None:
        _signalled(worker, signal.SIGCONT)

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _raylet_of(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def _processes_titled(title: str) -> Iterator[psutil.Process]:
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        if _has_title(int(folder.name), title):
            try:
                yield psutil.Process(int(folder.name))
            except psutil.Error:
                continue


def _has_title(pid: int, title: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode())
    except OSError:
        return False


def _said(question: Callable[[], object]) -> object:
    """The answer of a process, or None of one that is gone."""
    try:
        return question()
    except psutil.Error:
        return None


def _signalled(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether the process was there to get the signal."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True
