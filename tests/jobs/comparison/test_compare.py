"""`rsr compare`, beside what NumPy makes of the token columns alone."""

import json
import re

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main

NUM_PROBLEMS = 40
DRAWS = ("--draws", "100")


def run(*arguments, exit_code=0):
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output + result.stderr
    return result


def told(*arguments):
    return json.loads(run(*arguments, *DRAWS, "--json").stdout)


@pytest.fixture(scope="module")
def streams(tmp_path_factory, write_stream, make_trace):
    """Three streams: native, repaired in one place, and written anew; of each some problems."""
    random = np.random.default_rng(11)
    vocabulary = np.arange(20_000)
    traces = {"native": [], "repaired": [], "anew": []}
    for number in range(NUM_PROBLEMS):
        length = int(random.integers(3, 90))
        ids = random.choice(vocabulary, length, replace=False)
        start = int(random.integers(0, length))
        patch = 20_000 + random.integers(0, 50, int(random.integers(1, 6)))
        other = 30_000 + random.integers(0, 500, int(random.integers(3, 120)))
        versions = {
            "native": ids,
            "repaired": np.concatenate([ids[:start], patch, ids[start + 1 :]]),
            "anew": other,
        }
        for stream, tokens in versions.items():
            count = len(tokens)
            scale = {"native": 0.4, "repaired": 0.5, "anew": 1.2}[stream]
            traces[stream].append(
                make_trace(
                    f"problem {number:02}",
                    tokens,
                    random.zipf(1.7, count).clip(max=30_000),
                    random.exponential(scale, count),
                    {
                        "id": f"{stream} {number}",
                        "parent_id": f"native {number}",
                        "correct": bool(random.random() < 0.7) if number % 9 else None,
                        "reward": float(random.normal()),
                    },
                )
            )
    folder = tmp_path_factory.mktemp("streams")
    kept = {"native": slice(0, 36), "repaired": slice(4, 40), "anew": slice(0, 30)}
    for name, rows in kept.items():
        write_stream(folder / name / "rows.parquet", traces[name][rows])
    return folder


@pytest.fixture(scope="module")
def comparison(streams):
    return told(*(streams / n for n in ("native", "repaired", "anew")), "--quality-column=reward")


def read(folder, name):
    """A stream's rows of the problems that all three have: token columns and what is beside."""
    rows = pl.read_parquet(folder / name / "rows.parquet")
    shared = [f"problem {number:02}" for number in range(4, 30)]
    return rows.filter(pl.col("problem_id").is_in(shared)).sort("problem_id")


def surprisals(rows):
    return [-np.array(row, float) for row in rows["rsr_token_logprobs"].to_list()]


