"""What runs inside vLLM's worker: hidden states of scored rows to token scores.

A checkpoint's architecture is re-registered under its own name as a subclass that is a pooling
model and keeps its LM head. The name stays, because vLLM keys model-specific settings by it.
The pooler sees every chunk of every prefill step, sends the rows that predict scored tokens
through `rsr.kernels`, and keeps a few floats a token until the prompt is through. What leaves the
worker are a trajectory's sums, and single tokens only where a request asks for them.

Knows nothing of trajectories or chat templates: a request brings its scored spans along.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.registry import ModelRegistry
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from rsr.engine import metrics
from rsr.engine.head import HeadNotPlainError, HeadReader

POOLING_TASK: PoolingTask = "token_classify"
SPANS_KEY = "rsr_spans"
"""In `PoolingParams.extra_kwargs`: half-open [start, end) ranges of scored positions."""
DETAIL_END_KEY = "rsr_detail_end"
"""Likewise: scored positions before it come back one by one, those from it on as sums."""
LAST_TARGET_KEY = "rsr_last_target"
"""Likewise: the token after the request's last, which is scored but never computed."""
OPTIONS_KEY = "rsr"
"""In `VllmConfig.additional_config`: what `ScoringPooler` takes of `ScorerConfig`."""
TOKEN_COLUMNS = ("position", "rank", "logprob", "entropy")
"""Of one scored token; positions and ranks are exact in float32 below 2**24."""
SUM_COLUMNS = ("num_tokens", "position", *metrics.TERMS)
"""Sums over scored tokens. That of positions tells a lost or repeated token from none."""


class ScoringPooler(Pooler):
    """Scores each scheduled chunk at once; hidden states are never kept between chunks."""

    def __init__(self, head_reader: HeadReader, *, entropy: bool, rank_clip: int | None) -> None:
        super().__init__()
        self.head_reader = head_reader
        self._entropy = entropy
        self._rank_clip = rank_clip

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {POOLING_TASK}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        """(tokens of this step, D) to one flat float64 tensor per finished request.

        It holds `SUM_COLUMNS` over the scored positions from the request's detail end on, then
        `TOKEN_COLUMNS` of each one before it. Positions that a prefix cache supplied were never
        computed, so they are in neither; the caller compares with what it asked for.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        chunks = [
            _Chunk.of(params.extra_kwargs, int(seq_len), int(num_scheduled), token_ids)
            for params, seq_len, num_scheduled, token_ids in zip(
                pooling_metadata.pooling_params,
                cursor.seq_lens_cpu,
                cursor.num_scheduled_tokens_cpu,
                pooling_metadata.get_prompt_token_ids_cpu(),
                strict=True,
            )
        ]
        scores = self._score(hidden_states, chunks)
        finished: list[_ScoredRows] = []
        states = pooling_metadata.pooling_states
        is_finished = cursor.get_finished_mask()
        for chunk, state, part, is_last in zip(chunks, states, scores, is_finished, strict=True):
            # A preempted request starts over: what it scored from here on is scored again.
            kept = [rows.before(chunk.start + 1) for rows in state.hidden_states_cache]
            state.hidden_states_cache = [*kept, part]
            if is_last:
                finished.append(_ScoredRows.join(state.hidden_states_cache))
                state.clean()
        detail_ends = [c.detail_end for c, last in zip(chunks, is_finished, strict=True) if last]
        outputs = iter(self._reduce(finished, detail_ends))
        return [next(outputs) if is_last else None for is_last in is_finished]

    def _reduce(
        self, finished: list["_ScoredRows"], detail_ends: list[int]
    ) -> Iterator[torch.Tensor]:
        """What leaves the worker, for each finished request; one reduction for all of them."""
        if not finished:
            return
        fronts = [rows.before(end) for rows, end in zip(finished, detail_ends, strict=True)]
        rests = [
            rows.values[len(front.values) :] for rows, front in zip(finished, fronts, strict=True)
        ]
        values = torch.cat(rests)
        position, rank, logprob, entropy = values.double().unbind(dim=1)
        terms = metrics.token_terms(rank, logprob, entropy, self._rank_clip)
        lengths = torch.tensor([len(rest) for rest in rests], device=values.device)
        sums = torch.segment_reduce(
            torch.stack([torch.ones_like(position), position, *terms], dim=1),
            "sum",
            lengths=lengths,
            initial=0,
            unsafe=True,  # the checks would wait for the device
        )
        for row, front in zip(sums, fronts, strict=True):
            yield torch.cat([row, front.values.double().flatten()])

    def _score(self, hidden_states: torch.Tensor, chunks: list["_Chunk"]) -> list["_ScoredRows"]:
        """One head pass over all chunks' scored rows."""
        device = hidden_states.device
        offset, rows = 0, []
        for chunk in chunks:
            # The hidden state at position p predicts the token at p + 1.
            rows.append(chunk.positions - 1 - chunk.start + offset)
            offset += chunk.num_tokens
        targets = [chunk.targets for chunk in chunks]
        positions = torch.cat([chunk.positions for chunk in chunks])
        if not len(positions):
            empty = torch.empty(0, len(TOKEN_COLUMNS), device=device)
            return [_ScoredRows(chunk.positions, empty) for chunk in chunks]
        scored = hidden_states[torch.cat(rows).to(device, non_blocking=True)]
        scored, head = self.head_reader.prepare(scored)
        result = head.score(
            scored, torch.cat(targets).to(device, non_blocking=True), entropy=self._entropy
        )
        entropy = result.entropy
        if entropy is None:
            entropy = torch.full_like(result.logprob, float("nan"))
        columns = (positions.to(device).float(), result.rank.float(), result.logprob, entropy)
        parts = torch.stack(columns, dim=1).split([len(c.positions) for c in chunks])
        return [_ScoredRows(c.positions, part) for c, part in zip(chunks, parts, strict=True)]


