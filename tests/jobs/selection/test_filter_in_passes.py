"""`rsr filter` by passes over shards: the same files as the one-machine command, byte for byte."""

import json
import os
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsr.jobs.cli import main
from rsr.jobs.cluster.calls import CallsLost, calls_on_cluster
from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.selection import boundaries
from rsr.jobs.selection.candidates import Conditions
from rsr.jobs.selection.filter import FilterOptions, run_filter
from rsr.jobs.selection.filter_in_passes import run_filter_in_passes
from rsr.jobs.selection.own_row import is_of_own_row

NAN = float("nan")


def call_each(function, items):
    """Calls in this process what a cluster would be sent: last item first, arguments pickled."""
    for item in reversed(items):
        sent = pickle.loads(pickle.dumps(function))
        yield item, pickle.loads(pickle.dumps(sent(pickle.loads(pickle.dumps(item)))))


def written(output: Path) -> dict[str, bytes]:
    folder = output / ".rsr" / "kept"
    files = [*output.glob("*.parquet"), *(folder.rglob("*") if folder.exists() else ())]
    return {str(f.relative_to(output)): f.read_bytes() for f in files if f.is_file()}


def outcome(run, output):
    """What a run wrote and told, or why it refused."""
    try:
        result = run()
    except UsageError as error:
        assert not output.exists()
        return str(error)
    told = result.to_json()
    # Sums over shards may differ in the last bit from sums over the table.
    told = json.loads(json.dumps(told, default=str), parse_float=lambda x: f"{float(x):.12g}")
    del told["output"]
    return written(output), told


REFUSALS = ("none of the", "nothing to filter by", "--within says")

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "rsr": st.sampled_from([None, NAN, 0.0, -0.0, 1.0, 1.0, 2.0]) | st.floats(1, 1.001),
            "tokens": st.integers(1, 9),
            "teacher": st.sampled_from(["a", "b", None]),
            "id": st.sampled_from(["x", "y", None]),
        }
    ),
    min_size=1,
    max_size=24,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    rows=ROWS,
    cuts=st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted),
    keep_fraction=st.sampled_from([None, Fraction(1, 5), Fraction(1, 2), Fraction(1)]),
    keep_rows=st.none() | st.integers(1, 6),
    token_budget=st.none() | st.integers(1, 40),
    max_rsr=st.sampled_from([None, 1.0, 1.0005]),
    within=st.sampled_from([None, "teacher"]),
    where=st.sampled_from([None, "teacher <> 'b'"]),
    metric=st.sampled_from(["rsr", "perplexity"]),
    has_id=st.booleans(),
    refined_above=st.sampled_from([0, 3, 100]),
)
def test_same_files_as_on_one_machine(
    tmp_path, write_scored, monkeypatch, rows, cuts, keep_fraction, keep_rows, token_budget,
    max_rsr, within, where, metric, has_id, refined_above,
):  # fmt: skip
    monkeypatch.setattr(boundaries, "REFINED_ABOVE_ROWS", refined_above)
    for folder in ("in", "one", "many"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    low, high = cuts
    for name, part in zip("cab", (rows[:low], rows[low:high], rows[high:]), strict=True):
        columns = {
            "teacher": pa.array([row["teacher"] for row in part], pa.string()),
            "payload": pa.array([str(n) for n in range(len(part))], pa.string()),
        }
        if has_id:
            columns["id"] = pa.array([row["id"] for row in part], pa.string())
        write_scored(
            tmp_path / "in" / f"{name}.parquet",
            [row["rsr"] for row in part],
            num_tokens=[row["tokens"] for row in part],
            columns=columns,
        )

    def options(output):
        return FilterOptions(
            input=str(tmp_path / "in"),
            output=tmp_path / output,
            conditions=Conditions(where=where),
            metric=metric,
            max_rsr=max_rsr if metric == "rsr" else None,
            keep_fraction=keep_fraction,
            keep_rows=keep_rows,
            token_budget=token_budget,
            within=within,
        )

    stop = StopRequest()
    one = outcome(lambda: run_filter(options("one"), stop), tmp_path / "one")
    many = outcome(
        lambda: run_filter_in_passes(options("many"), call_each, stop), tmp_path / "many"
    )
    assert many == one
    # What is refused is refused for its rows or its limits, not for how this test writes files.
    assert not isinstance(one, str) or one.startswith(REFUSALS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a > 1 AND t IN ('x', 'y')", True),
        ("LOWER(t) LIKE 'a%' OR NOT (t IS NULL)", True),
        ("COALESCE(a, 2) BETWEEN 1 AND 3", True),
        ("CASE WHEN a > 1 THEN TRUE ELSE b END", True),
        ("a <= AVG(a)", False),
        ("a > COUNT(*)", False),
        ("a <= MAX(a) OVER (PARTITION BY t)", False),
        ("ROW_NUMBER() OVER () < 3", False),
        ("a = FIRST(a)", False),
    ],
)
def test_which_expressions_look_at_their_own_row(text, expected):
    assert is_of_own_row(pl.sql_expr(text)) is expected


