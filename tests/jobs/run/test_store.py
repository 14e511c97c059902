"""Input columns leave as they came, whatever their type, and files are whole or absent."""

import datetime
import decimal
import json
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsr.engine.metrics import TrajectoryScore, score_tokens
from rsr.engine.trajectory import Status, TokenScores
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.store import ChangedInputError, IncompleteShardError, RunStore, exact_cover
from rsr.jobs.scoring.commit import commit_scored_shard
from rsr.jobs.shards import score_columns
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.score_columns import Summary
from rsr.jobs.shards.shard import Shard, Unit, cut_units, describe_shard
from rsr.jobs.shards.writer import METADATA_KEY
from rsr.jobs.storage.atomic import atomic_path

IDENTITY = Identity({"token_scores": False})

ODD_COLUMNS = {
    "text": pa.array(["a", None, "c"]),
    "id": pa.array(["same", "same", "same"]),
    "large": pa.array(["a", None, "c"], pa.large_string()),
    "binary": pa.array([b"\xff\x00", None, b""], pa.binary()),
    "fixed": pa.array([b"ab", None, b"cd"], pa.binary(2)),
    "decimal": pa.array(
        [decimal.Decimal("1.23"), None, decimal.Decimal("-4")], pa.decimal128(9, 2)
    ),
    "wide": pa.array([decimal.Decimal("1.23"), None, None], pa.decimal256(60, 2)),
    "category": pa.array(["x", None, "x"]).dictionary_encode(),
    "zoned": pa.array(
        [datetime.datetime(2024, 5, 1), None, None], pa.timestamp("us", "Asia/Tokyo")
    ),
    "date": pa.array([datetime.date(2024, 5, 1), None, None]),
    "clock": pa.array([1, None, 2], pa.time32("ms")),
    "span": pa.array([1, None, 2], pa.duration("s")),
    "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
    "pair": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int16(), 2)),
    "nested": pa.array([{"a": [None, {"b": 1}]}, None, {"a": []}]),
    "half": pa.array(np.array([1.5, np.nan, -0.0], np.float16)),
    "double": pa.array([float("nan"), None, -0.0]),
    "nothing": pa.nulls(3),
    "flag": pa.array([True, None, False]),
    "a.dotted name": pa.array([1, 2, 3], pa.uint8()),
}


def score(number: float = 1.0) -> TrajectoryScore:
    tokens = TokenScores(
        token_ids=np.array([5, 6], np.int32),
        ranks=np.array([1, 400], np.int32),
        logprobs=np.array([-number, -2.0], np.float32),
        entropies=np.array([0.1, 0.2], np.float32),
    )
    return score_tokens(tokens, keep_tokens=True)


def commit(tmp_path, table, scores, *, token_columns=False, **write_options):
    source = tmp_path / "in.parquet"
    pq.write_table(table, source, **write_options)
    identity = Identity({"token_scores": token_columns})
    store = RunStore.of(RunFolder(tmp_path / "out"), identity)
    shard = describe_shard(str(source), "in.parquet", TrajectoryColumns(text="text"), None)
    units = cut_units(shard, max_rows=2, max_bytes=1 << 20)
    for unit in units:
        part = score_columns.to_frame(scores[unit.start : unit.stop], token_columns=token_columns)
        store.commit_unit(unit, part, Summary.of(part))
    commit_scored_shard(store, shard)
    return store, shard, pq.read_table(store.folder.root / shard.name)


