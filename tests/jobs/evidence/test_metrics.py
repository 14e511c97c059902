"""Every metric beside what NumPy makes of the tokens; and what commands make of the metrics."""

import json
import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.engine.catalogue import BY_NAME, CAR_BETA, METRICS
from rsr.engine.metric_sums import sum_metrics
from rsr.engine.metrics import (
    STORED_RANK_CLIPS,
    add_scores,
    score_tokens,
    sum_terms,
    trajectory_score,
)
from rsr.engine.parts import NUM_QUARTERS, PROMPT
from rsr.engine.trajectory import Status, TokenScores
from rsr.jobs.cli import main
from rsr.jobs.evidence.metric_table import MetricRow, told_agreement, with_agreement
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.writer import METADATA_KEY

RANK_CLIP = 100
FLOOR = 1e-3
TEACHERS = ("a", "b", "c")


@dataclass(frozen=True)
class Row:
    """One trajectory's tokens, one by one: what no metric is computed from."""

    ranks: np.ndarray
    surprisals: np.ndarray
    entropies: np.ndarray
    begins_step: np.ndarray
    prompt_surprisals: np.ndarray
    unconditional_surprisals: np.ndarray
    window_surprisals: np.ndarray
    quality: float
    teacher: str
    problem: int

    def score(self):
        """As the engine forms it: from sums by part."""
        num_prompt, length = len(self.prompt_surprisals), len(self.ranks)
        quarters = NUM_QUARTERS * np.arange(length) // length
        parts = np.concatenate(
            [np.full(num_prompt, PROMPT), quarters + NUM_QUARTERS * self.begins_step]
        )
        ones = np.ones(num_prompt)
        ranks = np.concatenate([ones, np.minimum(self.ranks, RANK_CLIP)])
        surprisals = np.concatenate([self.prompt_surprisals, self.surprisals])
        entropies = np.concatenate([ones, self.entropies])
        return trajectory_score(
            sum_terms(self.ranks, -self.surprisals, self.entropies, RANK_CLIP),
            length,
            has_entropy=True,
            rank_clip=RANK_CLIP,
            metric_sums=sum_metrics(ranks, surprisals, entropies, parts),
        )

    def second_pass(self, surprisals, borders):
        """As the engine forms it: from sums of each sequence, [borders[i], borders[i + 1])."""
        sequences = [
            score_tokens(
                TokenScores(
                    np.zeros(stop - start, np.int32),
                    self.ranks[start:stop],
                    -surprisals[start:stop],
                    np.zeros(stop - start),
                )
            )
            for start, stop in pairwise([*borders, len(surprisals)])
        ]
        return add_scores(sequences, Status.OK)

    @property
    def steps(self):
        return np.flatnonzero(self.begins_step)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    random = np.random.default_rng(5)
    made = []
    for number in range(90):
        length = int(random.integers(1, 400))
        begins_step = random.random(length) < 0.1
        begins_step[0] = True
        made.append(
            Row(
                ranks=random.zipf(1.6, length).clip(max=50_000),
                surprisals=random.exponential(1.3, length).astype(np.float32).astype(float),
                entropies=random.exponential(1.1, length).astype(np.float32).astype(float),
                begins_step=begins_step,
                prompt_surprisals=random.exponential(2.0, int(random.integers(1, 90))),
                unconditional_surprisals=random.exponential(1.9, length),
                window_surprisals=random.exponential(1.5, length),
                quality=float(random.normal(3.0, 1.0)),
                teacher=TEACHERS[number % 3],
                problem=number // 3,
            )
        )
    return made


def write(
    path, rows, *, scores=None, metrics=True, settings=None, row_group_size=7, second_passes=None
):
    scores = scores or [row.score() for row in rows]
    frame = score_columns.to_frame(scores, token_columns=False, metrics=metrics)
    table = score_columns.to_arrow(frame)
    own = {
        "id": pa.array([f"row {n}" for n in range(len(rows))]),
        "teacher": pa.array([row.teacher for row in rows]),
        "problem_id": pa.array([row.problem for row in rows]),
        "reward": pa.array([row.quality for row in rows]),
    }
    if metrics if second_passes is None else second_passes:
        passes = {
            "unconditional": [row.second_pass(row.unconditional_surprisals, [0]) for row in rows],
            "window": [row.second_pass(row.window_surprisals, row.steps) for row in rows],
        }
        for name, of_rows in passes.items():
            added = score_columns.to_arrow(score_columns.to_second_pass_frame(name, of_rows))
            own[added.column_names[0]] = added.column(0)
    for name, column in own.items():
        table = table.append_column(name, column)
    run = {"model": "student", "rank_clip": RANK_CLIP, "entropy": True, "prompt_metrics": True}
    identity = {"settings": run | (settings or {})}
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(identity).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


