"""`rsr filter` and `rsr select`: parse, build options, call one function, print the result."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import click

from rsr.jobs.cluster.calls_at import calls_at
from rsr.jobs.command import (
    Place,
    address_option,
    guarded,
    json_option,
    typed_command,
)
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.options import metric_option, rank_clip_option
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.selection.anywhere import filter_anywhere, select_anywhere
from rsr.jobs.selection.candidates import Conditions
from rsr.jobs.selection.filter import FilterOptions
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.select import (
    DEFAULT_QUALITY_WEIGHT,
    Objective,
    Pick,
    SelectOptions,
)
from rsr.jobs.selection.selection import SubsetOptions
from rsr.jobs.shards.scored import USUAL_CORRECT, USUAL_ID, USUAL_TEACHER
from rsr.jobs.terminal import Console, print_json


class Share(click.ParamType[Fraction]):
    """An exact fraction, above 0 and up to 1."""

    name = "fraction"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        try:
            share = Fraction(value)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not 0 < share <= 1:
            self.fail(f"{value!r}: expected a fraction above 0 and up to 1", param, ctx)
        return share


class ColumnShare(click.ParamType["tuple[str, Fraction]"]):
    """COLUMN=FRACTION."""

    name = "column=fraction"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Fraction]:
        column, equals, share = str(value).rpartition("=")
        if not (column and equals):
            self.fail(f"{value!r}: expected COLUMN=FRACTION, as in teacher=0.5", param, ctx)
        return column, Share().convert(share, param, ctx)


def _conditions_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option(
            "--where",
            metavar="EXPRESSION",
            help="Take only rows for which this Polars SQL expression is true, as in "
            "\"correct AND teacher <> 'human'\".",
        ),
        click.option(
            "--min-tokens", type=click.IntRange(min=1), help="Fewest scored tokens of a row."
        ),
        click.option(
            "--max-tokens", type=click.IntRange(min=1), help="Most scored tokens of a row."
        ),
    ]
    return _with(options, command)


def _common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        metric_option,
        click.option(
            "--quality-column",
            metavar="COLUMN",
            help="Column of a reward or the like; higher is better. For the metric car, and for "
            "joint selection.",
        ),
        rank_clip_option,
        click.option(
            "--id-column",
            help="Column that orders rows of equal RSR, so that the result does not depend on the "
            f"order of the input. [default: {USUAL_ID}, if there is one; else the earlier row "
            "wins]",
        ),
        click.option(
            "--teacher-column",
            help=f"Column to tell the composition by. [default: {USUAL_TEACHER}, if there is one]",
        ),
        click.option(
            "--correct-column",
            help="Boolean column of verdicts, for the composition and --objective joint. "
            f"[default: {USUAL_CORRECT}, if there is one]",
        ),
        click.option(
            "--allow-mixed-students",
            is_flag=True,
            help="Accept files that different students scored, whose RSR does not compare.",
        ),
        click.option(
            "--rows-per-file",
            type=click.IntRange(min=1),
            metavar="N",
            help="Write files of N rows each, in the order of SCORED, for a trainer. [default: the "
            "files of SCORED]",
        ),
        click.option("--overwrite", is_flag=True, help="Discard the earlier run in OUTPUT."),
        json_option,
    ]
    return _with(options, command)


def _with(options: list[Any], command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


@click.command("filter")
@click.argument("input", metavar="SCORED")
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option("--max-rsr", type=float, help="Largest RSR to keep.")
@click.option(
    "--keep-fraction",
    type=Share(),
    help="Keep this share of the candidates, rounded half up: exactly, not by sampling.",
)
@click.option("--keep-rows", type=click.IntRange(min=1), help="Keep at most this many rows.")
@click.option(
    "--token-budget",
    type=click.IntRange(min=1),
    help="Keep rows while their scored tokens fit; the first that does not fit ends it.",
)
@click.option(
    "--within",
    metavar="COLUMN",
    help="Let --keep-fraction, --keep-rows and --token-budget count for each value of COLUMN.",
)
@address_option("Look at shards and copy them")
@_conditions_options
@_common_options
def filter_(address: str | None, as_json: bool, **fields: Any) -> None:
    """Keep the rows of SCORED with the lowest RSR, writing them to the folder OUTPUT.

    SCORED is a file, folder or glob as rsr score writes it. Candidates are its scored rows that
    fulfil --where, --min-tokens and --max-tokens; of their ranking by RSR, or by --metric, every
    limit keeps the front, and the shortest holds. OUTPUT gets one file for each of SCORED, with the
    kept rows in their order and every column as it was; it may be one file: call it x.parquet or
    x.jsonl. Stopped half way, the same command goes on.
    """
    options = filter_options(**fields)

    def run(stop: StopRequest) -> SelectionResult:
        with calls_at(address, stop) as calls:
            return filter_anywhere(options, calls, stop)

    _print(guarded(run, log=_log(options)), as_json)


@click.command()
@click.argument("input", metavar="SCORED")
@click.argument("output", metavar="OUTPUT", type=Place())
@click.option(
    "--group-by", required=True, metavar="COLUMN", help="Column of the problem or other group."
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    help="Rows to keep of each group. [default: 1; with --objective pareto, or joint without "
    "--quality-weight, all that are on the front]",
)
@click.option(
    "--require",
    "required",
    multiple=True,
    metavar="COLUMN",
    help="Boolean column that must be true; may be repeated.",
)
@click.option(
    "--max-share-per",
    "max_shares",
    type=ColumnShare(),
    multiple=True,
    help="Largest share of the selected rows for any one value of a column, as in teacher=0.5. "
    "Repeat.",
)
@_conditions_options
@click.option(
    "--objective",
    type=click.Choice(get_args(Objective)),
    help="Joint selection, by --metric (RSR, or perplexity for what adapting costs) and "
    "--quality-column: weighted ranks by the mean of both ranks in the group; pareto keeps the "
    "rows that no other beats in both; joint puts correct rows first and then does the former "
    "with --quality-weight, the latter without.",
)
@click.option(
    "--quality-weight",
    type=click.FloatRange(0, 1),
    help=f"Weight of quality against --metric. [default: {DEFAULT_QUALITY_WEIGHT}; with "
    "--objective joint the front]",
)
@click.option(
    "--pick",
    type=click.Choice(get_args(Pick)),
    default="best",
    show_default=True,
    help="Rows to take of a group: the best; the first by sample_index, or in order; or some "
    "by chance, as --seed has it. With --require correct the last two are rejection sampling.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Seed of --pick random. [default: 0]")
@address_option("Look at shards, rank groups and copy")
@_common_options
def select(address: str | None, as_json: bool, **fields: Any) -> None:
    """Keep the best trajectories of each problem in SCORED, writing them to the folder OUTPUT.

    SCORED is a file, folder or glob as rsr score writes it; a problem's rows may be anywhere in it.
    The best have the lowest RSR, the best --metric, or the best mix of it and --quality-column.
    OUTPUT gets one file for each of SCORED, with the selected rows in their order and every column
    as it was; it may be one file: call it x.parquet or x.jsonl. Stopped half way, the same command
    goes on.
    """
    options = select_options(**fields)

    def run(stop: StopRequest) -> SelectionResult:
        with calls_at(address, stop) as calls:
            return select_anywhere(options, calls, stop)

    _print(guarded(run, log=_log(options)), as_json)


def filter_options(
    where: str | None, min_tokens: int | None, max_tokens: int | None, **fields: Any
) -> FilterOptions:
    """From what the options of `rsr filter` say."""
    conditions = Conditions(where=where, min_tokens=min_tokens, max_tokens=max_tokens)
    return FilterOptions(conditions=conditions, command=typed_command(), **fields)


def select_options(
    where: str | None,
    min_tokens: int | None,
    max_tokens: int | None,
    required: tuple[str, ...],
    **fields: Any,
) -> SelectOptions:
    """From what the options of `rsr select` say."""
    conditions = Conditions(
        where=where, min_tokens=min_tokens, max_tokens=max_tokens, required=required
    )
    return SelectOptions(conditions=conditions, command=typed_command(), **fields)


def _log(options: SubsetOptions) -> Path:
    return RunFolder(options.output).log_path


def _print(result: SelectionResult, as_json: bool) -> None:
    if as_json:
        print_json(result.to_json(), default=str)
    else:
        result.print(Console())
