"""One prefill step inside a worker: hidden states to the scores of the tokens that they predict.

A request may take several steps, and several requests share one. Scored rows of all of them go
through the LM head together; a few floats a token are kept until the request's last step, which
gives what leaves the worker. Knows torch and the rank kernel's results; imports no vLLM.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from rsr.engine import metric_sums, metrics
from rsr.engine.parts import NUM_PARTS
from rsr.engine.wire import SUM_COLUMNS, TOKEN_COLUMNS, ScoredTokens, pack_scores
from rsr.kernels import RankLogprob

BLOCK_ROWS = 256
"""Rows that are reduced together: two levels take 65,536 tokens; short rows have few to fill."""


ROW_COLUMNS = (*TOKEN_COLUMNS, "part")
"""Columns of one scored token inside a worker; the last is the part of its trajectory."""


class Head(Protocol):
    """An LM head that ranks targets: `rsr.kernels.rank_logprob` with its weight built in."""

    def score(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, *, entropy: bool
    ) -> RankLogprob: ...


class HeadSource(Protocol):
    """A model that says what its head is, and what becomes of hidden states on the way there."""

    def prepare(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Head]: ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's part of a prefill step.

    start: position of its first token. num_tokens: how many of its tokens are in this step.
    is_last: whether the request is through with it.
    scored: the scored tokens that this step's hidden states predict.
    """

    start: int
    num_tokens: int
    is_last: bool
    scored: ScoredTokens

    @classmethod
    def of(cls, request: ScoredTokens, start: int, num_tokens: int, *, is_last: bool) -> Self:
        """The part of `request` from position `start` on."""
        # The hidden state at position p predicts the token at p + 1.
        first, last = np.searchsorted(request.positions, (start + 1, start + num_tokens + 1))
        scored = ScoredTokens(
            request.positions[first:last],
            request.targets[first:last],
            request.parts[first:last],
            request.detail_end,
        )
        return cls(start, num_tokens, is_last, scored)


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Scored tokens of one request.

    positions: (T,) int32, ascending, on the host: to count them there keeps the device busy.
    values: (T, 5) float32 `ROW_COLUMNS` on the device.
    """

    positions: NDArray[np.int32]
    values: torch.Tensor

    def split_at(self, position: int) -> tuple[Self, Self]:
        """Those before `position`, and those from it on."""
        num_before = int(np.searchsorted(self.positions, position))
        before, rest = self.positions[:num_before], self.positions[num_before:]
        cls = type(self)
        return cls(before, self.values[:num_before]), cls(rest, self.values[num_before:])


class StepScorer:
    """Scores the chunks of one prefill step; keeps no hidden state between steps."""

    def __init__(
        self,
        head_source: HeadSource,
        *,
        entropy: bool,
        rank_clip: int | None,
        has_metrics: bool = True,
    ) -> None:
        """has_metrics: also form the sums of `metric_sums.SUMS`."""
        self._head_source = head_source
        self._has_metrics = has_metrics
        self._entropy = entropy
        self._rank_clip = rank_clip

    def score(
        self,
        hidden_states: torch.Tensor,
        chunks: Sequence[Chunk],
        kept: Sequence[list[ScoredRows]],
    ) -> list[torch.Tensor | None]:
        """(tokens of this step, D) to what each chunk's request has to say after it.

        That is None until a request's last chunk, and then a tensor that `PrefillScores.unpack`
        reads. kept: for each chunk, the rows of its request's earlier steps; this step's are
        added, or, after its last chunk, all removed. Positions that a prefix cache supplied were
        never computed, so they are in no answer; the caller compares with what it asked for.
        """
        finished = []
        for chunk, rows, new in zip(
            chunks, kept, self._pass_head(hidden_states, chunks), strict=True
        ):
            # A preempted request starts over: what it scored from here on is scored again.
            rows[:] = [*(old.split_at(chunk.start + 1)[0] for old in rows), new]
            if chunk.is_last:
                finished.append((rows[:], chunk.scored.detail_end))
                rows.clear()
        answers = self._answer(finished)
        return [next(answers) if chunk.is_last else None for chunk in chunks]

    def _pass_head(self, hidden_states: torch.Tensor, chunks: Sequence[Chunk]) -> list[ScoredRows]:
        """One pass over all chunks' scored rows."""
        device = hidden_states.device
        positions = [chunk.scored.positions for chunk in chunks]
        offset, rows = 0, []
        for chunk in chunks:
            rows.append(chunk.scored.positions - 1 - chunk.start + offset)
            offset += chunk.num_tokens
        counts = [len(part) for part in positions]
        if not sum(counts):
            values = torch.empty(0, len(ROW_COLUMNS), device=device)
        else:
            targets = [chunk.scored.targets for chunk in chunks]
            parts = [chunk.scored.parts for chunk in chunks]
            columns = (rows, targets, positions, parts)
            plan = np.stack([np.concatenate(column).astype(np.int64) for column in columns])
            index, target, position, part = _to_device(plan, device)
            scored, head = self._head_source.prepare(hidden_states[index])
            rank, logprob, entropy = head.score(scored, target, entropy=self._entropy)
            if entropy is None:
                entropy = torch.full_like(logprob, float("nan"))
            values = torch.stack(
                (position.float(), rank.float(), logprob, entropy, part.float()), dim=1
            )
        return [
            ScoredRows(part, new) for part, new in zip(positions, values.split(counts), strict=True)
        ]

    def _answer(self, finished: list[tuple[list[ScoredRows], int]]) -> Iterator[torch.Tensor]:
        """What leaves the worker, of each request's rows; one reduction for all of them."""
        if not finished:
            return iter(())
        parts = [[rows.split_at(end) for rows in kept] for kept, end in finished]
        shown = slice(len(TOKEN_COLUMNS))
        fronts = [[front.values[:, shown] for front, _ in request] for request in parts]
        rests = [[rest.values for _, rest in request] for request in parts]
        reduced = reduce_rows(
            rests, self._rank_clip, has_entropy=self._entropy, has_metrics=self._has_metrics
        )
        return pack_scores(reduced, fronts)


