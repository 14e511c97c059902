"""Finished shards, opened to ask questions of them: the one place that knows how.

A file, folder or glob of what `rsr score` wrote becomes a `ScoredTable`: a lazy scan that keeps
the rows' order, with the expressions for what a score means (which rows have one, RSR at another
r_max). Everything a user can get wrong about the input is refused here, from footers alone.
Column names and types are `score_columns.py`'s. Knows no question and writes nothing.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from rsr.engine.metrics import MIN_SURPRISAL_SUM_NATS, STORED_RANK_CLIPS
from rsr.engine.trajectory import Status
from rsr.jobs.errors import UsageError, first_line
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.columns import require_columns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.json_file import is_json
from rsr.jobs.shards.lines_file import holds_scores, scored_rows_of
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.shard import Shard, describe_shard
from rsr.jobs.shards.writer import METADATA_KEY
from rsr.jobs.storage import StorageError, is_in_bucket, is_remote
from rsr.jobs.storage.bucket import polars_options
from rsr.jobs.storage.concurrency import in_parallel
from rsr.jobs.storage.one_file import folder_beside

SCORED_STATUSES = [status.value for status in Status if status.is_scored]

USUAL_ID, USUAL_TEACHER, USUAL_CORRECT = "id", "teacher", "correct"
"""Columns of the input that are looked for where no other is named."""

SETTINGS_OF_NO_STUDENT = (
    "model",
    "rank_clip",
    "entropy",
    "token_scores",
    "metrics",
    "prompt_metrics",
    "trust_remote_code",
    "tokenizer_backend",
)
"""Settings that may differ between scores of one student: where it lay, and what else was kept."""

RANK_CLIP_NAMES = {str(clip or "none"): name for name, clip in STORED_RANK_CLIPS.items()}
"""What `--rank-clip` may say, and the field of `rsr_rank_sums` that it means."""


@dataclass(frozen=True, slots=True)
class ScoredTable:
    """Scored shards as one table, in order of their relative names.

    path: as the user gave it. shards: the files, with row counts. schema: of every file.
    identities: what the files' metadata say of the runs that scored them, each once; files that
    were written by other programs since say nothing. rank_clip: a name of `STORED_RANK_CLIPS`,
    or None for the run's own r_max.
    """

    path: str
    shards: tuple[Shard, ...]
    schema: pa.Schema
    identities: tuple[dict[str, Any], ...] = field(repr=False)
    rank_clip: str | None = None

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def of(self, shard: Shard) -> Self:
        """One shard of it, with what the footers of all of them say."""
        return replace(self, shards=(shard,))

    def seen_from_anywhere(self) -> Self:
        """The same, with paths that name its files whatever the working directory."""
        shards = (
            shard if is_remote(shard.path) else replace(shard, path=os.path.abspath(shard.path))
            for shard in self.shards
        )
        return replace(self, shards=tuple(shards))

    @property
    def scan(self) -> pl.LazyFrame:
        """All rows and columns, files one after another; nothing is read before it is asked for.

        For looking, not for copying: Polars normalises some Arrow types.
        """
        return pl.scan_parquet(
            [shard.path for shard in self.shards],
            glob=False,
            hive_partitioning=False,
            storage_options=polars_options() if is_in_bucket(self.shards[0].path) else None,
        )

    def collect(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """Rows that were made of `scan`.

        Raises `UsageError` if a file cannot be read, `StorageError` if an object store fails.
        """
        place = self.shards[0].path if len(self.shards) == 1 else self.path
        with _telling_what_cannot_be_read(place):
            return rows.collect(engine="streaming")

    def read_at(self, column: str, positions: NDArray[np.int64]) -> pl.Series:
        """Values of a column at ascending row numbers of the whole table, and only their groups.

        Raises what `collect` raises.
        """
        parts: list[pl.Series] = []
        first = 0
        for shard in self.shards:
            here = _between(positions, first, first + shard.num_rows) - first
            first += shard.num_rows
            if not len(here):
                continue
            with open_parquet(shard.path) as file, _telling_what_cannot_be_read(shard.path):
                start = 0
                for group in range(file.metadata.num_row_groups):
                    stop = start + file.metadata.row_group(group).num_rows
                    inside = _between(here, start, stop) - start
                    if len(inside):
                        values = file.read_row_group(group, [column])[column]
                        parts.append(pl.Series(column, values).gather(inside))
                    start = stop
        assert parts, "asked for no row"
        return pl.concat(parts)

    @property
    def rsr(self) -> pl.Expr:
        """RSR at `rank_clip` (Eq. 7), f64; null in every row that does not count as scored."""
        ratio = pl.col("rsr")
        if not self._is_own_clip:
            surprisal_sum_nats = pl.col("rsr_mean_surprisal") * pl.col("rsr_num_tokens")
            ratio = self._rank_sum / pl.max_horizontal(surprisal_sum_nats, MIN_SURPRISAL_SUM_NATS)
        is_ok = pl.col("rsr_status").is_in(SCORED_STATUSES)
        return pl.when(is_ok & ratio.is_finite() & (pl.col("rsr_num_tokens") > 0)).then(ratio)

    @property
    def is_scored(self) -> pl.Expr:
        """Whether a row counts as scored: status ok or truncated, RSR neither null nor NaN."""
        return self.rsr.is_not_null()

    @property
    def mean_rank(self) -> pl.Expr:
        """Mean rank clipped at `rank_clip`, f64: a scored row's part in Eq. 9."""
        if self._is_own_clip:
            return pl.col("rsr_mean_rank")
        return self._rank_sum / pl.col("rsr_num_tokens")

    @property
    def _rank_sum(self) -> pl.Expr:
        return pl.col("rsr_rank_sums").struct.field(self.rank_clip or "")

    @property
    def _is_own_clip(self) -> bool:
        """Whether the stored columns are already at `rank_clip`, to the last bit."""
        clips = {identity["settings"].get("rank_clip") for identity in self.identities}
        return self.rank_clip is None or clips == {STORED_RANK_CLIPS[self.rank_clip]}

    def require(self, columns: Sequence[str]) -> None:
        """Raises `UsageError` unless all these columns are there, each once."""
        require_columns(self.schema, columns, self.path)


