"""`rsr compare`: parse, call one function, print what it returns."""

from pathlib import Path

import click

from rsr.jobs.command import Place, configure_logging, guarded, json_option, typed_command
from rsr.jobs.comparison.compare import StreamComparison, StreamOptions, compare_streams
from rsr.jobs.comparison.drift import DRIFT_FORMULA, DriftOptions
from rsr.jobs.comparison.gate import (
    DEFAULT_MAX_DRIFT,
    GateOptions,
    GateResult,
    GateStatus,
    run_gate,
)
from rsr.jobs.comparison.printing import print_comparison
from rsr.jobs.comparison.streams import open_streams
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.cli import draws_option, mixed_option, seed_option
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import rank_clip_option
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.shards.scored import USUAL_ID
from rsr.jobs.terminal import Console, fact_table, print_json


@click.command()
@click.argument("scored", metavar="NATIVE REFINED...", nargs=-1, required=True)
@click.option(
    "--on",
    default="problem_id",
    show_default=True,
    metavar="COLUMN",
    help="Column of the problem; only problems that every stream has are compared.",
)
@click.option(
    "--id-column",
    default=USUAL_ID,
    show_default=True,
    metavar="COLUMN",
    help="Column of NATIVE whose values parent_id in REFINED names. Without it, rows are "
    "named by their place, as rsr refine does; where REFINED has no parent_id, by problem.",
)
@click.option(
    "--quality-column",
    "quality_columns",
    multiple=True,
    metavar="COLUMN",
    help="Column of a reward or the like, whose mean is compared too; may be repeated. "
    "`correct` always is, where it is there.",
)
@rank_clip_option
@click.option(
    "--pairs",
    "max_pairs",
    type=click.IntRange(min=1),
    default=1_000,
    show_default=True,
    help="Pairs of a refined and a native trace whose tokens are looked at for drift, at random "
    "where there are more.",
)
@click.option(
    "--tokenizer",
    help="Tokenizer of the student, to show tokens as text: a folder, or a hub name. [default: "
    "the run's model, where that is a folder that is there]",
)
@click.option(
    "--gate",
    "gate_output",
    type=Place(),
    metavar="OUTPUT",
    help="Compare nothing; write the one REFINED stream to this folder, with the native row in the "
    "place of each refined one that is not correct or has drifted, and why.",
)
@click.option(
    "--max-drift",
    type=click.FloatRange(min=0),
    default=DEFAULT_MAX_DRIFT,
    show_default=True,
    help=f"With --gate: the most {DRIFT_FORMULA} of a pair that may pass.",
)
@click.option("--overwrite", is_flag=True, help="Discard the earlier run in --gate OUTPUT.")
@draws_option
@seed_option()
@mixed_option
@json_option
def compare(
    scored: tuple[str, ...],
    on: str,
    id_column: str,
    quality_columns: tuple[str, ...],
    rank_clip: str | None,
    max_pairs: int,
    tokenizer: str | None,
    gate_output: Path | str | None,
    max_drift: float,
    overwrite: bool,
    num_draws: int,
    seed: int,
    allow_mixed_students: bool,
    as_json: bool,
) -> None:
    """Compare a student's own traces, NATIVE, with REFINED ones of the same problems.

    Each is what `rsr score` wrote: a file, a folder or a glob. Shown are what each stream costs the
    student to adapt to (perplexity), RSR and the floor below which it cannot go, length,
    correctness and qualities, all on the problems that every stream has; and, for streams scored
    with --token-columns, how far each refined trace has drifted from its native one. Intervals are
    95 % bootstrap intervals over problems.
    """
    configure_logging(verbose=False)

    def run(stop: StopRequest) -> StreamComparison | GateResult:
        if len(scored) < 2:
            raise UsageError("give NATIVE and at least one REFINED, each what rsr score wrote")
        if gate_output is not None and len(scored) > 2:
            raise UsageError(f"--gate takes NATIVE and one REFINED; found {len(scored)} streams")
        streams = open_streams(
            scored,
            on=on,
            id_column=id_column,
            quality_columns=quality_columns,
            rank_clip=rank_clip,
            allow_mixed_students=allow_mixed_students,
        )
        if gate_output is not None:
            options = GateOptions(
                output=gate_output,
                max_drift=max_drift,
                overwrite=overwrite,
                command=typed_command(),
            )
            return run_gate(streams[0], streams[1], options, stop)
        drift = DriftOptions(max_pairs, num_draws, seed, tokenizer)
        return compare_streams(streams, StreamOptions(num_draws, seed, drift))

    log = None if gate_output is None else RunFolder(gate_output).log_path
    result = guarded(run, log=log)
    if isinstance(result, GateResult):
        _tell_gate(result, as_json)
    elif as_json:
        print_json(result.to_json())
    else:
        print_comparison(result, Console())


def _tell_gate(result: GateResult, as_json: bool) -> None:
    counts = result.summary.rows_by_status
    if as_json:
        print_json(
            {
                "output": str(result.folder.root),
                "num_rows": result.summary.num_rows,
                "rows_by_status": counts,
            }
        )
        return
    table = fact_table()
    told = ", ".join(f"{count:,} {status}" for status, count in counts.items())
    table.add_row("rows", f"{result.summary.num_rows:,}" + (f"  ({told})" if told else ""))
    table.add_row("refined", f"{counts.get(GateStatus.REFINED, 0):,}; the others are native")
    table.add_row("result", str(result.folder))
    Console().show(table)