@pytest.fixture(scope="module")
def scored(rows, tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("scored") / "rows.parquet", rows)


def by_hand(rows: list[Row]) -> dict[str, tuple[list[float], float]]:
    """Each metric of each row (NaN where there is none), and of them as a data set."""

    def mean(values):
        return values, float(np.nanmean(values))

    def ratio(above, below):
        above, below = np.array(above), np.array(below)
        return list(above / below), float(above.sum() / below.sum())

    clipped = [np.minimum(r.ranks, RANK_CLIP) for r in rows]
    mean_surprisals = [r.surprisals.mean() for r in rows]
    mean_entropies = [r.entropies.mean() for r in rows]
    told = {
        "rsr": ratio([c.mean() for c in clipped], mean_surprisals),
        "rsr_floor": ratio(np.ones(len(rows)), mean_surprisals),
        "token_ratio": mean(
            [
                (c / np.maximum(r.surprisals, FLOOR)).mean()
                for c, r in zip(clipped, rows, strict=True)
            ]
        ),
        "surprisal": mean(mean_surprisals),
        "surprisal_variance": mean([r.surprisals.var() for r in rows]),
        "rank": mean([c.mean() for c in clipped]),
        "entropy": mean(mean_entropies),
        "rank_entropy": ratio([c.mean() for c in clipped], mean_entropies),
        "relative_surprisal": ratio(mean_surprisals, mean_entropies),
        "token_rank_entropy": mean(
            [
                (c / np.maximum(r.entropies, FLOOR)).mean()
                for c, r in zip(clipped, rows, strict=True)
            ]
        ),
        "token_relative_surprisal": mean(
            [(r.surprisals / np.maximum(r.entropies, FLOOR)).mean() for r in rows]
        ),
        "perplexity": (
            [float(np.exp(s)) for s in mean_surprisals],
            float(np.exp(np.concatenate([r.surprisals for r in rows]).mean())),
        ),
        "perplexity_mean": mean([float(np.exp(s)) for s in mean_surprisals]),
        "grape": mean([-s for s in mean_surprisals]),
        "length": mean([float(len(r.ranks)) for r in rows]),
        "car": ratio([r.quality for r in rows], [1 + CAR_BETA * s for s in mean_surprisals]),
    }
    for name, clip in STORED_RANK_CLIPS.items():
        limited = [np.minimum(r.ranks, clip or np.inf).mean() for r in rows]
        told[f"rsr_{name.removeprefix('clip_')}"] = ratio(limited, mean_surprisals)
    for quarter in range(4):
        parts = []
        for row in rows:
            length = len(row.surprisals)
            inside = [
                s
                for k, s in enumerate(row.surprisals)
                if quarter * length <= 4 * k < (quarter + 1) * length
            ]
            parts.append(np.array(inside))
        told[f"perplexity_q{quarter + 1}"] = (
            [float(np.exp(p.mean())) if len(p) else np.nan for p in parts],
            float(np.exp(np.concatenate(parts).mean())),
        )
    later = [
        -r.surprisals[~r.begins_step].mean() if not r.begins_step.all() else np.nan for r in rows
    ]
    told["aslec_drop"] = mean(later)
    first = np.array([-r.surprisals[r.begins_step].mean() for r in rows])
    share = np.array([r.begins_step.mean() for r in rows])
    whole = ~np.isnan(later)
    design = np.stack([np.array(later), first, share, np.ones(len(rows))], axis=1)
    overall = -np.array(mean_surprisals)
    coefficients, *_ = np.linalg.lstsq(design[whole], overall[whole], rcond=None)
    told["aslec_casl"] = mean(list(overall - coefficients[2] * share))
    of_prompts = [r.prompt_surprisals.mean() if len(r.prompt_surprisals) else np.nan for r in rows]
    unconditional = [r.unconditional_surprisals.mean() for r in rows]
    both = list(zip(mean_surprisals, unconditional, strict=True))
    told["ifd"] = mean([float(np.exp(s) / np.exp(u)) for s, u in both])
    told["ifd_loss"] = mean([s / u for s, u in both])
    told["local_naturalness"] = mean(
        [
            np.mean([-step.mean() for step in np.split(r.window_surprisals, r.steps[1:])])
            for r in rows
        ]
    )
    told["scas_likelihood"] = mean(
        [0.5 * a * a + 0.5 * a * q for a, q in zip(mean_surprisals, of_prompts, strict=True)]
    )
    return told