def reduce_rows(
    requests: Sequence[Sequence[torch.Tensor]],
    rank_clip: int | None,
    *,
    has_entropy: bool,
    has_metrics: bool = True,
) -> torch.Tensor:
    """Each request's (T, 5) `ROW_COLUMNS`, in pieces, to (requests, len(REST_COLUMNS)) float64.

    Blocks of fixed size are reduced, then blocks of their results: a long row is as parallel as
    many short ones, no atomic addition makes runs differ, and a request's sums depend on its rows
    alone.
    """
    padding = requests[0][0].new_zeros(BLOCK_ROWS, len(ROW_COLUMNS))
    blocks, num_blocks = _in_blocks(requests, padding)
    position, rank, logprob, entropy, part = blocks.double().unbind(dim=-1)
    # Padding is the only thing at position 0, adds 0 to every sum and is finite.
    is_token = (position > 0).double()
    terms = metrics.token_terms(rank, logprob, entropy, rank_clip)
    more_terms: list[torch.Tensor] = []
    if has_metrics:
        is_response = metric_sums.is_response(part)
        terms = [term * is_response for term in terms]
        part = part.masked_fill(position == 0, -1)
        more_terms = _metric_terms(metrics.clipped(rank, rank_clip), -logprob, entropy, part)
    is_scored = metrics.is_finite(logprob, entropy if has_entropy else None)
    not_finite = position.masked_fill(is_scored, math.inf)
    sums = torch.stack([is_token, position, *terms], dim=-1)
    reduced = _reduce(torch.cat([sums, *more_terms, not_finite[..., None]], dim=-1))
    padding = reduced.new_zeros(BLOCK_ROWS, reduced.shape[1])
    padding[:, -1] = math.inf
    while max(num_blocks) > 1:
        parts = reduced.split(num_blocks)
        blocks, num_blocks = _in_blocks([[part] for part in parts], padding)
        reduced = _reduce(blocks)
    if not has_metrics:
        nothing = reduced.new_zeros(len(reduced), len(metric_sums.SUMS))
        reduced = torch.cat([reduced[:, :-1], nothing, reduced[:, -1:]], dim=1)
    return reduced


def _metric_terms(
    ranks: torch.Tensor, surprisals: torch.Tensor, entropies: torch.Tensor, parts: torch.Tensor
) -> list[torch.Tensor]:
    """(blocks, BLOCK_ROWS, …) terms of `metric_sums.SUMS`, all but the first 0 for padding."""
    numbers = torch.arange(NUM_PARTS, device=parts.device)
    terms = metric_sums.token_terms(ranks, surprisals, entropies, parts)
    return [
        torch.stack(terms, dim=-1),
        *metric_sums.part_terms(ranks, surprisals, parts, numbers),
    ]


def _reduce(blocks: torch.Tensor) -> torch.Tensor:
    """(blocks, BLOCK_ROWS, C) to one row for each block: sums, and the smallest of the last column.

    In two sums: how wide a table is decides in which order torch adds up a column, and the first
    columns must not depend on whether others are asked for.
    """
    first, more, not_finite = blocks.tensor_split((len(SUM_COLUMNS), blocks.shape[2] - 1), dim=2)
    return torch.cat([first.sum(dim=1), more.sum(dim=1), not_finite.amin(dim=1)], dim=1)


def _in_blocks(
    requests: Sequence[Sequence[torch.Tensor]], padding: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    """(blocks, BLOCK_ROWS, C) of requests' rows (T, C), given in pieces, and each one's blocks.

    padding: (BLOCK_ROWS, C), of which each request gets what fills its last block, or its only one.
    """
    parts: list[torch.Tensor] = []
    num_blocks = []
    for pieces in requests:
        num_rows = sum(len(piece) for piece in pieces)
        num_blocks.append(max(1, -(-num_rows // BLOCK_ROWS)))
        parts += [*pieces, padding[: num_blocks[-1] * BLOCK_ROWS - num_rows]]
    return torch.cat(parts).unflatten(0, (-1, BLOCK_ROWS)), num_blocks


def _to_device(array: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """One copy, for which the host does not wait if it need not."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
