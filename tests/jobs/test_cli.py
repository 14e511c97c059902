"""What a user can get wrong: one line, exit code 2, before a model loads, nothing left behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.run.folder import RunFolder

ROW = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "in" / "rows.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"id": [1], "messages": [ROW]}), path)
    return path


def score(*arguments):
    return CliRunner().invoke(main, ["score", *map(str, arguments)])


def assert_refused(result, message, output):
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not output.exists()


def test_input_that_is_not_there(tmp_path, tiny_student):
    out = tmp_path / "out"
    result = score(tmp_path / "none.parquet", out, "--model", tiny_student)
    assert_refused(result, "no such file or folder", out)


def test_column_that_is_not_there_names_those_that_are(tmp_path, data, tiny_student):
    out = tmp_path / "out"
    result = score(data, out, "--model", tiny_student, "--messages-column", "chat")
    assert_refused(result, "no column 'chat'; it has: id, messages", out)


def test_file_that_is_not_parquet(tmp_path, tiny_student):
    (tmp_path / "text.parquet").write_text("plainly text")
    out = tmp_path / "out"
    result = score(tmp_path / "text.parquet", out, "--model", tiny_student)
    assert_refused(result, "cannot be read as Parquet", out)


def test_json_that_is_not_rows_leaves_no_staged_copy(tmp_path, tiny_student):
    (tmp_path / "rows.json").write_text("{}")
    out = tmp_path / "out"
    assert_refused(
        score(tmp_path / "rows.json", out, "--model", tiny_student), "expected a list", out
    )


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "has no weights"),
        pytest.param("tokenizer.json", "no usable tokenizer", marks=pytest.mark.ray),
        ("config.json", "has no config.json"),
    ],
)
def test_incomplete_model_folder(tmp_path, data, tiny_student, missing, message):
    model = tmp_path / "model"
    shutil.copytree(tiny_student, model)
    (model / missing).unlink()
    out = tmp_path / "out"
    assert_refused(score(data, out, "--model", model), message, out)


def test_model_that_is_not_there(tmp_path, data):
    out = tmp_path / "out"
    assert_refused(score(data, out, "--model", tmp_path / "none"), "no such model folder", out)


@pytest.mark.ray
def test_messages_for_a_model_without_a_template(tmp_path, data, tiny_student):
    out = tmp_path / "out"
    result = score(data, out, "--model", tiny_student, "--chat-template", "none")
    assert_refused(result, "has no chat template", out)


def test_output_inside_input(data, tiny_student):
    out = data.parent / "out"
    assert_refused(score(data.parent, out, "--model", tiny_student), "lies inside INPUT", out)


def test_output_over_input(data, tiny_student):
    before = data.read_bytes()
    result = score(data, data.parent, "--model", tiny_student)
    assert result.exit_code == 2
    assert "would overwrite its own input" in result.stderr
    assert data.read_bytes() == before
    assert [p.name for p in data.parent.iterdir()] == [data.name]


def test_output_that_is_somebody_elses_folder(tmp_path, data, tiny_student):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    result = score(data, out, "--model", tiny_student, "--overwrite")
    assert result.exit_code == 2
    assert "no run's receipt names 'thesis.txt'" in result.stderr
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_output_that_cannot_be_written(tmp_path, data, tiny_student):
    file = tmp_path / "file"
    file.write_text("")
    result = score(data, file, "--model", tiny_student)
    assert result.exit_code == 2
    assert "is a file; expected a folder" in result.stderr
    # Even root cannot make a folder below a file, or in the kernel's own.
    for output in (file / "out", Path("/proc/out")):
        result = score(data, output, "--model", tiny_student)
        assert result.exit_code == 2
        assert "cannot be written" in result.stderr


def test_disk_that_is_too_full(tmp_path, data, tiny_student):
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        out = mount / "out"
        assert_refused(score(data, out, "--model", tiny_student), "MiB free", out)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_input_that_was_scored_already(tmp_path, tiny_student):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"messages": [ROW], "rsr": [1.0], "rsr_status": ["ok"]}), path)
    out = tmp_path / "out"
    result = score(path, out, "--model", tiny_student)
    assert_refused(
        result, "already has rsr, rsr_status; replace them with --overwrite-columns", out
    )


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rank-clip", "0", "expected a rank of at least 1"),
        ("--dtype", "int8", "is not one of"),
        ("--on-long", "cut", "is not one of"),
        ("--limit", "0", "is not in the range"),
        ("--gpu-memory-utilization", "1.5", "is not in the range"),
        pytest.param(
            "--max-model-len",
            "99999",
            "the model takes 512 tokens at most",
            marks=pytest.mark.ray,
        ),
        ("--unknown", "1", "No such option"),
    ],
)
def test_option_with_a_wrong_value(tmp_path, data, tiny_student, option, value, message):
    out = tmp_path / "out"
    result = score(data, out, "--model", tiny_student, option, value)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not out.exists()


def test_two_kinds_of_columns_at_once(tmp_path, data, tiny_student):
    out = tmp_path / "out"
    result = score(
        data, out, "--model", tiny_student, "--text-column", "t", "--messages-column", "m"
    )
    assert_refused(result, "give --messages-column, or", out)


def test_run_of_another_process_is_left_alone(tmp_path, data, tiny_student):
    out = tmp_path / "out"
    with RunFolder(out).lock():
        result = score(data, out, "--model", tiny_student)
        assert result.exit_code == 2
        assert f"is being written by process {os.getpid()} on" in result.stderr
        assert RunFolder(out).holder().pid == os.getpid()
        # Not even what it staged before it had a manifest.
        staged = out / ".rsr" / "staged" / "rows.parquet"
        staged.parent.mkdir()
        staged.write_text("")
        assert score(data, out, "--model", tiny_student).exit_code == 2
        assert staged.exists()


def test_help_says_unit_default_and_reason():
    text = " ".join(CliRunner().invoke(main, ["score", "--help"]).output.split())
    for word in ("in tokens", "nats", "[default: auto]", "the paper's"):
        assert word in text


def test_command_starts_without_the_heavy_libraries():
    code = (
        "import sys; from rsr.jobs.cli import main; "
        "[main.get_command(None, name) for name in main.list_commands(None)]; "
        "print(sorted({'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
