"""`rsr select` by passes over shards: the same files as the one-machine command, byte for byte."""

import shutil
from fractions import Fraction

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickled_calls import PickledCalls
from selection_outcome import outcome, passes_of, written

from rsr.jobs.errors import UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.selection import admission, bundles, select_in_passes
from rsr.jobs.selection.candidates import Conditions
from rsr.jobs.selection.select import SelectOptions, run_select
from rsr.jobs.selection.select_in_passes import run_select_in_passes

NAN = float("nan")


REFUSALS = ("none of the", "no selection meets", "no candidate of")

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "rsr": st.sampled_from([None, NAN, 0.0, -0.0, 1.0, 1.0, 2.0]) | st.floats(1, 1.001),
            "teacher": st.sampled_from(["a", "b", "c", None]),
            "source": st.sampled_from([1, 2, None]),
            "problem": st.sampled_from([None, 1, 2, 3, -(2**62), 2**62]),
            "id": st.sampled_from(["x", "y", None]),
            "reward": st.sampled_from([None, NAN, 0.0, 1.0, 2.0]),
            "sample_index": st.sampled_from([None, 0, 1]),
            "correct": st.sampled_from([None, True, False]),
        }
    ),
    min_size=1,
    max_size=40,
)

WAYS = st.one_of(
    st.fixed_dictionaries(
        {
            "max_shares": st.sampled_from(
                [
                    (),
                    (("teacher", Fraction(1, 2)),),
                    (("teacher", Fraction(2, 5)), ("source", Fraction(1, 2))),
                ]
            ),
            "metric": st.sampled_from(["rsr", "perplexity"]),
        }
    ),
    st.fixed_dictionaries({"pick": st.sampled_from(["first", "random"])}),
    st.fixed_dictionaries(
        {
            "quality_column": st.just("reward"),
            "objective": st.sampled_from(["weighted", "pareto", "joint"]),
            "quality_weight": st.none(),
            "max_shares": st.sampled_from([(), (("teacher", Fraction(1, 2)),)]),
        }
    ),
)


