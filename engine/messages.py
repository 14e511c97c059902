"""One form for conversations, whatever API or data set they were written for.

Data sets disagree on names (`from`/`value`, human/gpt), on where reasoning stands and on what
"nothing" is (null, "", []); chat templates know one spelling each. Here every row becomes
messages of `role` and text `content`, with `reasoning` and `tool_calls` only where they say
something, and a list of what had to be changed. What the student's template needs instead is
`rendering.py`'s to choose.

Knows messages; knows nothing of templates, tokenizers or files.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rsr.engine.trajectory import Trajectory

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Roles of the ShareGPT and Gemini formats; the value of `function_call` is a call as JSON."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where chat APIs put an assistant's chain of thought beside its `content`."""
_CLOSED_REASONING = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)


class BadMessagesError(ValueError):
    """These messages cannot be rendered faithfully.

    reason: why, in words that are the same for every such row. hint: the option to try, or "".
    detail: `reason`, and where in this row.
    """

    def __init__(self, reason: str, *, detail: str = "", hint: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason
        self.detail = detail or reason
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row in one form.

    turns: `role` and `content` (a string) each; `reasoning` (a non-blank string, under the name
        in `reasoning_field`) and `tool_calls` (a list that is not empty) where there are some;
        other fields as they were.
    first_scored: turns before this one are context, assistant turns among them too.
    tools, template_kwargs: what the chat template is given beside the messages.
    notes: what was changed, in a few words each, the same for every row.
    """

    turns: list[dict[str, Any]]
    first_scored: int = 0
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def to_conversation(trajectory: Trajectory, template_kwargs: Mapping[str, Any]) -> Conversation:
    """`trajectory` as a conversation; its own template arguments go before `template_kwargs`.

    Raises `BadMessagesError` if a message is malformed or the row contradicts itself.
    """
    notes: dict[str, None] = {}
    if trajectory.messages is not None:
        turns = _turns(trajectory.messages, "messages", notes)
        first_scored = 0
    else:
        turns = _side(trajectory.prompt, "user", "prompt", notes)
        first_scored = len(turns)
        turns += _side(trajectory.response, "assistant", "response", notes)
    if trajectory.system:
        if turns and turns[0]["role"] in ("system", "developer"):
            raise BadMessagesError("the row has a system prompt and a system turn")
        turns.insert(0, {"role": "system", "content": trajectory.system})
        first_scored += bool(first_scored)
    if trajectory.reasoning and trajectory.reasoning.strip():
        _add_reasoning(turns, trajectory.reasoning)
    tools = _json_value(trajectory.tools, list, "tools")
    own_kwargs = _json_value(trajectory.chat_template_kwargs, dict, "chat_template_kwargs")
    return Conversation(
        turns=turns,
        first_scored=first_scored,
        tools=without_nulls(tools) or None,
        template_kwargs={**template_kwargs, **without_nulls(own_kwargs or {})},
        notes=tuple(notes),
    )


def without_nulls(value: Any) -> Any:
    """`value` without the null fields of its mappings, which Arrow adds to make structs alike."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def split_reasoning(content: str) -> tuple[str, str] | None:
    """The chain of thought and the answer of a `content` that closes the former once."""
    if content.count("</think>") != 1 or content.count("<think>") > 1:
        return None
    match = _CLOSED_REASONING.fullmatch(content)
    if match is None or "<think>" in match[1]:
        return None
    return match[1].strip("\n"), match[2].lstrip("\n")


def _side(
    value: str | Sequence[Mapping[str, Any]] | None, role: str, name: str, notes: dict[str, None]
) -> list[dict[str, Any]]:
    """A prompt or a response: text is one turn of `role`, a list is messages."""
    if value is None:
        value = ""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _turns(value, name, notes)


def _turns(messages: Any, name: str, notes: dict[str, None]) -> list[dict[str, Any]]:
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise BadMessagesError(f"{name} is {type(messages).__name__}, not a list")
    return [_turn(message, notes) for message in messages]


def _turn(message: Any, notes: dict[str, None]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadMessagesError(f"a message is {type(message).__name__}, not a mapping")
    given = {k: v for k, v in message.items() if v is not None and (k == "content" or v != [])}
    if "role" not in given and "from" in given:
        notes["from/value turns"] = None
        given["role"] = given.pop("from")
        if "value" in given:
            given["content"] = given.pop("value")
    role = given.get("role")
    if isinstance(role, str) and role in ROLE_ALIASES:
        given["role"] = ROLE_ALIASES[role]
        if role == "function_call":
            given["tool_calls"] = _parsed_calls(given.pop("content", None))
    elif not isinstance(role, str) or role not in ROLES:
        raise BadMessagesError(
            "unknown role", detail=f"unknown role {role!r}; expected one of {sorted(ROLES)}"
        )
    _join_parts(given, notes)
    if given["role"] == "assistant":
        _gather_reasoning(given, notes)
        if "tool_calls" in given:
            given["tool_calls"] = _checked_calls(given["tool_calls"], notes)
    content = given.get("content")
    if content is None and ("tool_calls" in given or "reasoning" in given):
        given["content"] = content = ""
    if not isinstance(content, str):
        kind = "missing" if content is None else f"{type(content).__name__}, not a string"
        raise BadMessagesError(f"{given['role']} content is {kind}")
    return given


def _join_parts(given: dict[str, Any], notes: dict[str, None]) -> None:
    """Content as a list of parts becomes text; parts of thinking become reasoning."""
    parts = given.get("content")
    if not isinstance(parts, list | tuple):
        return
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        for name, found in (("text", texts), ("thinking", thoughts)):
            if kind == name and isinstance(part, Mapping) and isinstance(part.get(name), str):
                found.append(part[name])
                break
        else:
            raise BadMessagesError(
                "content has a part that is not text",
                detail=f"{given['role']} content has a part of type {kind!r}, not text",
            )
    notes["lists of text parts"] = None
    given["content"] = "".join(texts)
    if thoughts:
        given.setdefault("thinking", "".join(thoughts))


def _gather_reasoning(given: dict[str, Any], notes: dict[str, None]) -> None:
    """Reasoning under `reasoning`, the name it had under `reasoning_field`; nothing if blank."""
    found = {name: given.pop(name) for name in REASONING_FIELDS if name in given}
    if not found:
        return
    for name, value in found.items():
        if not isinstance(value, str):
            raise BadMessagesError(f"assistant {name} is {type(value).__name__}, not a string")
    said = {name: value for name, value in found.items() if value.strip()}
    if not said:
        return
    if len({value.strip() for value in said.values()}) > 1:
        raise BadMessagesError(f"an assistant turn has different {' and '.join(said)}")
    name, reasoning = next(iter(said.items()))
    content = given.get("content")
    if isinstance(content, str) and "</think>" in content:
        inside = split_reasoning(content)
        if inside is not None and inside[0].strip() == reasoning.strip():
            notes[f"{name} that content repeats left out"] = None
            return
    given["reasoning"], given["reasoning_field"] = reasoning, name


def _add_reasoning(turns: list[dict[str, Any]], reasoning: str) -> None:
    """A row's reasoning column belongs to its last assistant turn."""
    for turn in reversed(turns):
        if turn["role"] == "assistant":
            if "reasoning" in turn or "</think>" in turn["content"]:
                raise BadMessagesError("the row has reasoning of its own and in its response")
            turn["reasoning"], turn["reasoning_field"] = reasoning, REASONING_FIELDS[0]
            return


def _parsed_calls(value: Any) -> list[Any]:
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadMessagesError("a function_call turn is not JSON") from error
    calls = calls if isinstance(calls, list) else [calls]
    return [
        call
        if "function" in call
        else {"type": "function", "function": call}
        if isinstance(call, Mapping)
        else call
        for call in calls
    ]


def _checked_calls(calls: Any, notes: dict[str, None]) -> list[dict[str, Any]]:
    """Tool calls without null fields; arguments that are a JSON object's text become one."""
    if not isinstance(calls, list | tuple):
        raise BadMessagesError(f"tool_calls is {type(calls).__name__}, not a list")
    checked = []
    for call in without_nulls(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise BadMessagesError("tool_calls without a function name")
        if not isinstance(function["name"], str):
            raise BadMessagesError("tool_calls with a function name that is not a string")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            parsed = _parsed_object(arguments)
            if parsed is not None:
                notes["tool arguments read from JSON text"] = None
                function = {**function, "arguments": parsed}
                call = {**call, "function": function} if "function" in call else function
        checked.append(call)
    return checked


def _parsed_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_value(value: Any, kind: type, name: str) -> Any:
    """`value`, or what its JSON text says, as a `kind`; None if there is nothing."""
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadMessagesError(f"{name} is not JSON") from error
    if value is None:
        return None
    if not isinstance(value, kind):
        raise BadMessagesError(f"{name} is {type(value).__name__}, not a {kind.__name__}")
    return value
