"""`rsr bench kernel` through its command: what it prints, writes, draws and refuses."""

import csv
import json

import pytest
import torch
from click.testing import CliRunner

from rsr.benchmarks import kernel as bench
from rsr.jobs.cli import main
from rsr.kernels import RankLogprob

ARGUMENTS = ["bench", "kernel", "--preset", "smollm2-135m", "--dtype", "float32"]
SMALL = [*ARGUMENTS, "--tokens", "64", "--repeat", "1", "--device", "cpu"]


@pytest.fixture
def two_operations(monkeypatch):
    """The GEMM and one more: the full list takes a while even at 64 tokens."""

    def choose(name, operation):
        operations = [("gemm", bench._Operation(lambda x: x.logits)), (name, operation)]
        monkeypatch.setattr(bench, "_operations", lambda device, dtype: iter(operations))

    return choose


@pytest.mark.slow
def test_rows_files_and_pictures(tmp_path):
    csv_file, picture = tmp_path / "deep" / "rows.csv", tmp_path / "rows.png"
    result = CliRunner().invoke(
        main, [*SMALL, "--json", "--csv", str(csv_file), "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    rows = {row["operation"]: row for row in json.loads(result.stdout)["rows"]}
    assert {"gemm", "rsr tiled float32", "rsr tiled model", "authors"} <= set(rows)
    for row in rows.values():
        assert row["failed_check"] is None
        assert row["time_ms_p20"] <= row["time_ms_p50"] <= row["time_ms_p80"]
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["time_ms_p50"])
        gemm_ms = rows["gemm"]["time_ms_p50"]
        assert row["share_of_gemm"] == pytest.approx(gemm_ms / row["time_ms_p50"])
    # What forms logits needs them at least: 64 × 49,152 × 4 bytes are 12 MiB.
    assert rows["authors"]["peak_extra_mib"] > 11
    with csv_file.open() as file:
        assert [row["operation"] for row in csv.DictReader(file)] == list(rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.seconds
def test_table_and_page(tmp_path, two_operations):
    two_operations("authors", bench._Operation(bench._authors, rounds_logits=True, clip=100))
    page = tmp_path / "rows.html"
    result = CliRunner().invoke(main, [*SMALL, "--plot", str(page)])
    assert result.exit_code == 0, result.output
    assert "smollm2-135m, float32, 64 × 576 × 49,152" in result.stdout
    assert "authors" in result.stdout
    assert "time_ms_p50" in page.read_text()
    steps = [line.removeprefix("smollm2-135m, float32: ") for line in result.stderr.splitlines()]
    assert [step for step in steps if step.startswith(("checking", "timing"))] == [
        "checking gemm",
        "checking authors",
        "timing, round 1 of 1",
    ]


@pytest.mark.slow
def test_busy_cores_are_a_second_set_of_rows(tmp_path, two_operations):
    two_operations("authors", bench._Operation(bench._authors, rounds_logits=True, clip=100))
    path = tmp_path / "rows.csv"
    result = CliRunner().invoke(main, [*SMALL, "--busy-cores", "1", "--csv", str(path)])
    assert result.exit_code == 0, result.output
    assert "smollm2-135m, float32, 64 × 576 × 49,152, 1 cores busy" in result.stdout
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["busy_cores"], row["operation"]) for row in rows] == [
        ("0", "gemm"),
        ("0", "authors"),
        ("1", "gemm"),
        ("1", "authors"),
    ]
    for quiet, busy in zip(rows[:2], rows[2:], strict=True):
        assert float(quiet["slow_down"]) == 1
        ratio = float(busy["time_ms_p50"]) / float(quiet["time_ms_p50"])
        assert float(busy["slow_down"]) == pytest.approx(ratio, rel=1e-4)


@pytest.mark.seconds
def test_a_wrong_operation_is_listed_not_timed_and_exits_with_1(two_operations):
    def off_by_one(operands):
        right = bench._authors(operands)
        return RankLogprob(right.rank + 1, right.logprob, None)

    two_operations("wrong", bench._Operation(off_by_one, rounds_logits=True, clip=100))
    result = CliRunner().invoke(main, [*SMALL, "--json"])
    assert result.exit_code == 1
    gemm, wrong = json.loads(result.stdout)["rows"]
    assert gemm["failed_check"] is None
    assert "ranks are wrong" in wrong["failed_check"]
    assert wrong["time_ms_p50"] is None


@pytest.mark.seconds
def test_what_does_not_fit_in_memory_is_listed_and_costs_nothing_else(two_operations, tmp_path):
    def too_large(operands):
        raise torch.OutOfMemoryError("tried to allocate 40 GiB")

    two_operations("large", bench._Operation(too_large))
    path = tmp_path / "rows.csv"
    result = CliRunner().invoke(main, [*SMALL, "--csv", str(path)])
    assert result.exit_code == 0, result.output
    with path.open() as file:
        gemm, large = csv.DictReader(file)
    assert gemm["time_ms_p50"]
    assert large["failed_check"] == "OutOfMemoryError: tried to allocate 40 GiB"


@pytest.mark.slow
def test_an_operation_for_few_tokens_is_compared_per_token(two_operations):
    sort = bench._Operation(bench._sort, rounds_logits=True, max_tokens=16)
    two_operations("log-softmax and sort", sort)
    result = CliRunner().invoke(main, [*SMALL, "--json"])
    assert result.exit_code == 0, result.output
    gemm, few = json.loads(result.stdout)["rows"]
    assert (gemm["num_tokens"], few["num_tokens"]) == (64, 16)
    per_token = few["time_ms_p50"] / 16
    assert few["share_of_gemm"] == pytest.approx(gemm["time_ms_p50"] / 64 / per_token)
    assert few["tokens_per_s"] == pytest.approx(1e3 / per_token)
    assert few["gb_per_s"] == pytest.approx(4 * 576 * (49_152 + 16) / few["time_ms_p50"] / 1e6)


@pytest.mark.seconds
def test_a_head_that_fails_costs_no_rows_before_it(two_operations, tmp_path, monkeypatch):
    two_operations("authors", bench._Operation(bench._authors, rounds_logits=True, clip=100))
    drawn, draw = [], bench._draw

    def draw_once(shape, dtype, device):
        drawn.append(shape)
        if len(drawn) > 1:
            raise RuntimeError("the card is gone")
        return draw(shape, dtype, device)

    monkeypatch.setattr(bench, "_draw", draw_once)
    path = tmp_path / "rows.csv"
    twice = ["--preset", "qwen2.5-0.5b", "--csv", str(path)]
    result = CliRunner().invoke(main, [*SMALL, *twice])
    assert "the card is gone" in result.output
    with path.open() as file:
        assert [row["operation"] for row in csv.DictReader(file)] == ["gemm", "authors"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--plot", "rows.pdf"], "--plot must end in .html or .png, got rows.pdf"),
        (["--busy-cores", "4096"], "--busy-cores must be at most this process's"),
        (["--device", "meta"], "--device must be cpu or cuda, got meta"),
        (["--device", "nonsense"], "--device nonsense: "),
    ],
)
def test_wrong_options_are_refused(option, message):
    result = CliRunner().invoke(main, [*SMALL, *option])
    assert result.exit_code == 2
    assert message in result.output
