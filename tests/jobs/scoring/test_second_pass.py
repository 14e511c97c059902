"""Second passes through the command line: a column of their own beside a scored input's."""

import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typed import rsr

from rsr.jobs.shards.writer import METADATA_KEY

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.slow]

ANSWERS = ["Six tens are 60. Minus 18. So 42.", "42", "It is 7 times 6. That is 42.", ""]


@pytest.fixture(scope="module")
def passes(tiny_student, tmp_path_factory):
    """A first pass, one without prompts over its output, and one with a window over that."""
    root = tmp_path_factory.mktemp("passes")
    messages = [
        [{"role": "user", "content": "6 × 7?"}, {"role": "assistant", "content": answer}]
        for answer in ANSWERS
    ]
    pq.write_table(pa.table({"messages": messages, "teacher": list("abab")}), root / "in.parquet")
    model = ("--model", tiny_student, "--dtype", "float32")
    rsr("score", root / "in.parquet", root / "first", *model, "--token-columns")
    rsr("score", root / "first", root / "second", *model, "--unconditional")
    told = rsr("score", root / "second", root / "third", *model, "--window", "1", "--json")
    return root, json.loads(told.stdout)


def test_a_second_pass_leaves_what_is_there(passes):
    root, told = passes
    first, second, third = (
        pq.read_table(root / name / "in.parquet") for name in ("first", "second", "third")
    )
    assert second.column_names == [*first.column_names, "rsr_unconditional"]
    assert third.column_names == [*second.column_names, "rsr_window"]
    assert second.drop_columns("rsr_unconditional").equals(first)
    assert third.drop_columns("rsr_window").equals(second)
    metadata = third.schema.metadata
    assert metadata[METADATA_KEY] == first.schema.metadata[METADATA_KEY]
    assert json.loads(metadata[b"rsr_window"])["settings"]["window"] == 1
    assert told["rows_by_status"] == {"no_response": 1, "ok": 3}
    assert told["dataset_rsr"] is None
    for name in ("second", "third"):
        rsr("verify", root / name, "--deep")


def test_sums_are_those_of_transformers(passes, tiny_student):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, _ = passes
    model = AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    frame = pl.read_parquet(root / "third" / "in.parquet")
    for ids, alone, status in frame.select(
        "rsr_token_ids", "rsr_unconditional", "rsr_status"
    ).iter_rows():
        assert alone["status"] == status
        if ids is None:
            assert alone["num_tokens"] is alone["surprisal_sum"] is None
            continue
        with torch.inference_mode():
            logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, :-1]
        logprobs = torch.log_softmax(logits.double(), 1)[range(len(ids)), ids]
        assert alone["num_tokens"] == len(ids)
        assert alone["surprisal_sum"] == pytest.approx(-logprobs.sum().item(), rel=1e-5)
    assert frame["rsr_window"].struct.field("num_steps").to_list() == [3, 1, 2, None]


def test_metrics_of_second_passes_are_told(passes):
    root, _ = passes
    frame = pl.read_parquet(root / "third" / "in.parquet").filter(pl.col("rsr").is_not_null())
    told = json.loads(rsr("metrics", root / "third", "--json").stdout)
    values = {m["metric"]: m["values"]["all"] for m in told["metrics"]}
    mean = frame["rsr_mean_surprisal"]
    without = frame["rsr_unconditional"].struct.field("surprisal_sum") / frame["rsr_num_tokens"]
    assert values["ifd"] == pytest.approx(np.exp(mean - without).mean(), rel=1e-9)
    assert values["ifd_loss"] == pytest.approx((mean / without).mean(), rel=1e-9)
    refused = rsr("metrics", root / "first", "--metric", "ifd", exit_code=2)
    assert "it needs a second pass: rsr score" in refused.stderr


def test_a_second_pass_of_another_student_does_not_compare(passes, tmp_path):
    root, _ = passes
    table = pq.read_table(root / "second" / "in.parquet")
    metadata = dict(table.schema.metadata)
    identity = json.loads(metadata[b"rsr_unconditional"])
    identity["model"]["config_sha256"] = "another"
    metadata[b"rsr_unconditional"] = json.dumps(identity).encode()
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "mixed.parquet")
    assert rsr("metrics", tmp_path / "mixed.parquet", exit_code=2).stdout == ""


def test_a_second_pass_is_done_once(passes, tiny_student):
    root, _ = passes
    model = ("--model", tiny_student, "--dtype", "float32")
    rsr("score", root / "second", root / "new", *model, "--unconditional", exit_code=2)
    assert not (root / "new").exists()
