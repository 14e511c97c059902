"""`rsr verify` passes what is right and finds each way of being wrong, by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from typed import rsr

from rsr.jobs.cli import main
from rsr.jobs.run.receipts import Receipt
from rsr.jobs.run.store import stored_receipt
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.compare import same_bits
from rsr.jobs.storage.hashing import hash_bytes


def table(num_rows=10):
    rows = range(num_rows)
    return pa.table(
        {
            "text": [f"row {i}" for i in rows],
            "x": pa.array([float("nan") if i % 3 else -0.0 for i in rows]),
            "nested": [[{"y": float(i)}] if i % 2 else None for i in rows],
            "category": pa.array([str(i % 2) for i in rows]).dictionary_encode(),
        }
    )


@pytest.fixture
def run(make_run):
    made = make_run({"a.parquet": table(), "deep/b.parquet": table(7), "none.parquet": table(0)})
    for shard in made.shards:
        made.finish(shard)
    return made


def verify(run, *options, exit_code):
    result = CliRunner().invoke(main, ["verify", str(run.output.root), "--json", *options])
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def problems(run, *options):
    found = verify(run, *options, exit_code=1)
    what = {
        p["file"]: "; ".join(q["what"] for q in found["problems"] if q["file"] == p["file"])
        for p in found["problems"]
    }
    return what, found["repair"]


def reseal(run, name):
    """Make a shard's receipt vouch for what stands there now, as a run with a mistake would."""
    found, receipt = run.output.storage.find(name), stored_receipt(run.output, name)
    with run.output.storage.open(name) as file:
        digest = hash_bytes(file.read())
    values = {k: getattr(receipt, k) for k in Receipt.__slots__} | {
        "content_bytes": found.num_bytes, "content_blake2b": digest, "version": found.version,
    }  # fmt: skip
    path = run.output.root / run.output.receipt_name(name)
    path.write_text(Receipt(**values).to_json())


def rewrite(run, name, change):
    path = run.output.root / name
    pq.write_table(change(pq.read_table(path)), path)
    reseal(run, name)


def test_whole_output_passes(run):
    assert verify(run, exit_code=0)["num_rows"] == 17
    assert verify(run, "--deep", exit_code=0)["problems"] == []
    text = CliRunner().invoke(main, ["verify", str(run.output.root), "--deep"]).stdout
    assert "17 rows in 3 shards" in text
    assert "as in INPUT" in text


def test_missing_output_and_receipt_are_named_with_the_command_that_repairs(run):
    (run.output.root / "a.parquet").unlink()
    receipt = run.output.root / run.output.receipt_name("deep/b.parquet")
    receipt.write_bytes(receipt.read_bytes()[:50])
    found, repair = problems(run)
    assert found == {
        "a.parquet": "not written: 10 rows are missing",
        "deep/b.parquet": "has no receipt that can be trusted",
    }
    assert repair == [f"rsr score in {run.output.root} --model m"]
    text = CliRunner().invoke(main, ["verify", str(run.output.root)]).stdout
    assert "10 rows are missing" in text
    assert f"rsr score in {run.output.root} --model m" in text


def test_decayed_byte_is_found_and_repaired_by_the_commands_named(run):
    path = run.output.root / "a.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    found, repair = problems(run)
    assert found == {"a.parquet": "its bytes are not those its receipt vouches for"}
    assert repair == [f"rm {path}", f"rsr score in {run.output.root} --model m"]
    path.unlink()
    run.finish(run.shards[0])
    verify(run, "--deep", exit_code=0)


def test_stranger_in_the_output_is_found(run):
    shutil.copy(run.output.root / "a.parquet", run.output.root / "copy.parquet")
    found, repair = problems(run)
    assert found == {"copy.parquet": "is not of this run; move it out of OUTPUT"}
    assert repair == []


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), "has 9 rows; expected 10"),
        (lambda t: t.drop_columns("rsr_mean_rank"), "has score columns"),
        (lambda t: t.select([*t.column_names[4:], "text"]), "has score columns"),
        (lambda t: t.replace_schema_metadata({}), "its metadata name other settings"),
        (
            lambda t: t.set_column(
                t.column_names.index("rsr_status"), "rsr_status", pa.array(["ok"] * 10)
            ),
            "has a row of status 'ok' with score None",
        ),
    ],
)
def test_output_that_is_not_what_a_run_writes(run, change, message):
    rewrite(run, "a.parquet", change)
    found, _ = problems(run)
    assert message in found["a.parquet"]


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.take([1, 0, *range(2, 10)]), "column 'text' differs in rows 0 to 3"),
        (lambda t: t.take([0, 0, *range(2, 10)]), "column 'text' differs in rows 0 to 3"),
        (
            lambda t: t.set_column(1, "x", pa.array([0.0, *t["x"].to_pylist()[1:]])),
            "column 'x' differs in rows 0 to 3",
        ),
        (
            lambda t: t.set_column(3, "category", t["category"].cast(pa.string())),
            "column 'category' of the input is dictionary",
        ),
    ],
)
def test_deep_look_finds_what_differs_from_the_input(run, change, message):
    def changed(written):
        # The statuses stay in order, so that only the input's columns tell.
        scores = [n for n in written.column_names if score_columns.is_score_column(n)]
        new = change(written)
        for name in scores:
            new = new.set_column(new.column_names.index(name), written.field(name), written[name])
        return new

    rewrite(run, "a.parquet", changed)
    verify(run, exit_code=0)
    found, _ = problems(run, "--deep")
    assert message in found["a.parquet"]


