"""Rows as public data sets have them, from Parquet and from JSON lines, become trajectories."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from rsr.engine.trajectory import Trajectory
from rsr.jobs.cli import main
from rsr.jobs.errors import UsageError
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns, warn_of_unused_columns
from rsr.jobs.shards.json_input import stage_json
from rsr.jobs.shards.parquet import open_parquet
from rsr.jobs.shards.reader import read_trajectories
from rsr.jobs.shards.shard import Unit, describe_shard

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"}
CHAT = [USER, ANSWER]
SHARE = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}],
}
TOLD = {"role": "tool", "content": "4"}

FORMS = {
    "messages": ({"messages": CHAT, "source": "x"}, {}, {"messages": CHAT}),
    "messages and generations": (
        {"problem": "2+2?", "generations": ["a", "b"], "messages": CHAT},
        {},
        {"messages": CHAT},
    ),
    "from and value": ({"conversations": SHARE}, {}, {"messages": SHARE}),
    "from and value with system": (
        {"system": "Think.", "conversations": SHARE},
        {"system": "system"},
        {"messages": SHARE, "system": "Think."},
    ),
    "conversations of roles": ({"conversations": CHAT}, {}, {"messages": CHAT}),
    "prompt and response": (
        {"prompt": "2+2?", "response": "4"},
        {},
        {"prompt": "2+2?", "response": "4"},
    ),
    "prompt and completion": (
        {"prompt": "2+2?", "completion": "4"},
        {},
        {"prompt": "2+2?", "response": "4"},
    ),
    "chat prompt and completion": (
        {"prompt": [USER], "completion": [ANSWER]},
        {},
        {"prompt": [USER], "response": [ANSWER]},
    ),
    "messages as prompt, text as response": (
        {"input": [USER], "output": "4", "reasoning": "on"},
        {"prompt": "input", "response": "output"},
        {"prompt": [USER], "response": "4"},
    ),
    "problem and solution": (
        {"problem": "2+2?", "solution": "4", "answer": "4"},
        {"prompt": "problem", "response": "solution"},
        {"prompt": "2+2?", "response": "4"},
    ),
    "reasoning apart": (
        {"question": "2+2?", "thinking": "easy", "attempt": "4"},
        {"prompt": "question", "response": "attempt", "reasoning": "thinking"},
        {"prompt": "2+2?", "response": "4", "reasoning": "easy"},
    ),
    "reasoning beside messages": (
        {"messages": CHAT, "reasoning": "easy"},
        {"reasoning": "reasoning"},
        {"messages": CHAT, "reasoning": "easy"},
    ),
    "chosen": ({"chosen": CHAT, "rejected": CHAT}, {"messages": "chosen"}, {"messages": CHAT}),
    "instruction and output": (
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"prompt": "instruction", "response": "output"},
        {"prompt": "2+2?", "response": "4"},
    ),
    "tools": (
        {"messages": [USER, CALL, TOLD, ANSWER], "tools": TOOLS},
        {"tools": "tools"},
        {"messages": [USER, CALL, TOLD, ANSWER], "tools": TOOLS},
    ),
    "tools as JSON text": (
        {"messages": CHAT, "tools": json.dumps(TOOLS)},
        {"tools": "tools"},
        {"messages": CHAT, "tools": json.dumps(TOOLS)},
    ),
    "template arguments": (
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": "chat_template_kwargs"},
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}},
    ),
    "messages as JSON text": ({"messages": json.dumps(CHAT)}, {}, {"messages": CHAT}),
    "text": ({"text": "2+2=4"}, {}, {"text": "2+2=4"}),
}


def write(path, rows):
    """The file as a run reads it: Parquet as it stands, JSON staged."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stage_json(path, path.with_suffix(".staged.parquet"))
    return path.with_suffix(".staged.parquet")


def read(path, wanted):
    columns = choose_columns(open_parquet(path).schema_arrow, TrajectoryColumns(**wanted), "f")
    shard = describe_shard(str(path), "f", columns, None)
    return read_trajectories(Unit(shard, 0, shard.num_rows), columns)


def without_nulls(value):
    """Arrow gives all structs of a column the same fields."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_row_of_every_form_is_read(tmp_path, form, suffix):
    row, wanted, expected = FORMS[form]
    (found,) = read(write(tmp_path / f"a{suffix}", [row]), wanted)
    values = {kind: without_nulls(getattr(found, kind)) for kind in Trajectory.__slots__}
    assert {kind: value for kind, value in values.items() if value is not None} == expected


@pytest.mark.parametrize(
    ("row", "wanted", "message"),
    [
        ({"prompt": "q", "response": ["a", "b"]}, {}, r"'response' of f is list<\w+: string>"),
        ({"prompt": "q", "response": [{"text": "a"}]}, {}, "expected a string or a list of"),
        ({"messages": [{"speaker": "a", "text": "b"}]}, {}, r"expected a list of \{role, content"),
        ({"messages": CHAT, "s": 1}, {"system": "s"}, "column 's' of f is int64; expected a str"),
        ({"messages": CHAT, "t": 1}, {"tools": "t"}, "expected a list of JSON schemas"),
        ({"messages": CHAT}, {"tools": "t"}, "no column 't'; it has: messages"),
        ({"text": "t", "s": "x"}, {"text": "text", "system": "s"}, "a text is scored as it stands"),
        ({"text": "t", "s": "x"}, {"system": "s"}, "a text is scored as it stands"),
        ({"prompt": "q", "answer": "a"}, {}, r"\(or 'completion'\).* it has: prompt, answer"),
        ({"prompt": "q", "answer": "a"}, {"prompt": "prompt"}, "no column 'response'"),
    ],
)
def test_columns_of_another_type_are_refused(row, wanted, message):
    schema = pa.Table.from_pylist([row]).schema
    with pytest.raises(UsageError, match=message):
        choose_columns(schema, TrajectoryColumns(**wanted), "f")


def test_texts_beside_a_number_keep_their_words_without_quotes(tmp_path):
    """A column without a common type is staged as JSON text; its rows mean what they meant."""
    rows = [
        {"prompt": 'say "hi"', "response": "hi"},
        {"prompt": 7, "response": "seven"},
        {"prompt": [USER], "response": "4"},
        {"prompt": None, "response": "4"},
    ]
    found = read(write(tmp_path / "a.jsonl", rows), {})
    assert found[0] == Trajectory(prompt='say "hi"', response="hi")
    # Refused by the encoder: without its prompt, the response would be scored as something else.
    assert found[1] == Trajectory(messages=[7])
    assert found[2:] == [Trajectory(prompt=[USER], response="4"), Trajectory(response="4")]


def test_columns_that_a_trainer_would_render_are_named_if_unused(caplog):
    schema = pa.Table.from_pylist([{"messages": CHAT, "tools": TOOLS, "system": "s"}]).schema
    columns = choose_columns(schema, TrajectoryColumns(system="system"), "f")
    warn_of_unused_columns(schema, columns, "f")
    (message,) = caplog.messages
    assert message.endswith("--tools-column tools")


def test_options_name_the_columns(tmp_path, tiny_student):
    source = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": CHAT, "n": 1}]), source)
    for option in ("system", "reasoning", "tools", "chat-template-kwargs"):
        arguments = ["score", source, tmp_path / "out", "--model", tiny_student]
        result = CliRunner().invoke(main, [*map(str, arguments), f"--{option}-column", "n"])
        assert result.exit_code == 2
        assert "column 'n' of" in result.stderr
    arguments += ["--messages-column", "n", "--text-column", "n"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert "give --messages-column, or" in result.stderr
