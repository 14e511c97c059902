"""Runs and scored files without a model: what scoring leaves, with made-up scores."""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import SILENCE_S, FaultyProxy
from s3_server import make_bucket, s3_server

from rsr.engine.metrics import STORED_RANK_CLIPS, TrajectoryScore, score_tokens
from rsr.engine.trajectory import Status, TokenScores
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.commit import commit_scored_shard
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit, cut_units, describe_shard
from rsr.jobs.shards.writer import METADATA_KEY
from rsr.jobs.storage.bucket import open_bucket

TEXT = TrajectoryColumns(text="text")


def made_up_score(row: int) -> TrajectoryScore:
    """Another score for each row; every fifth row has nothing to score."""
    if row % 5 == 4:
        detail = f"row {row} has no response"
        return TrajectoryScore(Status.NO_RESPONSE, detail=detail, hint="write one")
    tokens = TokenScores(
        token_ids=np.array([5, 6], np.int32),
        ranks=np.array([1, 2 + row], np.int32),
        logprobs=np.array([-1.0 - row, -2.0], np.float32),
        entropies=np.array([0.1, 0.2], np.float32),
    )
    return score_tokens(tokens)


@dataclass(frozen=True)
class MadeUpRun:
    """A run whose scores are `made_up_score` of the row's number in its shard."""

    store: RunStore
    shards: list[Shard]

    @property
    def output(self) -> RunFolder:
        return self.store.folder

    def keep(self, unit: Unit) -> None:
        scores = [made_up_score(row) for row in range(unit.start, unit.stop)]
        frame = score_columns.to_frame(scores, token_columns=False)
        summary = Summary.of(frame)
        summary.count_reasons(scores, unit.shard.name, unit.start)
        self.store.commit_unit(unit, frame, summary)

    def finish(self, shard: Shard) -> None:
        kept = [unit for unit, _ in self.store.kept_units(shard)]
        for unit in cut_units(shard, max_rows=3, max_bytes=1 << 20, kept=kept):
            self.keep(unit)
        commit_scored_shard(self.store, shard)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., MadeUpRun]:
    """Begins a run over tables, by file name; OUTPUT is `out` unless told otherwise."""

    def make(
        tables: dict[str, pa.Table], root: Path | str | None = None, **write_options: Any
    ) -> MadeUpRun:
        shards, sources = [], {}
        for name, table in tables.items():
            source = tmp_path / "in" / name
            source.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, source, row_group_size=4, **write_options)
            shards.append(describe_shard(str(source), name, TEXT, None))
            sources[name] = str(source)
        identity = Identity({"token_scores": False, "model": "made-up"}, {"text": "text"})
        folder = RunFolder(tmp_path / "out" if root is None else root)
        folder.write_manifest(
            Manifest(
                writer="score",
                identity=identity,
                shards=tuple(InputShard.of(s, sources[s.name]) for s in shards),
                subject="student made-up",
                command=("rsr", "score", "in", "out", "--model", "m"),
                output="out",
            )
        )
        return MadeUpRun(RunStore.of(folder, identity), shards)

    return make


@pytest.fixture(scope="session")
def s3() -> Iterator[FaultyProxy]:
    """A real S3 server behind a proxy that can be told to fail; `s3://bucket` is on it."""
    # Not importorskip: what moto imports must stay out of this process, see s3_server.py.
    if importlib.util.find_spec("moto") is None:
        pytest.skip("needs moto[server]")
    with s3_server() as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_TIMEOUT", f"{SILENCE_S / 2}s")
        open_bucket.cache_clear()
        make_bucket(proxy, "bucket")
        yield proxy
    open_bucket.cache_clear()


@pytest.fixture
def s3_url(s3: FaultyProxy, tmp_path: Path) -> str:
    """A prefix of the test's own."""
    return f"s3://bucket/{tmp_path.name}/with space"


IDENTITY = {
    "settings": {"model": "student", "dtype": "float32", "rank_clip": 100},
    "columns": {"messages": "messages"},
    "model": {"config_sha256": "0123"},
    "versions": {"rsr-engine": "0.1.0"},
}


@pytest.fixture(scope="session")
def write_scored() -> Callable[..., Path]:
    """Writes a scored file: input columns, and score columns that agree with each other.

    rsr: one value a row; None is a row that could not be scored, NaN a broken score. num_tokens:
    scored tokens of each row, 10 where not given. Mean surprisal is 2 nats and r_max 100; the
    rank sum at r_max 50 is half of that at 100, at 200 twice, at 500 five times, unclipped ten.
    """

    def write(
        path: Path,
        rsr: Sequence[float | None],
        *,
        columns: Mapping[str, Any] | None = None,
        num_tokens: Sequence[int] | None = None,
        identity: Mapping[str, Any] | None = IDENTITY,
        **write_options: Any,
    ) -> Path:
        tokens = [10] * len(rsr) if num_tokens is None else list(num_tokens)
        factors = dict(zip(STORED_RANK_CLIPS, (0.5, 1.0, 2.0, 5.0, 10.0), strict=True))
        values: dict[str, list[Any]] = {
            "rsr": list(rsr),
            "rsr_num_tokens": [n if r is not None else 0 for r, n in zip(rsr, tokens, strict=True)],
            "rsr_mean_rank": [None if r is None else 2.0 * r for r in rsr],
            "rsr_mean_surprisal": [None if r is None else 2.0 for r in rsr],
            "rsr_mean_entropy": [None if r is None else 1.0 for r in rsr],
            "rsr_rank_sums": [
                None if r is None else {name: 2.0 * r * n * f for name, f in factors.items()}
                for r, n in zip(rsr, tokens, strict=True)
            ],
            "rsr_status": ["no_response" if r is None else "ok" for r in rsr],
            "rsr_detail": ["empty response" if r is None else None for r in rsr],
        }
        chosen = score_columns.columns(token_columns=False)
        fields = [pa.field(c.name, c.arrow_type) for c in chosen]
        arrays = [pa.array(values[f.name], f.type) for f in fields]
        own = pa.table(dict(columns or {}))
        schema = pa.schema([*own.schema, *fields])
        if identity is not None:
            schema = schema.with_metadata({METADATA_KEY: json.dumps(identity).encode()})
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_arrays([*own.columns, *arrays], schema=schema)
        pq.write_table(table, path, **write_options)
        return path

    return write


@pytest.fixture(scope="session")
def identity() -> dict[str, Any]:
    """What `write_scored` says of the run, for tests that change it."""
    return json.loads(json.dumps(IDENTITY))
