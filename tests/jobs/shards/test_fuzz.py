"""Damaged files and odd messages through the public doors: no crash, no hang, no lost neighbour.

`RSR_FUZZ_CASES=100000 pytest tests/jobs/shards/test_fuzz.py` looks longer than the suite does.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from soak_disk import small_disk

from rsr.engine.chat import TrajectoryEncoder
from rsr.engine.trajectory import Status, Trajectory
from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import read_trajectories
from rsr.jobs.shards.shard import Unit, describe_shard

pytestmark = pytest.mark.slow

NUM_CASES = int(os.environ.get("RSR_FUZZ_CASES", "2000"))
MOST_CPU_S = 10.0
"""Of one case, which is not slower where other programs take the cores."""
GOOD = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}]
READ_ERRORS = (OSError, pa.ArrowException)
"""What reading rows may raise in a worker, where it costs that file alone. Before a run only
`UsageError` may be: one line, exit code 2."""


@pytest.fixture(scope="module")
def memory(tmp_path_factory) -> Iterator[Path]:
    """A folder in memory, where one can be had: thousands of small files wait for a disk."""
    with small_disk(tmp_path_factory.mktemp("fuzz") / "memory", size_mib=512) as disk:
        yield disk.folder


@pytest.fixture
def folder(memory) -> Path:
    """An empty one in memory."""
    return new_folder(memory)


def new_folder(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=parent))


@contextmanager
def little_cpu() -> Iterator[None]:
    """Fails where the block takes as long as no case should, on a machine that is busy or not."""
    started = time.process_time()
    try:
        yield
    finally:
        assert time.process_time() - started < MOST_CPU_S


def mutate(content: bytes, chance: random.Random) -> bytes:
    """Some damage of the kinds that disks, networks and editors do."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0:
            del data[at:]
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 2:
            data[at : at + chance.randrange(64)] = chance.randbytes(chance.randrange(64))
        elif kind == 3:
            del data[at : at + chance.randrange(1, 200)]
        elif kind == 4:
            data[at:at] = data[at : at + chance.randrange(1, 200)]
        elif kind == 5:
            data[at : at + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
        else:
            # The footer, where the lengths and offsets are.
            at = max(0, len(data) - chance.randrange(1, 400))
            data[at : at + 1] = chance.randbytes(1)
        if not data:
            break
    return bytes(data)


def read_like_a_run(path: Path, folder: Path) -> int:
    """The way of a file into a worker; returns its rows. Raises `UsageError` at most."""
    ((file, name),) = find_inputs(str(path))
    if not file.endswith(".parquet"):
        stage_json(file, folder / "staged.parquet")
        file = str(folder / "staged.parquet")
    columns = choose_columns(open_parquet(file).schema_arrow, TrajectoryColumns(), file)
    shard = describe_shard(file, name, columns, None)
    try:
        rows = read_trajectories(Unit(shard, 0, shard.num_rows), columns)
    except READ_ERRORS as error:
        raise UsageError(str(error)) from error
    assert len(rows) == shard.num_rows, "every row the footer names is there"
    return len(rows)


def parquet_seeds(folder: Path) -> list[bytes]:
    tables = [
        (pa.table({"messages": [GOOD] * 20, "id": range(20)}), {"row_group_size": 6}),
        (pa.table({"prompt": ["q"] * 30, "response": ["a" * i for i in range(30)]}), {}),
        (pa.table({"text": pa.array(["t"] * 9).dictionary_encode()}), {"compression": "zstd"}),
        (pa.table({"text": ["x" * 500] * 9, "n": [None] * 9}), {"compression": "none"}),
    ]
    seeds = []
    for number, (table, options) in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", **options)
        seeds.append((folder / f"{number}.parquet").read_bytes())
    return seeds


def json_seeds() -> list[bytes]:
    rows = [{"messages": GOOD, "id": i, "extra": {"deep": [i, None]}} for i in range(12)]
    texts = [{"prompt": "q", "response": "a\u2028b", "x": 1.5 * i} for i in range(12)]
    return ["\n".join(map(json.dumps, lines)).encode() for lines in (rows, texts)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json"])
def test_damaged_file_is_read_or_refused(folder, suffix):
    chance = random.Random(suffix)
    seeds = parquet_seeds(folder) if suffix == ".parquet" else json_seeds()
    if suffix == ".json":
        seeds = [b"[" + seed.replace(b"\n", b",") + b"]" for seed in seeds]
    path = folder / f"damaged{suffix}"
    num_cases = NUM_CASES if suffix == ".parquet" else NUM_CASES // 2
    num_read = num_refused = 0
    for _ in range(num_cases):
        content = mutate(chance.choice(seeds), chance)
        path.write_bytes(content)
        try:
            with little_cpu():
                num_rows = read_like_a_run(path, folder)
        except UsageError:
            num_refused += 1
        else:
            num_read += 1
            if suffix == ".jsonl":
                text = content.decode("utf-8", "replace")
                assert num_rows == sum(
                    bool(line.strip("\ufeff").strip()) for line in text.split("\n")
                )
    # Both outcomes must be common, or the damage is too small or too large to say anything. A
    # damaged line is a row of its own: of JSON lines hardly a file need be refused.
    assert num_read > num_cases // 50
    assert num_refused > num_cases // 50 or suffix == ".jsonl"


def test_column_name_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "name": [1]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"name", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        open_parquet(path)


def test_damaged_line_costs_its_own_row_alone(folder):
    chance = random.Random(1)
    path = folder / "rows.jsonl"
    lines = [json.dumps({"messages": GOOD, "id": i}).encode() for i in range(5)]
    for _ in range(NUM_CASES // 4):
        damaged = mutate(lines[2], chance).replace(b"\n", b" ")
        if not damaged.strip():
            continue
        path.write_bytes(b"\n".join([*lines[:2], damaged, *lines[3:]]))
        stage_json(path, folder / "staged.parquet")
        columns = TrajectoryColumns(messages="messages")
        shard = describe_shard(str(folder / "staged.parquet"), "s", columns, None)
        read = read_trajectories(Unit(shard, 0, shard.num_rows), columns)
        assert len(read) == 5
        for row in (0, 1, 3, 4):
            turns = [{k: m[k] for k in ("role", "content")} for m in read[row].messages]
            assert turns == GOOD


@pytest.mark.parametrize("kind", ["text", "empty", "cut"])
def test_damaged_shard_beside_good_ones_is_refused_by_name(tmp_path, tiny_student, kind):
    source = tmp_path / "in"
    source.mkdir()
    pq.write_table(pa.table({"messages": [GOOD]}), source / "good.parquet")
    whole = (source / "good.parquet").read_bytes()
    damaged = {"text": b"plainly text", "empty": b"", "cut": whole[:-9]}[kind]
    (source / "worse.parquet").write_bytes(damaged)
    result = CliRunner().invoke(
        main, ["score", str(source), str(tmp_path / "out"), "--model", str(tiny_student)]
    )
    assert result.exit_code == 2
    assert "worse.parquet cannot be read as Parquet" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def encoders(make_tokenizer) -> list[TrajectoryEncoder]:
    tokenizer = make_tokenizer()
    template = tokenizer.chat_template
    return [
        TrajectoryEncoder(tokenizer, chat_template=template, max_model_len=200, truncate=truncate)
        for truncate in (True, False)
    ] + [TrajectoryEncoder(tokenizer, chat_template=None, max_model_len=200)]


ODD_TEXT = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=st.characters(), max_size=20),
    st.sampled_from(
        ["", " ", "\0", "\ud800", "<|im_end|>", "{{ 7 * 7 }}", "\u202e", "é" * 300, "\n" * 9]
    ),
)
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), ODD_TEXT, st.binary(max_size=9)
)
ODD_VALUE = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3),
    max_leaves=6,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", "robot", "", "Assistant"])
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": ROLE, "content": ODD_TEXT}),
    st.fixed_dictionaries(
        {"role": ROLE | ODD_VALUE, "content": ODD_VALUE},
        optional={
            "tool_calls": ODD_VALUE,
            "reasoning_content": ODD_VALUE,
            "thinking": ODD_VALUE,
            "name": ODD_VALUE,
        },
    ),
    ODD_VALUE,
)


