"""The `rsr` command: which commands there are, and where each is.

What all of them share is in `command.py`.
"""

import ast
import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from rsr.jobs.command import run_program

COMMANDS_BY_QUESTION = {
    "Score trajectories": {
        "inspect": "rsr.jobs.inspection.cli:inspect",
        "score": "rsr.jobs.scoring.cli:score",
        "plan": "rsr.jobs.planning.cli:plan",
    },
    "Look after a run": {
        "status": "rsr.jobs.run.cli:status",
        "verify": "rsr.jobs.run.cli:verify",
    },
    "Sample, grade and refine answers": {
        "sample": "rsr.jobs.sampling.cli:sample",
        "grade": "rsr.jobs.grading.cli:grade",
        "refine": "rsr.jobs.refinement.cli:refine",
    },
    "Choose by the scores": {
        "filter": "rsr.jobs.selection.cli:filter_",
        "select": "rsr.jobs.selection.cli:select",
        "export": "rsr.jobs.export.cli:export",
    },
    "Ask what the scores say": {
        "teachers": "rsr.jobs.evidence.cli:teachers",
        "metrics": "rsr.jobs.evidence.cli:metrics_command",
        "compare": "rsr.jobs.comparison.cli:compare",
        "report": "rsr.jobs.evidence.cli:report",
        "correlate": "rsr.jobs.evidence.cli:correlate_command",
        "simulate": "rsr.jobs.evidence.cli:simulate_command",
    },
    "Try and measure": {
        "demo": "rsr.jobs.demo.cli:demo",
        "doctor": "rsr.jobs.doctor.cli:doctor",
        "bench": "rsr.benchmarks.cli:bench",
    },
}
"""Where each command is, by the question that it answers, in the order of the help text."""

PLANS = {
    "filter": "rsr.jobs.planning.cli:plan_filter",
    "select": "rsr.jobs.planning.cli:plan_select",
}
"""What `rsr plan` predicts besides scoring, by the word that comes after it."""

COMMANDS = {name: place for group in COMMANDS_BY_QUESTION.values() for name, place in group.items()}


class _Commands(click.Group):
    """The commands, each imported when it is asked for."""

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command line; ends the process unless `standalone_mode` is off, as click does."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*arguments, standalone_mode=False, **options)
        sys.exit(run_program(lambda: run(*arguments, standalone_mode=False, **options)))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under the question that each answers."""
        for question, names in COMMANDS_BY_QUESTION.items():
            with formatter.section(question):
                formatter.write_dl([(name, short_help(place)) for name, place in names.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve as click does, and name the commands that an unknown one resembles."""
        if args[:1] == ["plan"] and len(args) > 1 and args[1] in PLANS:
            return f"plan {args[1]}", _command_at(PLANS[args[1]]), args[2:]
        if (
            args
            and args[0] not in COMMANDS
            and (like := get_close_matches(args[0], COMMANDS, cutoff=0.7))
        ):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {' or '.join(like)}?")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return _command_at(COMMANDS[cmd_name])


def short_help(place: str) -> str:
    """The first sentence about a command, from its function's source: nothing is imported for it.

    Importing all commands takes longer than anybody waits for a list of them.
    """
    module, function_name = place.split(":")
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function_name:
            described = click.Command(function_name, help=ast.get_docstring(node))
            return described.get_short_help_str(limit=100)
    raise LookupError(place)


def _command_at(place: str) -> click.Command:
    module, attribute = place.split(":")
    command: click.Command = getattr(import_module(module), attribute)
    return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rsr-engine")
def main() -> None:
    """Score chain-of-thought trajectories by Rank-Surprisal Ratio: which teach a student best?"""


if __name__ == "__main__":
    main()
