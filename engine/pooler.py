"""What runs inside vLLM's worker: hidden states of scored rows to token scores.

A checkpoint's architecture is re-registered under its own name as a subclass that is a pooling
model and keeps its LM head. The name stays, because vLLM keys model-specific settings by it.
The pooler sees every chunk of every prefill step, sends the rows that predict scored tokens
through `rsr.kernels.rank_logprob`, and keeps a few floats a token until the prompt is through.

Together with `prefill.py` this is the only place that names vLLM. Knows nothing of trajectories
or chat templates: a request brings its scored spans along.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.registry import ModelRegistry
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from rsr.engine.config import LogitsDtype
from rsr.kernels import rank_logprob

POOLING_TASK: PoolingTask = "token_classify"
SPANS_KEY = "rsr_spans"
"""In `PoolingParams.extra_kwargs`: half-open [start, end) ranges of scored positions."""
OPTIONS_KEY = "rsr"
"""In `VllmConfig.additional_config`: keyword arguments of `ScoringPooler`."""

OUTPUT_COLUMNS = ("position", "rank", "logprob", "entropy")
"""Columns of a request's (T, 4) float32 output; positions and ranks are exact below 2**24."""


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head as the model itself applies it: z = scale · cap(x · weightᵀ + bias).

    weight: (V, D), padding rows cut off. bias: (V,) or None. soft_cap: None leaves logits
    uncapped.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    soft_cap: float | None