def invoke(*arguments: object, exit_code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(a) for a in arguments], standalone_mode=False)
    assert result.exit_code == exit_code or isinstance(result.exception, SystemExit), result
    assert (result.exception.code if result.exception else 0) == exit_code, result.output
    return result.output


def check_metrics(scored: str, rows: list[Row], folder, *, left_out=frozenset()) -> None:
    """`rsr metrics` of each row and of each teacher beside `by_hand`, to a relative 1e-6."""
    told = json.loads(
        invoke(
            "metrics",
            scored,
            "--by",
            "teacher",
            "--quality-column",
            "reward",
            "--output",
            folder,
            "--json",
        )
    )
    expected = by_hand(rows)
    assert (
        {m["metric"] for m in told["metrics"]}
        == set(expected) - left_out
        == set(BY_NAME) - left_out
    )
    of_rows = pl.read_parquet(folder / "rows.parquet")
    for metric in told["metrics"]:
        name = metric["metric"]
        found = of_rows[f"metric_{name}"].fill_null(float("nan")).to_numpy()
        np.testing.assert_allclose(found, expected[name][0], rtol=1e-6, err_msg=name)
    for teacher in sorted({row.teacher for row in rows}):
        own = by_hand([row for row in rows if row.teacher == teacher])
        # Its one coefficient is fitted over all rows.
        values = np.array(expected["aslec_casl"][0])[[row.teacher == teacher for row in rows]]
        own["aslec_casl"] = (list(values), float(values.mean()))
        for metric in told["metrics"]:
            value = metric["values"][teacher]
            assert value == pytest.approx(own[metric["metric"]][1], rel=1e-6), metric["metric"]
    table = pl.read_csv(folder / "metrics.csv")
    assert table["teacher"].to_list() == sorted({row.teacher for row in rows})
    assert table.columns[1:] == [m["metric"] for m in told["metrics"]]


@pytest.mark.seconds
def test_every_metric_is_what_its_tokens_say(scored, rows, tmp_path):
    check_metrics(scored, rows, tmp_path / "out")


def test_metrics_print_a_line_each_and_whether_they_agree(scored):
    printed = invoke("metrics", scored, "--by", "teacher")
    for metric in METRICS:
        assert metric.name == "car" or re.search(rf"^{metric.name} ", printed, re.MULTILINE)
    assert "the metrics disagree on the best teacher" in printed
    assert "without car: it needs --quality-column" in printed


def test_sums_take_no_more_than_200_bytes_a_row(tmp_path):
    random = np.random.default_rng(3)
    rows = [
        Row(
            ranks=random.zipf(1.6, 40).clip(max=50_000),
            surprisals=random.exponential(1.3, 40),
            entropies=random.exponential(1.1, 40),
            begins_step=random.random(40) < 0.2,
            prompt_surprisals=random.exponential(2.0, 20),
            unconditional_surprisals=random.exponential(1.9, 40),
            window_surprisals=random.exponential(1.5, 40),
            quality=0.0,
            teacher="a",
            problem=number,
        )
        for number in range(1000)
    ]
    path = write(tmp_path / "rows.parquet", rows, row_group_size=1000, second_passes=False)
    written = pq.read_metadata(path)
    chunks = [written.row_group(0).column(i) for i in range(written.num_columns)]
    names = {column.name for column in score_columns.METRIC_COLUMNS}
    sizes = [c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] in names]
    assert len(sizes) == 4 * 3 + 3 + 5 + 2
    assert sum(sizes) / len(rows) <= 200


