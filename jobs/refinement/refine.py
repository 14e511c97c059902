"""`rsr refine`: an oracle's version of each row's trace, the native one beside it.

    prepare   look at INPUT and the oracle, decide what is left to do
    execute   have the oracle answer row after row; commit units and shards on the way

The oracle is a server, asked from this machine, or a model on the worker pool of `rsr sample`.
"""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa

from rsr.engine.facts import StudentFacts
from rsr.jobs.cluster.remaining import do_remaining, find_remaining
from rsr.jobs.cluster.student import ask_of_student
from rsr.jobs.cluster.venue import Venue
from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.refinement.commit import RefinedColumns
from rsr.jobs.refinement.endpoint import Budget, Endpoint, EndpointOptions
from rsr.jobs.refinement.job import RefiningJob, look_at_oracle
from rsr.jobs.refinement.journal import NAME, Journal
from rsr.jobs.refinement.options import ModelOptions, Plan, RefineOptions, RefineResult
from rsr.jobs.refinement.outcome import ADDED_COLUMNS
from rsr.jobs.refinement.prompts import load_prompt
from rsr.jobs.refinement.questions import Questions
from rsr.jobs.refinement.served import ServedRun
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest, versions_of
from rsr.jobs.run.opening import HeldOutput, open_places
from rsr.jobs.run.preflight import (
    canonical,
    refusing_what_cannot_be_reached,
    require_disk_space,
)
from rsr.jobs.run.probe import local_files
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.staging import as_parquet, describe_input
from rsr.jobs.run.store import RunStore
from rsr.jobs.sampling import sample
from rsr.jobs.sampling.job import first_units
from rsr.jobs.shards.columns import choose_columns, require_columns
from rsr.jobs.shards.parquet import file_size_bytes, open_parquet, row_groups
from rsr.jobs.shards.scored import USUAL_ID
from rsr.jobs.shards.shard import Shard, Unit, cut_units
from rsr.jobs.storage.concurrency import in_parallel

MAX_UNIT_ROWS, UNIT_BYTES = 32, 1 << 20
"""What is committed at a time of a server's answers; others are in the journal until then."""
COPIES = 3
"""Copies of INPUT's bytes, for the disk check: the refined trace and the native one beside it."""


@dataclass(frozen=True, slots=True)
class _Input:
    """INPUT, as the run reads it. sources: the files behind the shards, by the shard's name."""

    shards: list[Shard]
    sources: dict[str, str]
    questions: Questions


@dataclass(frozen=True, slots=True)
class _Subject:
    """What an oracle adds to a run's manifest. settings, versions, model: of its identity.

    unit_rows: of a run that begins, which is asked for then alone.
    """

    told: str
    settings: dict[str, Any]
    versions: dict[str, str]
    unit_rows: Callable[[], int]
    unit_bytes: int
    model: dict[str, Any] = field(default_factory=dict)


def run_refine(options: RefineOptions, progress: Progress, stop: StopRequest) -> RefineResult:
    """Refine INPUT into OUTPUT; goes on where an earlier start of the same settings stopped.

    Raises `UsageError` with OUTPUT as it was; `ShardsFailed` if the budget is spent, the server
    given up or a file not to be read or written, every answer so far being kept; `Interrupted` when
    `stop` says so, with the same kept.
    """
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            inputs, output = opened.enter_context(open_places(options, writer="refine"))
            read = _describe_input(options, inputs, output, stop)
        if isinstance(options.oracle, EndpointOptions):
            return _refine_by_server(options, options.oracle, read, output, stop)
        oracle = options.oracle
        venue = Venue(
            oracle.cluster,
            opened,
            stop,
            tensor_parallel_size=oracle.config.tensor_parallel_size,
            verbose=oracle.verbose,
        )
        return _refine_by_workers(options, oracle, read, output, venue, progress, stop)


def _refine_by_server(
    options: RefineOptions,
    oracle: EndpointOptions,
    read: _Input,
    output: HeldOutput,
    stop: StopRequest,
) -> RefineResult:
    with refusing_what_cannot_be_reached():
        asyncio.run(_probe(oracle))
        subject = _Subject(
            told=f"{oracle.model} at {oracle.url}",
            settings={
                "api_model": oracle.model,
                "temperature": oracle.temperature,
                "max_tokens": oracle.max_tokens,
            },
            versions=versions_of("rsr-engine", "openai"),
            unit_rows=lambda: MAX_UNIT_ROWS,
            unit_bytes=UNIT_BYTES,
        )
        plan = _begin(options, read, subject, output)
    journal = Journal(output.folder.state / NAME, plan.store.digest)
    if output.is_new:
        journal.remove()
    work = ServedRun(plan, oracle, journal)
    if plan.remaining.unfinished:
        with journal:
            asyncio.run(work.run(stop))
    journal.remove()
    plan.remaining.done.merge(work.summary)
    return RefineResult(output.folder, plan.remaining.done, work.budget.num_requests)


async def _probe(options: EndpointOptions) -> None:
    async with Endpoint(options, Budget(None)) as endpoint:
        await endpoint.probe()


