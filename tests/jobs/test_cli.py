"""What a user can get wrong: one line, exit code 2, before a model loads, nothing left behind."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.engine.config import ScorerConfig
from rsr.jobs.cli import COMMANDS, main, short_help
from rsr.jobs.errors import first_line
from rsr.jobs.options import scorer_config, scorer_options
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
        pytest.param(
            "tokenizer.json", "no usable tokenizer", marks=[pytest.mark.ray, pytest.mark.slow]
        ),
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


def test_model_that_is_not_there_is_told_before_anything_is_staged(tmp_path):
    # Staging would be the first to complain of these lines.
    (tmp_path / "rows.json").write_text("{}")
    out = tmp_path / "out"
    result = score(tmp_path / "rows.json", out, "--model", tmp_path / "none")
    assert_refused(result, "no such model folder", out)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "is not Jinja: line 1:"),
        ("{{ messages }}\n{% endfor %}", "is not Jinja: line 2:"),
        ("{{ messages | no_such_filter }}", "No filter named 'no_such_filter'"),
        (b"\xff", "cannot be read"),
        (None, "cannot be read: No such file or directory; expected a Jinja file, auto or none"),
    ],
)
def test_chat_template_that_is_none(tmp_path, data, tiny_student, template, message):
    file = tmp_path / "chat.jinja"
    if template is not None:
        file.write_bytes(template if isinstance(template, bytes) else template.encode())
    (tmp_path / "rows.json").write_text("{}")
    out = tmp_path / "out"
    result = score(tmp_path / "rows.json", out, "--model", tiny_student, "--chat-template", file)
    assert_refused(result, message, out)


def test_chat_templates_as_transformers_takes_them():
    config = scorer_config({"model": "hub/name"})
    assert config.chat_template == "auto"
    for text in (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for m in messages %}{% if m %}{% break %}{% endif %}{% endfor %}",
        "{{ raise_exception('no') }}{{ tools | tojson }}{{ strftime_now('%Y') }}",
    ):
        with tempfile.NamedTemporaryFile("w", suffix=".jinja") as file:
            file.write(text)
            file.flush()
            scorer_config({"model": "hub/name", "chat_template": file.name})


def test_every_field_of_the_scorer_is_an_option_with_its_default():
    @click.command()
    @scorer_options()
    def command(**options):
        assert options.keys() == ScorerConfig.__dataclass_fields__.keys()
        click.echo(scorer_config(options) == ScorerConfig(model="hub/name", **expected))

    expected = {}
    result = CliRunner().invoke(command, ["--model", "hub/name"])
    assert result.output == "True\n"
    expected = {"token_scores": True, "rank_clip": None, "entropy": False, "max_model_len": 2}
    typed = ["--token-columns", "--rank-clip", "none", "--no-entropy", "--max-model-len", "2"]
    result = CliRunner().invoke(command, ["--model", "hub/name", *typed])
    assert result.output == "True\n"


@pytest.mark.parametrize(
    ("message", "line"),
    [("", "ValueError"), ("\n \n", "ValueError"), ("\n first \nsecond", "first")],
)
def test_first_line_of_an_error(message, line):
    assert first_line(ValueError(message)) == line


@pytest.mark.ray
@pytest.mark.slow
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
            # A worker says so, as it does of the tokenizer above.
            marks=[pytest.mark.ray, pytest.mark.slow],
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


@pytest.mark.seconds
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


def test_help_has_every_command_under_one_question():
    text = CliRunner().invoke(main, ["--help"]).output
    named = [line.split()[0] for line in text.splitlines() if re.match(r"  [a-z]+  ", line)]
    assert sorted(named) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_of_a_command_what_it_says_of_itself(name):
    command = main.get_command(None, name)
    assert short_help(COMMANDS[name]) == command.get_short_help_str(limit=100)


def test_help_waits_for_no_library_of_data():
    code = (
        "import sys; from rsr.jobs.cli import main; main(['--help'], standalone_mode=False); "
        "print(sorted({'numpy', 'polars', 'pyarrow', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("typed", "meant"), [("scor", "score"), ("verfy", "verify")])
def test_command_that_is_mistyped_names_the_one_that_is_meant(typed, meant):
    result = CliRunner().invoke(main, [typed])
    assert result.exit_code == 2
    assert f"No such command '{typed}'. Did you mean {meant}?" in result.stderr


def test_help_says_unit_default_and_reason():
    text = " ".join(CliRunner().invoke(main, ["score", "--help"]).output.split())
    for word in ("in tokens", "nats", "[default: auto]", "the paper's"):
        assert word in text


@pytest.mark.seconds
def test_command_starts_without_the_heavy_libraries():
    code = (
        "import sys; from rsr.jobs.cli import main; "
        "[main.get_command(None, name) for name in main.list_commands(None)]; "
        "print(sorted({'torch', 'transformers', 'ray', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


BROKEN_COMMANDS = """
import click
from rsr.jobs.command import guarded

