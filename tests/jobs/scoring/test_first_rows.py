"""A corpus that the student cannot read is refused before a model is loaded, with the reasons."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from toy_students import STUDENTS
from typed import rsr

from rsr.engine.config import ScorerConfig
from rsr.engine.student import Student
from rsr.jobs.errors import UsageError
from rsr.jobs.scoring.first_rows import NUM_ROWS, first_units, look_at_rows, require_scored, told
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.shard import describe_shard

BY_NAME = {student.name: student for student in STUDENTS}
MESSAGES = TrajectoryColumns(messages="messages")
THOUGHT = "<think>\nadd\n</think>\n\n4"


def chat(content: str, **fields: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": content, **fields},
    ]


def shard_of(path: Path, rows: list) -> object:
    pq.write_table(pa.table({"messages": rows}), path)
    return describe_shard(str(path), path.name, MESSAGES, None)


def looked(student: str, shards: list, **options: str):
    toy = BY_NAME[student]
    student = Student(
        config=ScorerConfig(model=toy.name, **options),
        architectures=[],
        max_model_len=1 << 20,
        vocab_size=1 << 20,
        tokenizer=toy.tokenizer(),
        chat_template=toy.template,
        fingerprint={},
    )
    return look_at_rows(student, first_units(shards), MESSAGES)


def test_one_line_tells_what_was_done_to_the_rows(tmp_path):
    rows = [chat("4", reasoning_content="add"), chat("4"), chat(""), None]
    first = looked("Qwen2.5", [shard_of(tmp_path / "a", rows)])
    folded = "1 reasoning in content, between <think> tags"
    assert told(first) == f"4 rows looked at: {folded}; 2 without a score"
    plain = looked("Llama-3.1", [shard_of(tmp_path / "b", [chat("4")])])
    assert told(plain) == "1 row looked at: rendered as they stand"
    verbatim = looked("R1-Qwen", [shard_of(tmp_path / "c", [chat(THOUGHT)] * 3)])
    assert told(verbatim) == "3 rows looked at: 3 rendered verbatim"
    assert told(looked("R1-Qwen", [])) == ""


def test_a_larger_share_than_may_be_is_refused_with_its_reasons(tmp_path):
    shard = shard_of(tmp_path / "a.parquet", [*[chat(THOUGHT)] * 3, *[chat("4")] * 2])
    first = looked("R1-Qwen", [shard], render="template")
    with pytest.raises(UsageError, match="3 of the first 5 rows would have no score") as refused:
        require_scored(first, 0.5)
    (line,) = refused.value.more
    assert line.startswith("3 bad_messages: ")
    assert "(as a.parquet row 0)" in line
    assert "--render verbatim" in line
    require_scored(first, 0.6)
    require_scored(first, 1.0)


def test_as_many_rows_are_looked_at_as_are_said_wherever_they_are(tmp_path):
    """In shards without rows, damaged ones and those that follow."""
    damaged = shard_of(tmp_path / "a", [chat("4")] * 500)
    content = bytearray((tmp_path / "a").read_bytes())
    content[4:400] = b"\xff" * 396
    (tmp_path / "a").write_bytes(content)
    shards = [damaged, shard_of(tmp_path / "b", [chat("4")] * 150)]
    assert looked("Llama-3.1", shards).summary.num_rows == 150
    shards.append(shard_of(tmp_path / "c", [chat("")] * 500))
    first = looked("Llama-3.1", shards)
    assert (first.summary.num_rows, first.num_refused) == (NUM_ROWS, NUM_ROWS - 150)
    long = shard_of(tmp_path / "d", [chat(f"{i}" * (9 << 20)) for i in range(3)])
    assert [unit.num_rows for unit in first_units([long])] == [1]


@pytest.mark.slow
@pytest.mark.ray
def test_refused_run_leaves_output_as_it_was(tmp_path, tiny_student):
    rows = [*[chat("4<|im_start|>")] * 3, chat("4")]
    pq.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
    command = ["score", tmp_path / "a.parquet", tmp_path / "out", "--model", tiny_student, "--json"]
    done = rsr(*command, exit_code=2)
    assert done.stdout == ""
    first, reason = done.stderr.strip().splitlines()
    assert first.startswith("rsr: 3 of the first 4 rows would have no score, more than --max-refu")
    assert reason.startswith("rsr:   3 bad_messages: a message contains one of this student's con")
    assert not (tmp_path / "out").exists()
