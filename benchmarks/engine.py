"""`rsr bench engine`: our engine beside the limit, vLLM's own scoring and the authors' script.

All ways get the same rows and the same model in one run, in turns, because a shared machine is
never quiet: ratios mean something where times do not. What each way does is in
`engine_runs.py`.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box

from rsr.benchmarks.child import ChildProcess
from rsr.benchmarks.engine_runs import (
    LIMIT,
    OURS,
    PUBLISHED,
    STOCK,
    Outcome,
    Sums,
    Workload,
    import_published,
    open_way,
    run_way,
)
from rsr.engine.metrics import rank_surprisal_ratio
from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError
from rsr.jobs.options import scorer_config, scorer_options
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import read_trajectories
from rsr.jobs.shards.shard import Unit, describe_shard
from rsr.jobs.storage.hub import stay_offline_without_hub
from rsr.jobs.terminal import Console, Table, print_json

if TYPE_CHECKING:
    from rsr.benchmarks.engine_verify import Verification


WARM_UP_ROWS = 8


@dataclass(frozen=True, slots=True)
class EngineRow:
    """One way over one workload; times are medians over rounds, differences are from ours.

    num_tokens: whole sequences, context included. share_of_limit: speed relative to the bare
    prefill. max_rsr_difference: largest |Δ RSR| / RSR of a trajectory.
    """

    way: str
    num_rows: int
    num_tokens: int
    dtype: str
    prefix_reuse: str
    compile: bool
    num_threads: int
    torch_version: str
    time_s: float
    tokens_per_s: float
    share_of_limit: float
    peak_rss_mib: float
    max_rsr_difference: float | None
    max_mean_surprisal_difference_nats: float | None


def read_rows(path: Path, max_rows: int) -> list[Trajectory]:
    """The first trajectories of a Parquet file; raises `UsageError` where it has none."""
    columns = choose_columns(open_parquet(path).schema_arrow, TrajectoryColumns(), str(path))
    shard = describe_shard(str(path), path.name, columns, max_rows)
    return read_trajectories(Unit(shard, 0, shard.num_rows), columns)


def join_rows(trajectories: Sequence[Trajectory], min_characters: int) -> list[Trajectory]:
    """Rows' texts end to end, cut into plain texts of at least so many characters each."""
    joined: list[Trajectory] = []
    parts: list[str] = []
    for trajectory in trajectories:
        parts += [str(message["content"]) for message in trajectory.messages or ()]
        texts = (trajectory.prompt, trajectory.response, trajectory.text)
        parts += [text for text in texts if isinstance(text, str) and text]
        if sum(map(len, parts)) >= min_characters:
            joined.append(Trajectory(text="\n".join(parts)))
            parts = []
    return joined


def bench_engine(workload: Workload, num_rounds: int) -> list[EngineRow]:
    """Time every way over the workload, in turns, after a few rows that are not timed."""
    from rsr.engine.student import open_student

    ways = [LIMIT, OURS]
    if workload.prompt_logprobs:
        ways.append(STOCK)
    if workload.published_folder is not None:
        ways.append(PUBLISHED)
    with ExitStack() as stack:
        children = {way: stack.enter_context(ChildProcess()) for way in ways}
        for way, child in children.items():
            child.call(open_way, way, workload)
            child.call(run_way, way, WARM_UP_ROWS)
        num_rows = len(workload.trajectories)
        rounds = [
            {way: child.call(run_way, way, num_rows) for way, child in children.items()}
            for _ in range(num_rounds)
        ]
    encoder = open_student(workload.config).encoder()
    num_tokens = sum(len(encoder.encode(t).token_ids) for t in workload.trajectories)
    return [_row(way, workload, num_tokens, rounds) for way in ways]


def _row(
    way: str, workload: Workload, num_tokens: int, rounds: Sequence[dict[str, Outcome]]
) -> EngineRow:
    import torch

    time_s = statistics.median(outcomes[way].time_s for outcomes in rounds)
    last = rounds[-1]
    rsr_difference, surprisal_difference = _largest_differences(last[way].sums, last[OURS].sums)
    return EngineRow(
        way=way,
        num_rows=len(workload.trajectories),
        num_tokens=num_tokens,
        dtype=workload.config.dtype,
        prefix_reuse=workload.config.prefix_reuse,
        compile=workload.config.compile,
        num_threads=torch.get_num_threads(),
        torch_version=torch.__version__,
        time_s=time_s,
        tokens_per_s=num_tokens / time_s,
        share_of_limit=statistics.median(o[LIMIT].time_s / o[way].time_s for o in rounds),
        peak_rss_mib=last[way].peak_rss_mib,
        max_rsr_difference=rsr_difference,
        max_mean_surprisal_difference_nats=surprisal_difference,
    )


