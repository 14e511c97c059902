"""Lists of responses become rows of their own, whatever stands beside them, and nothing is lost."""

import datetime
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsr.jobs.errors import UsageError
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.compare import same_bits
from rsr.jobs.shards.exploded import EXPLODED_KEY, explode_parquet, is_exploded_from
from rsr.jobs.shards.parquet import fingerprint, open_parquet
from rsr.jobs.shards.reader import read_trajectories
from rsr.jobs.shards.shard import Unit, describe_shard
from rsr.jobs.shards.staging import is_staged_from, stage

ROWS = [
    {"problem": "a", "generations": ["1", "2"], "correct": [True, False], "id": 7},
    {"problem": "b", "generations": [], "correct": None, "id": 8},
    {"problem": "c", "generations": None, "correct": [], "id": 9},
    {"problem": "d", "generations": ["3", None, ""], "correct": None, "id": 10},
]
EXPLODED = [
    ("a", "1", True, 7, 0, 0),
    ("a", "2", False, 7, 0, 1),
    ("b", None, None, 8, 1, None),
    ("c", None, None, 9, 2, None),
    ("d", "3", None, 10, 3, 0),
    ("d", None, None, 10, 3, 1),
    ("d", "", None, 10, 3, 2),
]
COLUMNS = ["generations", "correct"]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def exploded(source, columns, **options):
    target = source.with_name("exploded.parquet")
    target.unlink(missing_ok=True)
    stage(str(source), str(target), columns, **options)
    assert is_staged_from(str(target), str(source))
    return pq.read_table(target)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_every_response_is_a_row_with_what_stood_beside_it(tmp_path, suffix):
    table = exploded(write(tmp_path / f"a{suffix}", ROWS), COLUMNS)
    assert [tuple(row.values()) for row in table.to_pylist()] == EXPLODED
    assert table.schema.names == [*ROWS[0], "source_row", "response_index"]
    assert table.schema.field("generations").type == pa.string()


def test_lists_that_are_not_named_stay_whole(tmp_path):
    table = exploded(write(tmp_path / "a.parquet", ROWS), ["generations"])
    assert table["correct"].to_pylist()[:3] == [[True, False], [True, False], None]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("correct", [[True], [True, True, True]])
def test_lists_of_other_lengths_are_refused_by_row(tmp_path, suffix, correct):
    """As nulls they would lose entries, or give one response's to another."""
    rows = [*ROWS, {"problem": "e", "generations": ["5", "6"], "correct": correct, "id": 11}]
    source = write(tmp_path / f"a{suffix}", rows)
    told = f"row 4 of .* has 2 'generations' and {len(correct)} 'correct'; .*--explode-column corr"
    with pytest.raises(UsageError, match=told):
        exploded(source, COLUMNS)
    assert not (tmp_path / "exploded.parquet").exists()
    rows[-1]["generations"] = []
    with pytest.raises(UsageError, match=r"row 4 of .* has 0 'generations'"):
        exploded(write(source, rows), COLUMNS)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"response": ["a"]}, ["generations"], "no column 'generations'; it has: response"),
        ({"response": "a"}, ["response"], "column 'response' of .* is string; expected lists"),
        ({"response": ["a"], "n": 1}, ["response", "n"], "column 'n' of .* is int64; expected li"),
        ({"response": ["a"], "source_row": 1}, ["response"], "has a column 'source_row', which"),
        ({"response": ["a"], "response_index": 1}, ["response"], "a column 'response_index', whi"),
    ],
)
def test_columns_that_are_no_lists_are_refused_by_name(tmp_path, row, columns, message):
    for suffix in (".parquet", ".jsonl"):
        with pytest.raises(UsageError, match=message):
            exploded(write(tmp_path / f"a{suffix}", [row]), columns)


def test_lists_of_messages_and_of_conversations(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    for suffix in (".parquet", ".jsonl"):
        rows = [{"prompt": [user], "completions": [[answer], [answer]], "chats": [[user, answer]]}]
        source = write(tmp_path / f"a{suffix}", rows)
        for column, kind in (("completions", "response"), ("chats", "messages")):
            table = exploded(source, [column])
            columns = choose_columns(table.schema, TrajectoryColumns(**{kind: column}), "f")
            path = str(source.with_name("exploded.parquet"))
            shard = describe_shard(path, "f", columns, None)
            found = read_trajectories(Unit(shard, 0, shard.num_rows), columns)
            assert [getattr(t, kind) for t in found] == rows[0][column]


def test_list_of_responses_is_not_scored_as_it_stands():
    schema = pa.Table.from_pylist([{"prompt": "q", "responses": ["a"]}]).schema
    with pytest.raises(UsageError, match="--explode-responses responses makes a row of each"):
        choose_columns(schema, TrajectoryColumns(response="responses"), "f")


def test_json_values_without_a_common_type_are_read_as_what_they_are(tmp_path):
    rows = [
        {"prompt": "a", "generations": ["1", {"role": "assistant"}]},
        {"prompt": "b", "generations": "2"},
        {"prompt": "c", "generations": None},
    ]
    table = exploded(write(tmp_path / "a.jsonl", rows), ["generations"])
    assert table["source_row"].to_pylist() == [0, 0, 1, 2]
    columns = TrajectoryColumns(prompt="prompt", response="generations")
    shard = describe_shard(str(tmp_path / "exploded.parquet"), "f", columns, None)
    found = read_trajectories(Unit(shard, 0, shard.num_rows), columns)
    assert [row.response for row in found] == ["1", None, "2", None]
    assert found[1].messages == [{"role": "assistant"}]


def test_null_columns_and_lines_that_are_no_objects_keep_their_rows(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"problem": "a", "generations": null}\n17\n')
    table = exploded(source, ["generations"])
    assert table.to_pylist() == [
        {"problem": "a", "generations": None, "source_row": 0, "response_index": None},
        {"problem": None, "generations": None, "source_row": 1, "response_index": None},
    ]


ENTRY_TYPES = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.struct([("text", pa.string())]),
    pa.list_(pa.int64()),
    pa.float64(),
    pa.decimal256(50, 2),
    pa.map_(pa.string(), pa.int64()),
    pa.time32("s"),
    pa.null(),
]
ENTRIES = {
    pa.struct([("text", pa.string())]): {"text": "x"},
    pa.list_(pa.int64()): [1, 2],
    pa.float64(): math.nan,
    pa.decimal256(50, 2): 12,
    pa.map_(pa.string(), pa.int64()): [("k", 1)],
    pa.time32("s"): datetime.time(0, 0, 5),
    pa.null(): None,
}