class _HeadCall(BaseException):
    """Carries the arguments of a model's call of its logits processor out of it."""

    def __init__(
        self, weight: torch.Tensor, hidden_states: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self.weight, self.hidden_states, self.bias = weight, hidden_states, bias


class HeadReader:
    """Lets a model say what its head is, instead of guessing by attribute names.

    Gemma 2 multiplies by its embedding, Granite scales, MiniCPM divides its hidden states
    first: whatever `compute_logits` does up to its `LogitsProcessor` is done here too, by
    calling it and stopping it there.
    """

    def __init__(self, model: Any) -> None:
        processors = [m for m in model.modules() if isinstance(m, LogitsProcessor)]
        if len(processors) != 1:
            raise RuntimeError(
                f"{type(model).__name__} has {len(processors)} logits processors; expected one"
            )
        self._model = model
        self._processor = processors[0]

    def prepare(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Head]:
        """(N, D) hidden states as they meet the head, and the head."""
        call = self._intercept(hidden_states)
        processor = self._processor
        num_tokens = processor.org_vocab_size
        head = Head(
            weight=call.weight[:num_tokens],
            bias=None if call.bias is None else call.bias[:num_tokens],
            scale=processor.scale,
            soft_cap=processor.soft_cap,
        )
        return call.hidden_states, head

    def _intercept(self, hidden_states: torch.Tensor) -> _HeadCall:
        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("lm_head", "hidden_states", "embedding_bias")
            given = dict(zip(names, args, strict=False)) | kwargs
            weight = given["lm_head"].weight
            raise _HeadCall(weight, given["hidden_states"], given.get("embedding_bias"))

        hook = self._processor.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model.compute_logits(hidden_states)
        except _HeadCall as call:
            return call
        finally:
            hook.remove()
        raise RuntimeError(f"{type(self._model).__name__} never called its logits processor")

    def check(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compare the head read here with the model's own logits on random hidden states.

        Raises `RuntimeError` where they differ: a quantised head, or one that changes its
        logits after its logits processor.
        """
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, hidden_size, generator=generator).to(device, dtype)
        expected = self._model.compute_logits(hidden).float()
        rows, head = self.prepare(hidden)
        logits = torch.nn.functional.linear(rows, head.weight, head.bias).float()
        if head.soft_cap is not None:
            logits = torch.tanh(logits / head.soft_cap) * head.soft_cap
        logits *= head.scale
        tolerance = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
        if logits.shape != expected.shape or not torch.allclose(
            logits, expected, rtol=0.0, atol=tolerance
        ):
            raise RuntimeError(
                f"{type(self._model).__name__}'s LM head is not a plain matrix with bias, scale "
                "and soft cap"
            )


class ScoringPooler(Pooler):
    """Scores each scheduled chunk at once; hidden states are never kept between chunks.

    logits_dtype, entropy: as in `ScorerConfig`.
    """

    def __init__(
        self, head_reader: Callable[[], HeadReader], *, logits_dtype: LogitsDtype, entropy: bool
    ):
        super().__init__()
        # A function, not the model: as a submodule the model would be its own grandchild.
        self._head_reader = head_reader
        self._logits_dtype = logits_dtype
        self._entropy = entropy

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {POOLING_TASK}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        """(tokens of this step, D) to a (T, 4) `OUTPUT_COLUMNS` tensor per finished request.

        Positions that a prefix cache supplied were never computed, so their rows are absent;
        the caller compares `position` with what it asked for.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        chunks = [
            _Chunk.of(params.extra_kwargs, int(seq_len), int(num_scheduled))
            for params, seq_len, num_scheduled in zip(
                pooling_metadata.pooling_params,
                cursor.seq_lens_cpu,
                cursor.num_scheduled_tokens_cpu,
                strict=True,
            )
        ]
        token_ids = pooling_metadata.get_prompt_token_ids_cpu()
        scores = self._score(hidden_states, chunks, token_ids)
        outputs: list[torch.Tensor | None] = []
        states = pooling_metadata.pooling_states
        finished = cursor.get_finished_mask()
        for chunk, state, part, is_finished in zip(chunks, states, scores, finished, strict=True):
            # A preempted request starts over: what it scored from here on is scored again.
            kept = [p[p[:, 0] <= chunk.start] for p in state.hidden_states_cache]
            state.hidden_states_cache = [*kept, part]
            outputs.append(torch.cat(state.hidden_states_cache) if is_finished else None)
            if is_finished:
                state.clean()
        return outputs

    def _score(
        self,
        hidden_states: torch.Tensor,
        chunks: list["_Chunk"],
        token_ids: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """One head pass over all chunks' scored rows; a (T_i, 4) tensor for each chunk."""
        device = hidden_states.device
        offset, rows, targets = 0, [], []
        for chunk, ids in zip(chunks, token_ids, strict=True):
            # The hidden state at position p predicts the token at p + 1.
            rows.append(chunk.positions - 1 - chunk.start + offset)
            targets.append(ids[chunk.positions].long())
            offset += chunk.num_tokens
        positions = torch.cat([chunk.positions for chunk in chunks])
        if not len(positions):
            empty = torch.empty(0, len(OUTPUT_COLUMNS), device=device)
            return [empty] * len(chunks)
        scored = hidden_states[torch.cat(rows).to(device, non_blocking=True)]
        scored, head = self._head_reader().prepare(scored)
        result = rank_logprob(
            scored,
            head.weight,
            torch.cat(targets).to(device, non_blocking=True),
            bias=head.bias,
            scale=head.scale,
            soft_cap=head.soft_cap,
            logits_dtype=self._logits_dtype,
            entropy=self._entropy,
        )
        entropy = result.entropy
        if entropy is None:
            entropy = torch.full_like(result.logprob, float("nan"))
        columns = (positions.to(device).float(), result.rank.float(), result.logprob, entropy)
        return list(torch.stack(columns, dim=1).split([len(c.positions) for c in chunks]))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One request's part of a prefill step.

    start: position of its first token. num_tokens: how many are in this step.
    positions: (T,) int64 positions of the scored tokens that this step's hidden states predict.
    """

    start: int
    num_tokens: int
    positions: torch.Tensor

    @classmethod
    def of(cls, extra: dict[str, Any] | None, seq_len: int, num_tokens: int) -> "_Chunk":
        start = seq_len - num_tokens
        # vLLM's warm-up runs the pooler with requests that are not ours.
        spans = (extra or {}).get(SPANS_KEY, ())
        parts = [
            torch.arange(first, last)
            for span_start, span_end in spans
            if (first := max(span_start, start + 1)) < (last := min(span_end, seq_len + 1))
        ]
        positions = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
        return cls(start, num_tokens, positions)


class ScoringModelMixin:
    """Marks a model class as ours, so that the caller can prove which class vLLM runs."""

    is_pooling_model = True


def register_scoring_model(architecture: str) -> None:
    """Replace `architecture` in vLLM's registry by a scoring subclass of its own class."""
    original = ModelRegistry.models[architecture].load_model_cls()
    if not issubclass(original, ScoringModelMixin):
        ModelRegistry.register_model(architecture, _scoring_class(original))


def _scoring_class(original: type[nn.Module]) -> type[nn.Module]:
    class ScoringModel(ScoringModelMixin, original):  # type: ignore[misc, valid-type]
        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            options = vllm_config.additional_config[OPTIONS_KEY]
            reader: list[HeadReader] = []

            def head_reader() -> HeadReader:
                """Made on first use: only then are the weights loaded."""
                if not reader:
                    config = vllm_config.model_config
                    weight = next(self.parameters())
                    new = HeadReader(self)
                    new.check(config.get_hidden_size(), config.dtype, weight.device)
                    reader.append(new)
                return reader[0]

            self.pooler = ScoringPooler(head_reader, **options)

    ScoringModel.__name__ = ScoringModel.__qualname__ = f"Scoring{original.__name__}"
    return ScoringModel
