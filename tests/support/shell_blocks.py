"""The shell blocks of README and docs/: which commands they call, and why some are not run."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from rsr.jobs.cli import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", *(
    f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))
))  # fmt: skip
FENCE = re.compile(r"^```(console|sh|bash|yaml)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = "# Not run by the tests: "
CALL = re.compile(r"""(?:^|[\s"'(&|;])rsr[ ](?=[a-z])(?P<words>[^|&;]*)""")


@dataclass(frozen=True, slots=True)
class ShellBlock:
    """One block of a document. number: from 1, of the document's shell blocks. script: for bash."""

    document: str
    number: int
    script: str

    def __str__(self) -> str:
        return f"{self.document}-{self.number}"

    @property
    def reason_not_to_run(self) -> str:
        """What its first line says that a test lacks, or ""."""
        first = self.script.split("\n", 1)[0]
        return first.removeprefix(NOT_RUN) if first.startswith(NOT_RUN) else ""

    @property
    def calls(self) -> list[list[str]]:
        """The words after `rsr` of every call, also of one inside the quotes of another command."""
        lines = self.script.replace("\\\n", " ").splitlines()
        found = [m["words"] for line in lines if not is_comment(line) for m in CALL.finditer(line)]
        return [shlex.split(without_open_quote(words), comments=True) for words in found]


def is_comment(line: str) -> bool:
    return line.lstrip().startswith("#")


def without_open_quote(words: str) -> str:
    """`words` up to the quote that began before them, if they hold its end."""
    return words.rpartition('"')[0] if words.count('"') % 2 else words


def shell_blocks(document: str) -> list[ShellBlock]:
    """Those of a document, in its order.

    Of a `console` block the lines after `$` count, of a Kubernetes manifest its entry point.
    """
    blocks = []
    for number, found in enumerate(FENCE.finditer((ROOT / document).read_text()), 1):
        kind, text = found.groups()
        if kind == "console":
            typed = re.findall(r"^\$ (.*(?:\\\n.*)*)$", text, re.MULTILINE)
            text = "".join(f"{command}\n" for command in typed)
        elif kind == "yaml":
            text = "".join(re.findall(r"^ *entrypoint: (.*\n)", text, re.MULTILINE))
        blocks.append(ShellBlock(document, number, text))
    return blocks


def require_parsed(words: list[str]) -> None:
    """Raises `click.UsageError` if the command, an option, a choice or a required one is wrong.

    Files need not be there, and numbers may be variables of the shell.
    """
    context = click.Context(main, info_name="rsr")
    name, command, arguments = main.resolve_command(context, words)
    while isinstance(command, click.Group) and arguments:
        context = click.Context(command, info_name=name, parent=context)
        name, command, arguments = command.resolve_command(context, arguments)
    assert command is not None
    context = click.Context(command, info_name=name, parent=context)
    values, left_over, _ = command.make_parser(context).parse_args(arguments)
    if left_over:
        raise click.UsageError(f"{left_over} are more than rsr {name} takes")
    for parameter in command.params:
        value = values.get(str(parameter.name))
        if isinstance(parameter.type, click.Choice):
            for each in [value] if isinstance(value, str) else value or ():
                parameter.type.convert(each, parameter, context)
        if parameter.required and not isinstance(value, str | tuple | list):
            raise click.UsageError(f"rsr {name} needs {parameter.name}")


BLOCKS = [block for document in DOCUMENTS for block in shell_blocks(document)]


def block_cases(*documents: str) -> list[object]:
    """The blocks of these documents, or of all, as cases of a test."""
    return [pytest.param(b, id=str(b)) for b in BLOCKS if not documents or b.document in documents]