def test_input_that_changed_or_moved(run, tmp_path):
    moved = tmp_path / "moved"
    (tmp_path / "in").rename(moved)
    found, _ = problems(run, "--deep")
    assert "its input cannot be compared" in found["a.parquet"]
    verify(run, "--deep", "--input", str(moved), exit_code=0)
    pq.write_table(table(10).slice(1), moved / "a.parquet")
    found, _ = problems(run, "--deep", "--input", str(moved))
    assert "its input has 9 rows, not the 10 that the run took" in found["a.parquet"]
    moved.rename(tmp_path / "in")
    found, repair = problems(run, "--deep")
    assert "has changed since the run began" in found["a.parquet"]
    assert repair == [f"rsr score in {run.output.root} --model m --overwrite"]


def test_run_in_progress_is_not_judged(run):
    with run.output.lock():
        result = CliRunner().invoke(main, ["verify", str(run.output.root)])
    assert result.exit_code == 2
    assert "is being written by" in result.stderr


def test_bits_tell_what_values_do_not():
    nan, other_nan = np.array([0x7FF8000000000000, 0x7FF8000000000001], np.uint64).view(float)
    assert same_bits(pa.array([nan]), pa.array([nan]))
    assert not same_bits(pa.array([nan]), pa.array([other_nan]))
    assert not same_bits(pa.array([0.0]), pa.array([-0.0]))
    assert same_bits(pa.array([[{"a": nan}], None]), pa.array([[{"a": nan}], None]))
    assert not same_bits(pa.array([[{"a": 0.0}]]), pa.array([[{"a": -0.0}]]))
    sliced = pa.array([[1.0], None, [nan, 2.0]]).slice(1)
    assert same_bits(sliced, pa.array([None, [nan, 2.0]]))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def torn(path):
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {
    "output is gone": ("s[1].parquet", Path.unlink),
    "output has another byte": ("s[1].parquet", flipped),
    "output is shorter": ("s[1].parquet", torn),
    "receipt is gone": (".rsr/receipts/s[1].parquet.json", Path.unlink),
    "receipt is torn": (".rsr/receipts/s[1].parquet.json", torn),
    "rows taken are unknown": (".rsr/kept/s[1].parquet.rows", Path.unlink),
    "result is gone": (".rsr/composition.json", Path.unlink),
}


@pytest.mark.seconds
@pytest.mark.parametrize("damage", [*DAMAGES, "input is another"])
def test_repair_that_is_printed_works(tmp_path, monkeypatch, write_scored, damage):
    """Run by a shell, word for word, in another folder than the run's own."""
    columns = {"problem": ["a", "a", "b"]}
    source, out = tmp_path / "scored", tmp_path / "o[red]x; echo"
    for name in ("s[1]", "t"):
        write_scored(source / f"{name}.parquet", [1.0, 2.0, 3.0], columns=columns)
    line = ["rsr", "select", "scored", out.name, "--group-by", "problem"]
    monkeypatch.chdir(tmp_path)
    # What a run keeps of its command are the words of the process.
    monkeypatch.setattr(sys, "argv", line)
    rsr(*line[1:])
    if damage in DAMAGES:
        name, harm = DAMAGES[damage]
        harm(out / name)
    else:
        write_scored(source / "t.parquet", [3.0, 2.0, 0.5], columns=columns)
    monkeypatch.chdir("/")
    found = rsr("verify", out, "--deep", "--json", exit_code=1)
    repair = json.loads(found.stdout)["repair"]
    assert repair
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in repair:
        done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    rsr("verify", out, "--deep")
