"""The `rsr` command: which commands there are, and where each is.

What all of them share is in `command.py`.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from rsr.jobs.command import run_program

COMMANDS = {
    "score": "rsr.jobs.scoring.cli:score",
    "status": "rsr.jobs.run.cli:status",
    "verify": "rsr.jobs.run.cli:verify",
    "plan": "rsr.jobs.planning.cli:plan",
    "filter": "rsr.jobs.selection.cli:filter_",
    "select": "rsr.jobs.selection.cli:select",
    "teachers": "rsr.jobs.evidence.cli:teachers",
    "correlate": "rsr.jobs.evidence.cli:correlate_command",
    "report": "rsr.jobs.evidence.cli:report",
    "simulate": "rsr.jobs.evidence.cli:simulate_command",
    "bench": "rsr.benchmarks.cli:bench",
    "demo": "rsr.jobs.demo.cli:demo",
}


class _Commands(click.Group):
    """The commands, each imported when it is asked for: all together take half as long again."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command line; ends the process unless `standalone_mode` is off, as click does."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*arguments, standalone_mode=False, **options)
        sys.exit(run_program(lambda: run(*arguments, standalone_mode=False, **options)))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rsr-engine")
def main() -> None:
    """Score chain-of-thought trajectories by Rank-Surprisal Ratio: which teach a student best?"""


if __name__ == "__main__":
    main()