def by_hand(rows):
    nats = surprisals(rows)
    ranks = [np.minimum(row, 100) for row in rows["rsr_token_ranks"].to_list()]
    quarters = [4 * np.arange(len(row)) // len(row) for row in nats]
    told = {
        "perplexity": np.exp(np.concatenate(nats).mean()),
        "perplexity_mean": np.mean([np.exp(row.mean()) for row in nats]),
        "rsr": sum(row.mean() for row in ranks) / sum(row.mean() for row in nats),
        "rsr_floor": len(nats) / sum(row.mean() for row in nats),
        "length": np.mean([len(row) for row in nats]),
        "correct": rows["correct"].cast(float).mean(),
        "reward": rows["reward"].mean(),
    }
    for number in range(4):
        part = [row[of == number] for row, of in zip(nats, quarters, strict=True)]
        told[f"perplexity_q{number + 1}"] = np.exp(np.concatenate(part).mean())
    return told


@pytest.mark.seconds
def test_every_number_is_that_of_the_token_columns(streams, comparison):
    assert comparison["num_problems"] == 26
    assert comparison["num_problems_left_out"] == NUM_PROBLEMS - 26
    expected = {name: by_hand(read(streams, name)) for name in ("native", "repaired", "anew")}
    found = {row["metric"]: row for row in comparison["metrics"]}
    assert set(found) == set(expected["native"])
    for metric, row in found.items():
        for stream, numbers in expected.items():
            value = row["values"][stream]
            assert value["value"] == pytest.approx(numbers[metric], rel=1e-6), (metric, stream)
            assert value["low"] <= value["value"] <= value["high"]
        for stream in ("repaired", "anew"):
            difference = expected[stream][metric] - expected["native"][metric]
            assert row["differences"][stream]["value"] == pytest.approx(difference, abs=1e-6)
        assert list(row["differences"]) == ["repaired", "anew"]


def test_intervals_are_those_of_drawn_problems(streams, comparison):
    """The draws made again by themselves: problems with replacement, the same for all streams."""
    nats = {name: surprisals(read(streams, name)) for name in ("native", "anew")}
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(100):
        chosen = random.integers(0, 26, 26)
        perplexity = {
            name: np.exp(np.concatenate([rows[i] for i in chosen]).mean())
            for name, rows in nats.items()
        }
        drawn.append(perplexity["anew"] - perplexity["native"])
    found = next(m for m in comparison["metrics"] if m["metric"] == "perplexity")
    ends = [found["differences"]["anew"][end] for end in ("low", "high")]
    assert ends == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=1e-6)


def test_drift_is_that_of_the_token_columns(streams, comparison):
    native, repaired = read(streams, "native"), read(streams, "repaired")
    drift = comparison["drift"]["repaired"]
    assert (drift["num_pairs"], drift["num_unpaired"]) == (26, 0)
    ours, theirs = surprisals(native), surprisals(repaired)
    # No token is twice in a native trace, and a patch is of tokens that no native trace has.
    kept = [
        (np.isin(a, b), np.isin(b, a))
        for a, b in zip(native["rsr_token_ids"], repaired["rsr_token_ids"], strict=True)
    ]

    def pooled(rows, masks):
        chosen = [row[mask] for row, mask in zip(rows, masks, strict=True)]
        return np.concatenate(chosen).mean()

    def difference(of):
        return pooled(theirs, [of(1, n) for n in range(26)]) - pooled(
            ours, [of(0, n) for n in range(26)]
        )

    def quarter(number):
        rows = (ours, theirs)
        return lambda side, n: 4 * np.arange(len(rows[side][n])) // len(rows[side][n]) == number

    lengths = [sum(map(len, rows)) for rows in (ours, theirs)]
    whole = np.concatenate(theirs).mean() - np.concatenate(ours).mean()
    share = 1 - 2 * sum(mask.sum() for mask, _ in kept) / sum(lengths)
    expected = {
        "delta_surprisal": whole,
        "delta_unchanged": difference(lambda side, n: kept[n][side]),
        "delta_edited": difference(lambda side, n: ~kept[n][side]),
        **{f"delta_q{n + 1}": difference(quarter(n)) for n in range(4)},
        "edit_share": share,
        "length_ratio": lengths[1] / lengths[0],
        "drift": share + max(0.0, whole),
    }
    assert set(drift["values"]) == set(expected)
    for name, value in expected.items():
        assert drift["values"][name]["value"] == pytest.approx(value, abs=1e-6), name