@dataclass(frozen=True, slots=True)
class _ScoredRows:
    """Scored tokens of one request.

    positions: (T,) int64, ascending, on the CPU: to count them there keeps the device busy.
    values: (T, 4) float32 `TOKEN_COLUMNS` on the device.
    """

    positions: torch.Tensor
    values: torch.Tensor

    def before(self, end: int) -> "_ScoredRows":
        """Those at positions before `end`."""
        num_kept = int((self.positions < end).sum())
        return _ScoredRows(self.positions[:num_kept], self.values[:num_kept])

    @classmethod
    def join(cls, parts: list["_ScoredRows"]) -> "_ScoredRows":
        return cls(
            torch.cat([part.positions for part in parts]),
            torch.cat([part.values for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One request's part of a prefill step.

    start: position of its first token. num_tokens: how many are in this step.
    positions: (T,) int64 positions of the scored tokens that this step's hidden states predict.
    targets: (T,) int64, these tokens.
    detail_end: scored positions before it are wanted one by one.
    """

    start: int
    num_tokens: int
    positions: torch.Tensor
    targets: torch.Tensor
    detail_end: int

    @classmethod
    def of(
        cls, extra: dict[str, Any] | None, seq_len: int, num_tokens: int, token_ids: torch.Tensor
    ) -> "_Chunk":
        start = seq_len - num_tokens
        # vLLM's warm-up runs the pooler with requests that are not ours.
        extra = extra or {}
        spans = extra.get(SPANS_KEY, ())
        parts = [
            torch.arange(first, last)
            for span_start, span_end in spans
            if (first := max(span_start, start + 1)) < (last := min(span_end, seq_len + 1))
        ]
        positions = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        targets = token_ids[positions.clamp(max=len(token_ids) - 1)].long()
        if len(positions) and positions[-1] == len(token_ids):
            targets[-1] = extra[LAST_TARGET_KEY]
        return cls(start, num_tokens, positions, targets, extra.get(DETAIL_END_KEY, 0))


class ScoringModelMixin:
    """Marks a model class as ours, so that `ScoringWorker` can tell which class vLLM runs."""

    is_pooling_model = True
    pooler: ScoringPooler


_replaced: dict[str, Any] = {}
"""By architecture, the registry entries of this process that scoring models stand in for."""


def register_scoring_model(architecture: str) -> None:
    """Replace `architecture` in vLLM's registry by a scoring subclass of its own class."""
    if architecture not in _replaced:
        entry = ModelRegistry.models.get(architecture)
        if entry is None:
            raise RuntimeError(f"this vLLM has no architecture named {architecture!r}")
        ModelRegistry.register_model(architecture, _scoring_class(entry.load_model_cls()))
        _replaced[architecture] = entry


def unregister_scoring_models() -> None:
    """Give every architecture back to vLLM's own class, for engines that are opened next."""
    ModelRegistry.models.update(_replaced)
    _replaced.clear()


def _scoring_class(original: type[nn.Module]) -> type[nn.Module]:
    class ScoringModel(ScoringModelMixin, original):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            options = vllm_config.additional_config[OPTIONS_KEY]
            reader = HeadReader(self, options["logits_dtype"])
            self.pooler = ScoringPooler(
                reader, entropy=options["entropy"], rank_clip=options["rank_clip"]
            )

    ScoringModel.__name__ = ScoringModel.__qualname__ = f"Scoring{original.__name__}"
    return ScoringModel


class ScoringWorker:
    """Methods that vLLM adds to its worker class; `LLM.collective_rpc` calls them by name."""

    def describe_scoring(self) -> dict[str, str | None]:
        """The model's class, None where it is not ours; and what is wrong with its head."""
        worker: Any = self
        model, config = worker.get_model(), worker.vllm_config.model_config
        if not isinstance(model, ScoringModelMixin):
            return {"model_class": None, "head_problem": None}
        problem = None
        try:
            model.pooler.head_reader.check(config.get_hidden_size(), config.dtype, worker.device)
        except HeadNotPlainError as error:
            problem = str(error)
        return {"model_class": type(model).__name__, "head_problem": problem}
