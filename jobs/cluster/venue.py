"""The cluster of a run, joined when it is sure to be needed.

Joining costs seconds, and so do the imports of whoever looks at a model. A new run therefore joins
first and lets a worker, which must import those libraries anyway, look: the driver never does.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeVar

from rsr.jobs.cluster.address import cluster_to_join
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.token import show_token_where_wanted
from rsr.jobs.interrupt import StopRequest

if TYPE_CHECKING:
    from rsr.jobs.cluster.run import Cluster

T = TypeVar("T")


class Venue:
    """The cluster that a run joins, once and when it is asked for.

    held: leaves the cluster when it is closed. stop: ends the wait for an answer.
    """

    def __init__(
        self,
        options: ClusterOptions,
        held: ExitStack,
        stop: StopRequest,
        *,
        tensor_parallel_size: int = 1,
        verbose: bool = False,
    ) -> None:
        self._options, self._held, self._stop = options, held, stop
        self._tensor_parallel_size, self._verbose = tensor_parallel_size, verbose
        self._cluster: Cluster | None = None

    def ask(self, question: Callable[[], T], then: Callable[[], object]) -> T | None:
        """Join the cluster; what its first worker answers, which then goes on with `then`.

        None if no worker can be asked yet. Raises `UsageError` where no cluster can be joined or
        the question raises ValueError, `Interrupted` when told to stop.
        """
        self._cluster = self._join().with_first_worker()
        return self._cluster.ask(question, then, self._stop)

    def cluster(self) -> "Cluster":
        """The cluster, joined by now."""
        if self._cluster is None:
            self._cluster = self._join()
        return self._cluster

    def _join(self) -> "Cluster":
        if address := cluster_to_join(self._options.address):
            show_token_where_wanted(address)
        from rsr.jobs.cluster.run import join_cluster

        joining = join_cluster(
            self._options,
            tensor_parallel_size=self._tensor_parallel_size,
            verbose=self._verbose,
        )
        return self._held.enter_context(joining)