def test_token_frequencies_are_those_of_the_token_columns(streams, comparison):
    counts = []
    for name in ("native", "anew"):
        ids = np.concatenate(read(streams, name)["rsr_token_ids"].to_list())
        counts.append(np.bincount(ids, minlength=40_000) / len(ids))
    p, q = counts
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.nan_to_num(p * np.log2(p / middle)) + np.nan_to_num(q * np.log2(q / middle))
    drift = comparison["drift"]["anew"]
    # The two have no token in common.
    assert drift["distance"] == pytest.approx(np.sqrt(parts.sum() / 2)) == pytest.approx(1.0)
    moved = drift["moved"][0]
    assert parts[moved["id"]] == pytest.approx(parts.max())
    assert (moved["native"], moved["refined"]) == pytest.approx((p[moved["id"]], q[moved["id"]]))
    first = drift["first_quarter"][0]
    nats = surprisals(read(streams, "anew"))
    ids = [np.array(row) for row in read(streams, "anew")["rsr_token_ids"].to_list()]
    early = [4 * np.arange(len(row)) // len(row) == 0 for row in ids]
    share = sum(n[e & (i == first["id"])].sum() for n, e, i in zip(nats, early, ids, strict=True))
    total = sum(n[e].sum() for n, e in zip(nats, early, strict=True))
    assert first["refined"] == pytest.approx(share / total, abs=1e-6)


def test_what_is_printed_says_what_was_left_out_and_claims_nothing(streams):
    printed = run(*(streams / n for n in ("native", "repaired", "anew")), *DRAWS).stdout
    assert "the 26 problems that all 3 streams have; 14 that not all of them have" in printed
    assert "Nothing was trained here" in printed
    assert re.search(r"perplexity_q4 +\d", printed)
    assert "Drift of repaired from native, over 26 pairs" in printed
    assert "hurts" not in printed


def trace_of(make_trace, problem, ranks, surprisals, number=0, **beside):
    return make_trace(
        problem, np.arange(len(ranks)), np.array(ranks), np.array(surprisals, float), beside
    )


def test_disagreement_and_the_floor_are_warned_of(tmp_path, write_stream, make_trace):
    """Native text of low surprisal cannot reach the RSR of a teacher's, whatever its ranks."""
    native = [trace_of(make_trace, p, [1, 1, 1, 1], [0.3] * 4) for p in "abc"]
    teacher = [trace_of(make_trace, p, [1, 2, 3, 2], [1.5] * 4) for p in "abc"]
    write_stream(tmp_path / "native.parquet", native)
    write_stream(tmp_path / "teacher.parquet", teacher)
    warnings = told(tmp_path / "native.parquet", tmp_path / "teacher.parquet")["warnings"]
    assert "native.parquet sits on RSR's floor" in warnings[0]
    assert "cannot have a lower RSR than teacher.parquet: RSR's floor at its" in warnings[1]
    assert "native.parquet has the lower perplexity, teacher.parquet the lower RSR" in warnings[2]
    assert len(warnings) == 3
    quiet = told(tmp_path / "teacher.parquet", tmp_path / "native.parquet")["warnings"]
    assert [w.partition(":")[0] for w in quiet] == ["perplexity and RSR disagree"]


def test_streams_that_agree_are_not_warned_of(tmp_path, write_stream, make_trace):
    low = write_stream(tmp_path / "a.parquet", [trace_of(make_trace, "p", [1, 2, 3], [1.0] * 3)])
    high = write_stream(tmp_path / "b.parquet", [trace_of(make_trace, "p", [1, 9, 9], [1.2] * 3)])
    assert told(low, high)["warnings"] == []


def test_rows_that_do_not_count_are_told_of(tmp_path, write_stream, make_trace):
    rows = [trace_of(make_trace, p, [1, 2], [1.0, 2.0]) for p in ("a", "b", None)]
    unscored = trace_of(make_trace, "c", [], [])
    write_stream(tmp_path / "one.parquet", [*rows, unscored])
    write_stream(tmp_path / "two.parquet", rows[:2])
    result = told(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert (result["num_problems"], result["num_problems_left_out"]) == (2, 0)
    note = "2 rows of one.parquet without a score or a 'problem_id' are left out"
    assert note in result["notes"]


def test_pairs_go_by_problem_where_there_is_no_parent(tmp_path, write_stream, make_trace):
    """Of a problem with two native rows, nobody knows which one was refined."""
    native = [trace_of(make_trace, p, [1, 2], [1.0, 2.0]) for p in ("a", "b", "b")]
    write_stream(tmp_path / "one.parquet", native)
    write_stream(tmp_path / "two.parquet", native[:2])
    drift = told(tmp_path / "one.parquet", tmp_path / "two.parquet")["drift"]["two.parquet"]
    assert (drift["num_pairs"], drift["num_unpaired"]) == (1, 1)
    assert drift["values"]["drift"]["value"] == 0.0
    assert drift["values"]["delta_edited"]["value"] is None


def test_pairs_go_by_place_where_native_rows_have_no_id(tmp_path, write_stream, make_trace):
    native = [trace_of(make_trace, "p", [1] * n, [1.0] * n, name=f"n{n}") for n in (2, 3, 4)]
    refined = [
        trace_of(make_trace, "p", [1] * n, [1.0] * n, parent_id=f"rows.parquet:{n - 2}", to=f"n{n}")
        for n in (4, 2, 4)
    ]
    one = write_stream(tmp_path / "one" / "rows.parquet", native)
    two = write_stream(tmp_path / "two" / "rows.parquet", refined)
    drift = told(one, two)["drift"][str(two)]
    assert (drift["num_pairs"], drift["values"]["edit_share"]["value"]) == (3, 0.0)
    named = [trace_of(make_trace, "p", [1], [1.0], parent_id=f"n{n}") for n in (3, 3, 5)]
    three = write_stream(tmp_path / "three.parquet", named)
    drift = told(one, three, "--id-column", "name")["drift"]["three.parquet"]
    assert (drift["num_pairs"], drift["num_unpaired"]) == (2, 1)


def test_streams_without_token_columns_or_sums_are_compared_all_the_same(
    tmp_path, write_stream, make_trace, write_scored
):
    rows = [trace_of(make_trace, p, [1, 2], [1.0, 2.0]) for p in "ab"]
    write_stream(tmp_path / "one.parquet", rows)
    write_stream(tmp_path / "two.parquet", rows, token_columns=False)
    result = told(tmp_path / "one.parquet", tmp_path / "two.parquet")
    assert result["drift"] == {}
    assert any("score it with --token-columns" in note for note in result["notes"])
    identity = {"settings": {"model": "student", "rank_clip": 100}, "columns": {}}
    columns = {"problem_id": ["a", "b"]}
    write_scored(tmp_path / "old.parquet", [1.0, 2.0], columns=columns, identity=identity)
    result = told(tmp_path / "one.parquet", tmp_path / "old.parquet")
    assert "perplexity_q1" in result["not_stored"]
    assert {m["metric"] for m in result["metrics"]} >= {"perplexity", "rsr", "length"}


def test_what_cannot_be_compared_is_refused(tmp_path, write_stream, make_trace):
    rows = [trace_of(make_trace, "a", [1, 2], [1.0, 2.0], text="x")]
    others = [trace_of(make_trace, "b", [1, 2], [1.0, 2.0], text="x")]
    one = write_stream(tmp_path / "one.parquet", rows)
    two = write_stream(tmp_path / "two.parquet", others)
    mixed = write_stream(tmp_path / "mixed.parquet", rows, dtype="bfloat16")
    clipped = write_stream(tmp_path / "clipped.parquet", rows, rank_clip=50)
    for arguments, reason in [
        ((one,), "at least one REFINED"),
        ((one, two), "no 'problem_id' has a scored row in each of"),
        ((one, one), "named more than once"),
        ((one, mixed), "different students"),
        ((one, clipped), "r_max 100 and 50; choose one with --rank-clip"),
        ((one, two, "--on", "nothing"), "no column 'nothing'"),
        ((one, two, "--quality-column", "nothing"), "no column 'nothing'"),
        ((one, two, "--quality-column", "text"), "expected numbers"),
        ((one, tmp_path / "no.parquet"), "no.parquet"),
    ]:
        refused = run(*arguments, exit_code=2)
        assert reason in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1
