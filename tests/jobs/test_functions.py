"""The commands as functions: they do what the commands do, print nothing, and have types."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import rsr.engine
import rsr.jobs
from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import score_tokens
from rsr.engine.trajectory import EncodedTrajectory, Status, TokenScores
from rsr.jobs.evidence.teachers import CompareOptions
from rsr.jobs.scoring.score import ScoreOptions
from rsr.jobs.selection.candidates import Conditions
from rsr.jobs.selection.filter import FilterOptions
from rsr.jobs.selection.select import SelectOptions

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL
)
OTHERWISE_CALLED = {
    "scorer": "config",
    "required": "require",
    "max_shares": "max_share_per",
    "num_draws": "draws",
}
"""Arguments that are not called as the field that they fill."""

PACKAGES_ARE_NAMESPACES = ("--namespace-packages", "--explicit-package-bases")


@pytest.fixture
def scored(tmp_path, write_scored):
    columns = {
        "problem_id": [0, 0, 1, 1, 2, 2],
        "teacher": ["a", "b"] * 3,
        "text": [f"row {n}" for n in range(6)],
    }
    return write_scored(
        tmp_path / "scored.parquet", [1.0, 2.0, 1.1, 2.1, 1.2, 2.2], columns=columns
    )


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (rsr.jobs.score, [ScoreOptions]),
        (rsr.jobs.filter, [FilterOptions, Conditions]),
        (rsr.jobs.select, [SelectOptions, Conditions]),
        (rsr.jobs.teachers, [CompareOptions]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_option_is_a_keyword(function, options):
    names = {OTHERWISE_CALLED.get(f.name, f.name) for kind in options for f in fields(kind)}
    # What stands for others here, or says what was typed; only select requires columns.
    names -= {"conditions", "command"} | ({"require"} if function is rsr.jobs.filter else set())
    parameters = inspect.signature(function).parameters
    assert names <= set(parameters)


def test_what_is_public_can_be_found():
    for module in (rsr.engine, rsr.jobs):
        assert set(module.__all__) <= set(dir(module))
        for name in module.__all__:
            assert getattr(module, name) is not None
    assert rsr.engine.__version__ == rsr.jobs.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", rsr.engine.__version__)
    with pytest.raises(AttributeError, match="scoer"):
        _ = rsr.jobs.scoer


def test_import_is_light():
    """What `rsr --help` and a configuration need is there without torch, vLLM, Ray or Polars."""
    heavy = "{'torch', 'vllm', 'ray', 'polars', 'pyarrow', 'transformers', 'altair'}"
    code = (
        "import sys; import rsr.jobs, rsr.engine; rsr.engine.ScorerConfig(model='m');"
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_teachers_are_a_result_and_a_frame(scored, capfd):
    found = rsr.jobs.teachers(scored, draws=50)
    assert found.best.teacher == "a"
    frame = found.to_polars()
    assert frame["teacher"].to_list() == ["a", "b"]
    assert frame["rsr"].to_list() == pytest.approx([1.1, 2.1])
    halved = rsr.jobs.teachers(scored, draws=50, rank_clip=50, problem_column=None)
    assert halved.to_polars()["rsr"].to_list() == pytest.approx([0.55, 1.05])
    assert capfd.readouterr() == ("", "")


def test_select_and_filter_give_the_rows_that_they_wrote(scored, tmp_path, capfd):
    best = rsr.jobs.select(scored, tmp_path / "best", group_by="problem_id")
    assert best.facts["num_kept"] == 3
    assert best.to_polars()["text"].to_list() == ["row 0", "row 2", "row 4"]
    shared = rsr.jobs.select(
        scored, tmp_path / "shared", group_by="problem_id", keep=2, max_share_per={"teacher": 0.5}
    )
    assert shared.scan().select(pl.len()).collect().item() == 6
    third = rsr.jobs.filter(scored, tmp_path / "third", keep_fraction=1 / 2, where="teacher = 'b'")
    assert third.to_polars()["text"].to_list() == ["row 1", "row 3"]
    assert capfd.readouterr() == ("", "")


def test_a_decimal_fraction_is_what_it_is_printed_as(scored, tmp_path):
    """0.3 of ten rows is three; the float is a little less than 3/10."""
    assert Fraction(0.3) != Fraction(3, 10)
    ten = pq.read_table(scored)
    ten = pa.concat_tables([ten, ten.slice(0, 4)])
    pq.write_table(ten, tmp_path / "ten.parquet")
    kept = rsr.jobs.filter(tmp_path / "ten.parquet", tmp_path / "out", keep_fraction=0.25)
    assert kept.facts["num_kept"] == 3  # 2.5, rounded half up


def test_what_is_wrong_is_refused_in_one_line(scored, tmp_path):
    calls = {
        "rank_clip=70": lambda: rsr.jobs.teachers(scored, rank_clip=70),
        "keep_fraction=1.5": lambda: rsr.jobs.filter(scored, tmp_path / "o", keep_fraction=1.5),
        "no column 'poser'": lambda: rsr.jobs.teachers(scored, teacher_column="poser"),
        "the model folder": lambda: rsr.jobs.score(scored, tmp_path / "o", str(tmp_path)),
    }
    for told, call in calls.items():
        with pytest.raises(rsr.jobs.UsageError, match=told) as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "o").exists()


def test_an_output_with_the_name_of_a_file_is_that_file(scored, tmp_path):
    result = rsr.jobs.filter(scored, tmp_path / "one.parquet", keep_rows=2)
    assert (tmp_path / "one.parquet").is_file()
    assert result.to_polars().equals(pl.read_parquet(tmp_path / "one.parquet"))
    assert str(result.output) == str(tmp_path / "one.parquet")


def test_a_run_in_a_folder_with_the_name_of_a_file_goes_on(scored, tmp_path):
    rsr.jobs.filter(scored, tmp_path / "best", keep_rows=2)
    (tmp_path / "best").rename(tmp_path / "best.parquet")
    again = rsr.jobs.filter(scored, tmp_path / "best.parquet", keep_rows=2)
    assert again.facts["num_kept"] == 2


class ByteScorer:
    """A stand-in for the engine, which takes every byte of a text for a token of rank 2."""

    kind = "kernel"
    max_num_batched_tokens = None

    def encode(self, trajectories):
        return [
            EncodedTrajectory(list(t.text.encode()), [(1, len(t.text))])
            if t.text
            else EncodedTrajectory.refused(Status.NO_RESPONSE, "null row")
            for t in trajectories
        ]

    def score_encoded(self, encoded):
        return [self._score(row) for row in encoded]

    def _score(self, row):
        if not row.token_ids:
            return rsr.engine.TrajectoryScore(row.status, detail=row.detail)
        num_tokens = len(row.token_ids)
        return score_tokens(
            TokenScores(
                token_ids=np.array(row.token_ids, np.int32),
                ranks=np.full(num_tokens, 2, np.int32),
                logprobs=np.full(num_tokens, -0.5, np.float32),
                entropies=np.ones(num_tokens, np.float32),
            ),
            keep_tokens=False,
        )


def test_batches_of_a_pipeline_get_the_columns_of_a_run():
    config = ScorerConfig(model="m", metrics="rsr")
    step = rsr.jobs.ScoreBatches.over(ByteScorer(), config)
    batch = pa.table({"id": [1, 2, 3], "text": ["abc", None, "de"]})
    scored = step(pa.concat_tables([batch.slice(0, 1), batch.slice(1)]))
    assert scored.select(["id", "text"]).equals(batch)
    assert scored["rsr"].to_pylist() == [4.0, None, 4.0]
    assert scored["rsr_status"].to_pylist() == ["ok", "no_response", "ok"]
    assert scored.schema.field("rsr_num_tokens").type == pa.int32()
    assert step(batch.slice(0, 0)).num_rows == 0
    with pytest.raises(rsr.jobs.UsageError, match="has a column 'rsr' already"):
        step(scored)
    with pytest.raises(rsr.jobs.UsageError, match="has no 'messages'"):
        step(batch.select(["id"]))


@pytest.mark.slow
def test_examples_pass_a_strict_type_check(tmp_path):
    script = tmp_path / "examples.py"
    # Ray has no types of its own.
    script.write_text(
        "\n".join(EXAMPLES).replace("import ray.data\n", "from typing import Any\n\nray: Any\n")
    )
    # With the options of `make lint`, whose cache saves a minute.
    options = ["--strict", "--cache-dir", str(ROOT / ".mypy_cache")]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", *options, *PACKAGES_ARE_NAMESPACES, str(script)],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": ".editor"},
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.ray
def test_examples_run(tiny_student, tmp_path, monkeypatch, capfd):
    *examples, pipeline = EXAMPLES
    assert "ray.data" in pipeline
    rows = pl.DataFrame(
        {
            "prompt": ["Six times seven?", "Two and two?"] * 4,
            "response": [f"That makes {n} of them." for n in range(8)],
            "problem_id": [0, 1] * 4,
            "teacher": ["a", "a", "b", "b"] * 2,
        }
    )
    rows.write_parquet(tmp_path / "trajectories.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    names: dict[str, object] = {}
    for example in examples:
        exec(example.replace("Qwen/Qwen3-8B", str(tiny_student)), names)
    printed = capfd.readouterr()
    assert "none of the" not in printed.out
    assert "bad_messages the row has no messages" in printed.out
    for chatter in ("INFO", "Traceback", "Loading safetensors"):
        assert chatter not in printed.out + printed.err
    assert "loading" in printed.err  # the progress that was asked for
    assert names["frame"].height == 3
    assert names["third"].to_polars().height == 2  # 2.4 of 8 rows


def test_batches_of_a_second_pass_get_its_column_alone():
    """Its sums under the names of a first pass would be wrong scores that look right."""
    config = ScorerConfig(model="bytes", unconditional=True)
    step = rsr.jobs.ScoreBatches.over(ByteScorer(), config)
    made = step(pa.table({"text": ["some text"], "rsr": [1.5]}))
    assert made.column_names == ["text", "rsr", "rsr_unconditional"]
    assert made["rsr_unconditional"][0]["status"].as_py() == "ok"


def test_a_metric_that_is_none_is_refused(tmp_path, write_scored):
    scored = write_scored(tmp_path / "in.parquet", [1.0, 2.0], columns={"teacher": ["a", "b"]})
    with pytest.raises(rsr.jobs.UsageError, match="there is no metric 'nope'; expected one of rsr"):
        rsr.jobs.filter(scored, tmp_path / "out", keep_rows=1, metric="nope")
    with pytest.raises(rsr.jobs.UsageError, match="there is no metric 'nope'"):
        rsr.jobs.teachers(scored, metric="nope", problem_column=None)