def _largest_differences(
    theirs: Sequence[Sums] | None, ours: Sequence[Sums] | None
) -> tuple[float | None, float | None]:
    """Of RSR, relative, and of mean surprisal in nats, over rows in which both score as much."""
    if theirs is None or ours is None:
        return None, None
    rsr_differences, surprisal_differences = [0.0], [0.0]
    for their_sums, our_sums in zip(theirs, ours, strict=True):
        their_rsr, our_rsr = rank_surprisal_ratio(*their_sums), rank_surprisal_ratio(*our_sums)
        if their_rsr is None or our_rsr is None or their_sums[2] != our_sums[2]:
            continue
        rsr_differences.append(abs(their_rsr - our_rsr) / our_rsr)
        surprisal_differences.append(abs(their_sums[1] - our_sums[1]) / our_sums[2])
    return max(rsr_differences), max(surprisal_differences)


@click.command()
@click.option(
    "--input",
    "input_path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Parquet file of trajectories.",
)
@click.option(
    "--rows",
    "max_rows",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="Number of rows to take, from the first.",
)
@click.option(
    "--join",
    "min_characters",
    type=click.IntRange(1),
    help="Join rows to plain texts of at least this many characters and score those whole.",
)
@scorer_options(
    "model", "dtype", "prefix_reuse", "max_model_len", "max_num_batched_tokens", "compile"
)
@click.option(
    "--prompt-logprobs/--no-prompt-logprobs",
    default=True,
    show_default=True,
    help="Whether vLLM's own scoring takes part.",
)
@click.option(
    "--published",
    "published_folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A checkout of UmeanNever/RankSurprisalRatio, to run its rsr_cal.py beside ours.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Batch size of the published script, in rows; 8 is its default.",
)
@click.option(
    "--repeat",
    "num_rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Timed rounds; a few rows before them are not timed.",
)
@click.option(
    "--verify",
    "num_verified",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="First compare this many rows with transformers in float32.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def engine(
    input_path: Path,
    max_rows: int,
    min_characters: int | None,
    prompt_logprobs: bool,
    published_folder: Path | None,
    batch_size: int,
    num_rounds: int,
    num_verified: int,
    as_json: bool,
    **scorer: Any,
) -> None:
    """Time whole-trajectory scoring beside a bare vLLM prefill, which is the limit.

    The bare prefill computes every row whole, whatever --prefix-reuse says.
    """
    stay_offline_without_hub(str(scorer["model"]))
    # Seconds of imports that `rsr --help` must not wait for.
    from rsr.benchmarks.engine_verify import verify
    from rsr.engine.student import open_student

    try:
        trajectories = read_rows(input_path, max_rows)
        config = open_student(scorer_config(scorer)).config
    except (UsageError, ValueError) as error:
        raise click.UsageError(str(error)) from None
    if min_characters is not None:
        trajectories = join_rows(trajectories, min_characters)
    if not trajectories:
        raise click.UsageError("no rows to score: give more --rows, or a smaller --join")
    if published_folder is not None and any(t.messages is None for t in trajectories):
        raise click.UsageError("--published takes rows with messages, and no --join")
    if published_folder is not None:
        _require_published(published_folder)
    verification = None
    if num_verified:
        with ChildProcess() as child:
            verification = child.call(verify, config, trajectories[:num_verified])
    workload = Workload(config, trajectories, published_folder, batch_size, prompt_logprobs)
    rows = bench_engine(workload, num_rounds)
    if as_json:
        checked = asdict(verification) if verification else None
        print_json({"rows": [asdict(row) for row in rows], "verification": checked})
        return
    console = Console()
    if verification:
        console.say(_verification_text(verification))
    console.print(_table(rows))


def _require_published(folder: Path) -> None:
    """Refuse a checkout that lacks something before any model loads; a child finds out."""
    with ChildProcess() as child:
        try:
            # Modules cannot come back from a process: only whether the import works.
            child.call(_try_published, folder)
        except UsageError as error:
            raise click.UsageError(str(error)) from None


def _try_published(folder: Path) -> None:
    import_published(folder)


def _verification_text(verification: "Verification") -> str:
    return (
        f"{verification.num_rows} rows, {verification.num_tokens} tokens against transformers in "
        f"float32: {verification.num_equal_ranks} ranks equal, largest |Δ surprisal| "
        f"{verification.max_surprisal_difference_nats:.2g} nats, largest |Δ RSR| "
        f"{verification.max_rsr_difference:.2g}"
    )


def _table(rows: Sequence[EngineRow]) -> Table:
    first = rows[0]
    table = Table(
        title=f"{first.num_rows} rows, {first.num_tokens} tokens, {first.dtype}, "
        f"prefix reuse {first.prefix_reuse}{', compiled' if first.compile else ''}",
        box=box.HEAVY_HEAD,
        pad_edge=True,
    )
    table.add_column("way")
    for column in (
        "s",
        "tokens/s",
        "of limit",
        "peak MiB",
        "max |Δ RSR|",
        "max |Δ surprisal| nats",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.way,
            f"{row.time_s:,.2f}",
            f"{row.tokens_per_s:,.0f}",
            f"{row.share_of_limit:.0%}",
            f"{row.peak_rss_mib:,.0f}",
            *(
                "" if value is None else f"{value:.2g}"
                for value in (row.max_rsr_difference, row.max_mean_surprisal_difference_nats)
            ),
        )
    return table
