"""Help texts and public docstrings are there, and are phrases that stand alone."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from rsr.jobs.cli import main

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for room in ("engine", "jobs", "kernels") for path in sorted((ROOT / room).rglob("*.py"))
]


def options_of(command: click.Command, name: str = "rsr") -> Iterator[tuple[str, click.Option]]:
    """Every option below a command, with the words that lead to it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from options_of(found, f"{name} {child}")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield f"{name} {parameter.opts[-1]}", parameter


def test_every_option_says_what_it_is():
    told = {name: option.help or "" for name, option in options_of(main)}
    assert len(told) > 300
    # "Of every draw" finishes the option's name and says nothing by itself.
    assert not {name: text for name, text in told.items() if not re.match(r"(?!Of )[A-Z]", text)}


@pytest.mark.parametrize("name", ["rsr.engine", "rsr.kernels", "rsr.jobs"])
def test_what_is_public_is_documented(name):
    module = importlib.import_module(name)
    public = {item: getattr(module, item) for item in module.__all__}
    callables = {item: found for item, found in public.items() if callable(found)}
    assert callables
    assert not {item for item, found in callables.items() if not (found.__doc__ or "").strip()}


@pytest.mark.seconds
def test_classes_say_first_what_they_are():
    without = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                said = ast.get_docstring(node) or ("" if node.name[0] != "_" else "Private.")
                # "size: of a unit" explains a field.
                if not re.match(r"(?![a-z_, ]+: )\S", said):
                    without.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert without == []
