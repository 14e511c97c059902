"""A layout: where a chat template puts what the messages of one shape of conversation say.

A conversation's *shape* is everything about it but its words. A row of that shape is rendered once
and laid against its layout: every character of it must be the template's or a message's, in the
same places, or the row is refused. Nothing is searched for, so nothing can be found in a wrong
place. `layout_finder.py` finds layouts.

Knows templates and messages; knows nothing of tokens, models or scores.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsr.engine.form import Form
from rsr.engine.messages import BadMessagesError
from rsr.engine.probes import PROBE, Pieces

MAX_END_CANDIDATES = 64
"""How often the text after a message may recur inside it before the row is given up."""


class ReasoningDroppedError(BadMessagesError):
    """The template prints a turn without its reasoning."""


@dataclass(frozen=True, slots=True)
class CharSpan:
    """One response in the rendered text: [start, end), and where its end-of-turn token ends."""

    start: int
    end: int
    end_of_turn: int


@dataclass(frozen=True, slots=True)
class Slot:
    """One message's place in the text.

    literal: what the template prints before it, from the slot before. body: what it prints for
    the message, without white space, probe words in the place of words. is_whole: the body is the
    message's own text, nothing added or taken away. end_of_turn: characters from its end to the
    end of the end-of-turn token. prompted: what the generation prompt prints after `literal`, which
    is not the response's where a message itself begins with exactly this.
    """

    literal: str
    turn: int
    body: str
    is_scored: bool
    is_whole: bool
    end_of_turn: int
    prompted: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A shape's text: slots, and what follows the last; `form` is what the template was given."""

    form: Form
    slots: tuple[Slot, ...]
    tail: str

    def match(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        pieces: Sequence[Pieces],
    ) -> list[CharSpan]:
        """Where the scored slots stand in `text`; raises `BadMessagesError` unless all fits.

        messages: in the layout's form. pieces: of the turns that they were made of.
        """
        spans, position = [], 0
        followers = [*(slot.literal for slot in self.slots), self.tail][1:]
        for slot, follower in zip(self.slots, followers, strict=True):
            if not text.startswith(slot.literal, position):
                raise rewritten(messages[slot.turn]["role"], slot.turn)
            start = position + len(slot.literal)
            is_last = slot is self.slots[-1]
            position = _place(slot, text, start, follower, is_last, messages, pieces)
            if slot.is_scored:
                if text.startswith(slot.prompted, start, position):
                    start += len(slot.prompted)
                spans.append(CharSpan(start, position, position + slot.end_of_turn))
        if len(text) - position != len(self.tail) or not text.endswith(self.tail):
            raise rewritten(messages[-1]["role"], len(messages) - 1)
        return spans


def _place(
    slot: Slot,
    text: str,
    start: int,
    follower: str,
    is_last: bool,
    messages: Sequence[Mapping[str, Any]],
    pieces: Sequence[Pieces],
) -> int:
    """Where the message of `slot` ends in `text`, which it must fill from `start` to `follower`."""
    message = messages[slot.turn]
    content = message.get("content")
    if slot.is_whole and isinstance(content, str):
        for variant in _variants(content, message["role"]):
            end = start + len(variant)
            fits = text.startswith(variant, start) and text.startswith(follower, end)
            if fits and (not is_last or end + len(follower) == len(text)):
                return end
    filled = _fill(slot, pieces)
    for end in _possible_ends(text, start, follower, is_last):
        if squeeze(text[start:end]) == filled:
            return end
    raise rewritten(message["role"], slot.turn)


def _variants(content: str, role: str) -> Iterator[str]:
    """How a template may print a content: as it is, trimmed, as the inside of a JSON string."""
    yield content
    yield content.strip()
    yield content.rstrip()
    yield content.lstrip()
    if role != "assistant":
        for text in (content, content.strip()):
            yield escaped(text)


def _possible_ends(text: str, start: int, follower: str, is_last: bool) -> Iterator[int]:
    if is_last or not follower:
        yield len(text) - len(follower)
        return
    found = text.find(follower, start)
    for _ in range(MAX_END_CANDIDATES):
        if found < 0:
            return
        yield found
        found = text.find(follower, found + 1)


def _fill(slot: Slot, pieces: Sequence[Pieces]) -> str:
    return PROBE.sub(lambda m: squeeze(pieces[int(m[1])].words[int(m[2])]), slot.body)


def squeeze(text: str) -> str:
    """`text` without white space, which templates trim and add as they like."""
    return "".join(text.split())


def escaped(text: str) -> str:
    """The inside of `text` as a JSON string, as `tojson` prints it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def rewritten(role: str, index: int) -> BadMessagesError:
    article = "an" if role == "assistant" else "a"
    return BadMessagesError(
        f"the chat template drops or rewrites {article} {role} turn",
        detail=f"the chat template drops or rewrites {role} turn {index}",
        hint="try --render verbatim" if role == "assistant" else "",
    )


def dropped(index: int) -> ReasoningDroppedError:
    return ReasoningDroppedError(
        "the chat template drops the reasoning of an assistant turn",
        detail=f"the chat template drops the reasoning of assistant turn {index}",
        hint="try --render verbatim, or --turns last if only earlier turns lose theirs",
    )
