"""Chosen rows are the file's own: every type, bit for bit, whichever library decodes it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsr.jobs.selection import decode
from rsr.jobs.selection.decode import chosen_rows

LEAVES = {
    pa.bool_(): st.booleans(),
    pa.int8(): st.integers(-(2**7), 2**7 - 1),
    pa.uint16(): st.integers(0, 2**16 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float32(): st.floats(width=32),
    pa.float64(): st.floats(),
    pa.string(): st.text(max_size=5),
    pa.large_string(): st.text(max_size=5),
}
OTHERS = (
    pa.null(),
    pa.binary(),
    pa.binary(3),
    pa.date32(),
    pa.time32("s"),
    pa.float16(),
    pa.struct([]),
    pa.dictionary(pa.int8(), pa.string()),
    pa.map_(pa.string(), pa.int32()),
)
"""What Polars may give back as something else; test_filter.py has columns of them."""


def optional(values):
    return st.none() | values


@st.composite
def kinds(draw, leaves, depth=2):
    """A type, and a strategy for values of it."""
    kind, values = draw(st.sampled_from(list(leaves.items())))
    for _ in range(draw(st.integers(0, depth))):
        if draw(st.booleans()):
            kind, values = pa.list_(kind), st.lists(optional(values), max_size=3)
        else:
            other, more = draw(st.sampled_from(list(leaves.items())))
            kind = pa.struct([("a", kind), ("b", other)])
            values = st.fixed_dictionaries({"a": optional(values), "b": optional(more)})
    return kind, values


@st.composite
def tables(draw, leaves):
    num_rows = draw(st.integers(1, 20))
    columns, fields = [], []
    for number in range(draw(st.integers(1, 3))):
        kind, values = draw(kinds(leaves))
        rows = draw(st.lists(optional(values), min_size=num_rows, max_size=num_rows))
        columns.append(pa.array(rows, kind))
        fields.append(pa.field(f"c{number}", kind, metadata={"unit": "nats"}))
    return pa.table(columns, pa.schema(fields, metadata={"made": "here"}))


def bits(table):
    """Told apart: -0.0 and 0.0; taken as equal: NaN and NaN."""
    return repr(table.to_pylist())


def assert_chosen(path, table, mask):
    chosen = pa.Table.from_batches(chosen_rows(str(path), mask), table.schema)
    chosen.validate(full=True)
    assert bits(chosen) == bits(table.take(np.flatnonzero(mask)))


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_chosen_rows_are_the_files_own(tmp_path, data):
    table = data.draw(tables(LEAVES))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table))))
    path = tmp_path / "a [b]*.parquet"
    pq.write_table(table, path, row_group_size=data.draw(st.integers(1, 20)))
    assert_chosen(path, table, mask)


def test_types_that_polars_changes_go_to_pyarrow():
    given_back = [pa.field("", kind) for kind in LEAVES]
    assert all(map(decode._survives_polars, given_back))
    for kind in OTHERS:
        assert not decode._survives_polars(pa.field("", kind))
        assert not decode._survives_polars(pa.field("", pa.list_(kind)))
    strict = pa.struct([pa.field("a", pa.int8(), nullable=False)])
    assert not decode._survives_polars(pa.field("", strict))


@pytest.mark.parametrize("max_polars_bytes", [0, decode.MAX_POLARS_BYTES])
def test_row_groups_are_joined_and_cut(tmp_path, monkeypatch, max_polars_bytes):
    monkeypatch.setattr(decode, "MAX_POLARS_BYTES", max_polars_bytes)
    monkeypatch.setattr(decode, "BATCH_BYTES", 4096)
    dice = np.random.default_rng(0)
    table = pa.table({"n": range(3000), "text": ["x" * (i % 50) for i in range(3000)]})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, row_group_size=70)
    for share in (0.0, 0.001, 0.1, 1.0):
        assert_chosen(path, table, dice.random(3000) < share)


def test_text_that_is_not_utf8_leaves_as_it_came(tmp_path):
    raw = pa.array([b"ok", b"\xff\xfe", b"ok too"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": text}), path)
    (batch,) = chosen_rows(str(path), np.array([True, True, False]))
    assert batch["text"].cast(pa.binary()).to_pylist() == [b"ok", b"\xff\xfe"]