def keep(store, unit, scores):
    frame = score_columns.to_frame(scores, token_columns=False)
    store.commit_unit(unit, frame, Summary.of(frame))


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_odd_columns_pass_through_bit_for_bit(tmp_path, row_group_size):
    fields = [
        pa.field(name, array.type, metadata={"unit": "odd"}) for name, array in ODD_COLUMNS.items()
    ]
    schema = pa.schema(fields, metadata={"source": "test"})
    table = pa.Table.from_arrays(list(ODD_COLUMNS.values()), schema=schema)
    scores = [score(1.0), TrajectoryScore(Status.NO_RESPONSE), score(3.0)]
    _, _, result = commit(tmp_path, table, scores, row_group_size=row_group_size)
    before = pq.read_table(tmp_path / "in.parquet")
    kept = result.select(before.schema.names)
    assert kept.schema.equals(before.schema.remove_metadata(), check_metadata=False)
    assert [f.metadata for f in kept.schema] == [f.metadata for f in before.schema]
    assert result.schema.metadata[b"source"] == b"test"
    assert json.loads(result.schema.metadata[METADATA_KEY])["settings"] == {"token_scores": False}
    for name in before.schema.names:
        old, new = before[name].combine_chunks(), kept[name].combine_chunks()
        if pa.types.is_floating(old.type):
            # Bits, not values: NaN is itself, and -0.0 is not 0.0.
            assert old.is_null().equals(new.is_null())
            assert old.fill_null(0).to_numpy().tobytes() == new.fill_null(0).to_numpy().tobytes()
        else:
            assert old.to_pylist() == new.to_pylist(), name
    assert result["rsr"].to_pylist() == [scores[0].rsr, None, scores[2].rsr]
    assert result["rsr_status"].to_pylist() == ["ok", "no_response", "ok"]
    assert result["rsr_rank_sums"].to_pylist()[:2] == [
        {"clip_50": 51, "clip_100": 101, "clip_200": 201, "clip_500": 401, "unclipped": 401},
        None,
    ]


@pytest.mark.parametrize("num_rows", [0, 1])
def test_tables_of_no_row_and_of_one(tmp_path, num_rows):
    table = pa.table({"text": ["a"][:num_rows], "n": pa.array([7][:num_rows], pa.int8())})
    _, _, result = commit(tmp_path, table, [score()] * num_rows)
    assert result.num_rows == num_rows
    assert result.schema.names[:2] == ["text", "n"]
    assert result.schema.field("rsr_rank_sums").type == score_columns.ROW_COLUMNS[5].arrow_type


def test_earlier_score_columns_are_replaced(tmp_path):
    table = pa.table({"rsr": ["old"], "text": ["a"], "rsr_token_ids": [["old"]]})
    _, _, result = commit(tmp_path, table, [score()])
    assert result.schema.names == ["text"] + [c.name for c in score_columns.ROW_COLUMNS]


def test_token_columns_hold_what_the_means_are_made_of(tmp_path):
    scores = [score(), TrajectoryScore(Status.TOO_LONG)]
    _, _, result = commit(tmp_path, pa.table({"text": ["a", "b"]}), scores, token_columns=True)
    assert result["rsr_token_ids"].to_pylist() == [[5, 6], None]
    assert result["rsr_token_ranks"].to_pylist() == [[1, 400], None]
    assert result["rsr_token_logprobs"].to_pylist() == [[-1.0, -2.0], None]


def test_output_is_readable_by_polars(tmp_path):
    commit(tmp_path, pa.table({"text": ["a", "b"]}), [score(), score()])
    frame = pl.scan_parquet(f"{tmp_path}/out/**/*.parquet").collect()
    assert frame["rsr_num_tokens"].to_list() == [2, 2]


def test_receipt_is_trusted_only_while_the_output_is_the_one_it_was_for(tmp_path):
    store, shard, _ = commit(tmp_path, pa.table({"text": ["a", "b"]}), [score(), score(3.0)])
    file = store.folder.root / shard.name
    assert store.read_receipt(shard).summary == Summary.of(pl.read_parquet(file))
    assert not (store.folder.root / store.folder.units_folder(shard.name)).exists()
    whole = file.read_bytes()
    for damaged in (whole[:-20], whole[:100] + b"x" + whole[101:]):
        file.write_bytes(damaged)
        assert store.read_receipt(shard) is None
    # A copy has another time of writing, and the same content.
    file.write_bytes(whole)
    assert store.read_receipt(shard) is not None
    assert replace(store, digest="other").read_receipt(shard) is None
    assert store.read_receipt(replace(shard, fingerprint="other")) is None
    file.unlink()
    assert store.read_receipt(shard) is None


def test_torn_or_altered_receipt_is_none(tmp_path):
    store, shard, _ = commit(tmp_path, pa.table({"text": ["a", "b"]}), [score(), score(3.0)])
    path = store.folder.root / store.folder.receipt_name(shard.name)
    whole, receipt = path.read_bytes(), store.read_receipt(shard)
    assert receipt is not None
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        assert store.read_receipt(shard) is None
    for position in range(len(whole) - 1):
        path.write_bytes(whole[:position] + b"7" + whole[position + 1 :])
        # A digit may be beyond what a float holds; nothing else goes unnoticed.
        assert store.read_receipt(shard) in (None, receipt)
    assert store.read_receipt(shard) is None


