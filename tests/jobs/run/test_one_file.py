"""OUTPUT called `x.parquet` is that one file, with the run's own files hidden beside it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner, Result

from rsr.jobs.cli import main
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.storage import open_storage


@pytest.fixture
def scored(tmp_path, write_scored):
    columns = {"problem_id": [0, 0, 1, 1], "teacher": ["a", "b"] * 2, "correct": [True] * 4}
    path = tmp_path / "in" / "scored.parquet"
    path.parent.mkdir()
    return write_scored(path, [1.0, 2.0, 2.1, 1.1], columns=columns)


def rsr(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "command",
    [("select", "--group-by", "problem_id"), ("filter", "--keep-fraction", "0.5")],
    ids=lambda command: command[0],
)
def test_the_file_holds_what_a_folder_would_hold(scored, tmp_path, command):
    out, folder = tmp_path / "out" / "best.parquet", tmp_path / "folder"
    done = rsr(command[0], scored, out, *command[1:])
    assert done.exit_code == 0, done.output
    assert f"{out}\n" in done.stdout.replace(" ", "")
    assert rsr(command[0], scored, folder, *command[1:]).exit_code == 0
    assert out.read_bytes() == (folder / "scored.parquet").read_bytes()
    assert names_in(out.parent) == [".best.parquet.rsr", "best.parquet"]
    looked = rsr("verify", out, "--deep")
    assert looked.exit_code == 0, looked.output
    assert "whole, in order, and as in INPUT" in looked.stdout
    assert "finished" in rsr("status", out).stdout


def test_grades_of_one_file_are_one_file(tmp_path):
    rows = {"response": ["A: 1", "A: 2"], "prompt": ["p", "q"], "answer": ["1", "1"]}
    pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "graded.parquet"
    line = ("grade", tmp_path / "rows.parquet", out, "--answer-column", "answer")
    done = rsr(*line, "--verifier", "exact", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["output"] == str(out)
    assert len(pl.read_parquet(out)["correct"]) == 2
    assert rsr("verify", out, "--deep").exit_code == 0


def test_on_an_object_store_too(scored, s3_url):
    out, folder = f"{s3_url}/deep/best.parquet", f"{s3_url}/folder"
    for place in (out, folder):
        assert rsr("filter", scored, place, "--keep-rows", "2").exit_code == 0
    storage = open_storage(s3_url)
    assert storage.read("deep/best.parquet") == storage.read("folder/scored.parquet")
    state = {file.name for file in storage.list("deep")} - {"deep/best.parquet"}
    assert "deep/.best.parquet.rsr/manifest.json" in state
    assert all(name.startswith("deep/.best.parquet.rsr/") for name in state)
    assert rsr("verify", out, "--deep").exit_code == 0
    again = rsr("filter", out, f"{s3_url}/fewer.parquet", "--keep-rows", "1")
    assert again.exit_code == 0, again.output


def test_a_finished_run_is_left_alone_and_a_lost_file_written_again(scored, tmp_path):
    out = tmp_path / "best.parquet"
    line = ("filter", scored, out, "--keep-rows", "2")
    assert rsr(*line).exit_code == 0
    before = out.read_bytes(), out.stat().st_mtime_ns
    assert rsr(*line).exit_code == 0
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before
    out.unlink()
    lost = rsr("verify", out)
    assert lost.exit_code == 1
    assert "best.parquet" in lost.stdout
    assert "not written: 4 rows are missing" in lost.stdout
    assert rsr(*line).exit_code == 0
    assert out.read_bytes() == before[0]


def test_other_settings_are_refused_and_overwritten_when_asked(scored, tmp_path):
    out = tmp_path / "best.parquet"
    assert rsr("filter", scored, out, "--keep-rows", "2").exit_code == 0
    other = ("filter", scored, out, "--keep-rows", "3")
    refused = rsr(*other)
    assert refused.exit_code == 2
    assert "holds a run with other settings" in refused.stderr
    assert rsr(*other, "--overwrite").exit_code == 0
    assert len(pl.read_parquet(out)) == 3


def test_a_damaged_manifest_does_not_make_the_file_somebody_elses(scored, tmp_path):
    out = tmp_path / "best.parquet"
    line = ("filter", scored, out, "--keep-rows", "2")
    assert rsr(*line).exit_code == 0
    (tmp_path / ".best.parquet.rsr" / "manifest.json").write_text("{")
    refused = rsr(*line)
    assert refused.exit_code == 2
    assert "a run that nothing can go on with" in refused.stderr
    assert rsr(*line, "--overwrite").exit_code == 0
    assert rsr("verify", out, "--deep").exit_code == 0


def test_a_file_that_no_run_wrote_is_never_touched(scored, tmp_path):
    out = tmp_path / "mine.parquet"
    out.write_bytes(b"mine")
    for options in ([], ["--overwrite"]):
        refused = rsr("filter", scored, out, "--keep-rows", "2", *options)
        assert refused.exit_code == 2
        assert "is a file that no run of rsr wrote" in refused.stderr
        assert out.read_bytes() == b"mine"
        assert names_in(tmp_path) == ["in", "mine.parquet"]


def test_the_input_itself_is_refused_by_any_name(scored, tmp_path):
    before = scored.read_bytes()
    (tmp_path / "link.parquet").symlink_to(scored)
    for out, told in [
        (scored, "would overwrite its own input"),
        (scored.parent / ".." / "in" / "scored.parquet", "would overwrite its own input"),
        (tmp_path / "link.parquet", "it is a link; name what it leads to"),
    ]:
        refused = rsr("filter", scored, out, "--keep-rows", "2")
        assert refused.exit_code == 2
        assert told in refused.stderr
    assert scored.read_bytes() == before
    inside = rsr("filter", scored.parent, scored.parent / "new.parquet", "--keep-rows", "2")
    assert inside.exit_code == 2
    assert "lies inside INPUT" in inside.stderr


def test_what_cannot_be_one_file_is_refused_with_a_name_to_take(scored, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (scored.parent / "more.parquet").write_bytes(scored.read_bytes())
    for command, told in [
        (
            ("filter", scored, "best.parquet", "--keep-rows", "2", "--rows-per-file", "1"),
            "a folder",
        ),
        (("filter", scored, "best.json", "--keep-rows", "2"), "name it best.parquet or best.jsonl"),
        (("score", scored.parent, "best.jsonl", "--model", "none"), "INPUT has 2 files"),
        (
            ("filter", scored.parent, "best.csv", "--keep-rows", "2"),
            "or JSON lines: name it best.parquet",
        ),
        (("export", scored, "best.parquet", "--format", "messages"), "writes a folder of files"),
        (("sample", scored, "best.parquet", "--model", "none"), "writes a folder of files"),
        (("score", scored.parent, "best.parquet", "--model", "none"), "INPUT has 2 files"),
        (("grade", scored, "best.json", "--answer-column", "correct"), "name it best.parquet"),
    ]:
        refused = rsr(*command)
        assert refused.exit_code == 2, refused.output
        assert told in refused.stderr.replace("\n", " "), refused.stderr
        assert not list(Path().glob("best*"))


def test_leftovers_of_the_file_alone_are_removed(scored, tmp_path):
    out = tmp_path / "best.parquet"
    ours = tmp_path / ".best.parquet.0123abcd.rsr-tmp"
    theirs = tmp_path / ".other.parquet.0123abcd.rsr-tmp"
    deep = tmp_path / "in" / ".best.parquet.0123abcd.rsr-tmp"
    for path in (ours, theirs, deep):
        path.write_text("half")
    assert rsr("filter", scored, out, "--keep-rows", "2").exit_code == 0
    assert [path.exists() for path in (ours, theirs, deep)] == [False, True, True]


def test_the_storage_of_one_file_knows_no_other(tmp_path):
    (tmp_path / "other.parquet").write_bytes(b"other")
    storage = RunFolder(tmp_path / "x.parquet").storage
    storage.write("rows.parquet", b"rows")
    storage.write(".rsr/units/rows.parquet/u.scores", b"unit")
    names = [file.name for file in storage.list()]
    assert names == ["x.parquet", ".rsr/units/rows.parquet/u.scores"]
    assert [file.name for file in storage.list(".rsr/units")] == names[1:]
    assert storage.read("rows.parquet") == storage.read("x.parquet") == b"rows"
    assert storage.describe() == str(tmp_path / "x.parquet")
    assert open_storage(tmp_path).read(".x.parquet.rsr/units/rows.parquet/u.scores") == b"unit"
    found = storage.find("rows.parquet")
    assert found is not None
    assert found.name == "rows.parquet"
    storage.remove_folder(".rsr/units")
    storage.remove("rows.parquet")
    assert storage.list() == []
    assert (tmp_path / "other.parquet").read_bytes() == b"other"


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_a_scoring_run_into_one_file_is_stopped_and_goes_on(tmp_path, tiny_student, monkeypatch):
    """Of JSON lines, which are staged beside the file; by the name of a path that is relative."""
    rows = [
        {
            "id": row,
            "messages": [
                {"role": "user", "content": f"What is {row} + {row}?"},
                {"role": "assistant", "content": f"It is {2 * row}. " * (1 + row % 9)},
            ],
        }
        for row in range(200)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", tiny_student, "--dtype", "float32", "--max-num-batched-tokens", "256")
    monkeypatch.chdir(tmp_path)
    units = tmp_path / ".scored.parquet.rsr" / "units"
    stopped = subprocess.Popen(
        [sys.executable, "-m", "rsr.jobs.cli", "score", "rows.jsonl", "scored.parquet"]
        + [str(option) for option in options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while stopped.poll() is None and not any(units.rglob("*.scores")):
            time.sleep(0.02)
        os.kill(stopped.pid, signal.SIGTERM)
        _, said = stopped.communicate(timeout=300)
    finally:
        stopped.kill()
    assert stopped.returncode == 75, said
    assert not (tmp_path / "scored.parquet").exists()
    assert "the same rsr score command goes on" in rsr("status", tmp_path / "scored.parquet").stdout
    for output in ("scored.parquet", "folder"):
        done = rsr("score", "rows.jsonl", output, *options)
        assert done.exit_code == 0, done.output
    assert pl.read_parquet(tmp_path / "scored.parquet").equals(
        pl.read_parquet(tmp_path / "folder" / "rows.parquet")
    )
    looked = rsr(
        "verify", tmp_path / "scored.parquet", "--deep", "--input", tmp_path / "rows.jsonl"
    )
    assert looked.exit_code == 0, looked.output
    assert names_in(tmp_path) == [".scored.parquet.rsr", "folder", "rows.jsonl", "scored.parquet"]