def lists_of(kind, make):
    entry = ENTRIES.get(kind, "text")
    values = [[entry, None], None, [], [entry, entry, entry]]
    if pa.types.is_fixed_size_list(make(kind)):
        values = [[entry, None], None, [None, None], [entry, entry]]
    return pa.array(values, make(kind)), values


@pytest.mark.parametrize("kind", ENTRY_TYPES, ids=str)
@pytest.mark.parametrize("make", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
def test_entries_and_columns_of_any_type_leave_bit_for_bit(tmp_path, kind, make):
    lists, values = lists_of(kind, make)
    beside = lists_of(kind, pa.list_)[0]
    entries = [v or [None] for v in values]
    table = pa.table({"generations": lists, "kept": beside, "plain": pa.array(range(4))})
    pq.write_table(table, tmp_path / "a.parquet")
    found = exploded(tmp_path / "a.parquet", ["generations"])
    before = pq.read_table(tmp_path / "a.parquet")
    kept = before["kept"].chunk(0)
    entry_type = before.schema.field("generations").type.value_type
    assert found.schema.field("generations").type == entry_type
    assert found.schema.field("kept").equals(before.schema.field("kept"), check_metadata=True)
    rows = [row for row, of_row in enumerate(entries) for _ in of_row]
    assert found["source_row"].to_pylist() == rows
    expected = pa.array([e for of_row in entries for e in of_row], kept.type.value_type)
    assert same_bits(found["generations"].combine_chunks(), expected)
    for number, row in enumerate(rows):
        one = found["kept"].combine_chunks().slice(number, 1)
        assert same_bits(one, kept.slice(row, 1))


@pytest.mark.seconds
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.none() | st.integers(0, 7), max_size=30),
    group=st.integers(1, 9),
    batch_rows=st.integers(1, 8),
    limit=st.none() | st.integers(1, 40),
)
def test_every_entry_comes_out_once_in_order(
    tmp_path, monkeypatch, lengths, group, batch_rows, limit
):
    rows = [
        {"row": row, "generations": None if n is None else [f"{row}.{i}" for i in range(n)]}
        for row, n in enumerate(lengths)
    ]
    schema = pa.schema([("row", pa.int64()), ("generations", pa.list_(pa.string()))])
    source = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), source, row_group_size=group)
    with monkeypatch.context() as patch:
        patch.setattr("rsr.jobs.shards.reader.READ_BATCH_ROWS", batch_rows)
        patch.setattr("rsr.jobs.shards.exploded.READ_BATCH_ROWS", batch_rows)
        found = exploded(source, ["generations"], max_rows=limit)
    expected = [
        (row, entry, row, index)
        for row, of_row in enumerate(r["generations"] for r in rows)
        for index, entry in (list(enumerate(of_row)) if of_row else [(None, None)])
    ]
    assert [tuple(row.values()) for row in found.to_pylist()] == expected[:limit]


def test_file_made_of_another_content_is_told_apart(tmp_path):
    source = write(tmp_path / "a.parquet", ROWS)
    exploded(source, COLUMNS)
    target = str(tmp_path / "exploded.parquet")
    with open_parquet(target) as file:
        assert file.schema_arrow.metadata[EXPLODED_KEY] == fingerprint(str(source)).encode()
    write(source, ROWS[:3])
    assert not is_exploded_from(target, str(source))
    # A file exploded before and exploded again names what it was made of last.
    again = str(tmp_path / "again.parquet")
    rows = pq.read_table(target).drop_columns(["source_row", "response_index"])
    pq.write_table(rows.append_column("lists", pa.array([["x"]] * 7)), tmp_path / "b.parquet")
    explode_parquet(str(tmp_path / "b.parquet"), again, ["lists"])
    assert is_exploded_from(again, str(tmp_path / "b.parquet"))


def test_damaged_file_is_refused_by_name(tmp_path):
    source = tmp_path / "a.parquet"
    pq.write_table(pa.table({"generations": [["x" * 50]] * 500}), source, compression="none")
    content = bytearray(source.read_bytes())
    content[4:400] = b"\xff" * 396
    source.write_bytes(content)
    with pytest.raises(UsageError, match=r"a\.parquet cannot be read"):
        exploded(source, ["generations"])