@pytest.mark.seconds
@pytest.mark.parametrize("metric", [m.name for m in METRICS])
def test_any_metric_ranks_teachers_and_chooses_rows(scored, rows, tmp_path, metric):
    of_all = by_hand(rows)[metric][0]
    sign = 1.0 if BY_NAME[metric].direction == "lower" else -1.0
    asked = ["--metric", metric, "--quality-column", "reward"]
    (told,) = json.loads(invoke("teachers", scored, *asked, "--draws", 50, "--json"))["students"]
    values = [sign * t["value"] for t in told["teachers"]]
    assert values == sorted(values)
    assert all(t["low"] <= t["high"] for t in told["teachers"])
    names = [m["metric"] for m in told["metrics"]]
    assert names[0] == metric
    assert {"rsr", "length", "surprisal"} <= set(names)
    asked = asked if metric == "car" else asked[:2]
    invoke("filter", scored, tmp_path / "kept", *asked, "--keep-rows", 11)
    order = sorted((sign * v, n) for n, v in enumerate(of_all) if not np.isnan(v))
    expected = sorted(n for _, n in order[:11])
    kept = pl.read_parquet(tmp_path / "kept" / "rows.parquet")
    assert kept["id"].to_list() == [f"row {n}" for n in expected]
    invoke("select", scored, tmp_path / "best", *asked, "--group-by", "problem_id")
    best: dict[int, tuple[float, int]] = {}
    for value, n in order:
        best.setdefault(rows[n].problem, (value, n))
    selected = pl.read_parquet(tmp_path / "best" / "rows.parquet")
    assert selected["id"].to_list() == [f"row {n}" for n in sorted(n for _, n in best.values())]


def test_metrics_agree_where_they_do(tmp_path):
    """One teacher's rows are likelier, and longer."""
    ones = np.ones(50)
    rows = [
        Row(
            ranks=np.full(50 + 50 * better, 4 - 3 * better),
            surprisals=np.full(50 + 50 * better, 2.0 - better),
            entropies=np.ones(50 + 50 * better),
            begins_step=np.arange(50 + 50 * better) == 0,
            prompt_surprisals=ones,
            unconditional_surprisals=np.full(50 + 50 * better, 3.0 - better),
            window_surprisals=np.full(50 + 50 * better, 3.0 - better),
            quality=1.0,
            teacher="ab"[better],
            problem=problem,
        )
        for problem in range(4)
        for better in (0, 1)
    ]
    scored = write(tmp_path / "in" / "rows.parquet", rows)
    printed = invoke("teachers", scored, "--metric", "surprisal", "--draws", 10)
    assert "teachers by surprisal (lower is better)" in printed
    assert "the metrics agree on the best teacher: b" in printed


def test_agreement_is_kendalls_over_groups_that_have_both():
    """Against a metric of which higher values are better; ties count as τ-b has them."""

    def row(name, values):
        return MetricRow(BY_NAME[name], dict(zip("abcd", values, strict=True)), {})

    told = with_agreement(
        [
            row("rsr", [1.0, 2.0, 3.0, 4.0]),
            row("grape", [-1.0, -2.0, -3.0, -4.0]),
            row("length", [1.0, 2.0, 3.0, None]),
            row("rank", [1.0, 2.0, 2.0, 1.0]),
            row("entropy", [5.0, 5.0, 5.0, 5.0]),
        ]
    )
    taus = [r.agreement for r in told]
    assert taus == [1.0, 1.0, -1.0, pytest.approx(0.0), None]
    assert [r.best for r in told] == ["a", "a", "c", "a", "a"]
    assert told_agreement(told[:2]) == "the metrics agree on the best teacher: a"
    assert told_agreement(told[1:3]).endswith("teacher: a by grape; c by length")


LACKING = {
    "perplexity_q1": "it has no rsr_quarters",
    "aslec_casl": "it has no rsr_steps",
    "token_ratio": "it has no rsr_sums",
    "scas_likelihood": "it has no rsr_prompt",
    "car": "it needs --quality-column",
    "ifd": "it needs a second pass: rsr score",
    "local_naturalness": "it needs a second pass: rsr score",
}


@pytest.mark.seconds
@pytest.mark.parametrize("command", ["teachers", "report", "filter", "select", "metrics"])
@pytest.mark.parametrize("metric", LACKING)
def test_a_metric_that_is_not_stored_is_refused_in_one_line(rows, tmp_path, command, metric):
    """Of a file of an earlier release; what it does store is read as ever."""
    old = write(tmp_path / "old.parquet", rows[:9], metrics=False)
    further = {
        "report": [tmp_path / "page.html"],
        "filter": [tmp_path / "out", "--keep-rows", 3],
        "select": [tmp_path / "out", "--group-by", "problem_id"],
    }.get(command, [])
    told = invoke(command, old, *further, "--metric", metric, exit_code=2)
    (line,) = told.splitlines()
    assert f"cannot give the metric {metric}: {LACKING[metric]}" in line
    assert not (tmp_path / "out").exists()
    if metric == "car":
        invoke(command, old, *further)


