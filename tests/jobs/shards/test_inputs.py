"""What stands behind INPUT: every file that holds rows is read, refused or named."""

import bz2
import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.storage.open import open_storage

ROWS = [{"text": f"row {i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


GZIPPED = gzip.compress(LINES, mtime=0)
COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd, "": bytes}


def names(place):
    return [name for _, name in find_inputs(str(place))]


def make_tree(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def staged_rows(source):
    target = source.with_name("staged.parquet")
    stage_json(source, target)
    return pq.read_table(target).to_pylist()


def test_empty_input_is_refused():
    with pytest.raises(UsageError, match="INPUT is empty"):
        find_inputs("")


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_compressed_json_is_read(tmp_path, kind, suffix):
    content = json.dumps(ROWS).encode() if kind == ".json" else LINES
    source = tmp_path / f"rows.v1{kind}{suffix}"
    # Two members, as appending to a compressed log leaves them.
    half = len(content) // 2
    compress = COMPRESSED[suffix]
    source.write_bytes(compress(content[:half]) + compress(content[half:]))
    assert names(tmp_path) == ["rows.v1.parquet"]
    assert names(source) == ["rows.v1.parquet"]
    assert staged_rows(source) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_cut_off_compressed_file_is_refused_by_name(tmp_path, suffix):
    source = tmp_path / f"a.jsonl{suffix}"
    source.write_bytes(COMPRESSED[suffix](LINES * 50)[:-4])
    with pytest.raises(UsageError, match=r"a\.jsonl\.\w+ cannot be read: .*[Tt]runcated"):
        stage_json(source, tmp_path / "a.parquet")
    source.write_bytes(LINES)
    with pytest.raises(UsageError, match=r"a\.jsonl\.\w+ cannot be read"):
        stage_json(source, tmp_path / "a.parquet")


def test_upper_case_names_are_read(tmp_path):
    make_tree(tmp_path, "A.PARQUET", "deep/B.Pq")
    assert names(tmp_path) == ["A.parquet", "deep/B.parquet"]
    assert names(tmp_path / "A.PARQUET") == ["A.parquet"]


def test_one_output_for_two_inputs_is_refused_whatever_they_are_called(tmp_path):
    make_tree(tmp_path, "a.jsonl", "a.jsonl.gz")
    with pytest.raises(UsageError, match=r"would both become a\.parquet"):
        find_inputs(str(tmp_path))


def test_data_that_is_not_read_is_named_with_its_number(tmp_path, caplog):
    unread = ["b.csv", "c.arrow", "deep/d.tar.gz", "e.parquet.part", "f.jsonl.xz"]
    beside = ["README.md", "a.parquet.md5", "_log.csv", ".x.csv", "LICENSE"]
    make_tree(tmp_path, "a.parquet", *unread, *beside)
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["a.parquet"]
    (message,) = caplog.messages
    assert "5 files (b.csv, c.arrow, deep/d.tar.gz and 2 more)" in message
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UsageError, match=r"JSON-lines file but 5 other files \(b\.csv"):
        find_inputs(str(tmp_path))


def test_links_to_folders_are_followed_once(tmp_path):
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "in"
    make_tree(root, "real/a.parquet", "b.parquet")
    make_tree(elsewhere, "deep/c.parquet", ".hidden/d.parquet")
    (root / "again").symlink_to("real")
    (root / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "self").symlink_to("self")
    (root / "up").symlink_to("..")
    (root / "file.parquet").symlink_to(elsewhere / "deep" / "c.parquet")
    found = ["b.parquet", "file.parquet", "linked/deep/c.parquet", "real/a.parquet"]
    assert names(root) == found
    assert sorted(names(f"{root}/**/*.parquet")) == found
    assert names(f"{root}/again/*.parquet") == ["a.parquet"]


def test_links_without_a_target_are_refused_where_rows_would_be_missing(tmp_path, caplog):
    make_tree(tmp_path, "a.parquet")
    (tmp_path / "disk2").symlink_to("/nowhere")
    with caplog.at_level(logging.WARNING):
        assert names(tmp_path) == ["a.parquet"]
    assert "1 link (disk2)" in caplog.text
    (tmp_path / "b.parquet").symlink_to("b.parquet")
    (tmp_path / "_c.parquet").symlink_to("nowhere")
    for place in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(UsageError, match=r"rows would be missing.*1 link \(\S*b\.parquet\)"):
            find_inputs(str(place).replace("*", "[ab]*"))
    with pytest.raises(UsageError, match=r"b\.parquet is a link that leads nowhere"):
        find_inputs(str(tmp_path / "b.parquet"))


@pytest.mark.seconds
@given(
    folders=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    links=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=8),
)
def test_every_file_of_any_tree_with_links_is_found_once(tmp_path_factory, folders, links):
    root = tmp_path_factory.mktemp("tree") / "in"
    paths = [root]
    for parent in folders:
        paths.append(paths[min(parent, len(paths) - 1)] / f"d{len(paths)}")
    for number, path in enumerate(paths):
        path.mkdir()
        (path / f"f{number}.parquet").write_bytes(b"")
    for number, (place, target) in enumerate(links):
        if place < len(paths) and target < len(paths):
            (paths[place] / f"l{number}").symlink_to(paths[target])
    expected = sorted(str(p / f"f{n}.parquet") for n, p in enumerate(paths))
    assert sorted(file for file, _ in find_inputs(str(root))) == expected


