"""A row in the form that a trainer reads: which fields, of which Arrow types.

Knows conversations; knows no files. What a form has no place for is refused, not dropped.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from rsr.engine.messages import (
    REASONING_FIELDS,
    BadMessagesError,
    Conversation,
    to_conversation,
)
from rsr.engine.trajectory import Trajectory

FormatName = Literal["messages", "prompt-completion", "sharegpt", "alpaca"]
Row = dict[str, Any]

TOOL_CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGE_FIELDS: dict[str, pa.DataType] = {
    "role": pa.string(),
    "content": pa.string(),
    **dict.fromkeys(REASONING_FIELDS, pa.string()),
    "name": pa.string(),
    "tool_call_id": pa.string(),
    "tool_calls": pa.list_(TOOL_CALL),
}
"""Fields of a message, in order; all but the first two only if a row has them. The arguments of
a call are JSON text: as a struct, Arrow would give each call the null arguments of all others."""
SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "tool": "observation"}
SYSTEM_ROLES = ("system", "developer")


class NotExportableError(ValueError):
    """The row has no form of this kind; the text is the same for every such row."""


@dataclass(frozen=True, slots=True)
class Format:
    """A form of rows. make: the row's fields but its id. types: of all that it may have."""

    make: Callable[[Conversation], Row]
    types: Mapping[str, pa.DataType]

    def row(self, trajectory: Trajectory) -> Row:
        """The trajectory in this form, without fields that say nothing.

        Raises `NotExportableError`, with why in words.
        """
        if trajectory.text is not None:
            raise NotExportableError("a plain text is no conversation")
        try:
            conversation = to_conversation(trajectory, {})
        except BadMessagesError as error:
            raise NotExportableError(error.reason) from error
        turns = conversation.turns
        if not turns or turns[-1]["role"] != "assistant":
            raise NotExportableError("the last turn is not the assistant's")
        if not (turns[-1]["content"].strip() or turns[-1].get("tool_calls")):
            raise NotExportableError("the last turn is empty")
        if len(turns) == 1:
            raise NotExportableError("nothing comes before the response")
        return self.make(conversation)

    def schema(self, fields_of_messages: Iterable[str], columns: Iterable[str]) -> pa.Schema:
        """The schema of rows with these columns, whose messages have these fields."""
        used, there = set(fields_of_messages), set(columns)
        message = pa.struct([(n, t) for n, t in MESSAGE_FIELDS.items() if n in used])
        return pa.schema(
            [
                ("id", pa.string()),
                *(
                    (name, pa.list_(message) if kind is MESSAGES else kind)
                    for name, kind in self.types.items()
                    if name in there
                ),
            ]
        )


MESSAGES = pa.null()
"""Stands in `Format.types` for a list of messages, whose fields depend on the rows."""


def message_fields(row: Row) -> set[str]:
    """The fields that the row's messages have."""
    return {
        name
        for value in row.values()
        if isinstance(value, list)
        for message in value
        if isinstance(message, dict) and "role" in message
        for name in message
    }


def _messages(conversation: Conversation) -> Row:
    messages = [_message(turn) for turn in conversation.turns]
    return {"messages": messages, **_tools(conversation)}


def _prompt_completion(conversation: Conversation) -> Row:
    *before, last = (_message(turn) for turn in conversation.turns)
    return {"prompt": before, "completion": [last], **_tools(conversation)}


def _sharegpt(conversation: Conversation) -> Row:
    system, turns = _apart(conversation)
    pairs = []
    for turn in turns:
        if turn["role"] not in SHAREGPT_ROLES or turn.get("tool_calls"):
            raise NotExportableError("sharegpt has no place for tool calls or such roles")
        pairs.append({"from": SHAREGPT_ROLES[turn["role"]], "value": _plain(turn, "sharegpt")})
    asked = [pair["from"] in ("human", "observation") for pair in pairs]
    if asked != [place % 2 == 0 for place in range(len(pairs))]:
        raise NotExportableError("sharegpt wants human and gpt turns in turn")
    return {"conversations": pairs, **system, **_tools(conversation)}


def _alpaca(conversation: Conversation) -> Row:
    system, turns = _apart(conversation)
    if conversation.tools:
        raise NotExportableError("alpaca has no place for tools")
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise NotExportableError("alpaca wants user and assistant turns in turn")
    texts = [_plain(turn, "alpaca") for turn in turns]
    history = [texts[place : place + 2] for place in range(0, len(texts) - 2, 2)]
    row = {"instruction": texts[-2], "input": "", "output": texts[-1], **system}
    return {**row, "history": history} if history else row


def _message(turn: Mapping[str, Any]) -> Row:
    """The turn as chat APIs have it: reasoning under the name that it came by, nothing null."""
    message = {"role": turn["role"], "content": turn["content"]}
    for name, value in turn.items():
        if name in ("role", "content", "reasoning_field"):
            continue
        if name == "reasoning":
            message[turn.get("reasoning_field", REASONING_FIELDS[0])] = value
        elif name == "tool_calls":
            message[name] = [_tool_call(call) for call in value]
        elif name in ("name", "tool_call_id") and isinstance(value, str):
            message[name] = value
        else:
            raise NotExportableError(f"a message has a field {name!r}, which no trainer reads")
    return message


def _tool_call(call: Mapping[str, Any]) -> Row:
    function = call.get("function", call)
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    told = {"function": {"name": function["name"], "arguments": text}}
    return {**{n: str(call[n]) for n in ("id", "type") if call.get(n) is not None}, **told}


def _apart(conversation: Conversation) -> tuple[Row, list[dict[str, Any]]]:
    """The system prompt as a field of its own, if there is one, and the other turns."""
    turns = conversation.turns
    if turns[0]["role"] in SYSTEM_ROLES:
        return {"system": turns[0]["content"]}, turns[1:]
    return {}, turns


def _plain(turn: Mapping[str, Any], name: str) -> str:
    if "reasoning" in turn:
        raise NotExportableError(f"{name} has no place for reasoning in a field of its own")
    content: str = turn["content"]
    return content


def _tools(conversation: Conversation) -> Row:
    if not conversation.tools:
        return {}
    return {"tools": json.dumps(conversation.tools, ensure_ascii=False)}


FORMATS: dict[str, Format] = {
    "messages": Format(_messages, {"messages": MESSAGES, "tools": pa.string()}),
    "prompt-completion": Format(
        _prompt_completion, {"prompt": MESSAGES, "completion": MESSAGES, "tools": pa.string()}
    ),
    "sharegpt": Format(
        _sharegpt,
        {
            "conversations": pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())])),
            "system": pa.string(),
            "tools": pa.string(),
        },
    ),
    "alpaca": Format(
        _alpaca,
        {
            "instruction": pa.string(),
            "input": pa.string(),
            "output": pa.string(),
            "system": pa.string(),
            "history": pa.list_(pa.list_(pa.string())),
        },
    ),
}
