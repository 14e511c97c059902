"""One GPU or tensor-parallel group, in memory: trajectories in, their scores out.

Knows vLLM and chat templates; knows nothing of files, Ray or the command line. Names are imported
on first use: configuring and reading scores needs neither torch nor vLLM, and the command line's
help needs none of them. `__version__` is that of the distribution rsr-engine, of which `rsr` is the
namespace.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsr.engine.config import ScorerConfig
    from rsr.engine.metrics import DatasetRsr, TrajectoryScore
    from rsr.engine.scorer import Scorer
    from rsr.engine.trajectory import Row, Status, TokenScores, Trajectory

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

_MODULES = {
    "config": ("ScorerConfig",),
    "metrics": ("DatasetRsr", "TrajectoryScore"),
    "scorer": ("Scorer",),
    "trajectory": ("Row", "Status", "TokenScores", "Trajectory"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("rsr-engine")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
