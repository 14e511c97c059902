"""What every `rsr` command shares: exit codes, refusals, logging, and options of one meaning.

Exit codes: 0 done; 1 some rows or shards failed and are listed; 2 wrong usage or input, nothing
written; 75 interrupted, the same command goes on. Results go to stdout, everything else to
stderr. Logging is configured here and nowhere else. Knows no command.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from rsr.jobs.errors import Interrupted, ShardsFailed, UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.storage import is_remote

EXIT_FAILURES, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 75
T = TypeVar("T")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)


class RankClip(click.ParamType):
    """A positive rank, or `none`."""

    name = "rank|none"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value is None or value == "none":
            return None
        try:
            rank = int(value)
        except ValueError:
            rank = 0
        if rank < 1:
            self.fail(f"{value!r}: expected a rank of at least 1, or 'none'", param, ctx)
        return rank


class Place(click.ParamType):
    """A local path, or an object store's URL, which must not be tidied up as a path would be."""

    name = "path|url"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        return value if isinstance(value, Path) or is_remote(value) else Path(value)


def configure_logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def guarded(
    run: Callable[[StopRequest], T], *, after_stop: str = "the same command goes on from here"
) -> T:
    """Call `run`, turning what a user can cause into one line and its exit code."""
    stop = StopRequest()
    try:
        with stop.listening():
            return run(stop)
    except UsageError as error:
        click.echo(f"rsr: {error}", err=True)
        sys.exit(EXIT_USAGE)
    except ShardsFailed as error:
        for line in str(error).splitlines():
            click.echo(f"rsr: failed: {line}", err=True)
        sys.exit(EXIT_FAILURES)
    except Interrupted:
        click.echo(f"rsr: interrupted; {after_stop}", err=True)
        sys.exit(EXIT_INTERRUPTED)


def typed_command() -> tuple[str, ...]:
    """The words that were typed."""
    return ("rsr", *sys.argv[1:])