@pytest.fixture
def scored(tmp_path, write_scored):
    rng = np.random.default_rng(5)
    for number in range(4):
        rsr = rng.choice([1.0, 1.5, 2.0, 2.5, 3.0], 50) + rng.choice([0.0, 1e-9], 50)
        columns = {"teacher": rng.choice(["a", "b"], 50), "payload": np.arange(50)}
        write_scored(tmp_path / "in" / f"{number}.parquet", rsr, columns=columns)
    return tmp_path / "in"


def test_goes_on_where_a_pass_was_stopped(tmp_path, scored):
    def options(output):
        return FilterOptions(
            input=str(scored), output=tmp_path / output, keep_fraction=Fraction(1, 3)
        )

    run_filter(options("one"), StopRequest())

    def stopping_after(num_calls):
        left = iter(range(num_calls))

        def stopping(function, items):
            for answer in call_each(function, items):
                if next(left, None) is None:
                    raise Interrupted
                yield answer

        return stopping

    num_stops = 0
    while True:
        try:
            run_filter_in_passes(options("many"), stopping_after(num_stops), StopRequest())
        except Interrupted:
            num_stops += 1
        else:
            break
    # Four passes of four shards each, and the description of what was written.
    assert num_stops == 5 * 4
    assert written(tmp_path / "many") == written(tmp_path / "one")


def test_a_link_keeps_its_name(tmp_path, scored):
    """As one machine names its output."""
    (tmp_path / "latest.parquet").symlink_to(scored / "0.parquet")

    def options(output):
        source = str(tmp_path / "latest.parquet")
        return FilterOptions(input=source, output=tmp_path / output, keep_rows=3)

    run_filter(options("one"), StopRequest())
    run_filter_in_passes(options("many"), call_each, StopRequest())
    assert "latest.parquet" in written(tmp_path / "many")
    assert written(tmp_path / "many") == written(tmp_path / "one")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"conditions": Conditions(where="CAST(teacher AS BIGINT) > 3")}, "cannot be read"),
        ({"conditions": Conditions(where="rsr <= AVG(rsr)")}, "may look at other rows"),
        ({"within": "rsr_mean_rank", "keep_rows": 1}, "floating-point"),
    ],
)
def test_refuses_what_passes_cannot_do(tmp_path, scored, asked, message):
    options = FilterOptions(input=str(scored), output=tmp_path / "out", **asked)
    with pytest.raises(UsageError, match=message):
        run_filter_in_passes(options, call_each, StopRequest())
    assert not (tmp_path / "out").exists()


def test_a_machine_that_sees_another_output_is_refused(tmp_path, scored):
    """What it would write to a folder of its own under that name would be lost."""

    def elsewhere(function, items):
        for probe in (tmp_path / "out").rglob(".probe-*"):
            probe.unlink()
        yield from call_each(function, items)

    options = FilterOptions(input=str(scored), output=tmp_path / "out", keep_rows=3)
    with pytest.raises(UsageError, match="every machine of the cluster must see the same files"):
        run_filter_in_passes(options, elsewhere, StopRequest())
    assert not list((tmp_path / "out").glob("*.parquet"))


@pytest.mark.ray
def test_on_a_ray_cluster(tmp_path, scored):
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        limits = ["--keep-fraction", "0.3", "--within", "teacher"]
        for output, more in (("one", []), ("many", ["--address", cluster.address])):
            arguments = ["filter", str(scored), str(tmp_path / output), *limits, *more]
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, result.output
        with (
            calls_on_cluster(cluster.address, StopRequest()) as call,
            pytest.raises(CallsLost, match="a worker was lost 4 times over 7"),
        ):
            # As a shard does that takes more memory than there is.
            list(call(os._exit, [7]))
    finally:
        cluster.shutdown()
    assert written(tmp_path / "many") == written(tmp_path / "one")
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "many"), "--deep"]).exit_code == 0
