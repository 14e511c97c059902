"""What `rsr refine` is asked to do, what is left to do of it, and what it says that it did."""

from dataclasses import dataclass, field
from pathlib import Path

from rsr.engine.config import ScorerConfig
from rsr.engine.sampling import Sampling
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.remaining import Remaining
from rsr.jobs.cluster.work import Failure
from rsr.jobs.refinement.endpoint import EndpointOptions
from rsr.jobs.refinement.outcome import Mode
from rsr.jobs.refinement.questions import Questions
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.store import RunStore
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.score_columns import Summary


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """An oracle that workers load, as `rsr sample` loads a student.

    config: of the engine. seed: of the run; from it, the file and the row follows a reply's own.
    """

    config: ScorerConfig
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    verbose: bool = False

    @property
    def model(self) -> str:
        return self.config.model


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineOptions:
    """What `rsr refine` is asked to do.

    input, output: local paths or URLs. mode: which prompt the oracle gets. oracle: a server, or a
    model on workers of our own. answer_column: of gold answers, which the oracle is then told.
    id_column: None is `id`, if there is one. overwrite: discard an earlier run in OUTPUT. command:
    what was typed.
    """

    input: str
    output: Path | str
    mode: Mode
    oracle: EndpointOptions | ModelOptions
    columns: TrajectoryColumns = field(default_factory=TrajectoryColumns)
    answer_column: str | None = None
    id_column: str | None = None
    overwrite: bool = False
    same_input: bool = False
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that can start."""

    questions: Questions
    store: RunStore
    remaining: Remaining


@dataclass(frozen=True, slots=True)
class RefineResult:
    """What a run has written, earlier starts included.

    num_requests: to a server, by this start; None without one. num_tokens_now: of replies of this
    start by workers, in `seconds`. failures: what workers gave up.
    """

    folder: RunFolder
    summary: Summary
    num_requests: int | None = None
    num_tokens_now: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
