import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.shards.parquet import RowGroup
from rsr.jobs.shards.reader import TrajectoryReader, iter_rows, read_trajectories
from rsr.jobs.shards.shard import (
    UNIT_RULES,
    Shard,
    Unit,
    cut_units,
    describe_shard,
    unit_limits,
)

MESSAGES = TrajectoryColumns(messages="messages")
TEXT = TrajectoryColumns(text="text")


def write_table(path, columns, row_group_size=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def read_all(path, columns):
    shard = describe_shard(str(path), path.name, columns, None)
    return read_trajectories(Unit(shard, 0, shard.num_rows), columns)


def test_file_folder_and_glob_name_their_outputs(tmp_path):
    for name in ("a.parquet", "deep/b.parquet", "_skipped/c.parquet", ".hidden/d.parquet"):
        write_table(tmp_path / name, {"text": ["x"]})
    assert [n for _, n in find_inputs(str(tmp_path / "a.parquet"))] == ["a.parquet"]
    assert [n for _, n in find_inputs(str(tmp_path))] == ["a.parquet", "deep/b.parquet"]
    assert [n for _, n in find_inputs(f"{tmp_path}/deep/*.parquet")] == ["b.parquet"]
    assert [n for _, n in find_inputs(f"{tmp_path}/de*/*.parquet")] == ["deep/b.parquet"]


@pytest.mark.parametrize(
    ("make", "pattern", "message"),
    [
        ([], "nowhere", "no such file or folder"),
        ([], "*.parquet", "no file matches"),
        ([], ".", "holds no Parquet"),
        (["a.csv"], "a.csv", r"expected a file named \.parquet"),
        (["a.parquet", "b.jsonl"], "", "holds both Parquet"),
        (["a.json", "a.jsonl"], "", "would both become a.parquet"),
    ],
)
def test_what_cannot_be_input_is_refused(tmp_path, make, pattern, message):
    for name in make:
        (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match=message):
        find_inputs(str(tmp_path / pattern))


def test_columns_are_found_or_the_ones_there_are_named():
    chat = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    schema = pa.schema([("messages", chat), ("text", pa.string()), ("n", pa.int64())])
    assert choose_columns(schema, TrajectoryColumns(), "f") == MESSAGES
    assert choose_columns(schema, TEXT, "f") == TEXT
    assert choose_columns(schema.remove(0), TrajectoryColumns(), "f") == TEXT
    with pytest.raises(UsageError, match="no column 'chat'; it has: messages, text, n"):
        choose_columns(schema, TrajectoryColumns(messages="chat"), "f")
    with pytest.raises(UsageError, match="column 'n' of f is int64; expected a string"):
        choose_columns(schema, TrajectoryColumns(text="n"), "f")
    with pytest.raises(UsageError, match="it has: n"):
        choose_columns(schema.remove(0).remove(0), TrajectoryColumns(), "f")


@given(
    st.integers(0, 200),
    st.integers(1, 50),
    st.integers(1, 3000),
    st.integers(0, 10_000),
)
def test_units_cover_every_row_once_in_order(num_rows, max_rows, max_bytes, num_bytes):
    shard = Shard("p", "n", num_rows, num_bytes, "f")
    units = cut_units(shard, max_rows=max_rows, max_bytes=max_bytes)
    assert [r for u in units for r in range(u.start, u.stop)] == list(range(num_rows))
    assert all(1 <= u.num_rows <= max_rows for u in units)


@given(st.data())
def test_any_slice_of_rows_is_read_over_any_row_groups(tmp_path_factory, data):
    num_rows = data.draw(st.integers(1, 40))
    path = tmp_path_factory.mktemp("slices") / "a.parquet"
    write_table(path, {"i": list(range(num_rows))}, data.draw(st.integers(1, 50)))
    start = data.draw(st.integers(0, num_rows))
    stop = data.draw(st.integers(start, num_rows))
    read = [i for batch in iter_rows(str(path), start, stop) for i in batch["i"].to_pylist()]
    assert read == list(range(start, stop))


def test_messages_are_read_from_structs_and_from_json_text(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    structs = write_table(tmp_path / "structs.parquet", {"messages": [messages, None]})
    texts = write_table(tmp_path / "texts.parquet", {"messages": [json.dumps(messages), None]})
    items = write_table(
        tmp_path / "items.parquet", {"messages": [[*map(json.dumps, messages)], None]}
    )
    for path in (structs, texts, items):
        assert read_all(path, MESSAGES) == [Trajectory(messages=messages), Trajectory()]


def test_invalid_utf8_costs_its_own_row_alone(tmp_path):
    bytes_ = pa.array([b"fine", b"\xff\xfe", b"too"], pa.binary())
    table = pa.table({"text": bytes_.view(pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_all(tmp_path / "a.parquet", TEXT) == [
        Trajectory(text="fine"),
        Trajectory(),
        Trajectory(text="too"),
    ]


def test_json_lines_keep_every_line_and_every_key(tmp_path):
    source = tmp_path / "a.jsonl"
    rows = [
        {"messages": [{"role": "assistant", "content": "ok"}], "n": 1},
        {"messages": [{"role": "assistant", "content": ["parts"]}], "extra": {"deep": [1]}},
        {"messages": [{"role": "assistant", "content": "\ud800"}], "n": 2.5},
    ]
    lines = [json.dumps(row) for row in rows]
    source.write_text("\n".join([lines[0], "{broken", *lines[1:], ""]))
    stage_json(source, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["n"].to_pylist() == [1, None, None, 2.5]
    assert table["extra"].to_pylist() == [None, None, {"deep": [1]}, None]
    read = read_all(tmp_path / "a.parquet", MESSAGES)
    assert [t.messages for t in read] == [rows[0]["messages"], None] + [
        row["messages"] for row in rows[1:]
    ]


def test_column_means_the_same_in_every_chunk_of_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr("rsr.jobs.shards.json_input.CHUNK_BYTES", 40)
    rows = [{"n": i, "s": f"s{i}", "mixed": f"m{i}", "deep": [{"a": i}]} for i in range(20)]
    rows[15] = {"n": 0.5, "s": None, "mixed": 7, "deep": [{"b": "x"}], "late": True}
    rows[17]["s"] = "\ud800"
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    stage_json(source, tmp_path / "a.parquet")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table["n"].to_pylist() == [float(row["n"]) for row in rows]
    for name in ("s", "mixed"):
        # No common type in the file as a whole: JSON text from the first row on.
        texts = [None if (value := row[name]) is None else json.dumps(value) for row in rows]
        assert table[name].to_pylist() == texts
    assert table["deep"].to_pylist()[14:16] == [[{"a": 14, "b": None}], [{"a": None, "b": "x"}]]
    assert table["late"].to_pylist() == [None] * 15 + [True] + [None] * 4


def test_json_list_is_read_and_other_json_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}]))
    stage_json(tmp_path / "a.json", tmp_path / "a.parquet")
    assert [t.text for t in read_all(tmp_path / "a.parquet", TEXT)] == ["one", "two"]
    for content, message in (('{"text": "one"}', "expected a list"), ("[", "is not JSON")):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(UsageError, match=message):
            stage_json(tmp_path / "b.json", tmp_path / "b.parquet")
        assert not (tmp_path / "b.parquet").exists()


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2000)), max_size=12),
    st.integers(1, 40),
    st.integers(1, 3000),
    st.data(),
)
@example([(1, 0), (2, 0)], 3, 1, None)
def test_unit_is_whole_row_groups_or_part_of_one(sizes, max_rows, max_bytes, data):
    groups = [RowGroup(num_rows, num_bytes) for num_rows, num_bytes in sizes]
    num_rows = sum(group.num_rows for group in groups)
    shard = Shard("p", "n", num_rows, sum(group.num_bytes for group in groups), "f")
    edges = sorted(data.draw(st.sets(st.integers(0, num_rows), max_size=4))) if data else []
    kept = [Unit(shard, a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    units = cut_units(shard, max_rows=max_rows, max_bytes=max_bytes, kept=kept, groups=groups)
    rows = [row for unit in [*kept, *units] for row in range(unit.start, unit.stop)]
    assert sorted(rows) == list(range(num_rows))
    starts = [sum(group.num_rows for group in groups[:n]) for n in range(len(groups) + 1)]
    gap_edges = {0, num_rows, *(u.start for u in kept), *(u.stop for u in kept)}
    for unit in units:
        assert unit.num_rows <= max_rows
        inside = [start for start in starts if unit.start < start < unit.stop]
        if inside:
            # More than one row group: all of each, but where a kept unit cuts in.
            assert {unit.start, unit.stop} <= {*starts, *gap_edges}


@pytest.mark.seconds
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2000)), max_size=12),
    st.integers(1, 40),
    st.integers(1, 3000),
    st.data(),
)
def test_what_is_kept_moves_no_border_of_the_other_units(sizes, max_rows, max_bytes, data):
    groups = [RowGroup(num_rows, num_bytes) for num_rows, num_bytes in sizes]
    num_rows = sum(group.num_rows for group in groups)
    shard = Shard("p", "n", num_rows, sum(group.num_bytes for group in groups), "f")
    whole = cut_units(shard, max_rows=max_rows, max_bytes=max_bytes, groups=groups)
    kept = [unit for unit in whole if data.draw(st.booleans())]
    rest = cut_units(shard, max_rows=max_rows, max_bytes=max_bytes, kept=kept, groups=groups)
    assert rest == [unit for unit in whole if unit not in kept]


