"""Single trajectories to look at: the best and the worst by RSR, their text and their tokens.

Reads only the row groups that hold them. Tokens are there only as text, so where the student's
tokenizer is at hand: a list of ids tells a reader nothing. Knows nothing of pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from rsr.engine.trajectory import USUAL_MESSAGES, USUAL_RESPONSES
from rsr.jobs.errors import UsageError
from rsr.jobs.evidence.observations import Observations
from rsr.jobs.run.calls import Calls, answers_in_order
from rsr.jobs.shards.columns import TrajectoryColumns, choose_columns
from rsr.jobs.shards.reader import iter_rows, read_trajectories
from rsr.jobs.shards.score_columns import TOKEN_COLUMNS
from rsr.jobs.shards.scored import USUAL_ID, ScoredTable
from rsr.jobs.shards.shard import Shard, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TURN_CHARS = 3_000
"""Shown of a turn; the rest is counted."""

MAX_TOKENS = 600
"""Shown of a trajectory's tokens; the rest is counted."""

UNDECODED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation. num_chars: of the whole; `text` may hold fewer."""

    role: str
    text: str
    num_chars: int


@dataclass(frozen=True, slots=True)
class Token:
    """One scored token. text: its part of the decoded response."""

    id: int
    text: str
    rank: int
    surprisal_nats: float


@dataclass(frozen=True, slots=True)
class Example:
    """One scored trajectory. turns: empty where the columns of its text cannot be found. tokens:
    None without token columns or tokenizer; at most MAX_TOKENS of `num_tokens`."""

    label: str
    teacher: str
    rsr: float
    mean_rank: float
    mean_surprisal_nats: float
    num_tokens: int
    correct: float | None
    turns: list[Turn]
    tokens: list[Token] | None


@dataclass(frozen=True, slots=True)
class Examples:
    """The trajectories that a report shows as text.

    best, worst: lowest and highest RSR first; no trajectory is in both. notes: what is not shown
    and why, in sentences.
    """

    best: list[Example]
    worst: list[Example]
    notes: list[str]


def find_examples(observations: Observations, *, num_each: int, tokenizer: str | None) -> Examples:
    """The `num_each` trajectories of lowest and of highest RSR; ties go by position.

    tokenizer: a folder or hub name; None takes the run's model where that is a folder that is
    there. Raises `UsageError` if a tokenizer that was asked for cannot be read, or is not the one
    the scores were made with.
    """
    ordered = observations.rows.sort("rsr", "row")
    num_each = min(num_each, max(1, len(ordered) // 2))
    best = ordered.head(num_each)
    worst = ordered.tail(min(num_each, len(ordered) - len(best))).reverse()
    reader = _Reader(observations.table, tokenizer)
    return Examples(
        best=[reader.example(row) for row in best.iter_rows(named=True)],
        worst=[reader.example(row) for row in worst.iter_rows(named=True)],
        notes=reader.notes,
    )


class _Reader:
    """Reads single rows of a table, whatever of a trajectory it still holds."""

    def __init__(self, table: ScoredTable, tokenizer: str | None) -> None:
        self._table = table
        self._names = set(table.schema.names)
        self._columns, no_text = _trajectory_columns(table)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        if {c.name for c in TOKEN_COLUMNS} <= self._names:
            self._tokenizer, no_tokens = student_tokenizer(table, tokenizer)
        else:
            no_tokens = "score with --token-columns to have them"
        lacking = {"No text": no_text, "No tokens": no_tokens}
        self.notes = [f"{what}: {why}." for what, why in lacking.items() if why is not None]

    def example(self, row: dict[str, Any]) -> Example:
        shard, index = _locate(self._table.shards, row["row"])
        return Example(
            label=self._label(shard, index),
            teacher=row["teacher"],
            rsr=row["rsr"],
            mean_rank=row["mean_rank"],
            mean_surprisal_nats=row["mean_surprisal_nats"],
            num_tokens=row["num_tokens"],
            correct=row.get("correct"),
            turns=self._turns(shard, index),
            tokens=self._tokens(shard, index),
        )

    def _label(self, shard: Shard, index: int) -> str:
        if USUAL_ID in self._names:
            return str(_value(shard, index, USUAL_ID))
        return f"{shard.name}, row {index:,}"

    def _turns(self, shard: Shard, index: int) -> list[Turn]:
        if self._columns is None:
            return []
        (trajectory,) = read_trajectories(Unit(shard, index, index + 1), self._columns)
        parts = {
            "messages": trajectory.messages,
            "prompt": trajectory.prompt,
            "response": trajectory.response,
            "text": trajectory.text,
        }
        pairs = [turn for kind, said in parts.items() for turn in _said(kind, said)]
        return [
            Turn(role, str(text)[:MAX_TURN_CHARS], len(str(text)))
            for role, text in pairs
            if text is not None
        ]

    def _tokens(self, shard: Shard, index: int) -> list[Token] | None:
        if self._tokenizer is None:
            return None
        ids, ranks, logprobs = (
            (_value(shard, index, column.name) or [])[:MAX_TOKENS] for column in TOKEN_COLUMNS
        )
        texts = token_texts(self._tokenizer, ids)
        return [
            # −0.0 would print as a surprisal below zero.
            Token(token_id, text, rank, 0.0 - logprob)
            for token_id, text, rank, logprob in zip(ids, texts, ranks, logprobs, strict=True)
        ]


def _said(kind: str, said: str | Sequence[Mapping[str, Any]] | None) -> list[tuple[str, Any]]:
    """Who said what: the messages, or the one text of this `kind`."""
    if said is None or isinstance(said, str):
        return [(kind, said)]
    return [(str(m.get("role", m.get("from"))), m.get("content", m.get("value"))) for m in said]


def _trajectory_columns(table: ScoredTable) -> tuple[TrajectoryColumns | None, str | None]:
    """The columns in which the run found its trajectories, or None and why they cannot be told.

    A file that another program wrote since says nothing of the run: then the usual columns.
    """
    if not table.identities:
        try:
            return choose_columns(table.schema, TrajectoryColumns(), table.path), None
        except UsageError:
            usual = ", ".join((*USUAL_MESSAGES, "prompt", *USUAL_RESPONSES, "text"))
            return None, (
                "another program has written the file since it was scored, so that it no longer "
                f"says which columns hold the text, and none of the usual ones ({usual}) holds it"
            )
    names: list[str] = []
    for identity in table.identities:
        columns = TrajectoryColumns(**identity.get("columns", {}))
        names = columns.names
        if names and set(names) <= set(table.schema.names):
            return columns, None
    gone = ", ".join(repr(name) for name in names if name not in table.schema.names)
    if not gone:
        return None, "the run that scored the file does not say which columns hold the text"
    return None, f"the columns that the run read are no longer in the file ({gone})"


def _locate(shards: Sequence[Shard], row: int) -> tuple[Shard, int]:
    for shard in shards:
        if row < shard.num_rows:
            return shard, row
        row -= shard.num_rows
    raise AssertionError("every observed row is in a shard")


def _value(shard: Shard, index: int, column: str) -> Any:
    (batch,) = iter_rows(shard.path, index, index + 1, [column])
    return batch.column(0)[0].as_py()


def student_tokenizer(
    table: ScoredTable, wanted: str | None
) -> tuple["PreTrainedTokenizerBase | None", str | None]:
    """The student's tokenizer, or None and why tokens cannot be shown as text."""
    identity = table.identities[0] if table.identities else {}
    model = wanted or identity.get("settings", {}).get("model")
    if model is None:
        return None, (
            "another program has written the file since it was scored, so that it no longer says "
            "which student's tokens they are; give --tokenizer"
        )
    # A hub name is not looked up unasked: a report needs no network.
    if wanted is None and not Path(model).is_dir():
        return None, f"the student {model} is not a folder that is there; give --tokenizer"
    # transformers takes seconds to import, and only token columns need it.
    from rsr.engine.chat import load_tokenizer
    from rsr.engine.student import tokenizer_sha256

    try:
        tokenizer = load_tokenizer(str(model))
    except ValueError as error:
        if wanted:
            raise UsageError(f"--tokenizer: {error}") from error
        return None, str(error)
    scored_with = (identity.get("model") or {}).get("tokenizer_sha256")
    if scored_with not in (None, tokenizer_sha256(tokenizer)):
        if wanted:
            raise UsageError(f"--tokenizer {wanted}: not the tokenizer of the scored run")
        return None, f"the tokenizer in {model} is no longer the run's"
    return tokenizer, None


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Each token's part of the decoded text; empty where a character is not complete yet.

    Decoded as growing prefixes: alone, a token loses its leading space in some tokenizers, and
    half a character in others.
    """
    texts, so_far = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        is_complete = not text.endswith(UNDECODED) or end == len(ids)
        texts.append(text[len(so_far) :] if is_complete else "")
        if is_complete:
            so_far = text
    return texts


def rows_by_status(table: ScoredTable, calls: Calls | None = None) -> dict[str, int]:
    """How many rows there are of each `rsr_status`, most first; counted where calls are made."""
    if calls is None:
        counts = _count_status(table)
    else:
        parts = answers_in_order(calls, partial(_count_status_of_shard, table), table.shards)
        counts = pl.concat(parts).group_by("rsr_status").agg(pl.col("len").sum())
    ordered = counts.sort(pl.col("len"), "rsr_status", descending=[True, False])
    return {str(status): count for status, count in ordered.iter_rows()}


def _count_status(table: ScoredTable) -> pl.DataFrame:
    return table.scan.group_by("rsr_status").len().collect(engine="streaming")


def _count_status_of_shard(table: ScoredTable, shard: Shard) -> pl.DataFrame:
    return _count_status(table.of(shard))