def assert_is_a_row(encoded) -> None:
    assert isinstance(encoded.status, Status)
    if encoded.status.is_scored:
        assert encoded.spans
        assert encoded.spans[0][0] > 0
        assert all(a < b for a, b in encoded.spans)
        assert encoded.spans[-1][1] <= len(encoded.token_ids) <= 200
    else:
        assert not encoded.token_ids
        assert encoded.detail


@settings(
    max_examples=NUM_CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(messages=st.lists(MESSAGE, max_size=5) | ODD_VALUE)
@example(messages=7)
@example(messages=[{"role": ["assistant"], "content": "x"}, *GOOD])
@example(messages=[GOOD[0], GOOD[1] | {"tool_calls": [{"name": 5}]}])
@example(messages=[GOOD[0], GOOD[1] | {"tool_calls": [{"function": {"name": "\ud800"}}]}])
def test_odd_messages_get_a_status(encoders, messages):
    with little_cpu():
        for encoder in encoders:
            assert_is_a_row(encoder.encode(Trajectory(messages=messages)))
            # Whatever a row was, the next one is none the worse for it.
            assert encoder.encode(Trajectory(prompt="2+2?", response="Four.")).status == Status.OK


@settings(max_examples=NUM_CASES // 4, deadline=None, database=None)
@given(prompt=st.none() | ODD_TEXT, response=st.none() | ODD_TEXT, text=st.none() | ODD_TEXT)
def test_odd_texts_get_a_status(encoders, prompt, response, text):
    for encoder in encoders:
        assert_is_a_row(encoder.encode(Trajectory(prompt=prompt, response=response)))
        assert_is_a_row(encoder.encode(Trajectory(text=text)))


@settings(
    max_examples=NUM_CASES // 8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(rows=st.lists(st.dictionaries(ODD_TEXT, ODD_VALUE, max_size=3), min_size=1, max_size=4))
def test_any_json_object_is_a_row(memory, rows):
    folder = new_folder(memory)
    lines = [json.dumps(row, default=repr) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines))
    stage_json(folder / "a.jsonl", folder / "a.parquet")
    assert pq.read_metadata(folder / "a.parquet").num_rows == len(rows)


def test_deep_nesting_is_a_row_like_any_other(tmp_path, encoders):
    deep = "[" * 100_000
    (tmp_path / "a.jsonl").write_text(f'{{"messages": {deep}\n{json.dumps({"messages": GOOD})}\n')
    stage_json(tmp_path / "a.jsonl", tmp_path / "a.parquet")
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == 2
    (tmp_path / "b.json").write_text(deep)
    with pytest.raises(UsageError, match="is not JSON"):
        stage_json(tmp_path / "b.json", tmp_path / "b.parquet")
