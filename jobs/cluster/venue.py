"""Student and cluster of a run, each opened when it is sure to be needed.

Both cost seconds of imports and of processes that start. A new run therefore joins the cluster
first and has a worker, which must import the student's libraries anyway, look at the student: the
driver never imports them. Knows nothing of what the run is about.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rsr.engine.config import ScorerConfig
from rsr.engine.facts import StudentFacts
from rsr.engine.model_folder import require_model_folder
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.errors import refusing_values
from rsr.jobs.interrupt import StopRequest

if TYPE_CHECKING:
    from rsr.jobs.cluster.run import Cluster


RAY_TOKEN = Path("~/.ray/auth_token")
"""Where Ray keeps its token unless RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH says otherwise."""


class Venue:
    """Where a run takes place: its student, and the cluster that it joins.

    held: leaves the cluster when it is closed. stop: ends the wait for a student.
    """

    def __init__(
        self,
        scorer: ScorerConfig,
        options: ClusterOptions,
        held: ExitStack,
        stop: StopRequest,
        *,
        verbose: bool = False,
    ) -> None:
        self._scorer, self._options, self._held, self._stop = scorer, options, held, stop
        self._verbose = verbose
        self._cluster: Cluster | None = None

    def open_student(self, *, with_cluster: bool) -> StudentFacts:
        """What the student is. with_cluster: there is work for one, so let it have a look.

        Raises `UsageError` for what is wrong with either, `Interrupted` when told to stop.
        """
        scorer = self._scorer
        with refusing_values():
            require_model_folder(scorer.model)
        if with_cluster:
            self._cluster = self._join().with_first_worker()
            if (facts := self._cluster.open_student(scorer, self._stop)) is not None:
                return facts
        from rsr.engine.student import open_student

        with refusing_values():
            return open_student(scorer).facts

    def cluster(self) -> "Cluster":
        """The cluster, joined by now."""
        if self._cluster is None:
            self._cluster = self._join()
        return self._cluster

    def _join(self) -> "Cluster":
        if self._options.address or os.environ.get("RAY_ADDRESS"):
            _show_token()
        from rsr.jobs.cluster.run import join_cluster

        joining = join_cluster(
            self._options,
            tensor_parallel_size=self._scorer.tensor_parallel_size,
            verbose=self._verbose,
        )
        return self._held.enter_context(joining)


def _show_token() -> None:
    """Let Ray present its token, if there is one, to the cluster that is joined.

    `ray start` asks for one since Ray 2.60, but ray.init shows it to the address `auto` alone.
    A cluster that wants none does not mind. Ray reads this when it is imported.
    """
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if named or RAY_TOKEN.expanduser().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
