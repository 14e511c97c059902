"""What `rsr filter` and `rsr select` on a cluster would read, exchange, write and hold.

From the footers of a few files: column chunks say how many bytes a pass reads, and all files are
taken to be like the sampled ones. What the passes are is told in docs/selection.md. Reads no row.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import polars as pl

from rsr.jobs.errors import UsageError
from rsr.jobs.planning.prediction import Figure
from rsr.jobs.selection.bundles import MAX_BUNDLES, MIN_BUNDLE_ROWS
from rsr.jobs.selection.candidates import candidate_columns
from rsr.jobs.selection.filter import FilterOptions
from rsr.jobs.selection.passes import COPIES_AT_A_TIME
from rsr.jobs.selection.select import SelectOptions, extra_columns
from rsr.jobs.selection.select_in_passes import num_parts_of
from rsr.jobs.selection.selection import OpenedInput
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.parquet import file_size_bytes, open_parquet
from rsr.jobs.storage.concurrency import in_parallel

NARROW_PASSES_OF_FILTER = (2, 5)
"""Count and look at the limits; with them, as many as three to refine."""
EXCHANGED_BYTES = 24
"""Of each row that can still be chosen: key, score and position. Hashed keys take 8 more."""
FRAME_BYTES_PER_ROW = 110
"""Of a shard that is looked at, in memory: the columns of a pass and what is made of them."""
COPY_BYTES = COPIES_AT_A_TIME * (200 << 20)
"""Of a call that copies, in memory: of each copy a row group of kept rows and what encodes it."""
RANK_FACTOR = 4
"""Memory of ranking a part, in sizes of the part, which counts itself."""


@dataclass(frozen=True, slots=True)
class ClusterSize:
    """The machines that a plan counts with.

    bandwidth_gbytes: what each reads and writes in a second, in 10⁹ bytes.
    """

    num_machines: int
    bandwidth_gbytes: float


@dataclass(frozen=True, slots=True)
class SampledFooters:
    """A corpus as its sampled files say.

    bytes_by_column: compressed, of the whole corpus.
    """

    num_files: int
    num_sampled: int
    num_rows: float
    num_bytes: float
    largest_num_rows: int
    bytes_by_column: dict[str, float]

    def bytes_of(self, columns: Iterable[str]) -> float:
        return sum(self.bytes_by_column.get(name, 0.0) for name in set(columns))


def sample_footers(files: list[tuple[str, str]], num_sampled: int) -> SampledFooters:
    """The footers of at most `num_sampled` of these files, evenly spaced over all."""
    step = max(1, len(files) // num_sampled)
    sampled = [path for path, _ in files[::step]][:num_sampled]
    scale = len(files) / len(sampled)
    with in_parallel(_look_at, sampled) as found:
        looked = list(found)
    by_column: dict[str, float] = {}
    for _, _, columns in looked:
        for name, num_bytes in columns.items():
            by_column[name] = by_column.get(name, 0.0) + scale * num_bytes
    return SampledFooters(
        num_files=len(files),
        num_sampled=len(sampled),
        num_rows=scale * sum(num_rows for num_rows, _, _ in looked),
        num_bytes=scale * sum(num_bytes for _, num_bytes, _ in looked),
        largest_num_rows=max(num_rows for num_rows, _, _ in looked),
        bytes_by_column=by_column,
    )


def _look_at(path: str) -> tuple[int, int, dict[str, int]]:
    """Rows and bytes of a file, and compressed bytes of each column."""
    with open_parquet(path) as file:
        metadata = file.metadata
    columns: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            name = chunk.path_in_schema.split(".")[0]
            columns[name] = columns.get(name, 0) + chunk.total_compressed_size
    return metadata.num_rows, file_size_bytes(path), columns


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """A prediction. seconds: of moving bytes alone, on all machines together."""

    command: str
    footers: SampledFooters
    num_bytes_read: float
    num_bytes_exchanged: float
    num_bytes_written: float
    worker_bytes: float
    seconds: float
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def plan_selection(
    options: FilterOptions | SelectOptions,
    kept_share: float,
    cluster: ClusterSize,
    num_sampled: int,
) -> SelectionPlan:
    """Predict a run of `rsr filter` or `rsr select` on a cluster.

    kept_share: of all rows, that will be kept. Raises `UsageError` where the first file lacks a
    column, or is not what `rsr score` writes.
    """
    files = find_inputs(options.input)
    footers = sample_footers(files, num_sampled)
    if not footers.num_rows:
        raise UsageError(f"{options.input}: the sampled files have no row")
    narrow, ids, described = _columns(replace(options, input=files[0][0]))
    narrow_bytes, id_bytes = footers.bytes_of(narrow), footers.bytes_of(ids)
    told_bytes = footers.bytes_of({*described} - {*narrow})
    written = footers.num_bytes * kept_share
    share_described = footers.bytes_of(described) * kept_share
    if isinstance(options, FilterOptions):
        least, most = NARROW_PASSES_OF_FILTER
        looked = narrow_bytes * most + told_bytes
        exchanged, command = footers.num_rows / 8, "filter"
        worker = float(max(COPY_BYTES, FRAME_BYTES_PER_ROW * footers.largest_num_rows))
        figures = [
            Figure("passes over narrow columns", f"{least} to {most}", "0 to 3 refine the limits")
        ]
    else:
        looked = narrow_bytes + id_bytes + told_bytes
        own_bytes = EXCHANGED_BYTES + 8 * len(options.max_shares) + 8 * bool(options.objective)
        exchanged, command = footers.num_rows * own_bytes, "select"
        num_parts = num_parts_of(int(footers.num_rows))
        bundle_rows = max(MIN_BUNDLE_ROWS, footers.num_rows / MAX_BUNDLES)
        num_bundles = max(1, min(footers.num_files, footers.num_rows // bundle_rows))
        worker = max(COPY_BYTES, RANK_FACTOR * exchanged / num_parts)
        figures = [
            Figure("passes over narrow columns", "1", "and at most one over ids, where rows tie"),
            Figure(
                "exchanged",
                _bytes(exchanged),
                f"at most, {own_bytes} bytes a row; {num_bundles:,.0f} bundles, "
                f"{num_parts:,.0f} parts",
            ),
        ]
    read = looked + footers.num_bytes + share_described
    seconds = (read + written + exchanged) / (cluster.num_machines * cluster.bandwidth_gbytes * 1e9)
    figures = [
        Figure(
            "corpus",
            f"{footers.num_rows:,.0f} rows, {_bytes(footers.num_bytes)}",
            f"{footers.num_files:,} files like the {footers.num_sampled:,} sampled",
        ),
        *figures,
        Figure("read by a narrow pass", _bytes(narrow_bytes), ", ".join(sorted(narrow))),
        Figure("read in all", _bytes(read), "narrow passes, all columns once, the result's scores"),
        Figure("written", _bytes(written), f"{kept_share:.0%} of the rows"),
        Figure("memory of a worker", _bytes(worker), "a shard that is copied, or what it ranks"),
        Figure(
            "hours",
            f"{seconds / 3600:,.2f}",
            f"moving bytes alone: {cluster.num_machines} machines at "
            f"{cluster.bandwidth_gbytes:g} GB/s each",
        ),
    ]
    return SelectionPlan(
        command, footers, read, exchanged, written, worker, seconds, tuple(figures)
    )


def _columns(
    options: FilterOptions | SelectOptions,
) -> tuple[set[str], set[str], set[str]]:
    """Columns of narrow passes, of ids, and of what the result is described by."""
    is_filter = isinstance(options, FilterOptions)
    group = options.within if isinstance(options, FilterOptions) else options.group_by
    opened = OpenedInput.of(options, [group, options.quality_column])
    table = opened.table
    wanted = candidate_columns(table, options.conditions, opened.measured, group_column=group)
    if isinstance(options, SelectOptions):
        wanted |= extra_columns(options, opened)
    narrow = _roots(wanted.values()) | ({"rsr_num_tokens"} if is_filter else set())
    ids = {opened.id_column} if opened.id_column is not None else set()
    by = {name for name in (opened.by.teacher, opened.by.correct) if name is not None}
    sums = _roots([table.rsr, table.mean_rank]) | {"rsr_num_tokens", "rsr_mean_surprisal"}
    return narrow, ids, sums | by


def _roots(expressions: Iterable[pl.Expr]) -> set[str]:
    return {name for expression in expressions for name in expression.meta.root_names()}


def _bytes(count: float) -> str:
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((unit for unit in units if count >= unit[1]), units[-1])
    return f"{count / size:,.1f} {unit}"