def test_files_of_earlier_releases_tell_the_metrics_that_they_store(rows, tmp_path):
    old = write(tmp_path / "old.parquet", rows, metrics=False)
    told = json.loads(invoke("metrics", old, "--json"))
    names = {m["metric"] for m in told["metrics"]}
    assert {"rsr", "rsr_50", "perplexity", "length", "rank_entropy"} <= names
    assert names | set(told["not_stored"]) == set(BY_NAME)
    expected = by_hand(rows)
    for metric in told["metrics"]:
        value = metric["values"]["all"]
        assert value == pytest.approx(expected[metric["metric"]][1], rel=1e-6)


def test_prompts_and_entropies_that_were_not_asked_for_are_named(rows, tmp_path):
    settings = {"prompt_metrics": False, "entropy": False}
    scored = write(tmp_path / "rows.parquet", rows[:9], settings=settings)
    assert "--prompt-metrics" in invoke(
        "metrics", scored, "--metric", "scas_likelihood", exit_code=2
    )
    assert "--entropy" in invoke("metrics", scored, "--metric", "entropy", exit_code=2)


def test_thresholds_and_qualities_that_mean_nothing_are_refused(scored, tmp_path):
    out = tmp_path / "out"
    told = invoke("filter", scored, out, "--metric", "length", "--max-rsr", 3, exit_code=2)
    assert "--max-rsr is a threshold of RSR" in told
    told = invoke(
        "filter", scored, out, "--quality-column", "reward", "--keep-rows", 1, exit_code=2
    )
    assert "--quality-column says nothing to --metric rsr" in told
    told = invoke("teachers", scored, "--metric", "car", "--quality-column", "id", exit_code=2)
    assert "expected numbers" in told


@pytest.mark.seconds
def test_the_page_tells_what_the_metrics_say(scored, tmp_path):
    page = tmp_path / "page.html"
    invoke("report", scored, page, "--metric", "perplexity_q1", "--draws", 20)
    text = page.read_text()
    assert "What the metrics say" in text
    assert "aslec_drop" in text
    assert "the metrics disagree on the best teacher" in text
    assert "Its data-set perplexity_q1 is" in text


@pytest.mark.slow
@pytest.mark.vllm
def test_every_metric_of_real_rows_is_what_their_tokens_say(real_student, shared_data, tmp_path):
    """40 rows: sums formed in the worker, beside NumPy on the tokens that came back one by one."""
    from transformers import AutoTokenizer

    from rsr.engine import Scorer, ScorerConfig, Trajectory

    table = pl.read_parquet(shared_data / "gsm8k_teachers.parquet")[:40]
    trajectories = [Trajectory(messages=m) for m in table["messages"].to_list()]
    settings = {"model": str(real_student), "dtype": "float32", "prefix_reuse": "off"}
    with Scorer(ScorerConfig(**settings, token_scores=True)) as scorer:
        detailed = [score.tokens for score in scorer.score(trajectories)]
    with Scorer(ScorerConfig(**settings)) as scorer:
        scores = scorer.score(trajectories)
    tokenizer = AutoTokenizer.from_pretrained(real_student)
    rows = [
        Row(
            ranks=tokens.ranks,
            surprisals=-tokens.logprobs.astype(np.float64),
            entropies=tokens.entropies.astype(np.float64),
            begins_step=begins_of_steps(tokens.token_ids, tokenizer),
            prompt_surprisals=np.empty(0),
            unconditional_surprisals=np.empty(0),
            window_surprisals=np.empty(0),
            quality=float(number % 7),
            teacher=teacher,
            problem=problem,
        )
        for number, (tokens, teacher, problem) in enumerate(
            zip(detailed, table["teacher"], table["problem_id"], strict=True)
        )
    ]
    settings = {"prompt_metrics": False}
    scored = write(
        tmp_path / "rows.parquet", rows, scores=scores, settings=settings, second_passes=False
    )
    of_more_passes = {m.name for m in METRICS if {"prompt", "unconditional", "window"} & {*m.needs}}
    check_metrics(scored, rows, tmp_path / "out", left_out=of_more_passes)


def begins_of_steps(token_ids, tokenizer) -> np.ndarray:
    """By the text that is cut with the pattern, and the text of each token."""
    texts = [tokenizer.decode([token]) for token in token_ids]
    ends = np.cumsum([len(text) for text in texts])
    pieces = re.split(r"(\. |\? )", "".join(texts))
    starts = np.cumsum([0, *(len(a + b) for a, b in zip(pieces[::2], pieces[1::2], strict=False))])
    holders = np.searchsorted(ends, starts[starts < ends[-1]], side="right")
    return np.isin(np.arange(len(token_ids)), holders)