class Silent(Exception):
    def __str__(self):
        return ""

@click.command()
@click.option("--log")
def broken(log):
    from pathlib import Path
    def fail(_stop):
        raise KeyError("a secret\\n\\x1b[2J")
    guarded(fail, log=Path(log) if log else None)

@click.command()
def bare():
    raise Silent()

@click.command()
def full():
    def write(_stop):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    guarded(write)
"""


@pytest.fixture
def broken_commands(tmp_path, monkeypatch):
    (tmp_path / "broken_commands.py").write_text(BROKEN_COMMANDS)
    monkeypatch.syspath_prepend(tmp_path)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    for name in ("broken", "bare", "full"):
        monkeypatch.setitem(COMMANDS, name, f"broken_commands:{name}")
    monkeypatch.setitem(COMMANDS, "gone", "broken_commands:gone")
    return temporary


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("broken", r"unexpected KeyError: 'a secret\n\x1b[2J'"),
        ("bare", "unexpected Silent: Silent"),
        ("gone", "unexpected AttributeError: module 'broken_commands' has no"),
    ],
)
def test_what_nobody_expects_is_one_line_and_a_log(broken_commands, command, message):
    result = CliRunner().invoke(main, [command])
    assert result.exit_code == 70
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"rsr: {message}")
    (log,) = broken_commands.iterdir()
    assert result.stderr.endswith(f"; the log is {log}\n")
    assert "Traceback (most recent call last)" in log.read_text()


TOLD_TO_STOP_AT_THE_END = """
import os, signal
from rsr.jobs.command import guarded
from rsr.jobs.errors import ShardsFailed

class Failed(ShardsFailed):
    def __str__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return "a shard"

def fail(_stop):
    raise Failed

guarded(fail)
"""


def test_signal_that_comes_while_the_end_is_told_is_not_the_end():
    command = [sys.executable, "-c", TOLD_TO_STOP_AT_THE_END]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "rsr: failed: a shard\n")


def test_what_nobody_expects_goes_to_the_log_of_the_run(broken_commands, tmp_path):
    log = tmp_path / "out" / ".rsr" / "run.log"
    result = CliRunner().invoke(main, ["broken", "--log", str(log)])
    assert str(log) not in result.stderr, "a run that never began has no folder to put it in"
    log.parent.mkdir(parents=True)
    log.write_text("before\n")
    result = CliRunner().invoke(main, ["broken", "--log", str(log)])
    assert result.exit_code == 70
    assert result.stderr.endswith(f"; the log is {log}\n")
    assert log.read_text().startswith("before\n")
    assert "KeyError: 'a secret" in log.read_text()


def test_disk_that_is_full_at_the_end_is_no_mistake_of_the_program(broken_commands):
    result = CliRunner().invoke(main, ["full"])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert "No space left on device" in result.stderr
    assert "what is finished is kept, the same command goes on from here" in result.stderr


def test_without_a_place_for_a_log_the_traceback_is_printed(broken_commands, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nope")
    result = CliRunner().invoke(main, ["broken"])
    assert result.exit_code == 70
    first, *rest = result.stderr.splitlines()
    assert first.endswith("; no log can be written")
    assert any(line.startswith("Traceback") for line in rest)
    assert "\x1b" not in result.stderr
