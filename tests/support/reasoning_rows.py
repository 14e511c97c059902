"""The ways in which public data sets and APIs write a row of reasoning.

Each style is a row's messages and what its last and its earlier assistant turns say: lists of
texts that must be scored, in order, white space aside.
"""

from dataclasses import dataclass
from typing import Any

THOUGHT = "Add 2 and 2.\nThat makes 4 (four)."
ANSWER = "It is **4**.\nSurely."
EARLIER_THOUGHT = "She greets me; greet her."
EARLIER_ANSWER = "Hello to you."
QUESTION = "What is 2 + 2?"
CALL_THOUGHT = "I must look it up."


@dataclass(frozen=True)
class Style:
    """messages: the row. said: for each assistant turn, the texts that it says, in order."""

    name: str
    messages: list[dict[str, Any]]
    said: list[list[str]]
    has_calls: bool = False
    has_system: bool = False


def _user(content: Any = QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any = ANSWER, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def _one(name: str, content: Any, said: list[str], /, **fields: Any) -> Style:
    return Style(name, [_user(), _assistant(content, **fields)], [said])


def _call(arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": "call12345", "type": "function", "function": function}


def _tool(arguments: Any, result: str, last: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return [
        _user("Weather in Zürich?"),
        _assistant("", tool_calls=[_call(arguments)], **fields),
        {"role": "tool", "content": result, "tool_call_id": "call12345", "name": "get_weather"},
        last,
    ]


THINK = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
EARLIER_THINK = f"<think>\n{EARLIER_THOUGHT}\n</think>\n\n{EARLIER_ANSWER}"
CALL_SAID = ["get_weather", "Zürich", "3"]
ARGUMENTS = {"city": "Zürich", "days": 3}
ARGUMENTS_TEXT = '{"city": "Zürich", "days": 3}'


def _rounds(first: dict[str, Any], last: dict[str, Any]) -> list[dict[str, Any]]:
    return [_user("Hi."), first, _user(), last]


STYLES = [
    _one("plain answer", ANSWER, [ANSWER]),
    _one("think newline", THINK, [THOUGHT, ANSWER]),
    _one("think tight", f"<think>{THOUGHT}</think>{ANSWER}", [THOUGHT, ANSWER]),
    Style(
        "think+system",
        [{"role": "system", "content": "Be brief."}, _user(), _assistant(THINK)],
        [[THOUGHT, ANSWER]],
        has_system=True,
    ),
    _one("trailing space", THINK + " \n", [THOUGHT, ANSWER]),
    _one("empty think", f"<think>\n\n</think>\n\n{ANSWER}", [ANSWER]),
    _one("no open tag", f"{THOUGHT}\n</think>\n\n{ANSWER}", [THOUGHT, ANSWER]),
    _one("cut-off think", f"<think>\n{THOUGHT}", [THOUGHT]),
    _one(
        "R1 <answer>",
        f"<think>\n{THOUGHT}\n</think>\n<answer>{ANSWER}</answer>",
        [THOUGHT, f"<answer>{ANSWER}</answer>"],
    ),
    _one(
        "OpenThoughts",
        f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n{ANSWER}",
        [f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n{ANSWER}"],
    ),
    _one("reasoning_content", ANSWER, [THOUGHT, ANSWER], reasoning_content=THOUGHT),
    _one("reasoning_c. '\\n\\nA'", "\n\n" + ANSWER, [THOUGHT, ANSWER], reasoning_content=THOUGHT),
    _one("reasoning", ANSWER, [THOUGHT, ANSWER], reasoning=THOUGHT),
    _one("thinking", ANSWER, [THOUGHT, ANSWER], thinking=THOUGHT),
    Style(
        "list parts",
        [
            _user([{"type": "text", "text": QUESTION}]),
            _assistant([{"type": "text", "text": THINK}]),
        ],
        [[THOUGHT, ANSWER]],
    ),
    _one("tool_calls []", ANSWER, [ANSWER], tool_calls=[]),
    _one(
        "null extras",
        ANSWER,
        [ANSWER],
        tool_calls=None,
        reasoning_content=None,
        name=None,
    ),
    Style(
        "2 rounds plain",
        _rounds(_assistant(EARLIER_ANSWER), _assistant()),
        [[EARLIER_ANSWER], [ANSWER]],
    ),
    Style(
        "2 rounds think all",
        _rounds(_assistant(EARLIER_THINK), _assistant(THINK)),
        [[EARLIER_THOUGHT, EARLIER_ANSWER], [THOUGHT, ANSWER]],
    ),
    Style(
        "2 rounds rc all",
        _rounds(
            _assistant(EARLIER_ANSWER, reasoning_content=EARLIER_THOUGHT),
            _assistant(reasoning_content=THOUGHT),
        ),
        [[EARLIER_THOUGHT, EARLIER_ANSWER], [THOUGHT, ANSWER]],
    ),
    Style(
        "2 rounds think last",
        _rounds(_assistant(EARLIER_ANSWER), _assistant(THINK)),
        [[EARLIER_ANSWER], [THOUGHT, ANSWER]],
    ),
    Style(
        "tool dict",
        _tool(ARGUMENTS, '{"sky": "clear", "t": "20 °C"}', _assistant()),
        [CALL_SAID, [ANSWER]],
        has_calls=True,
    ),
    Style(
        "tool, result 100",
        _tool(ARGUMENTS, "100", _assistant()),
        [CALL_SAID, [ANSWER]],
        has_calls=True,
    ),
    Style(
        "tool, rc on call",
        _tool(ARGUMENTS, "100", _assistant(), reasoning_content=CALL_THOUGHT),
        [[CALL_THOUGHT, *CALL_SAID], [ANSWER]],
        has_calls=True,
    ),
    Style(
        "tool str args",
        _tool(ARGUMENTS_TEXT, "100", _assistant()),
        [CALL_SAID, [ANSWER]],
        has_calls=True,
    ),
    Style(
        "tool + rc",
        _tool(
            ARGUMENTS,
            '{"sky": "clear"}',
            _assistant(reasoning_content=THOUGHT),
            reasoning_content=CALL_THOUGHT,
        ),
        [[CALL_THOUGHT, *CALL_SAID], [THOUGHT, ANSWER]],
        has_calls=True,
    ),
    Style(
        "from/value rows",
        [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": THINK}],
        [[THOUGHT, ANSWER]],
    ),
]
