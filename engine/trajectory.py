"""The nouns of the engine: a trajectory goes in, its score comes out.

Knows nothing of tokenizers, models or files; the arithmetic on scores is in `metrics.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class Status(StrEnum):
    """Why a row has the score it has: the values of the output column `rsr_status`."""

    OK = "ok"
    TRUNCATED = "truncated"
    """Scored over the first `max_model_len` tokens only."""
    NO_RESPONSE = "no_response"
    """Nothing to score: no assistant turn, or only empty ones."""
    BAD_MESSAGES = "bad_messages"
    """The row cannot be turned into this student's conversation faithfully."""
    TOO_LONG = "too_long"
    """Longer than `max_model_len`, and the run was told to skip such rows."""
    NOT_FINITE = "not_finite"
    """The student gives a token of it no finite log-probability: it overflowed, or is broken."""
    ENGINE_ERROR = "engine_error"
    """The engine failed, or took its process with it, on this row alone and more than once."""

    @property
    def is_scored(self) -> bool:
        return self in (Status.OK, Status.TRUNCATED)


USUAL_MESSAGES = ("messages", "conversations")
USUAL_RESPONSES = ("response", "completion")
"""What data sets call the two: of a file's columns and of a mapping's keys the first there is."""

BESIDE = ("system", "reasoning", "tools", "chat_template_kwargs")
"""Fields of `Trajectory` that go with messages, or with a prompt and a response."""


class NotATrajectoryError(ValueError):
    """A mapping that has none of the fields of a trajectory."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One problem with one worked answer, in exactly one of three forms.

    messages: conversation turns, each a mapping with `role` and `content` (or `from` and `value`);
        every assistant turn is a response.
    prompt, response: text before the scored text, and the scored text; or messages, of which the
        prompt's are context, its assistant turns too, and the response's are as in `messages`.
    text: scored as a whole.

    With the first two may come, of which a plain text has no use:

    system: a system prompt that is not among the messages.
    reasoning: the chain of thought of the last assistant turn, where it stands apart.
    tools: JSON schemas of the tools that the student may call, or their JSON text.
    chat_template_kwargs: further arguments of the chat template, or their JSON text.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[Mapping[str, Any]] | None = None
    response: str | Sequence[Mapping[str, Any]] | None = None
    text: str | None = None
    system: str | None = None
    reasoning: str | None = None
    tools: str | Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: str | Mapping[str, Any] | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """A row of a data set, whose keys are the fields above; its other keys are left alone.

        `conversations` may stand for `messages`, and `completion` for `response`. Of several forms
        the first that is there counts, as of the columns of a file. Raises `NotATrajectoryError` if
        there is none.
        """
        beside = {name: row[name] for name in BESIDE if name in row}
        for name in USUAL_MESSAGES:
            if name in row:
                return cls(messages=row[name], **beside)
        for name in USUAL_RESPONSES:
            if name in row and "prompt" in row:
                return cls(prompt=row["prompt"], response=row[name], **beside)
        if "text" in row:
            return cls(text=row["text"])
        raise NotATrajectoryError(
            "the row has no messages (or conversations), prompt and response (or completion), or "
            f"text; it has {', '.join(map(str, row)) or 'nothing'}"
        )

    @property
    def contradiction(self) -> str:
        """What of this row excludes what else of it, in words; "" if nothing does."""
        forms = {
            "messages": self.messages is not None,
            "prompt and response": self.prompt is not None or self.response is not None,
            "text": self.text is not None,
        }
        given = [form for form, is_given in forms.items() if is_given]
        if len(given) > 1:
            return f"the row has {', and '.join(given)}; expected one of them"
        beside = [name for name in BESIDE if getattr(self, name) is not None]
        if given == ["text"] and beside:
            return f"the row has {beside[0]} beside a text, which is scored as it stands"
        return ""


Row = Trajectory | Mapping[str, Any]
"""A trajectory, or a mapping that `Trajectory.of` makes one of."""


@dataclass(frozen=True, slots=True)
class EncodedTrajectory:
    """A trajectory as the student sees it.

    token_ids: the whole sequence, context and responses.
    spans: half-open ranges [start, end) of scored positions in `token_ids`, ascending and
        disjoint; position 0 is never scored, since nothing precedes it.
    status: OK or TRUNCATED; anything else means `token_ids` and `spans` are empty.
    detail: what was wrong with this row. reason: the same without what is this row's alone, to
        count rows by. hint: the option that may help, or "".
    notes: what was changed before rendering, each in the same few words for every such row.
    num_cut: tokens that the student would have read as well, were it not for `max_model_len`.
    more: further sequences of the same trajectory, where turns have histories of their own; the
        trajectory's sums run over all of them.
    step_starts: positions of tokens that begin a step of a response, where steps are
        looked for; some may lie outside of `spans`.
    num_prompt: tokens before the first response that are scored for the prompt's own sums.
    parts: of each scored position, one byte, the part of the trajectory as `parts.py` numbers
        them; empty where nobody asks for sums by part.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]
    status: Status = Status.OK
    detail: str = ""
    reason: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()
    num_cut: int = 0
    more: "tuple[EncodedTrajectory, ...]" = ()
    step_starts: tuple[int, ...] = ()
    num_prompt: int = 0
    parts: bytes = b""

    @classmethod
    def refused(
        cls, status: Status, detail: str, *, reason: str = "", hint: str = "", num_cut: int = 0
    ) -> "EncodedTrajectory":
        return cls([], [], status, detail, reason or detail, hint, num_cut=num_cut)

    @property
    def sequences(self) -> "tuple[EncodedTrajectory, ...]":
        """What the student reads, one by one; none if the row is refused."""
        return (self, *self.more) if self.token_ids else ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the student reads, of all sequences."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def scored_spans(self) -> list[tuple[int, int]]:
        """Half-open ranges of all positions to score: the prompt's, then the responses'."""
        return [(1, 1 + self.num_prompt), *self.spans] if self.num_prompt else self.spans

    @property
    def num_scored(self) -> int:
        """Response tokens, of all sequences."""
        return sum(end - start for s in self.sequences for start, end in s.spans)

    @property
    def num_head_rows(self) -> int:
        """Tokens that go through the LM head, of all sequences: the prompt's too, where scored."""
        return self.num_scored + sum(sequence.num_prompt for sequence in self.sequences)

    def spans_within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of `scored_spans` in [start, end)."""
        parts = [(max(first, start), min(last, end)) for first, last in self.scored_spans]
        return [(first, last) for first, last in parts if first < last]


@dataclass(frozen=True, slots=True)
class InspectedTrajectory:
    """A trajectory as text, for people to look at.

    text: what the student reads, sequences after one another with `SEQUENCE_BREAK` between; what
        would have been read, where that is known, if the row is refused. scored: character
        ranges [start, end) of `text` whose tokens are scored. encoded: status, detail and sizes.
    """

    text: str
    scored: list[tuple[int, int]]
    encoded: EncodedTrajectory


SEQUENCE_BREAK = "\n\n"
"""Between the sequences of an `InspectedTrajectory`; the student does not read it."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the student thinks of each scored token, in reading order; all arrays are (T,).

    token_ids: int32. ranks: int32, 1 is the student's first choice. logprobs: float32, nats.
    entropies: float32, nats, of the distribution the token was drawn from; NaN where entropy
    was not asked for.
    """

    token_ids: NDArray[np.int32]
    ranks: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    entropies: NDArray[np.float32]


def join_tokens(parts: Sequence[TokenScores]) -> TokenScores:
    """The token scores of a trajectory's sequences, one after another."""
    return TokenScores(
        *(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(TokenScores))
    )
