"""`rsr compare`: parse, call one function, print what it returns."""

import click

from rsr.jobs.command import configure_logging, guarded, json_option
from rsr.jobs.comparison.compare import StreamComparison, StreamOptions, compare_streams
from rsr.jobs.comparison.drift import DriftOptions
from rsr.jobs.comparison.printing import print_comparison
from rsr.jobs.comparison.streams import open_streams
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.cli import draws_option, mixed_option, seed_option
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import rank_clip_option
from rsr.jobs.terminal import print_json, wide_console


@click.command()
@click.argument("scored", metavar="NATIVE REFINED...", nargs=-1, required=True)
@click.option(
    "--on",
    default="problem_id",
    show_default=True,
    metavar="COLUMN",
    help="What tells problems: only those that every stream has are compared.",
)
@click.option(
    "--quality-column",
    "quality_columns",
    multiple=True,
    metavar="COLUMN",
    help="A reward or the like, whose mean is compared too; may be repeated. `correct` always is, "
    "where it is there.",
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
    help="The student's, to show tokens as text: a folder, or a hub name. [default: the run's "
    "model, where that is a folder that is there]",
)
@draws_option
@seed_option()
@mixed_option
@json_option
def compare(
    scored: tuple[str, ...],
    on: str,
    quality_columns: tuple[str, ...],
    rank_clip: str | None,
    max_pairs: int,
    tokenizer: str | None,
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

    def run(_: StopRequest) -> StreamComparison:
        if len(scored) < 2:
            raise UsageError("give NATIVE and at least one REFINED, each what rsr score wrote")
        streams = open_streams(
            scored,
            on=on,
            quality_columns=quality_columns,
            rank_clip=rank_clip,
            allow_mixed_students=allow_mixed_students,
        )
        drift = DriftOptions(max_pairs, num_draws, seed, tokenizer)
        return compare_streams(streams, StreamOptions(num_draws, seed, drift))

    comparison = guarded(run)
    if as_json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison, wide_console())
