"""The whole way over an object store: `rsr score s3://… s3://…`, Ray, real vLLM, bad nights."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typed import rsr

from rsr.engine import Scorer, ScorerConfig, Trajectory
from rsr.jobs.storage import open_storage

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]


def chat(answer):
    return [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": answer}]


def put_table(storage, name, table):
    with storage.writing(name) as temporary:
        pq.write_table(table, temporary)


def test_score_status_and_verify_on_an_object_store(s3, s3_url, tiny_student):
    storage = open_storage(s3_url)
    rows = [chat(f"It is {i}.") for i in range(40)]
    put_table(storage, "in/a.parquet", pa.table({"id": range(30), "messages": rows[:30]}))
    put_table(storage, "in/deep/b.parquet", pa.table({"id": range(10), "messages": rows[30:]}))
    source, output = f"{s3_url}/in", f"{s3_url}/out"
    command = ("score", source, output, "--model", tiny_student, "--json")
    with s3.faults(0.1) as injected:
        done = rsr(*command)
    assert sum(injected.values()) >= 3
    result = json.loads(done.stdout)
    assert (result["output"], result["num_rows"]) == (output, 40)
    # Where files are kept is nobody's business: the rows are as they were, the scores the engine's.
    tables = [
        pq.read_table(pa.BufferReader(storage.read(f"out/{name}")))
        for name in ("a.parquet", "deep/b.parquet")
    ]
    scored = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    assert scored["messages"].to_pylist() == rows
    with Scorer(ScorerConfig(model=str(tiny_student))) as scorer:
        scores = scorer.score([Trajectory(messages=messages) for messages in rows])
    assert scored["rsr"].to_pylist() == pytest.approx([score.rsr for score in scores], rel=1e-5)
    for tool in (["status"], ["verify", "--deep"]):
        rsr(*tool, output, "--json")
    # Nothing is left to do, and nothing is left behind but the result and what vouches for it.
    assert json.loads(rsr(*command).stdout)["num_tokens_now"] == 0
    assert [file.name for file in storage.list("out")] == [
        "out/.rsr/events.jsonl",
        "out/.rsr/manifest.json",
        "out/.rsr/receipts/a.parquet.json",
        "out/.rsr/receipts/deep/b.parquet.json",
        "out/.rsr/run.log",
        "out/a.parquet",
        "out/deep/b.parquet",
    ]