def cut_for(num_places, num_rows, row_bytes, device="gpu"):
    """The units of one file without row groups, for a run that begins with so many workers."""
    limits = unit_limits(num_rows, num_rows * row_bytes, num_places, device)
    shard = Shard("p", "n", num_rows, num_rows * row_bytes, "f")
    return cut_units(shard, max_rows=limits.max_rows, max_bytes=limits.max_bytes)


@pytest.mark.parametrize(
    ("num_rows", "row_bytes", "num_places", "device", "least_units_per_place"),
    [
        # 5,000 trajectories of 12,000 tokens.
        pytest.param(5_000, 48_000, 64, "gpu", 15, id="long rows on many GPUs"),
        pytest.param(5_000, 400, 8, "gpu", 8, id="few short rows"),
        pytest.param(1_000_000, 400, 64, "gpu", 20, id="many short rows"),
        pytest.param(400, 400, 1, "cpu", 10, id="one machine without GPUs"),
    ],
)
def test_places_get_enough_units(num_rows, row_bytes, num_places, device, least_units_per_place):
    units = cut_for(num_places, num_rows, row_bytes, device)
    assert len(units) >= least_units_per_place * num_places


def test_run_that_began_on_one_gpu_has_enough_units_for_many_more():
    assert len(cut_for(1, 5_000, 48_000)) >= 3 * 64


