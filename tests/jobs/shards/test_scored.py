"""How finished shards are opened: what is refused, which rows count, RSR at another r_max."""

import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rsr.engine.metrics import STORED_RANK_CLIPS
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.scored import RANK_CLIP_NAMES, open_scored

NAN = float("nan")


def values(table, expression):
    return table.scan.select(expression.alias("x")).collect(engine="streaming")["x"].to_list()


def test_folder_is_one_table_in_order_of_names(tmp_path, write_scored):
    for name in ("b.parquet", "a/z.parquet", "a.parquet"):
        write_scored(tmp_path / "in" / name, [1.0, 2.0], columns={"from": [name, name]})
    (tmp_path / "in" / ".rsr").mkdir()
    (tmp_path / "in" / ".rsr" / "x.parquet").write_text("not output")
    table = open_scored(str(tmp_path / "in"))
    assert [s.name for s in table.shards] == ["a.parquet", "a/z.parquet", "b.parquet"]
    assert values(table, pl.col("from")) == [s.name for s in table.shards for _ in range(2)]
    assert table.num_rows == 6
    assert len(table.identities) == 1


def test_which_rows_count_as_scored(tmp_path, write_scored):
    path = write_scored(tmp_path / "x.parquet", [1.0, None, NAN, float("inf"), 2.0, 3.0])
    rows = pq.read_table(path)
    status = pa.array(["ok", "no_response", "ok", "ok", "truncated", "bad_messages"])
    pq.write_table(
        rows.set_column(rows.schema.get_field_index("rsr_status"), "rsr_status", status), path
    )
    table = open_scored(str(path))
    assert values(table, table.rsr) == [1.0, None, None, None, 2.0, None]
    assert values(table, table.is_scored) == [True, False, False, False, True, False]


@pytest.mark.parametrize(("said", "factor"), [("50", 0.5), ("200", 2.0), ("500", 5), ("none", 10)])
def test_rsr_at_another_rank_clip(tmp_path, write_scored, said, factor):
    path = write_scored(tmp_path / "x.parquet", [1.5, None, 3.0])
    table = open_scored(str(path), rank_clip=RANK_CLIP_NAMES[said])
    assert values(table, table.rsr) == [1.5 * factor, None, 3.0 * factor]
    assert values(table, table.mean_rank) == [3.0 * factor, None, 6.0 * factor]


def test_the_runs_own_rank_clip_is_the_stored_column_to_the_last_bit(tmp_path, write_scored):
    rsr = [1 / 3, 0.1, 2 / 7]
    path = write_scored(tmp_path / "x.parquet", rsr, num_tokens=[3, 7, 11])
    for rank_clip in (None, "clip_100"):
        table = open_scored(str(path), rank_clip=rank_clip)
        assert values(table, table.rsr) == rsr


def test_a_certain_student_has_no_infinite_score_at_another_rank_clip(tmp_path, write_scored):
    path = write_scored(tmp_path / "x.parquet", [1.0])
    rows = pq.read_table(path)
    place = rows.schema.get_field_index("rsr_mean_surprisal")
    pq.write_table(rows.set_column(place, "rsr_mean_surprisal", pa.array([0.0])), path)
    table = open_scored(str(path), rank_clip="clip_50")
    assert values(table, table.rsr) == [10.0 / 1e-12]


def test_every_stored_clip_can_be_asked_for():
    assert sorted(RANK_CLIP_NAMES.values()) == sorted(STORED_RANK_CLIPS)


def refusal(path, **options):
    with pytest.raises(UsageError) as caught:
        open_scored(str(path), **options)
    return str(caught.value)


def test_nothing_there(tmp_path):
    assert "no such file" in refusal(tmp_path / "x.parquet")
    assert "no file matches" in refusal(tmp_path / "*.parquet")


def test_never_scored(tmp_path):
    pq.write_table(pa.table({"id": [1]}), tmp_path / "x.parquet")
    assert "was never scored" in refusal(tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text("{}\n")
    assert "was never scored" in refusal(tmp_path / "x.jsonl")


def test_only_some_score_columns(tmp_path):
    pq.write_table(pa.table({"rsr": [1.0]}), tmp_path / "x.parquet")
    assert "but not rsr_num_tokens, " in refusal(tmp_path / "x.parquet")


def test_score_column_of_another_type(tmp_path, write_scored):
    path = write_scored(tmp_path / "x.parquet", [1.0])
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(0, "rsr", pa.array(["1.0"])), path)
    assert "column 'rsr' of" in refusal(path)


def test_missing_column_lists_what_there_is(tmp_path, write_scored):
    path = write_scored(tmp_path / "x.parquet", [1.0], columns={"tutor": ["a"]})
    assert "no column 'teacher'; it has: tutor, rsr, " in refusal(path, columns=["teacher"])


def test_different_schemas(tmp_path, write_scored):
    write_scored(tmp_path / "a.parquet", [1.0], columns={"x": pa.array([1], pa.int32())})
    write_scored(tmp_path / "b.parquet", [1.0], columns={"x": pa.array([1], pa.int64())})
    message = refusal(tmp_path)
    assert "different schemas" in message
    assert "'x' (int32)" in message
    assert "'x' (int64)" in message


def test_different_students(tmp_path, write_scored, identity):
    other = identity | {"model": {"config_sha256": "4567"}}
    write_scored(tmp_path / "a.parquet", [1.0])
    write_scored(tmp_path / "b.parquet", [2.0], identity=other)
    assert "config_sha256 is '0123' and '4567'" in refusal(tmp_path)
    assert len(open_scored(str(tmp_path), allow_mixed_students=True).identities) == 2


def test_one_student_from_two_places_is_one_student(tmp_path, write_scored, identity):
    identity["settings"]["model"] = "/elsewhere/student"
    write_scored(tmp_path / "a.parquet", [1.0])
    write_scored(tmp_path / "b.parquet", [2.0], identity=identity)
    assert open_scored(str(tmp_path)).num_rows == 2


def test_different_rank_clips_need_one_to_be_named(tmp_path, write_scored, identity):
    identity["settings"]["rank_clip"] = None
    write_scored(tmp_path / "a.parquet", [1.0])
    write_scored(tmp_path / "b.parquet", [2.0], identity=identity)
    assert "r_max 100 and none" in refusal(tmp_path)
    table = open_scored(str(tmp_path), rank_clip="clip_50")
    assert values(table, table.rsr) == [0.5, 1.0]


def test_metadata_that_is_not_ours(tmp_path, write_scored):
    path = write_scored(tmp_path / "a.parquet", [1.0], identity={"settings": 1})
    assert "not what rsr score writes" in refusal(path)


def test_file_without_metadata_is_accepted(tmp_path, write_scored):
    """Written by another program since: the columns are there, who scored them is not known."""
    path = write_scored(tmp_path / "a.parquet", [1.0], identity=None)
    pl.read_parquet(path).write_parquet(path)
    assert open_scored(str(path)).identities == ()
    assert json.dumps(open_scored(str(path)).identities) == "[]"
