"""Every command that README and docs/ tell to type exists; those of README and cookbook run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import polars as pl
import pytest
from shell_blocks import DOCUMENTS, ROOT, ShellBlock, block_cases, require_parsed, shell_blocks

from rsr.jobs.cli import COMMANDS
from rsr.jobs.demo.problems import demo_problems
from rsr.jobs.demo.trajectories import demo_trajectories

RUN = ("README.md", "docs/cookbook.md")
STUDENT = "Qwen/Qwen3-8B"
SMALLER = {"-n 8": "-n 4", "--max-tokens 4096": "--max-tokens 96"}
"""What would take a small student on two cores long, and what is run instead."""
INLINE = re.compile(r"`rsr ([a-z]+ [^`]*--[^`]*)`")
"""A command with options between back quotes."""


@pytest.mark.parametrize("block", block_cases())
def test_block_calls_what_there_is(block: ShellBlock):
    checked = subprocess.run(["bash", "-n"], input=block.script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    for words in block.calls:
        require_parsed(words)


def test_blocks_call_most_commands():
    """That is, calls are found: `CALL` could be wrong, and every block right."""
    called = {words[0] for d in DOCUMENTS for block in shell_blocks(d) for words in block.calls}
    assert called <= set(COMMANDS)
    assert len(called) >= 15


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_in_a_sentence_exist(document):
    for text in INLINE.findall((ROOT / document).read_text()):
        name, *words = text.split()
        command = click.Context(named(name, words)).command
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        told = {word.rstrip(".,") for word in words if re.fullmatch(r"--[a-z-]+[.,]?", word)}
        assert told - known - {"--help"} == set(), text


def named(name: str, words: list[str]) -> click.Command:
    """The command, or the command of a group."""
    from rsr.jobs.cli import main

    context = click.Context(main)
    command = main.get_command(context, name)
    if isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.get_command(context, words[0])
    assert command is not None, f"rsr {name}"
    return command


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("scor a b", "No such command 'scor'"),
        ("score a b --model m --nope", "No such option '--nope'"),
        ("score a b", "needs model"),
        ("score a --model m", "needs output"),
        ("score a b c --model m", "more than"),
        ("export a b --format nope", "is not one of"),
    ],
)
def test_what_is_wrong_is_found(words, wrong):
    with pytest.raises(click.UsageError, match=wrong):
        require_parsed(words.split())


@pytest.fixture(scope="module")
def real_student_in_float32(tmp_path_factory, real_student) -> Path:
    """The real student, whose weights are widened when they are loaded: faster on most CPUs."""
    folder = tmp_path_factory.mktemp("student")
    for path in real_student.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((real_student / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """For each document a folder with the files that its blocks begin with."""
    made = {document: tmp_path_factory.mktemp("typed") for document in RUN}
    trajectories = demo_trajectories(0, 5)
    trajectories.write_parquet(made["README.md"] / "trajectories.parquet")
    cookbook = made["docs/cookbook.md"]
    (cookbook / "candidates").mkdir()
    for (teacher,), rows in trajectories.group_by("teacher"):
        rows.write_parquet(cookbook / "candidates" / f"{teacher}.parquet")
    (cookbook / "openr1").mkdir()
    with_generations(trajectories).write_parquet(cookbook / "openr1" / "train.parquet")
    demo_problems(0, 8).write_parquet(cookbook / "problems.parquet")
    return made


def with_generations(trajectories: pl.DataFrame) -> pl.DataFrame:
    """As OpenR1-Math-220k has them: a problem a row, with lists of responses and verdicts."""
    answer = pl.col("messages").list.last().struct.field("content")
    return trajectories.group_by("problem_id", maintain_order=True).agg(
        pl.col("messages").first().list.first().struct.field("content").alias("problem"),
        answer.alias("generations"),
        pl.col("correct").alias("correctness_math_verify"),
        pl.col("problem_id").first().cast(pl.String).alias("uuid"),
    )


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.parametrize("block", block_cases(*RUN))
def test_block_runs(block: ShellBlock, folders, tiny_student, real_student_in_float32):
    if block.script.startswith("pip install"):
        pytest.skip("it would change the environment of the tests")
    if block.reason_not_to_run:
        pytest.skip(block.reason_not_to_run)
    # Only the real student ever gives a right answer.
    student = real_student_in_float32 if "rsr sample" in block.script else tiny_student
    script = block.script.replace(STUDENT, str(student))
    for told, smaller in SMALLER.items():
        script = script.replace(told, smaller)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cache = {"HF_DATASETS_CACHE": str(folders[block.document] / "cache")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folders[block.document],
        env={**os.environ, **cache, "PATH": path},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