@contextmanager
def _telling_what_cannot_be_read(place: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        # Of a store that fails Polars makes an error without a number.
        if isinstance(error, OSError) and error.errno is None and is_remote(place):
            raise StorageError(f"{place}: {first_line(error)}") from error
        raise UsageError(f"{place} cannot be read: {first_line(error)}") from error


def _between(positions: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    low, high = np.searchsorted(positions, [start, stop])
    return positions[low:high]


def open_scored(
    path: str,
    *,
    rank_clip: str | None = None,
    columns: Sequence[str] = (),
    allow_mixed_students: bool = False,
) -> ScoredTable:
    """Open the scored Parquet files behind `path`: a file, a folder or a glob.

    rank_clip: a name of `STORED_RANK_CLIPS`; None is the run's own r_max. columns: must be there
    besides the score columns.

    Raises `UsageError`, nothing but footers having been read: no such file, a file without score
    columns, files of different schemas, a column that is missing, files scored by different
    students (unless `allow_mixed_students`) or at different r_max (unless `rank_clip` says one).
    """
    inputs = scored_files(path)
    shards: list[Shard] = []
    schema: pa.Schema | None = None
    identities: list[dict[str, Any]] = []
    with in_parallel(lambda named: _look_at(*named), inputs) as found:
        for (file, _), (own_schema, shard) in zip(inputs, found, strict=True):
            if schema is not None:
                _require_same_schema(schema, own_schema, inputs[0][0], file)
            schema = schema or own_schema
            identity = _identity(own_schema, file, METADATA_KEY)
            if identity is not None and identity not in identities:
                identities.append(identity)
            if not allow_mixed_students:
                _require_second_pass_of_student(own_schema, identity, file)
            shards.append(shard)
    assert schema is not None, "find_inputs finds at least one file"
    table = ScoredTable(path, tuple(shards), schema, tuple(identities), rank_clip)
    table.require([c.name for c in score_columns.QUESTIONED_COLUMNS])
    table.require(columns)
    _require_readable(table)
    if not allow_mixed_students:
        require_one_student(table)
    if rank_clip is None:
        _require_one_rank_clip(table)
    return table


def scored_files(path: str) -> list[tuple[str, str]]:
    """`find_inputs`, with the Parquet file of rows that were written as JSON lines."""
    return [(scored_rows_of(file), name) for file, name in find_inputs(path)]


def _look_at(file: str, name: str) -> tuple[pa.Schema, Shard]:
    if is_json(file):
        raise _left_alone(file) if holds_scores(file) else _never_scored(file)
    with open_parquet(file) as parquet:
        schema = parquet.schema_arrow
    _require_score_columns(schema, file)
    return schema, describe_shard(file, name, None, None)


def _never_scored(file: str) -> UsageError:
    return UsageError(
        f"{file} was never scored: it has no rsr columns; score it first: "
        f"rsr score {file} OUTPUT --model STUDENT"
    )


def _left_alone(file: str) -> UsageError:
    return UsageError(
        f"{file} is a copy of scored rows as JSON lines, which have no exact types; name the "
        f"Parquet file in the folder {folder_beside('NAME')} beside the file NAME that rsr wrote"
    )


def _require_score_columns(schema: pa.Schema, file: str) -> None:
    if not any(score_columns.is_score_column(name) for name in schema.names):
        raise _never_scored(file)
    wanted = [c.name for c in score_columns.QUESTIONED_COLUMNS]
    if missing := [name for name in wanted if name not in schema.names]:
        raise UsageError(
            f"{file} has rsr columns but not {', '.join(missing)}; expected a file as rsr score "
            f"writes it, with {', '.join(wanted)}"
        )


def _require_same_schema(schema: pa.Schema, other: pa.Schema, file: str, other_file: str) -> None:
    if schema.equals(other):
        return
    before, now = (
        {f"{f.name!r} ({f.type})" for f in schema},
        {f"{f.name!r} ({f.type})" for f in other},
    )
    difference = "; ".join(
        f"only in {where}: {', '.join(sorted(columns))}"
        for where, columns in ((file, before - now), (other_file, now - before))
        if columns
    )
    raise UsageError(
        f"{file} and {other_file} have different schemas "
        f"({difference or 'another order of columns'}); name files of one schema with a glob"
    )


def _identity(schema: pa.Schema, file: str, key: bytes) -> dict[str, Any] | None:
    """What the file says of a run that scored it: `settings`, `model` and more."""
    text = (schema.metadata or {}).get(key)
    if text is None:
        return None
    try:
        identity: dict[str, Any] = json.loads(text)
        if not isinstance(identity["settings"], dict):
            raise TypeError("settings is not an object")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: the file metadata {key.decode()!r} is not what rsr score writes ({error!r})"
        ) from error
    return identity


def _require_readable(table: ScoredTable) -> None:
    """Polars can open the files, and the score columns have their types."""
    try:
        types = table.scan.collect_schema()
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise UsageError(f"{table.path} cannot be read by Polars: {first_line(error)}") from error
    for column in score_columns.QUESTIONED_COLUMNS:
        if types[column.name] != column.polars_type:
            raise UsageError(
                f"column {column.name!r} of {table.path} is {types[column.name]}; "
                f"expected {column.polars_type}"
            )


def require_one_student(table: ScoredTable) -> None:
    """Raises `UsageError` unless the table's files were scored by one student."""
    students = [_student(identity) for identity in table.identities]
    for other in students[1:]:
        if other != students[0]:
            differences = [
                f"{key} is {students[0].get(key)!r} and {other.get(key)!r}"
                for key in sorted(students[0].keys() | other.keys())
                if students[0].get(key) != other.get(key)
            ]
            raise UsageError(
                f"{table.path} mixes scores of different students, which do not compare: "
                f"{'; '.join(differences)}; name one student's files with a glob, or give "
                "--allow-mixed-students"
            )


def _student(identity: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share for their scores to compare."""
    settings = {k: v for k, v in identity["settings"].items() if k not in SETTINGS_OF_NO_STUDENT}
    return settings | dict(identity.get("model") or {})


def _require_second_pass_of_student(
    schema: pa.Schema, identity: dict[str, Any] | None, file: str
) -> None:
    """What a second pass added compares with the first one's scores of the same student alone."""
    for column in score_columns.SECOND_PASS_COLUMNS.values():
        second = _identity(schema, file, column.name.encode())
        if second is None or identity is None or column.name not in schema.names:
            continue
        first_dtype, dtype = (run["settings"].get("dtype") for run in (identity, second))
        if second.get("model") != identity.get("model") or first_dtype != dtype:
            raise UsageError(
                f"{file}: {column.name} is of another student, chat template or dtype than rsr; "
                "score it again with the same, or give --allow-mixed-students"
            )


def _require_one_rank_clip(table: ScoredTable) -> None:
    clips = {str(i["settings"].get("rank_clip") or "none") for i in table.identities}
    if len(clips) > 1:
        raise UsageError(
            f"{table.path} mixes scores at r_max {' and '.join(sorted(clips))}; "
            f"choose one with --rank-clip {'|'.join(RANK_CLIP_NAMES)}"
        )
