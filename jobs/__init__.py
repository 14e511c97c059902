"""Many shards, many workers: Parquet in, Parquet out; the `rsr` command, and it as functions.

What is named here is imported when it is first used, so that `rsr --help` waits for nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsr.jobs.errors import ShardsFailed, UsageError
    from rsr.jobs.evidence.teachers import Comparison, TeacherEvidence
    from rsr.jobs.functions import filter, score, select, teachers, to_polars
    from rsr.jobs.scoring.batches import ScoreBatches
    from rsr.jobs.scoring.score import ScoreResult
    from rsr.jobs.selection.result import SelectionResult
    from rsr.jobs.shards.columns import TrajectoryColumns

    __version__: str

__all__ = [
    "Comparison",
    "ScoreBatches",
    "ScoreResult",
    "SelectionResult",
    "ShardsFailed",
    "TeacherEvidence",
    "TrajectoryColumns",
    "UsageError",
    "__version__",
    "filter",
    "score",
    "select",
    "teachers",
    "to_polars",
]

PLACES = {
    "rsr.engine": ("__version__",),
    "rsr.jobs.errors": ("ShardsFailed", "UsageError"),
    "rsr.jobs.evidence.teachers": ("Comparison", "TeacherEvidence"),
    "rsr.jobs.functions": ("filter", "score", "select", "teachers", "to_polars"),
    "rsr.jobs.scoring.batches": ("ScoreBatches",),
    "rsr.jobs.scoring.score": ("ScoreResult",),
    "rsr.jobs.selection.result": ("SelectionResult",),
    "rsr.jobs.shards.columns": ("TrajectoryColumns",),
}
"""Where each of `__all__` is."""


def __getattr__(name: str) -> Any:
    for module, names in PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
