"""How a conversation's reasoning and tool calls are handed to a particular template.

A template reads reasoning from one field, from another, from a part of a list, or only from the
content; arguments of tool calls as a mapping or as JSON text. Which of these forms a template
prints whole is found by trying (`layout_finder.py`).

Knows messages; knows nothing of templates.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsr.engine.messages import REASONING_FIELDS, split_reasoning
from rsr.engine.tags import REASONING_TAG, without_opener

AS_GIVEN = "as given"
PARTS = "as a part of a list"
FOLDED = "in content, between <think> tags"
UNOPENED = "in content, the opening tag left to the template"


@dataclass(frozen=True, slots=True)
class Form:
    """The form in which a template takes reasoning and tool calls.

    reasoning: a field's name or one of the constants above.

    json_arguments: arguments of tool calls as JSON text. null_content: content that is blank
    beside tool calls is null.
    """

    reasoning: str = AS_GIVEN
    json_arguments: bool = False
    null_content: bool = False

    def message(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """`turn` of a `Conversation` as this form of a message."""
        message = {k: v for k, v in turn.items() if k not in ("reasoning", "reasoning_field")}
        if turn["role"] != "assistant":
            return message
        if self.reasoning != AS_GIVEN:
            self._place_reasoning(message, turn.get("reasoning"))
        elif "reasoning" in turn:
            message[turn["reasoning_field"]] = turn["reasoning"]
        if "tool_calls" in turn:
            if self.json_arguments:
                message["tool_calls"] = [_with_json_arguments(call) for call in turn["tool_calls"]]
            if self.null_content and not turn["content"].strip():
                message["content"] = None
        return message

    def _place_reasoning(self, message: dict[str, Any], reasoning: str | None) -> None:
        content = message["content"]
        if reasoning is None:
            parts = split_reasoning(content)
            # Tags around nothing are content, not reasoning that another field could hold.
            if parts is None or not parts[0].strip():
                if self.reasoning == UNOPENED:
                    message["content"] = without_opener(content)
                return
            reasoning, content = parts
        if self.reasoning == PARTS:
            message["content"] = [
                {"type": "thinking", "thinking": reasoning},
                {"type": "text", "text": content},
            ]
        elif self.reasoning == FOLDED:
            message["content"] = fold(reasoning, content)
        elif self.reasoning == UNOPENED:
            message["content"] = without_opener(fold(reasoning, content))
        else:
            message[self.reasoning] = reasoning
            message["content"] = content

    @property
    def note(self) -> str:
        """What it does to reasoning, for a reader; "" if nothing."""
        if self.reasoning == AS_GIVEN:
            return ""
        if self.reasoning in (PARTS, FOLDED, UNOPENED):
            return f"reasoning {self.reasoning}"
        return f"reasoning under {self.reasoning}"


def forms(turns: Sequence[Mapping[str, Any]]) -> Iterator[Form]:
    """Every form in which these turns are worth trying, those that change least first."""
    reasonings = [AS_GIVEN]
    if any("reasoning" in t or has_reasoning_tag(t) for t in turns):
        given = {t.get("reasoning_field") for t in turns}
        reasonings += [name for name in REASONING_FIELDS if given != {name}]
        reasonings += [PARTS, FOLDED, UNOPENED]
    calls = [t for t in turns if "tool_calls" in t]
    blank = any(not t["content"].strip() for t in calls)
    for reasoning in reasonings:
        for json_arguments in (False, True) if calls else (False,):
            for null_content in (True, False) if blank else (False,):
                yield Form(reasoning, json_arguments, null_content)


def has_reasoning_tag(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and REASONING_TAG.search(turn["content"]) is not None


def fold(reasoning: str, content: str) -> str:
    """Reasoning and answer as one content, as Qwen3's and most other templates write it."""
    answer = content.lstrip("\n")
    return f"<think>\n{reasoning.strip(chr(10))}\n</think>" + (f"\n\n{answer}" if answer else "")


def _with_json_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        return dict(call)
    function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function
