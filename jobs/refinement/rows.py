"""Which text of a row is its problem and which its trace, and the row with another trace."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from rsr.engine.messages import ROLE_ALIASES, BadMessagesError, to_conversation
from rsr.engine.trajectory import Trajectory
from rsr.jobs.refinement.outcome import Outcome, RefineStatus
from rsr.jobs.shards.json_file import JSON_TEXT_KEY


@dataclass(frozen=True, slots=True)
class RefinableRow:
    """A problem and the one response to it, as text."""

    problem: str
    trace: str


def refinable(trajectory: Trajectory) -> RefinableRow | Outcome:
    """The row's problem and trace, or why nothing of it can be refined."""
    try:
        conversation = to_conversation(trajectory, {})
    except BadMessagesError as error:
        return _not_refinable(error.detail)
    turns = conversation.turns
    responses = [t for t in turns[conversation.first_scored :] if t["role"] == "assistant"]
    if len(responses) != 1:
        return _not_refinable(f"it has {len(responses)} assistant turns; expected one")
    (response,) = responses
    if response is not turns[-1]:
        return _not_refinable("its assistant turn is not the last one")
    if "reasoning" in response:
        return _not_refinable("its reasoning stands apart from its response")
    if "tool_calls" in response:
        return _not_refinable("its response calls tools")
    if not _holds_one_text(trajectory):
        return _not_refinable("its response is a list of parts, not one text")
    if not response["content"].strip():
        return _not_refinable("its response is empty")
    context = [t for t in turns[:-1] if t["role"] not in ("system", "developer")]
    if not context:
        return _not_refinable("it has no problem before its response")
    if len(context) == 1:
        return RefinableRow(context[0]["content"], response["content"])
    told = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in context)
    return RefinableRow(told, response["content"])


def replace_traces(
    column: "pa.Array[Any]", field: "pa.Field[Any]", traces: Mapping[int, str], *, plain: bool
) -> "pa.Array[Any]":
    """The column with other traces at some positions; every other value to the last bit.

    traces: by position. plain: whether a text of the column is the response, not JSON of messages.
    """
    if not traces:
        return column
    is_json = JSON_TEXT_KEY in (field.metadata or {})
    positions = sorted(traces)
    values = [
        _with_trace(column[position].as_py(), traces[position], is_json=is_json, plain=plain)
        for position in positions
    ]
    kind, old = column.type, column
    wanted: Any = field.type
    if isinstance(old, pa.DictionaryArray):
        old, kind = old.dictionary_decode(), wanted.value_type
    made = pa.array(values, type=kind)
    # Take from the old values and the new ones, laid end to end.
    order = list(range(len(column)))
    for place, position in enumerate(positions):
        order[position] = len(column) + place
    joined: pa.Array[Any] = pa.concat_arrays([old, made]).take(pa.array(order, pa.int64()))
    return joined.cast(wanted) if isinstance(column, pa.DictionaryArray) else joined


def _with_trace(value: Any, trace: str, *, is_json: bool, plain: bool) -> Any:
    """A value of the trajectory's column with its response's text replaced."""
    if is_json:
        return json.dumps(_with_trace(json.loads(value), trace, is_json=False, plain=plain))
    if isinstance(value, str):
        if plain:
            return trace
        return json.dumps(
            _with_trace(json.loads(value), trace, is_json=False, plain=True), ensure_ascii=False
        )
    turns = list(value)
    last = turns[-1]
    if isinstance(last, str):
        turns[-1] = json.dumps(_turn_with(json.loads(last), trace), ensure_ascii=False)
    else:
        turns[-1] = _turn_with(last, trace)
    return turns


def _turn_with(turn: Mapping[str, Any], trace: str) -> dict[str, Any]:
    name = "content" if turn.get("content") is not None else "value"
    return {**turn, name: trace}


def _holds_one_text(trajectory: Trajectory) -> bool:
    """Whether the last message's content is one text that another can take the place of."""
    messages = trajectory.messages if trajectory.messages is not None else trajectory.response
    if isinstance(messages, str) or messages is None:
        return True
    last = messages[-1]
    role = last.get("role", last.get("from"))
    is_plain = isinstance(last.get("content", last.get("value")) or last.get("value"), str)
    return is_plain and ROLE_ALIASES.get(role, role) == "assistant"


def _not_refinable(why: str) -> Outcome:
    return Outcome(RefineStatus.NOT_REFINABLE, detail=why)
