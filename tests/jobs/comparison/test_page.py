"""`rsr report --compare`: the numbers of `rsr compare` on the report's page, and text as text."""

import html
import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main

HOSTILE = "re<b>fined & more"


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == exit_code, result.output + result.stderr
    return result


@pytest.fixture(scope="module")
def streams(tmp_path_factory, write_stream, make_trace):
    """A native stream and a repaired one, which is dearer in every pair, of a problem less."""
    random = np.random.default_rng(3)
    folder = tmp_path_factory.mktemp("streams")
    traces = {"native": [], HOSTILE: []}
    for number in range(8):
        ids = random.choice(1_000, 40, replace=False)
        repaired = np.where(np.arange(40) < 10, ids + 1_000, ids)
        for name, tokens, nats in (("native", ids, 1.0), (HOSTILE, repaired, 1.5)):
            beside = {"id": f"n{number}", "parent_id": f"n{number}", "teacher": name}
            ranks, surprisals = random.integers(1, 9, 40), np.full(40, nats)
            traces[name].append(
                make_trace(f"p{number}", tokens, ranks, surprisals, beside | {"correct": True})
            )
    for name, rows in traces.items():
        write_stream(folder / name / "rows.parquet", rows[: 8 if name == "native" else 7])
    return folder


@pytest.mark.seconds
def test_page_shows_what_compare_says(streams, tmp_path):
    page = tmp_path / "out.html"
    native, refined = streams / "native", streams / HOSTILE
    told = json.loads(
        run("report", native, page, "--compare", refined, "--draws", 50, "--json").stdout
    )["streams"]
    assert told == json.loads(run("compare", native, refined, "--draws", 50, "--json").stdout)
    source = page.read_text()
    assert "re<b>fined" not in source
    (section,) = re.findall(r'<section id="comparison">.*?</section>', source, re.DOTALL)
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", section)).split())
    assert "compared on the 7 problems that all 2 streams have; 1 that not all" in text
    # exp 1 and exp 1.5, the same in every quarter and every draw.
    for name in ("perplexity", "perplexity_q1", "perplexity_q4"):
        assert f"{name} lower 2.718 4.482 +1.76 (+1.76 to +1.76)" in text
    assert f"Drift of {HOSTILE} from native" in text
    assert "edit share +0.25 (+0.25 to +0.25)" in text
    assert "perplexity and RSR disagree: native has the lower perplexity" in text
    assert "Nothing was trained here" in text
    assert "data-chart" not in section


@pytest.mark.seconds
def test_streams_without_problems_are_refused(streams, tmp_path):
    page = tmp_path / "out.html"
    options = ("--compare", streams / HOSTILE, "--problem-column", "none")
    refused = run("report", streams / "native", page, *options, exit_code=2)
    assert "name their column with --problem-column" in refused.stderr
    assert not page.exists()
