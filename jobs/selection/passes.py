"""What `rsr filter` and `rsr select` share where shards are passed over by calls.

    decide, copy, describe

As `selection.py` has it for one machine; nothing here is of INPUT's length. Knows nothing of how
rows are chosen, nor of where calls are made.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import polars as pl
import pyarrow as pa

from rsr.jobs.errors import ShardsFailed, UsageError, first_line
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import Calls, CallsWhereSeen
from rsr.jobs.run.folder import COMPOSITION, RunFolder
from rsr.jobs.run.manifest import JsonObject
from rsr.jobs.run.passes import Passes
from rsr.jobs.run.preflight import canonical
from rsr.jobs.run.probe import probe_of
from rsr.jobs.run.store import ChangedInputError, RunStore
from rsr.jobs.selection.bundles import bundles_of, in_bundles
from rsr.jobs.selection.composition import Composition, Parts, parts_by_calls
from rsr.jobs.selection.layout import Mask, OutputFile
from rsr.jobs.selection.own_row import is_of_own_row
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.selection import Facts, OpenedInput, SubsetOptions
from rsr.jobs.selection.subset import commit_file, opened_subset
from rsr.jobs.shards.scored import ScoredTable, open_scored
from rsr.jobs.shards.shard import Shard
from rsr.jobs.storage import is_remote

MAX_BYTES_OF_CALL = 128 << 20
"""Of the files that one call copies: of what they are made of, uncompressed."""
COPIES_AT_A_TIME = 2
"""Of a call: while one waits for the disk or the store, the other has the core."""

Options = TypeVar("Options", bound=SubsetOptions)


@dataclass(frozen=True, slots=True)
class FilesToCopy:
    """Files of OUTPUT that one call writes."""

    files: tuple[OutputFile, ...]

    @property
    def path(self) -> str:
        """What a user is told of a call that is lost."""
        more = f" and of {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return f"{self.files[0].path}{more}"

    @property
    def shards(self) -> list[Shard]:
        """What they are made of, each once."""
        return list(dict.fromkeys(piece.shard for file in self.files for piece in file.slices))


@dataclass(frozen=True, slots=True)
class Decision:
    """What a command has decided before it copies.

    num_kept: rows of each shard. facts: of the result, before it is measured. pool: what INPUT is
    made of. copy: yields lines on files that could not be written, of each call.
    """

    num_kept: Sequence[int]
    facts: Facts
    pool: Parts
    copy: Callable[[RunStore, Calls, Sequence[FilesToCopy]], Iterator[list[str]]]


def for_any_machine(options: Options) -> Options:
    """The same, with places that do not depend on a working directory; a link keeps its name."""
    place = options.input
    absolute = place if is_remote(place) else os.path.abspath(place)
    return replace(options, input=absolute, output=canonical(options.output))


def run_by_calls(
    opened: OpenedInput,
    options: SubsetOptions,
    decide: Callable[[], Decision],
    passes: Passes,
    stop: StopRequest,
    *,
    writer: str,
    settings: JsonObject,
) -> SelectionResult:
    """Write what `decide` says, and describe it; the arguments are those of `run_selection`.

    Raises what `opened_subset` and `decide` raise, and `ShardsFailed` if a shard cannot be copied.
    """
    decisions: list[Decision] = []

    def num_kept() -> Sequence[int]:
        decisions.append(decide())
        return decisions[0].num_kept

    place = options.place(writer, settings)
    with (
        opened_subset(opened.table, place, num_kept, stop) as (store, files),
        probe_of(store.folder) as probe,
    ):
        seeing = passes.by(CallsWhereSeen(probe, passes.calls))
        bundles = in_bundles(files, [file.shard.num_bytes for file in files], MAX_BYTES_OF_CALL)
        items = [FilesToCopy(tuple(bundle)) for bundle in bundles]
        copied = decisions[0].copy(store, seeing.begin("copy", len(items)), items)
        if failures := [failure for of_call in copied for failure in of_call]:
            raise ShardsFailed("\n".join(sorted(failures)))
        return _describe(opened, decisions[0], store.folder, passes)


def _describe(
    opened: OpenedInput, decision: Decision, folder: RunFolder, passes: Passes
) -> SelectionResult:
    """What was written beside its pool, measured on the files and kept with them."""
    selected = open_scored(
        str(folder.root), rank_clip=opened.table.rank_clip, allow_mixed_students=True
    )
    calls = passes.begin("describe", len(bundles_of(selected)))
    parts = parts_by_calls(selected, opened.by, calls)
    composition = Composition(opened.by.teacher, parts, decision.pool)
    total = composition.selected_total
    facts = {"num_rows": opened.table.num_rows} | decision.facts
    facts |= {"num_kept": total.num_rows, "num_tokens": total.num_tokens}
    result = SelectionResult(folder, facts, composition)
    text = json.dumps(result.to_json(), indent=2, default=str) + "\n"
    folder.storage.write(COMPOSITION, text.encode())
    return result


def copy_files(store: RunStore, item: FilesToCopy, rows_of: Callable[[Shard], Mask]) -> list[str]:
    """Write those of the files that are not there; lines about what files can do to a copy.

    rows_of: (num_rows,) mask of the kept rows of a shard, asked for where it is needed.
    """
    with ThreadPoolExecutor(COPIES_AT_A_TIME) as pool:
        lines = list(pool.map(partial(_copy_file, store, rows_of), item.files))
    return [line for line in lines if line is not None]


def _copy_file(store: RunStore, rows_of: Callable[[Shard], Mask], file: OutputFile) -> str | None:
    try:
        if store.read_receipt(file.shard) is None:
            commit_file(store, file, rows_of, StopRequest())
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError, ChangedInputError) as error:
        return f"{file.shard.name}: {first_line(error)}"
    return None


def require_own_row(where: str | None) -> None:
    """Raises `UsageError` unless the condition is known to look at no other row."""
    if where is not None and not is_of_own_row(pl.sql_expr(where)):
        raise UsageError(
            f"--where {where!r} may look at other rows than its own, which a cluster cannot: leave "
            "--address out (and unset RAY_ADDRESS), or write the number in its place"
        )


def require_exact_groups(table: ScoredTable, option: str, column: str | None) -> None:
    """Raises `UsageError` for a column of numbers of which equal ones may differ in their bits."""
    if column is not None and table.scan.collect_schema()[column].is_float():
        raise UsageError(
            f"{option} {column}: a cluster does not group by floating-point numbers; leave "
            "--address out (and unset RAY_ADDRESS)"
        )