def test_name_that_is_not_utf8_is_refused_in_one_line(tmp_path, tiny_student):
    source = tmp_path / "in"
    source.mkdir()
    path = os.fsencode(source) + b"/caf\xe9.parquet"
    pq.write_table(pa.table({"text": ["x"]}), source / "a.parquet")
    os.rename(source / "a.parquet", path)
    for place in (str(source), os.fsdecode(path)):
        result = CliRunner().invoke(
            main, ["score", place, str(tmp_path / "out"), "--model", str(tiny_student)]
        )
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()
        assert r"caf\xe9.parquet is not UTF-8; rename" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GZIPPED, "compressed with gzip; add .gz"),
        ("a.jsonl", bz2.compress(LINES), "compressed with bzip2; add .bz2"),
        ("a.jsonl", zstd(LINES), "compressed with zstd; add .zst"),
        ("a.jsonl.gz", gzip.compress(GZIPPED, mtime=0), "compressed with gzip; add .gz"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16.*iconv"),
        ("a.jsonl", LINES.decode().encode("utf-16-le"), "UTF-16.*iconv"),
        ("a.json", json.dumps(ROWS).encode("utf-16"), "UTF-16.*iconv"),
        ("a.jsonl", b"PAR1 and so on", "is a Parquet file; name it .parquet"),
        ("a.jsonl", json.dumps(ROWS).encode(), r"one JSON list; name it \.json"),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode(), r"one JSON list; name it \.json"),
        ("a.jsonl", LINES.replace(b"\n", b",\n"), "lines end in commas"),
        ("a.jsonl", LINES.replace(b"\n", b",\n")[:-2], "lines end in commas"),
        ("a.jsonl", b"plain text\nand more\n", "one JSON object a line; the first line is 'plain"),
        ("a.jsonl", json.dumps(ROWS[0], indent=1).encode(), "the first line is '{'"),
        ("a.json", b'["a", "b"]', "no entry of its list is a JSON object"),
        ("a.json", b'{"text": "a"}', "holds one dict; expected a list of rows"),
        ("a.json", b'{"text": "a"', "is not JSON"),
    ],
)
def test_file_of_another_kind_is_told_for_what_it_is(tmp_path, name, content, message):
    source = tmp_path / name
    source.write_bytes(content)
    with pytest.raises(UsageError, match=message) as refused:
        stage_json(source, tmp_path / "staged.parquet")
    assert name in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "staged.parquet").exists()


def test_json_lines_in_a_json_file_are_read_as_such(tmp_path):
    source = tmp_path / "lines.json"
    source.write_bytes(LINES + b"{broken\n")
    assert staged_rows(source) == [*ROWS, {"text": None}]


def test_json_without_entries_has_no_rows(tmp_path):
    for name, content in (("a.jsonl", b""), ("b.json", b"[]"), ("c.jsonl", b"\n\n")):
        (tmp_path / name).write_bytes(content)
        assert staged_rows(tmp_path / name) == []


def test_object_store_follows_the_same_rules(s3_url, caplog):
    storage = open_storage(s3_url)
    storage.write("logs/a.JSONL.gz", GZIPPED)
    storage.write("logs/b.csv", b"x")
    with caplog.at_level(logging.WARNING):
        assert names(f"{s3_url}/logs") == ["a.parquet"]
    assert "1 file (b.csv)" in caplog.text
    assert names(f"{s3_url}/logs/*.gz") == ["a.parquet"]
    stage_json(f"{s3_url}/logs/a.JSONL.gz", f"{s3_url}/staged.parquet")
    with storage.open("staged.parquet") as file:
        assert pq.read_table(file).to_pylist() == ROWS
    storage.write("one/A.PARQUET", b"x")
    assert names(f"{s3_url}/one/") == ["A.parquet"]
