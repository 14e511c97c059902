"""One prefill step inside a worker: hidden states to the scores of the tokens that they predict.

A request may take several steps, and several requests share one. Scored rows of all of them go
through the LM head together; a few floats a token are kept until the request's last step, which
gives what leaves the worker. Knows torch and the rank kernel's results; imports no vLLM.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from rsr.engine import metrics
from rsr.engine.wire import TOKEN_COLUMNS, ScoredTokens, pack_scores
from rsr.kernels import RankLogprob


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
            request.positions[first:last], request.targets[first:last], request.detail_end
        )
        return cls(start, num_tokens, is_last, scored)


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Scored tokens of one request.

    positions: (T,) int32, ascending, on the host: to count them there keeps the device busy.
    values: (T, 4) float32 `TOKEN_COLUMNS` on the device.
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

    def __init__(self, head_source: HeadSource, *, entropy: bool, rank_clip: int | None) -> None:
        self._head_source = head_source
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
        answers = self._reduce(finished)
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
            values = torch.empty(0, len(TOKEN_COLUMNS), device=device)
        else:
            index, targets, position = (
                torch.from_numpy(np.concatenate(parts)).to(device)
                for parts in (rows, [chunk.scored.targets for chunk in chunks], positions)
            )
            scored, head = self._head_source.prepare(hidden_states[index])
            rank, logprob, entropy = head.score(scored, targets, entropy=self._entropy)
            if entropy is None:
                entropy = torch.full_like(logprob, float("nan"))
            values = torch.stack((position.float(), rank.float(), logprob, entropy), dim=1)
        return [
            ScoredRows(part, new) for part, new in zip(positions, values.split(counts), strict=True)
        ]

    def _reduce(self, finished: list[tuple[list[ScoredRows], int]]) -> Iterator[torch.Tensor]:
        """What leaves the worker, of each request's rows; one reduction for all of them."""
        if not finished:
            return
        parts = [[rows.split_at(end) for rows in kept] for kept, end in finished]
        rests = [torch.cat([rest.values for _, rest in request]) for request in parts]
        values = torch.cat(rests)
        position, rank, logprob, entropy = values.double().unbind(dim=1)
        terms = metrics.token_terms(rank, logprob, entropy, self._rank_clip)
        sums = torch.segment_reduce(
            torch.stack([torch.ones_like(position), position, *terms], dim=1),
            "sum",
            lengths=torch.tensor([len(rest) for rest in rests], device=values.device),
            initial=0,
            unsafe=True,  # the checks would wait for the device
        )
        for row, request in zip(sums, parts, strict=True):
            yield pack_scores(row, torch.cat([front.values for front, _ in request]))
