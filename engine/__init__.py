"""One GPU or tensor-parallel group, in memory: trajectories in, their scores out.

Knows vLLM and chat templates; knows nothing of files, Ray or the command line. `Scorer` is
imported on first use, so that configuring and reading scores needs neither torch nor vLLM.
`__version__` is that of the distribution rsr-engine, of which `rsr` is the namespace.
"""

from typing import TYPE_CHECKING, Any

from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import DatasetRsr, TrajectoryScore
from rsr.engine.trajectory import Row, Status, TokenScores, Trajectory

if TYPE_CHECKING:
    from rsr.engine.scorer import Scorer

    __version__: str

__all__ = [
    "DatasetRsr",
    "Row",
    "Scorer",
    "ScorerConfig",
    "Status",
    "TokenScores",
    "Trajectory",
    "TrajectoryScore",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "Scorer":
        from rsr.engine.scorer import Scorer

        return Scorer
    if name == "__version__":
        from importlib.metadata import version

        return version("rsr-engine")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
