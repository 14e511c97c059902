"""`rsr export`: chosen rows as a folder that trainers and the hub read.

    look      find the rows, and what their files say of where they come from
    survey    which of them can be exported in this format
    write     one file after another, each with its receipt

A file is a function of INPUT and the settings, so that a run that was stopped writes only those
that have no receipt.
"""

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from rsr.jobs.errors import ShardsFailed, UsageError, first_line
from rsr.jobs.export.files import scores_table, write_data, write_json_lines, write_table
from rsr.jobs.export.formats import FORMATS, FormatName
from rsr.jobs.export.plan import Plan, Source, Survey, choose_ids, survey
from rsr.jobs.export.sidecars import Card, axolotl_config, dataset_info, readme
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import COMPOSITION, RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest, ManifestError
from rsr.jobs.run.opening import HeldOutput, open_places
from rsr.jobs.run.preflight import (
    canonical,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.staging import as_parquet
from rsr.jobs.run.store import RunStore
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.parquet import file_size_bytes, fingerprint, open_parquet
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, describe_shard, digest_of
from rsr.jobs.shards.writer import GRADE_METADATA_KEY, METADATA_KEY
from rsr.jobs.storage.concurrency import in_parallel
from rsr.jobs.storage.hashing import HashingFile
from rsr.jobs.terminal import shell_command

DEFAULT_SHARD_ROWS = 100_000
DEFAULT_NAME = "rsr_selected"
JSON_LINES, SCORES, CARD = "train.jsonl", "scores.parquet", "README.md"
DATASET_INFO, AXOLOTL = "dataset_info.json", "axolotl.yaml"
COPIES = 3
"""Copies of the rows' bytes, for the disk check: Parquet, and JSON lines without compression."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What `rsr export` is asked to do.

    input, output: local paths or URLs. seed: of a random order; None is INPUT's. shard_rows: most
    rows of a Parquet file. id_column: None is `id` if its values are distinct, else file and row.
    name: of the data set. licence, sources: what the card says of them. overwrite: discard an
    earlier export in OUTPUT. command: what was typed.
    """

    input: str
    output: Path | str
    format: FormatName = "messages"
    columns: TrajectoryColumns = field(default_factory=TrajectoryColumns)
    seed: int | None = None
    shard_rows: int = DEFAULT_SHARD_ROWS
    id_column: str | None = None
    name: str = DEFAULT_NAME
    licence: str | None = None
    sources: tuple[str, ...] = ()
    overwrite: bool = False
    command: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What two runs must agree on to write into one OUTPUT."""
        return {
            "format": self.format,
            "seed": self.seed,
            "shard_rows": self.shard_rows,
            "id_column": self.id_column,
            "name": self.name,
            "licence": self.licence,
            "sources": list(self.sources),
        }


@dataclass(frozen=True, slots=True)
class ExportResult:
    """What was exported. left_out: rows that have no such form, by reason. ids: what they are."""

    folder: RunFolder
    num_rows: int
    num_files: int
    left_out: Counter[str]
    ids: str
    files: tuple[str, ...]


def run_export(options: ExportOptions, stop: StopRequest) -> ExportResult:
    """Export INPUT into OUTPUT; goes on where an earlier start of the same settings stopped.

    Raises `UsageError` with OUTPUT as it was, also if no row can be exported; `ShardsFailed` if a
    file cannot be written or INPUT changes; `Interrupted` when `stop` says so, with whole files
    kept.
    """
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            inputs, output = opened.enter_context(
                open_places(options, writer="export", is_always_folder=True)
            )
            source = _source(options, inputs, output, stop)
            found = survey(source, stop)
            plan = Plan.of(source, found, options.seed, options.shard_rows)
            writers = _writers(options, plan, found, stop)
            store, shards = _begin(options, output, plan, list(writers))
        try:
            for shard in shards:
                stop.check()
                if store.read_receipt(shard) is None:
                    _publish(store, shard, writers[shard.name])
        except (OSError, pa.ArrowException) as error:
            raise ShardsFailed(first_line(error)) from error
        _require_unchanged(source)
    return ExportResult(
        store.folder,
        len(plan.order),
        plan.num_files,
        found.left_out,
        _told_ids(source),
        tuple(writers),
    )


def open_source(
    files: list[tuple[str, str]], columns: TrajectoryColumns, form: str, id_column: str | None
) -> Source:
    """The rows of Parquet files; raises `UsageError` if they hold no trajectories.

    files: where each stands, and its name.
    """
    shards: list[Shard] = []
    with in_parallel(lambda named: open_parquet(named[0]).schema_arrow, files) as schemas:
        schema = pa.schema([])
        for number, ((path, name), own) in enumerate(zip(files, schemas, strict=True)):
            columns = choose_columns(own, columns, path)
            schema = own if not number else schema
            shards.append(describe_shard(canonical(path), name, columns, None))
    return Source(shards, columns, choose_ids(shards, schema, id_column), FORMATS[form])


def data_name(number: int, num_files: int) -> str:
    return f"data/train-{number:05d}-of-{num_files:05d}.parquet"


def _source(
    options: ExportOptions,
    inputs: list[tuple[str, str]],
    output: HeldOutput,
    stop: StopRequest,
) -> Source:
    staged = []
    for file, name in inputs:
        stop.check()
        staged.append((as_parquet(file, name, output, options.columns.exploded), name))
    return open_source(staged, options.columns, options.format, options.id_column)


def _begin(
    options: ExportOptions, output: HeldOutput, plan: Plan, names: list[str]
) -> tuple[RunStore, list[Shard]]:
    """The run, new or gone on with, and its files as the shards that it will write."""
    digest = digest_of(plan.source.shards)
    path = canonical(options.input)
    rows = {data_name(n, plan.num_files): len(plan.positions_of(n)) for n in range(plan.num_files)}
    shards = [Shard(path, name, rows.get(name, 0), 0, digest) for name in names]
    wanted = Manifest(
        writer="export",
        identity=Identity(
            options.settings,
            plan.source.columns.to_json(),
            versions={"rsr-engine": importlib.metadata.version("rsr-engine")},
        ),
        shards=tuple(InputShard.of(shard, path) for shard in shards),
        subject=f"of {options.input} as {options.format}",
        command=options.command,
        output=str(options.output),
    )
    if output.is_new:
        needed = COPIES * sum(file_size_bytes(shard.path) for shard in plan.source.shards)
        require_disk_space(options.output, needed)
        manifest = output.begin(wanted)
    else:
        manifest = output.go_on(wanted)
    return RunStore.of(output.folder, manifest.identity), shards


def _writers(
    options: ExportOptions, plan: Plan, found: Survey, stop: StopRequest
) -> dict[str, Callable[[HashingFile], object]]:
    """The writer of each file of the export, by name."""
    card = _card(options, plan, found)
    writers: dict[str, Callable[[HashingFile], object]] = {}
    for number in range(plan.num_files):
        name = data_name(number, plan.num_files)
        writers[name] = partial(write_data, plan, number, stop=stop)
    writers[JSON_LINES] = partial(write_json_lines, plan, stop=stop)
    writers[SCORES] = lambda sink: write_table(scores_table(plan, stop), sink)
    texts = {
        DATASET_INFO: dataset_info(card),
        AXOLOTL: axolotl_config(card),
        CARD: readme(card),
    }
    for name, text in texts.items():
        if text is not None:
            writers[name] = partial(_write_text, text)
    return writers


def _write_text(text: str, sink: HashingFile) -> None:
    sink.write(text.encode("utf-8", "backslashreplace"))


def _publish(store: RunStore, shard: Shard, write: Callable[[HashingFile], object]) -> None:
    def write_and_count(sink: HashingFile) -> Summary:
        write(sink)
        return Summary(num_rows=shard.num_rows)

    store.publish_derived(shard, write_and_count)


def _require_unchanged(source: Source) -> None:
    for shard in source.shards:
        if fingerprint(shard.path) != shard.fingerprint:
            raise ShardsFailed(f"{shard.path} was written again while it was exported")


def _told_ids(source: Source) -> str:
    if source.id_column is None:
        return "file and row of INPUT, as no column tells its rows apart"
    return f"of INPUT's column {source.id_column}"


def _card(options: ExportOptions, plan: Plan, found: Survey) -> Card:
    metadata = open_parquet(plan.source.shards[0].path).schema_arrow.metadata or {}
    selection, selected_by = _selection(options.input)
    return Card(
        name=options.name,
        format=options.format,
        num_rows=len(plan.order),
        command=shell_command(options.command),
        columns=plan.schema.names,
        seed=options.seed,
        licence=options.licence,
        sources=options.sources,
        scored=_object(metadata.get(METADATA_KEY)),
        graded=_object(metadata.get(GRADE_METADATA_KEY)),
        selection=selection,
        selected_by=selected_by,
        left_out=found.left_out,
        ids=_told_ids(plan.source),
        version=importlib.metadata.version("rsr-engine"),
    )


def _object(text: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(text or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _selection(place: str) -> tuple[dict[str, Any], str]:
    """The result and the command of the selection that wrote INPUT, where one did."""
    try:
        folder = RunFolder(place)
        manifest = folder.read_manifest()
        if manifest is None:
            return {}, ""
        result = _object(folder.storage.read(COMPOSITION))
    except (ManifestError, OSError, UsageError):
        return {}, ""
    return result, shell_command(manifest.command)
