"""What the figures of arXiv 2606.16152 support of the Quality–Utility Paradox, and what not.

Qwen2.5-Math-1.5B; perplexity under the student before training, mean reward, and accuracy (Avg@16,
per cent) after SFT and after DFT, as summaries of the paper give them. Figures that none gives are
missing: the data set's own perplexity, and the style-aligned streams after SFT.
"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main

STREAMS = Path(__file__).parent / "paper_streams.csv"


def correlations(target):
    arguments = ("--metric", "perplexity", "--metric", "reward", "--target", target, "--json")
    result = CliRunner().invoke(main, ["correlate", str(STREAMS), *arguments])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    return {metric["metric"]: metric for metric in told["metrics"]}, told


def test_lower_perplexity_went_with_better_accuracy_after_dft():
    metrics, told = correlations("dft_accuracy")
    perplexity, reward = metrics["perplexity"], metrics["reward"]
    assert perplexity["num_rows"] == 5
    assert perplexity["spearman"]["mean"] == pytest.approx(-0.9)
    # 1 − 6 · Σ d² / (n (n² − 1)), Σ d² = 58.
    assert (reward["num_rows"], reward["spearman"]["mean"]) == (6, pytest.approx(1 - 348 / 210))
    assert told["notes"] == ["perplexity: 1 of 6 rows have no usable value"]


def test_five_streams_do_not_make_it_sure():
    """Of 120 orders, ten are as far from chance: the style-aligned stream breaks the order."""
    metrics, _ = correlations("dft_accuracy")
    assert metrics["perplexity"]["spearman"]["p_value"] == pytest.approx(10 / 120, abs=0.01)


def test_after_plain_sft_perplexity_points_the_other_way():
    metrics, _ = correlations("sft_accuracy")
    assert metrics["perplexity"]["num_rows"] == 3
    assert metrics["perplexity"]["spearman"]["mean"] == pytest.approx(0.5)