@pytest.mark.seconds
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)
@given(
    rows=ROWS,
    cuts=st.lists(st.integers(0, 40), min_size=2, max_size=2).map(sorted),
    keep=st.none() | st.integers(1, 3),
    way=WAYS,
    group_by=st.sampled_from(["problem", "problem text"]),
    has_id=st.booleans(),
    num_parts=st.sampled_from([1, 3]),
    bundle_rows=st.sampled_from([1, 30, 1000]),
    refined_above=st.sampled_from([0, 2, 100]),
)
def test_same_files_as_on_one_machine(
    tmp_path, write_scored, monkeypatch, rows, cuts, keep, way, group_by, has_id, num_parts,
    bundle_rows, refined_above,
):  # fmt: skip
    monkeypatch.setattr(select_in_passes, "MIN_PART_ROWS", max(1, len(rows) // num_parts))
    monkeypatch.setattr(bundles, "MIN_BUNDLE_ROWS", bundle_rows)
    monkeypatch.setattr(admission, "REFINED_ABOVE_ROWS", refined_above)
    for folder in ("in", "one", "many"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    low, high = cuts
    for name, part in zip("cab", (rows[:low], rows[low:high], rows[high:]), strict=True):
        problems = [row["problem"] for row in part]
        columns = {
            "teacher": pa.array([row["teacher"] for row in part], pa.string()),
            "source": pa.array([row["source"] for row in part], pa.int32()),
            "problem": pa.array(problems, pa.int64()),
            "problem text": pa.array([p and f"problem {p}" for p in problems], pa.string()),
            "reward": pa.array([row["reward"] for row in part], pa.float64()),
            "sample_index": pa.array([row["sample_index"] for row in part], pa.int64()),
            "correct": pa.array([row["correct"] for row in part], pa.bool_()),
            "payload": pa.array([str(n) for n in range(len(part))], pa.string()),
        }
        if has_id:
            columns["id"] = pa.array([row["id"] for row in part], pa.string())
        write_scored(
            tmp_path / "in" / f"{name}.parquet", [row["rsr"] for row in part], columns=columns
        )

    def options(output):
        return SelectOptions(
            input=str(tmp_path / "in"),
            output=tmp_path / output,
            group_by=group_by,
            keep=keep,
            **way,
        )

    stop = StopRequest()
    one = outcome(lambda: run_select(options("one"), stop), tmp_path / "one")
    many = outcome(
        lambda: run_select_in_passes(options("many"), PickledCalls(), stop), tmp_path / "many"
    )
    assert many == one
    # What is refused is refused for its rows or its limits, not for how this test writes files.
    assert not isinstance(one, str) or one.startswith(REFUSALS)


@pytest.mark.seconds
@pytest.mark.parametrize("bundle_rows", [1, 3, 100])
@pytest.mark.parametrize("max_shares", [(), (("teacher", Fraction(1)),)])
def test_the_best_row_is_found_at_every_edge_of_shards_and_bundles(
    tmp_path, write_scored, monkeypatch, bundle_rows, max_shares
):
    """Each row of all in turn is the best one: the first and the last of every file among them."""
    monkeypatch.setattr(bundles, "MIN_BUNDLE_ROWS", bundle_rows)
    sizes = [2, 0, 3, 1, 0]
    ends = np.cumsum(sizes)
    for best in range(ends[-1]):
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
            rows = np.arange(end - size, end)
            columns = {
                "problem": pa.array(np.zeros(size), pa.int64()),
                "teacher": pa.array(["a"] * size, pa.string()),
                "row": pa.array(rows, pa.int64()),
            }
            scores = np.where(rows == best, 1.0, 2.0).tolist()
            write_scored(tmp_path / str(best) / f"{number}.parquet", scores, columns=columns)
        options = SelectOptions(
            input=str(tmp_path / str(best)),
            output=tmp_path / f"best {best}",
            group_by="problem",
            max_shares=max_shares,
        )
        run_select_in_passes(options, PickledCalls(), StopRequest())
        kept = pl.read_parquet(tmp_path / f"best {best}" / "*.parquet")
        assert kept["row"].to_list() == [best]


@pytest.fixture
def scored(tmp_path, write_scored):
    rng = np.random.default_rng(5)
    for number in range(3):
        columns = {
            "teacher": rng.choice(["a", "b"], 60),
            "problem": rng.integers(0, 12, 60),
            "reward": rng.integers(0, 5, 60).astype(float),
        }
        write_scored(tmp_path / "in" / f"{number}.parquet", 1 + rng.random(60), columns=columns)
    return tmp_path / "in"


def test_events_name_the_passes_in_their_order(tmp_path, scored):
    options = SelectOptions(
        input=str(scored),
        output=tmp_path / "out",
        group_by="problem",
        max_shares=(("teacher", Fraction(3, 4)),),
    )
    run_select_in_passes(options, PickledCalls(), StopRequest())
    names = dict.fromkeys(name for name, _ in passes_of(tmp_path / "out"))
    assert list(names) == ["gather", "rank", "admit", "choose", "copy", "describe"]


@pytest.mark.parametrize("max_shares", [(), (("teacher", Fraction(1, 2)),)])
def test_ids_are_read_of_groups_whose_rows_tie_and_no_others(
    tmp_path, write_scored, monkeypatch, max_shares
):
    monkeypatch.setattr(bundles, "MIN_BUNDLE_ROWS", 1)
    monkeypatch.setattr(select_in_passes, "MIN_PART_ROWS", 8)
    # The two rows of a problem are in two files; those of one problem tie.
    problems = np.arange(16)
    for number in range(2):
        columns = {
            "problem": problems,
            "teacher": np.where(problems % 3 == number, "a", "b"),
            "id": [f"{(problem + number) % 2} {problem}" for problem in problems],
        }
        scores = 2.0 + problems / 100 + np.where(problems == 5, 0.0, 0.001 * number)
        write_scored(tmp_path / "in" / f"{number}.parquet", scores, columns=columns)

    def options(output):
        return SelectOptions(
            input=str(tmp_path / "in"),
            output=tmp_path / output,
            group_by="problem",
            max_shares=max_shares,
        )

    run_select(options("one"), StopRequest())
    run_select_in_passes(options("many"), PickledCalls(), StopRequest())
    assert written(tmp_path / "many") == written(tmp_path / "one")
    begun = passes_of(tmp_path / "many")
    assert begun[:4] == [("gather", 2), ("rank", 3), ("ids", 2), ("rank", 1)]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"conditions": Conditions(where="rsr <= AVG(rsr)")}, "may look at other rows"),
        ({"group_by": "rsr_mean_rank"}, "--group-by rsr_mean_rank: .* floating-point"),
        ({"max_shares": (("reward", Fraction(1, 2)),)}, "--max-share-per reward: .* floating"),
        (
            {"quality_column": "reward", "objective": "weighted"},
            "one worker would have to rank 180 candidates.*weighted ranks a candidate among all",
        ),
    ],
)
def test_refuses_what_passes_cannot_do(tmp_path, scored, monkeypatch, asked, message):
    monkeypatch.setattr(select_in_passes, "MAX_PART_CANDIDATES", 100)
    options = SelectOptions(
        **{"input": str(scored), "output": tmp_path / "out", "group_by": "problem"} | asked
    )
    with pytest.raises(UsageError, match=message):
        run_select_in_passes(options, PickledCalls(), StopRequest())
    assert not (tmp_path / "out").exists()


def test_one_large_group_sends_no_more_than_can_be_chosen(tmp_path, write_scored):
    """Of a problem with ten thousand candidates every bundle sends the best two."""
    rng = np.random.default_rng(1)
    for number in range(4):
        write_scored(
            tmp_path / "in" / f"{number}.parquet",
            1 + rng.random(2_500),
            columns={"problem": np.zeros(2_500, np.int64)},
        )
    sent = []

    class Counting(PickledCalls):
        def scatter(self, function, items, given, num_pieces):
            for number, answer, pieces in super().scatter(function, items, given, num_pieces):
                if isinstance(answer, tuple) and hasattr(answer[0], "by_part"):
                    sent.append(int(np.sum(answer[0].by_part)))
                yield number, answer, pieces

    options = SelectOptions(
        input=str(tmp_path / "in"), output=tmp_path / "out", group_by="problem", keep=2
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bundles, "MIN_BUNDLE_ROWS", 5_000)
        result = run_select_in_passes(options, Counting(), StopRequest())
    assert sent == [2, 2]
    best = pl.scan_parquet(tmp_path / "in" / "*.parquet").select("rsr").collect()["rsr"].sort()[:2]
    assert result.to_polars()["rsr"].sort().to_list() == best.to_list()
