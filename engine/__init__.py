"""One GPU or tensor-parallel group, in memory: trajectories in, their scores out.

Knows vLLM and chat templates; knows nothing of files, Ray or the command line. `Scorer` is
imported on first use, so that configuring and reading scores needs neither torch nor vLLM.
"""

from typing import TYPE_CHECKING, Any

from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import DatasetRsr, TrajectoryScore
from rsr.engine.trajectory import Status, TokenScores, Trajectory

if TYPE_CHECKING:
    from rsr.engine.scorer import Scorer

__all__ = [
    "DatasetRsr",
    "Scorer",
    "ScorerConfig",
    "Status",
    "TokenScores",
    "Trajectory",
    "TrajectoryScore",
]


def __getattr__(name: str) -> Any:
    if name == "Scorer":
        from rsr.engine.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