def test_damaged_unit_is_not_trusted(tmp_path):
    store, shard, _ = commit(tmp_path, pa.table({"text": ["a", "b"]}), [score(), score()])
    (unit,) = cut_units(shard, max_rows=2, max_bytes=1 << 20)
    keep(store, unit, [score()] * 2)
    assert len(store.read_unit(unit)) == 2
    path = store.folder.root / store.unit_name(unit)
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-9], whole[:-9] + b"x" + whole[-8:], whole + b"x"):
        path.write_bytes(damaged)
        assert store.read_unit(unit) is None
        assert store.kept_units(shard) == []
    path.write_bytes(whole)
    assert replace(store, digest="other").read_unit(unit) is None


def test_scores_are_not_written_beside_rows_they_are_not_of(tmp_path):
    store, shard, _ = commit(tmp_path, pa.table({"text": ["a", "b"]}), [score(), score()])
    (unit,) = cut_units(shard, max_rows=2, max_bytes=1 << 20)
    keep(store, unit, [score()] * 2)
    pq.write_table(pa.table({"text": ["b", "a"]}), shard.path)
    with pytest.raises(ChangedInputError):
        commit_scored_shard(store, shard)


def test_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "deep" / "file"

    def fail_half_way():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert list(target.parent.iterdir()) == []
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_shard_is_written_from_units_however_they_were_cut(tmp_path):
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": list("abcdef")}), source)
    store = RunStore.of(RunFolder(tmp_path / "out"), IDENTITY)
    shard = describe_shard(str(source), "in.parquet", TrajectoryColumns(text="text"), None)
    scores = [score(1.0 + row) for row in range(6)]

    def keep_rows(start, stop):
        keep(store, Unit(shard, start, stop), scores[start:stop])

    # A unit of four that was halved, a half that was scored whole after all, a late neighbour.
    for start, stop in ((2, 4), (0, 2), (0, 3), (5, 6)):
        keep_rows(start, stop)
    kept = [unit for unit, _ in store.kept_units(shard)]
    assert [(u.start, u.stop) for u in kept] == [(0, 3), (5, 6)]
    rest = cut_units(shard, max_rows=10, max_bytes=1 << 20, kept=kept)
    assert [(u.start, u.stop) for u in rest] == [(3, 5)]
    with pytest.raises(IncompleteShardError):
        commit_scored_shard(store, shard)
    assert not (store.folder.root / shard.name).exists()
    keep_rows(4, 5)
    commit_scored_shard(store, shard)
    written = pq.read_table(store.folder.root / shard.name)
    assert written["text"].to_pylist() == list("abcdef")
    assert written["rsr"].to_pylist() == [s.rsr for s in scores]


def test_half_written_file_of_a_killed_process_is_not_a_unit_and_is_swept_up(tmp_path):
    store, shard, _ = commit(tmp_path, pa.table({"text": ["a", "b"]}), [score(), score()])
    (unit,) = cut_units(shard, max_rows=2, max_bytes=1 << 20)
    with atomic_path(store.folder.root / store.unit_name(unit)) as temporary:
        temporary.write_bytes(b"half")
        # As another process would have named its own, had it been killed here.
        left = temporary.with_name(temporary.name.replace(temporary.name[-16:], "0badc0de.rsr-tmp"))
        shutil.copy(temporary, left)
    (store.folder.root / store.unit_name(unit)).unlink()
    assert store.kept_units(shard) == []
    store.folder.storage.remove_leftovers()
    assert not left.exists()
    assert store.read_receipt(shard) is not None


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 4)), max_size=12), st.integers(0, 8))
def test_a_cover_is_found_if_there_is_one(ranges, num_rows):
    shard = Shard("p", "n", num_rows, 0, "f")
    units = [Unit(shard, start, start + length) for start, length in ranges]
    reachable = {0}
    for _ in range(num_rows):
        reachable |= {u.stop for u in units if u.start in reachable}
    cover = exact_cover(units, num_rows)
    assert (cover is not None) == (num_rows in reachable)
    if cover is not None:
        assert [r for u in cover for r in range(u.start, u.stop)] == list(range(num_rows))
