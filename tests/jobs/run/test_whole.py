"""A run that has not finished is not taken for the corpus."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from rsr.jobs.cli import main
from rsr.jobs.storage import open_storage


def rsr(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def unfinished(tmp_path, write_scored) -> Path:
    """A run of three files; of the second neither output nor receipt is there yet."""
    for number in range(3):
        columns = {"problem_id": np.arange(4), "teacher": ["a", "b"] * 2}
        write_scored(tmp_path / "in" / f"{number}.parquet", [1.0, 2.0, 3.0, 4.0], columns=columns)
    out = tmp_path / "run"
    assert rsr("filter", tmp_path / "in", out, "--max-rsr", "9").exit_code == 0
    (out / "1.parquet").unlink()
    (out / ".rsr" / "receipts" / "1.parquet.json").unlink()
    return out


@pytest.mark.seconds
@pytest.mark.parametrize(
    "command",
    [
        ("filter", "--keep-rows", "2"),
        ("select", "--group-by", "problem_id"),
        ("grade", "--answer-column", "problem_id"),
        ("export", "--format", "messages"),
        ("score", "--model", "none"),
    ],
    ids=lambda command: command[0],
)
def test_a_command_refuses_it(unfinished, tmp_path, command):
    out = tmp_path / "chosen"
    refused = rsr(command[0], unfinished, out, *command[1:])
    assert refused.exit_code == 2
    told = refused.stderr.replace("\n", " ")
    assert f"rsr filter has written 2 of the 3 files of {unfinished}" in told
    assert f"name the files that are there: '{unfinished}/**/*.parquet'" in told
    assert not out.exists()


@pytest.mark.parametrize(
    "command", [("filter", "--keep-rows", "2"), ("select", "--group-by", "problem_id")]
)
def test_a_glob_takes_the_files_that_are_there(unfinished, tmp_path, command):
    out = tmp_path / "chosen"
    taken = rsr(command[0], f"{unfinished}/**/*.parquet", out, *command[1:], "--json")
    assert taken.exit_code == 0, taken.output
    assert json.loads(taken.stdout)["num_rows"] == 8


def test_it_is_taken_when_its_own_command_has_finished_it(unfinished, tmp_path):
    assert rsr("filter", tmp_path / "in", unfinished, "--max-rsr", "9").exit_code == 0
    done = rsr("filter", unfinished, tmp_path / "chosen", "--keep-rows", "2", "--json")
    assert json.loads(done.stdout)["num_rows"] == 12


def test_a_lost_file_counts_as_one_that_is_missing(unfinished, tmp_path):
    assert rsr("filter", tmp_path / "in", unfinished, "--max-rsr", "9").exit_code == 0
    (unfinished / "2.parquet").unlink()
    refused = rsr("filter", unfinished, tmp_path / "chosen", "--keep-rows", "2")
    assert refused.exit_code == 2
    assert "2 of the 3 files" in refused.stderr.replace("\n", " ")


def test_evidence_says_how_much_is_there(unfinished):
    done = rsr("teachers", unfinished, "--json")
    assert done.exit_code == 0, done.output
    notes = json.loads(done.stdout)["students"][0]["notes"]
    assert f"2 of the 3 files of {unfinished}: the others" in notes[0]


def test_a_damaged_manifest_is_not_held_against_the_rows(unfinished, tmp_path):
    (unfinished / ".rsr" / "manifest.json").write_text("{")
    done = rsr("filter", unfinished, tmp_path / "chosen", "--keep-rows", "2")
    assert done.exit_code == 0, done.output


def test_on_an_object_store_too(tmp_path, write_scored, s3_url):
    columns = {"problem_id": [0, 1], "teacher": ["a", "b"]}
    for number in range(2):
        write_scored(tmp_path / "in" / f"{number}.parquet", [1.0, 2.0], columns=columns)
    run = f"{s3_url}/run"
    assert rsr("filter", tmp_path / "in", run, "--max-rsr", "9").exit_code == 0
    assert rsr("filter", run, f"{s3_url}/all", "--max-rsr", "9").exit_code == 0
    open_storage(run).remove("1.parquet")
    refused = rsr("filter", run, f"{s3_url}/some", "--max-rsr", "9")
    assert refused.exit_code == 2
    assert "has written 1 of the 2 files" in refused.stderr.replace("\n", " ")
