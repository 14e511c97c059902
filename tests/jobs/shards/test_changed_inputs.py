"""A run that goes on does so over the very rows that it began with."""

import json
import os
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from typed import rsr

from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.run.manifest import InputShard
from rsr.jobs.run.opening import hold_output
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.json_input import is_made_of, stage_json
from rsr.jobs.shards.parquet import file_state
from rsr.jobs.shards.shard import describe_shard, was_written_again
from rsr.jobs.storage import locate

TEXT = TrajectoryColumns(text="text")


def table(*texts):
    return pa.table({"text": [*texts, "z" * 200_000]})


def go_on(run, **options):
    """As a further start of the run does, over its inputs as they are now."""
    sources = {shard.name: shard.source for shard in run.output.read_manifest().shards}
    shards = [describe_shard(source, name, TEXT, None) for name, source in sources.items()]
    wanted = replace(
        run.output.read_manifest(),
        shards=tuple(InputShard.of(shard, sources[shard.name]) for shard in shards),
    )
    with hold_output(run.output.root, writer="score", overwrite=False) as held:
        return held.go_on(wanted, **options)


def edit_in_place(path, old, new):
    """Other bytes of the same length, as `sed -i` leaves them."""
    content = path.read_bytes()
    assert content.count(old) >= 1
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def later(path):
    """As if written a second later: a file system's clock may be coarse."""
    time_ns = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(time_ns, time_ns))


def test_parquet_that_was_edited_far_from_its_end_is_another(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table("It is 000000"), path, compression="none", write_statistics=False)
    shard = describe_shard(str(path), "a.parquet", TEXT, None)
    assert not was_written_again(shard)
    edit_in_place(path, b"It is 000000", b"It is 999999")
    later(path)
    assert file_state(str(path)).fingerprint == shard.fingerprint, "nothing but its time tells"
    assert was_written_again(shard)


def test_footer_counts_as_a_whole(tmp_path):
    columns = {f"a column with a rather long name, number {i}": [i] for i in range(2000)}
    first, second = tmp_path / "1.parquet", tmp_path / "2.parquet"
    pq.write_table(pa.table(columns), first)
    content = first.read_bytes()
    footer_bytes = int.from_bytes(content[-8:-4], "little")
    assert footer_bytes > 150_000
    place = len(content) - footer_bytes + 1000
    second.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert file_state(str(first)).fingerprint != file_state(str(second)).fingerprint


def test_run_over_parquet_that_was_written_again_is_refused_unless_it_is_a_copy(make_run, tmp_path):
    run = make_run({name: table("first") for name in ("a.parquet", "b.parquet")})
    paths = [tmp_path / "in" / name for name in ("a.parquet", "b.parquet")]
    go_on(run)
    for path in paths:
        later(path)
    with pytest.raises(UsageError) as refused:
        go_on(run, is_same_input=False)
    assert "written again since" in str(refused.value)
    assert "a.parquet and 1 more; say --same-input" in str(refused.value)
    with pytest.raises(UsageError, match="and 1 more; choose another OUTPUT"):
        go_on(run)
    go_on(run, is_same_input=True)
    # The times that were vouched for are the run's from then on.
    go_on(run, is_same_input=False)
    pq.write_table(table("other"), paths[0])
    with pytest.raises(UsageError, match=r"changed: a\.parquet\."):
        go_on(run, is_same_input=True)


def test_verify_names_a_repair_that_works_for_an_input_edited_in_place(make_run, tmp_path):
    run = make_run({"a.parquet": table("It is 000000")}, compression="none", write_statistics=False)
    run.finish(run.shards[0])
    path = tmp_path / "in" / "a.parquet"
    edit_in_place(path, b"It is 000000", b"It is 999999")
    later(path)
    result = CliRunner().invoke(main, ["verify", str(run.output.root), "--deep", "--json"])
    assert result.exit_code == 1
    (repair,) = json.loads(result.stdout)["repair"]
    assert repair.endswith("--overwrite")


def test_staged_json_is_known_by_its_source_content(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "It is 000000"}) + "\n" * 100_000)
    staged = [tmp_path / f"{i}.parquet" for i in range(3)]
    stage_json(source, staged[0])
    later(source)
    stage_json(source, staged[1])
    edit_in_place(source, b"000000", b"999999")
    stage_json(source, staged[2])
    first, copied, edited = (file_state(str(path)).fingerprint for path in staged)
    assert first == copied
    assert first != edited
    assert is_made_of(str(staged[2]), str(source))
    assert not is_made_of(str(staged[0]), str(source))


def test_json_that_is_written_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n')
    storage = type(locate(source)[0])
    opened = storage.open

    def append_then_open(self, name):
        with source.open("a") as file:
            file.write('{"text": "b"}\n')
        return opened(self, name)

    monkeypatch.setattr(storage, "open", append_then_open)
    with pytest.raises(UsageError, match="written while it was read"):
        stage_json(source, tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_edited_json_lines_are_noticed_and_touched_ones_go_on(tmp_path, tiny_student):
    source, output = tmp_path / "front.jsonl", tmp_path / "out"
    rows = [{"prompt": "Six times seven?", "response": f"It is {'0' * 6}. " + "So. " * 20}] * 4
    padding = {"prompt": None, "response": None, "padding": "p" * 100_000}
    source.write_text("\n".join(map(json.dumps, [*rows, padding])))

    command = ("score", source, output, "--json", "--model", tiny_student)
    rsr(*command)
    later(source)
    assert json.loads(rsr(*command).stdout)["num_tokens_now"] == 0
    edit_in_place(source, b"It is 000000", b"It is 999999")
    later(source)
    assert "changed: front.parquet" in rsr(*command, exit_code=2).stderr
    rsr(*command, "--overwrite")
    assert "999999" in pq.read_table(output / "front.parquet")["response"][0].as_py()