@given(
    st.integers(0, 10**9),
    st.integers(0, 10**13),
    st.integers(0, 10**5),
    st.sampled_from(sorted(UNIT_RULES)),
)
def test_limits_stay_between_those_of_the_device(num_rows, num_bytes, num_places, device):
    rule, limits = UNIT_RULES[device], unit_limits(num_rows, num_bytes, num_places, device)
    assert rule.min_rows <= limits.max_rows <= rule.max_rows
    assert rule.min_bytes <= limits.max_bytes <= rule.max_bytes
    more = unit_limits(num_rows, num_bytes, num_places + 1, device)
    assert more.max_rows <= limits.max_rows
    assert more.max_bytes <= limits.max_bytes


def test_row_group_is_decoded_once_however_many_units_it_is_cut_into(tmp_path, monkeypatch):
    path = write_table(tmp_path / "a.parquet", {"text": [f"row {i}" for i in range(1000)]}, 600)
    decoded = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self, *arguments, **options):
        for batch in iter_batches(self, *arguments, **options):
            decoded.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    shard = describe_shard(str(path), "a.parquet", TEXT, None)
    reader = TrajectoryReader(TEXT)
    for start in range(0, 1000, 7):
        unit = Unit(shard, start, min(start + 7, 1000))
        assert [t.text for t in reader.read(unit)] == [f"row {i}" for i in range(start, unit.stop)]
    assert sum(decoded) == 1000
    # A unit that is given out again is read again, and nothing else is.
    assert [t.text for t in reader.read(Unit(shard, 601, 603))] == ["row 601", "row 602"]
    assert sum(decoded) <= 1400