def _refine_by_workers(
    options: RefineOptions,
    oracle: ModelOptions,
    read: _Input,
    output: HeldOutput,
    venue: Venue,
    progress: Progress,
    stop: StopRequest,
) -> RefineResult:
    with refusing_what_cannot_be_reached():
        # Of a run that goes on they were looked at when it began.
        units = first_units(read.shards) if output.is_new else []
        question = partial(look_at_oracle, oracle.config, read.questions, units)
        facts, first = ask_of_student(question, venue, with_cluster=output.is_new)
        if first.refusal:
            raise UsageError(f"none of the first rows can be refined: {first.refusal}")
        if first.text is not None:
            progress.looked_at(f"the first prompt:\n{first.text}")
        stop.check()
        plan = _begin(options, read, _subject_of_model(oracle, facts, venue), output)
    job = RefiningJob(
        config=facts.config,
        sampling=oracle.sampling,
        questions=plan.questions,
        seed=oracle.seed,
        store=plan.store,
        must_see=local_files(*[s.path for s in read.shards][:1], facts.config.model),
    )
    done = do_remaining(job, plan.remaining, venue, progress, stop)
    return RefineResult(
        output.folder,
        done.summary,
        num_tokens_now=done.num_tokens_now,
        seconds=done.seconds,
        failures=done.failures,
    )


def _subject_of_model(oracle: ModelOptions, facts: StudentFacts, venue: Venue) -> _Subject:
    settings = {name: getattr(facts.config, name) for name in sample.STUDENT_SETTINGS}
    return _Subject(
        told=facts.config.model,
        settings=settings | asdict(oracle.sampling) | {"seed": oracle.seed},
        versions=versions_of(*sample.VERSIONED),
        unit_rows=lambda: sample.UNIT_SAMPLES["gpu" if venue.cluster().has_gpus else "cpu"],
        unit_bytes=sample.UNIT_BYTES,
        model=facts.fingerprint,
    )


def _describe_input(
    options: RefineOptions, inputs: list[tuple[str, str]], output: HeldOutput, stop: StopRequest
) -> _Input:
    shards: list[Shard] = []
    columns: RefinedColumns | None = None
    exploded = options.columns.exploded
    with in_parallel(lambda named: as_parquet(*named, output, exploded), inputs) as paths:
        for (file, name), path in zip(inputs, paths, strict=True):
            stop.check()
            schema = open_parquet(path).schema_arrow
            columns = _choose_columns(options, schema, columns, file)
            shards.append(describe_input(file, path, name, columns.trajectory))
    assert columns is not None, "find_inputs finds at least one file"
    sources = {name: canonical(file) for file, name in inputs}
    return _Input(shards, sources, Questions(columns, load_prompt(options.mode)))


def _choose_columns(
    options: RefineOptions, schema: pa.Schema, known: RefinedColumns | None, file: str
) -> RefinedColumns:
    wanted = options.columns if known is None else known.trajectory
    trajectory = choose_columns(schema, wanted, file)
    if trajectory.text:
        raise UsageError(
            f"{file}: a text column has no problem apart from its response; expected messages, or "
            "a prompt and a response"
        )
    if there := [name for name in schema.names if name in ADDED_COLUMNS]:
        raise UsageError(f"{file} already has {', '.join(there)}: refine the native rows instead")
    name = options.id_column
    if name is None:
        has_usual = USUAL_ID in schema.names if known is None else known.id is not None
        name = USUAL_ID if has_usual else None
    columns = RefinedColumns(trajectory, options.answer_column, name)
    require_columns(schema, columns.beside, file)
    return columns


def _begin(options: RefineOptions, read: _Input, subject: _Subject, output: HeldOutput) -> Plan:
    """Begin the run in OUTPUT, or go on with it; raises `UsageError` if another is there."""
    columns, prompt = read.questions.columns, read.questions.prompt
    settings = {
        "mode": options.mode,
        "prompt_blake2b": prompt.digest,
        "answer_column": columns.answer,
        "id_column": columns.id,
    }
    wanted = Manifest(
        writer="refine",
        identity=Identity(
            settings | subject.settings,
            columns.trajectory.to_json(),
            subject.model,
            subject.versions,
        ),
        shards=tuple(InputShard.of(shard, read.sources[shard.name]) for shard in read.shards),
        subject=f"{options.mode} of {options.input} by {subject.told}",
        command=options.command,
        output=str(options.output),
        unit_bytes=subject.unit_bytes,
    )
    if output.is_new:
        needed = COPIES * sum(file_size_bytes(shard.path) for shard in read.shards)
        require_disk_space(options.output, needed)
        manifest = output.begin(replace(wanted, unit_rows=subject.unit_rows()))
    else:
        manifest = output.go_on(wanted, is_same_input=options.same_input)

    def cut(shard: Shard, kept: list[Unit]) -> list[Unit]:
        return cut_units(
            shard,
            max_rows=manifest.unit_rows,
            max_bytes=manifest.unit_bytes,
            kept=kept,
            groups=row_groups(open_parquet(shard.path).metadata, columns.trajectory.names),
        )

    # As every machine finds it.
    store = RunStore.of(RunFolder(canonical(options.output)), manifest.identity)
    return Plan(read.questions, store, find_remaining(store, read.shards, cut))
