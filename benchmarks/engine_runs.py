"""The ways to score that `rsr bench engine` times: ours, vLLM's, the authors', and the limit.

Each lives in a process of its own, with its own model, and waits to be told to run: so rounds can
be interleaved, and peak memory is one way's alone. Knows nothing of tables or options.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rsr.benchmarks.memory import peak_rss_mib
from rsr.engine.allocator import keep_freed_memory
from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import DEFAULT_RANK_CLIP, TrajectoryScore
from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError

LIMIT, OURS, STOCK, PUBLISHED = "bare prefill", "rsr", "prompt_logprobs", "published script"

Sums = tuple[float, float, int]
"""Σ clipped rank, Σ surprisal in nats, and how many tokens, of one trajectory."""
Run = Callable[[int], list[Sums] | None]
"""Goes through the first so many trajectories once; None where nothing is scored."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What every way gets.

    published_folder: the authors' checkout. batch_size: of their script, in rows.
    prompt_logprobs: whether vLLM's own scoring takes part.
    """

    config: ScorerConfig
    trajectories: Sequence[Trajectory]
    published_folder: Path | None = None
    batch_size: int = 8
    prompt_logprobs: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """One round: sums are None for the limit, which scores nothing."""

    time_s: float
    peak_rss_mib: float
    sums: list[Sums] | None


_opened: dict[str, Run] = {}
"""In a child process, its way with the model loaded."""


def open_way(way: str, workload: Workload) -> None:
    """Load the model, in seconds to minutes; to be called once in a process."""
    # As a worker does, and for all ways: what is compared is scoring, not allocators.
    keep_freed_memory()
    _opened[way] = _OPENERS[way](workload)


def run_way(way: str, num_rows: int) -> Outcome:
    """Go through the workload's first rows once."""
    start = time.perf_counter()
    sums = _opened[way](num_rows)
    return Outcome(time.perf_counter() - start, _peak_memory_mib(), sums)


def _peak_memory_mib() -> float:
    """Of this process so far: resident memory; on a GPU what torch has reserved there."""
    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    return peak_rss_mib()


def _open_limit(workload: Workload) -> Run:
    from rsr.engine.prefill import StockPrefill
    from rsr.engine.student import open_student
    from rsr.engine.wire import PrefillRequest

    student = open_student(workload.config)
    encoder = student.encoder()
    encoded = [encoder.encode(t) for t in workload.trajectories]
    prefill = StockPrefill(student)

    def run(num_rows: int) -> None:
        prefill.run_unscored(
            [PrefillRequest(e.token_ids, e.spans) for e in encoded[:num_rows] if e.status.is_scored]
        )

    return run


def _open_scorer(config: ScorerConfig, trajectories: Sequence[Trajectory]) -> Run:
    from rsr.engine.scorer import Scorer

    scorer = Scorer(config)
    return lambda num_rows: [_sums(score) for score in scorer.score(trajectories[:num_rows])]


def _sums(score: TrajectoryScore) -> Sums:
    return score.rank_sum, score.surprisal_sum_nats, score.num_tokens


def _open_ours(workload: Workload) -> Run:
    return _open_scorer(workload.config, workload.trajectories)


def _open_stock(workload: Workload) -> Run:
    return _open_scorer(replace(workload.config, scorer="prompt-logprobs"), workload.trajectories)


def import_published(folder: Path) -> ModuleType:
    """The authors' `rsr_cal.py`; `UsageError` if it, or what it imports, is not there."""
    sys.path.insert(0, str(folder))
    try:
        return import_module("rsr_cal")
    except ImportError as error:
        raise UsageError(f"--published {folder}: rsr_cal.py cannot be imported: {error}") from error


def _open_published(workload: Workload) -> Run:
    """`infer_dataset` and `compute_sample_metrics` of the authors' `rsr_cal.py`, as it stands."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, folder = workload.config, workload.published_folder
    assert folder is not None
    published = import_published(folder)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype)
    model.to(device).eval()
    lines = [
        json.dumps({"id": index, "messages": [dict(turn) for turn in trajectory.messages or ()]})
        for index, trajectory in enumerate(workload.trajectories)
    ]
    rows = Path(tempfile.mkdtemp(prefix="rsr-bench-")) / "rows.jsonl"

    def run(num_rows: int) -> list[Sums]:
        rows.write_text("\n".join(lines[:num_rows]) + "\n", encoding="utf-8")
        samples = published.infer_dataset(
            model,
            tokenizer,
            rows,
            workload.batch_size,
            max_model_len=config.max_model_len,
            rank_clip_r=DEFAULT_RANK_CLIP,
        )
        _, metrics = published.compute_sample_metrics(samples, rank_clip_r=DEFAULT_RANK_CLIP)
        sums: list[Sums] = [(0.0, 0.0, 0)] * num_rows
        for row in metrics:
            count = row["resp_token_length"]
            sums[row["sample_id"]] = (
                row["avg_rank_clip"] * count,
                row["avg_surprisal"] * count,
                count,
            )
        return sums

    return run


_OPENERS: dict[str, Callable[[Workload], Run]] = {
    LIMIT: _open_limit,
    OURS: _open_ours,
    STOCK: _open_stock,
    PUBLISHED: _open_published,
}
