"""What every `rsr` command shares: exit codes, refusals, logging, and options of one meaning.

Exit codes:

    0   done
    1   some rows or shards failed and are listed, no row of a run has a score, or a disk or an
        object store failed before the end; what is finished is kept
    2   wrong usage or input, nothing written
    70  a mistake of the program's own: one line, and a log with the traceback
    74  stdout could not be written (a full disk, say); files are as with 0 or 1
    75  interrupted, the same command goes on

A reader that leaves early (`| head -1`) changes no exit code. Results go to stdout, everything
else to stderr. Logging is configured here and nowhere else. Knows no command, and imports nothing
that `rsr --help` would wait for.
"""

import errno
import io
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from rsr.jobs import terminal
from rsr.jobs.errors import Interrupted, ShardsFailed, UsageError, first_line
from rsr.jobs.interrupt import StopRequest

EXIT_FAILURES, EXIT_USAGE = 1, 2
EXIT_UNEXPECTED, EXIT_OUTPUT, EXIT_INTERRUPTED = 70, 74, 75
ERRORS_OF_THE_PLACE = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EIO,
        errno.EACCES,
        errno.EPERM,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.EHOSTDOWN,
        errno.ETIMEDOUT,
    }
)
"""What a disk says that is full, read-only, broken, forbidden or gone away."""
T = TypeVar("T")

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)


def address_option(what: str) -> Callable[..., Any]:
    """Adds `--address`. what: is done there, as an imperative."""
    return click.option(
        "--address",
        envvar="RAY_ADDRESS",
        help=f"{what} on this Ray cluster: auto, or host:port of its head; or, by local, on a Ray "
        "of its own on this machine, for what memory cannot hold at once. "
        "[default: RAY_ADDRESS, else in this process]",
    )


class RankClip(click.ParamType["int | None"]):
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


class Place(click.ParamType["Path | str"]):
    """A local path, or an object store's URL, which must not be tidied up as a path would be."""

    name = "path|url"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | str:
        from rsr.jobs.storage import is_remote

        return value if isinstance(value, Path) or is_remote(value) else Path(value)


def configure_logging(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def guarded(
    run: Callable[[StopRequest], T],
    *,
    after_stop: str = "the same command goes on from here",
    log: Path | None = None,
) -> T:
    """Call `run`, turning what a user can cause into one line and its exit code.

    log: of the run, for what nobody expects; used if its folder is there.
    """
    stop = StopRequest()
    # To the last word: a signal that comes while the end is told must not be the end.
    with stop.listening():
        try:
            return run(stop)
        except UsageError as error:
            terminal.complain(str(error))
            for line in error.more:
                terminal.complain(f"  {line}")
            sys.exit(EXIT_USAGE)
        except ShardsFailed as error:
            for line in str(error).splitlines():
                terminal.complain(f"failed: {line}")
            sys.exit(EXIT_FAILURES)
        except Interrupted:
            terminal.complain(f"interrupted; {after_stop}")
            sys.exit(EXIT_INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, terminal.OutputError):
            raise
        except Exception as error:
            if _is_of_the_place(error):
                _end_by_the_place(error, after_stop, log)
            _end_unexpectedly(error, log)


def run_program(run: Callable[[], Any]) -> int:
    """Call `run`, which parses a command line and obeys it; returns the exit code.

    Whatever happens ends in an exit code of this module's, with one line on stderr at most.
    """
    terminal.prepare_streams()
    try:
        try:
            outcome = run()
        except click.ClickException as error:
            told = io.StringIO()
            error.show(told)
            sys.stderr.write(terminal.printable(told.getvalue(), multiline=True))
            outcome = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            terminal.complain("interrupted")
            outcome = EXIT_INTERRUPTED
        sys.stdout.flush()
    except terminal.OutputError as error:
        terminal.complain(f"stdout cannot be written: {error.strerror}")
        return EXIT_OUTPUT
    except Exception as error:
        _end_unexpectedly(error, None)
    return outcome if isinstance(outcome, int) else 0


def _is_of_the_place(error: Exception) -> bool:
    """Whether a disk or an object store is to blame, and not the program."""
    from rsr.jobs.storage import StorageError

    return isinstance(error, StorageError) or (
        isinstance(error, OSError) and error.errno in ERRORS_OF_THE_PLACE
    )


def _end_by_the_place(error: Exception, after_stop: str, log: Path | None) -> NoReturn:
    """One line on stderr that says which file and why; the traceback goes into the log."""
    _keep_traceback("".join(traceback.format_exception(error)), log)
    terminal.complain(f"failed: {first_line(error)}; what is finished is kept, {after_stop}")
    sys.exit(EXIT_FAILURES)


def _end_unexpectedly(error: Exception, log: Path | None) -> NoReturn:
    """One line on stderr and the traceback in a log; on stderr where no log can be written."""
    told = "".join(traceback.format_exception(error))
    kept = _keep_traceback(told, log)
    where = "no log can be written" if kept is None else f"the log is {kept}"
    terminal.complain(f"unexpected {type(error).__name__}: {first_line(error)}; {where}")
    if kept is None:
        sys.stderr.write(terminal.printable(told, multiline=True))
    sys.exit(EXIT_UNEXPECTED)


def _keep_traceback(told: str, log: Path | None) -> Path | None:
    """Append to `log` if its folder is there, else make a file among the temporary ones."""
    headed = (
        f"{time.strftime('%Y-%m-%d %H:%M:%S')} {terminal.shell_command(typed_command())}\n{told}"
    )
    content = headed.encode("utf-8", "backslashreplace")
    with suppress(OSError):
        if log is not None and log.parent.is_dir():
            with log.open("ab") as file:
                file.write(content)
            return log
    with suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="rsr-", suffix=".log")
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        return Path(path)
    return None


def typed_command() -> tuple[str, ...]:
    """The words that were typed."""
    return ("rsr", *sys.argv[1:])
