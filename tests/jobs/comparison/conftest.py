"""Scored streams with token columns, of tokens that a test chooses."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsr.engine.metric_sums import sum_metrics
from rsr.engine.metrics import TrajectoryScore, sum_terms, trajectory_score
from rsr.engine.parts import NUM_QUARTERS
from rsr.engine.trajectory import Status, TokenScores
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.writer import METADATA_KEY

RANK_CLIP = 100


@dataclass(frozen=True)
class Trace:
    """The tokens of one trajectory, and what stands beside it. ids: none is a row without score."""

    problem: str
    ids: np.ndarray
    ranks: np.ndarray
    surprisals: np.ndarray
    beside: dict[str, Any]

    def score(self) -> Any:
        length = len(self.ids)
        if not length:
            return TrajectoryScore(Status.NO_RESPONSE, detail="nothing to score")
        entropies = np.ones(length)
        parts = NUM_QUARTERS * np.arange(length) // length
        logprobs = (-self.surprisals).astype(np.float32)
        surprisals = -logprobs.astype(np.float64)
        sums = sum_metrics(np.minimum(self.ranks, RANK_CLIP), surprisals, entropies, parts)
        return trajectory_score(
            sum_terms(self.ranks, -surprisals, entropies, RANK_CLIP),
            length,
            has_entropy=True,
            rank_clip=RANK_CLIP,
            metric_sums=sums,
            tokens=TokenScores(
                self.ids.astype(np.int32),
                self.ranks.astype(np.int32),
                logprobs,
                entropies.astype(np.float32),
            ),
        )


@pytest.fixture(scope="session")
def write_stream() -> Callable[..., Path]:
    """Writes traces as `rsr score --token-columns` would have; settings: of the run's identity."""

    def write(
        path: Path, traces: list[Trace], *, token_columns: bool = True, **settings: Any
    ) -> Path:
        frame = score_columns.to_frame(
            [trace.score() for trace in traces], token_columns=token_columns, metrics=True
        )
        own = {"problem_id": pa.array([trace.problem for trace in traces])}
        for name in traces[0].beside:
            own[name] = pa.array([trace.beside[name] for trace in traces])
        scores = score_columns.to_arrow(frame)
        table = pa.table(own | dict(zip(scores.column_names, scores.columns, strict=True)))
        run = {"model": "student", "rank_clip": RANK_CLIP, "entropy": True} | settings
        identity = json.dumps({"settings": run, "columns": {}}).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table.replace_schema_metadata({METADATA_KEY: identity}), path, row_group_size=5
        )
        return path

    return write


@pytest.fixture(scope="session")
def make_trace() -> type[Trace]:
    return Trace
