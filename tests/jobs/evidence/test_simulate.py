"""The simulation: the paper's table, and what of it holds for any seed."""

import json

import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main
from rsr.jobs.evidence.simulate import PUBLISHED, simulate


def test_published_table_within_three_per_cent():
    for ours, paper in zip(simulate().texts, PUBLISHED, strict=True):
        assert ours.text == paper.text
        assert ours.mean_surprisal_nats == pytest.approx(paper.mean_surprisal_nats, rel=0.03)
        assert ours.mean_rank == pytest.approx(paper.mean_rank, rel=0.03)
        assert ours.mean_token_ratio == pytest.approx(paper.mean_token_ratio, rel=0.03)


def test_seed_decides_everything():
    assert simulate(5, 1_000).texts == simulate(5, 1_000).texts
    assert simulate(5, 1_000).texts != simulate(6, 1_000).texts


def test_minor_mode_has_the_lowest_ratio_whatever_the_order():
    lowest = [min(simulate(seed, 20_000).texts, key=lambda t: t.rsr).text for seed in range(100)]
    assert lowest.count("minor") >= 90
    for seed in range(20):
        major, minor, foreign, _ = simulate(seed, 20_000).texts
        assert major.mean_surprisal_nats < minor.mean_surprisal_nats < foreign.mean_surprisal_nats


def test_command_prints_published_values_beside_ours():
    shown = CliRunner().invoke(main, ["simulate"]).output
    for number in ("(1.38)", "(4.31)", "(11.57)", "(1.62)"):
        assert number in shown
    told = json.loads(CliRunner().invoke(main, ["simulate", "--json", "--tokens", "500"]).stdout)
    assert [t["text"] for t in told["texts"]] == ["major", "minor", "foreign", "mixed"]
    assert told["published"][2]["mean_rank"] == 11.57


@pytest.mark.seconds
@pytest.mark.parametrize("suffix", [".html", ".svg", ".png"])
def test_plot(tmp_path, suffix):
    target = tmp_path / f"out{suffix}"
    result = CliRunner().invoke(main, ["simulate", "--plot", str(target)])
    assert result.exit_code == 0, result.output
    drawn = target.read_bytes()
    if suffix == ".png":
        assert drawn.startswith(b"\x89PNG")
    else:
        assert b"foreign" in drawn
        assert b"<script src" not in drawn


def test_plot_of_another_kind_is_refused_before_anything_is_written(tmp_path):
    result = CliRunner().invoke(main, ["simulate", "--plot", str(tmp_path / "out.gif")])
    assert result.exit_code == 2
    assert "--plot must end in one of .html, .png, .svg" in result.stderr
    assert list(tmp_path.iterdir()) == []
