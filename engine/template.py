"""A student's chat template: messages to text, and where in it each response stands.

The spans are found in the rendered text, never in the ids, and every one is checked against the
message it came from, because chat templates may drop, trim or rewrite turns; a row that does not
survive its template is refused, not scored wrongly.

Knows Jinja templates; knows nothing of tokens, models, scores or files.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Where chat APIs put an assistant's chain of thought beside its `content`."""
TEMPLATE_DATE = datetime(2024, 7, 26)
"""What templates that print today's date print here (Llama 3.1's own fallback date), so that a
score does not depend on the day it was computed."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPENED_REASONING = re.compile(r"<think(ing)?>\s*$")


class BadMessagesError(ValueError):
    """These messages cannot be rendered faithfully; the text says why."""


@dataclass(frozen=True, slots=True)
class CharSpan:
    """One response in the rendered text: [start, end), and where its end-of-turn token ends."""

    start: int
    end: int
    end_of_turn: int


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> str | None:
    """The Jinja text behind `ScorerConfig.chat_template`; None scores text without one.

    Raises `ValueError` if `choice` is a path that cannot be read.
    """
    if choice == "none":
        return None
    if choice == "auto":
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    try:
        return Path(choice).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"chat_template={choice!r}: expected 'auto', 'none' or a readable Jinja file ({error})"
        ) from error


class ChatTemplate:
    """A Jinja chat template, and where its responses stand in what it renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._template = template
        self._variables = {
            **tokenizer.special_tokens_map,
            "strftime_now": TEMPLATE_DATE.strftime,
        }
        self._marks_responses = bool(_GENERATION_TAG.search(template))
        self._control_tokens = _control_token_pattern(tokenizer)
        self._frame = lru_cache(maxsize=None)(self._probe_frame)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[CharSpan]]:
        """The conversation as text, and its non-empty responses in order.

        Raises `BadMessagesError` if a message is malformed, or if what the template made of it
        is not what it said.
        """
        turns = [self._checked_message(m) for m in messages]
        rendered, marks = self._render(turns)
        self._check_context(turns, rendered)
        if self._marks_responses:
            starts: Iterator[int | None] = self._marked_starts(turns, marks)
        else:
            starts = self._derived_starts(turns, rendered)
        spans, cursor = [], 0
        for index, start in zip(_assistant_turns(turns), starts, strict=True):
            span = self._locate(turns, index, rendered, cursor, start)
            cursor = span.end
            spans.append(span)
        return rendered, [s for s in spans if s.end > s.start]

    def _checked_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message without its null fields; refused unless role and content are usable."""
        if not isinstance(message, Mapping):
            raise BadMessagesError(f"a message is {type(message).__name__}, not a mapping")
        turn = {key: value for key, value in message.items() if value is not None}
        role = turn.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadMessagesError(f"unknown role {role!r}; expected one of {sorted(ROLES)}")
        if "content" not in turn and turn.get("tool_calls"):
            turn["content"] = ""
        for key in ("content", *REASONING_FIELDS):
            if key != "content" and key not in turn:
                continue
            value = turn.get(key)
            if not isinstance(value, str):
                raise BadMessagesError(f"{role} {key} is {type(value).__name__}, not a string")
            require_encodable(value)
            if self._control_tokens and (found := self._control_tokens.search(value)):
                raise BadMessagesError(
                    f"{role} {key} contains this student's control token {found.group()!r}"
                )
        return turn

    def _render(
        self, turns: list[dict[str, Any]], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            rendered, marks = render_jinja_template(
                [turns],
                chat_template=self._template,
                return_assistant_tokens_mask=self._marks_responses,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        # Templates run arbitrary expressions over the row: what they raise is not enumerable.
        except Exception as error:
            raise BadMessagesError(f"the chat template refused it: {error}") from error
        return rendered[0], marks[0] if marks else []

    @staticmethod
    def _check_context(turns: list[dict[str, Any]], rendered: str) -> None:
        """Every non-assistant message must stand in the text, in order."""
        squeezed, cursor = _squeeze(rendered), 0
        for turn in turns:
            if turn["role"] == "assistant":
                continue
            content = _squeeze(turn["content"])
            found = squeezed.find(content, cursor)
            if found < 0:
                raise BadMessagesError(f"the chat template drops or rewrites a {turn['role']} turn")
            cursor = found + len(content)

    def _marked_starts(
        self, turns: list[dict[str, Any]], marks: list[tuple[int, int]]
    ) -> Iterator[int]:
        if len(marks) != len(_assistant_turns(turns)):
            raise BadMessagesError(
                f"the chat template marks {len(marks)} responses, the row has "
                f"{len(_assistant_turns(turns))}"
            )
        yield from (start for start, _ in marks)

    def _derived_starts(self, turns: list[dict[str, Any]], rendered: str) -> Iterator[int | None]:
        """Where each response begins: after what a generation prompt at its place renders to.

        None where the template cannot render the turns before it alone.
        """
        for index in _assistant_turns(turns):
            try:
                prompt, _ = self._render(turns[:index], add_generation_prompt=True)
            except BadMessagesError:
                yield None
                continue
            # A template that opens the reasoning for the student: still the student's words.
            prompt = _OPENED_REASONING.sub("", prompt)
            yield len(prompt) if rendered.startswith(prompt) else None

    def _locate(
        self,
        turns: list[dict[str, Any]],
        index: int,
        rendered: str,
        cursor: int,
        start: int | None,
    ) -> CharSpan:
        """The response of `turns[index]`, verified against its message."""
        turn = turns[index]
        fields = tuple(f for f in ("content", *REASONING_FIELDS) if f in turn)
        frame = self._frame(fields)
        starts = (
            [start] if start is not None else _occurrences_after(rendered, frame.header, cursor)
        )
        for candidate in starts:
            for end in _possible_ends(rendered, candidate, frame.end_of_turn):
                if frame.holds(turn, rendered[candidate:end]):
                    visible_end = end + len(frame.end_of_turn.rstrip())
                    return CharSpan(candidate, end, visible_end)
        raise BadMessagesError(f"the chat template drops or rewrites assistant turn {index}")

    def _probe_frame(self, fields: tuple[str, ...]) -> "TurnFrame":
        """What the template puts around and between an assistant turn's fields.

        Read off two renderings of a message made of sentinels: as the last turn and in between,
        which many templates treat differently.
        """
        user = {"role": "user", "content": "Q"}
        sentinels = {field: f"Sentinel{number}" for number, field in enumerate(fields)}
        probe = {"role": "assistant", **sentinels}
        prompt, _ = self._render([user], add_generation_prompt=True)
        bare, _ = self._render([user])
        header = _OPENED_REASONING.sub("", prompt[len(bare) :]) if prompt.startswith(bare) else ""
        prompt = _OPENED_REASONING.sub("", prompt)

        bodies, tails = [], []
        for turns in ([user, probe], [user, probe, user, probe]):
            text, _ = self._render(turns)
            if not text.startswith(prompt):
                continue
            ends = [text.find(s) + len(s) for s in sentinels.values() if s in text]
            if not ends:
                continue
            bodies.append(_squeeze(text[len(prompt) : max(ends)]))
            tails.append(text[max(ends) :])
        return TurnFrame(
            header=header,
            end_of_turn=_common_prefix(tails),
            bodies=tuple(b for b in bodies if all(s in b for s in sentinels.values())),
            sentinels=sentinels,
        )


@dataclass(frozen=True, slots=True)
class TurnFrame:
    """An assistant turn's fixed parts under one template, for one set of message fields.

    header: from the end of the turn before to the start of the response.
    end_of_turn: what follows every response; "" if there is nothing constant.
    bodies: squeezed responses with each field's sentinel in its place, one for each way in
        which the template lays the fields out; empty if it drops one of them.
    """

    header: str
    end_of_turn: str
    bodies: tuple[str, ...]
    sentinels: dict[str, str]

    def holds(self, turn: Mapping[str, Any], response: str) -> bool:
        """Whether `response` says what `turn` says, white space and the frame aside."""
        squeezed = _squeeze(response)
        if turn.get("tool_calls"):
            return _squeeze(turn["content"]) in squeezed and all(
                name in response for name in _tool_names(turn["tool_calls"])
            )
        # Content that brings its own reasoning tags meets a template that would add them.
        if len(self.sentinels) == 1 and squeezed == _squeeze(turn["content"]):
            return True
        return any(squeezed == self._filled(body, turn) for body in self.bodies)

    def _filled(self, body: str, turn: Mapping[str, Any]) -> str:
        pattern = "|".join(map(re.escape, self.sentinels.values()))
        by_sentinel = {s: _squeeze(turn[field]) for field, s in self.sentinels.items()}
        return re.sub(pattern, lambda match: by_sentinel[match.group()], body)


def _control_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Matches text that the tokenizer would read as a control token, not as text."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    return (
        re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        if (tokens)
        else None
    )


def require_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadMessagesError(f"not valid Unicode: {error.reason}") from error


def _assistant_turns(turns: list[dict[str, Any]]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]


def _squeeze(text: str) -> str:
    """`text` without white space, which templates trim and add as they like."""
    return "".join(text.split())


def _tool_names(tool_calls: Any) -> list[str]:
    try:
        names = [call.get("function", call)["name"] for call in tool_calls]
    except (AttributeError, KeyError, TypeError) as error:
        raise BadMessagesError("tool_calls without a function name") from error
    if not all(isinstance(name, str) for name in names):
        raise BadMessagesError("tool_calls with a function name that is not a string")
    return names


def _occurrences_after(text: str, part: str, cursor: int) -> Iterator[int]:
    """Positions just after each occurrence of `part` in `text` from `cursor` on."""
    if not part:
        return
    while (found := text.find(part, cursor)) >= 0:
        cursor = found + len(part)
        yield cursor


def _possible_ends(text: str, start: int, end_of_turn: str) -> Iterator[int]:
    """Where a response from `start` on may end: before each end-of-turn, else at the end."""
    if not end_of_turn:
        yield len(text)
        return
    found = text.find(end_of_turn, start)
    while found >= 0:
        yield found
        found = text.find(end_of_turn, found + 1)


def _common_prefix(texts: list[str]) -> str:
    if not texts:
        return ""
    shortest, longest = min(texts), max(texts)
    for position, char in enumerate(shortest):
        if longest[position] != char:
            return shortest[:position]
    return shortest
