"""What runs inside vLLM's worker: a model class that scores tokens instead of embedding them.

A checkpoint's architecture is re-registered under its own name as a subclass that is a pooling
model and keeps its LM head. The name stays, because vLLM keys model-specific settings by it.
The pooler sees every chunk of every prefill step. What leaves the worker are a trajectory's sums,
and single tokens only where a request asks for them: see `scored_rows.py` and `wire.py`.

Knows nothing of trajectories or chat templates: a request brings its scored positions along.
"""

from collections.abc import Set
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.registry import ModelRegistry
from vllm.tasks import PoolingTask
from vllm.v1.pool.metadata import PoolingMetadata

from rsr.engine.head import HeadNotPlainError, HeadReader
from rsr.engine.scored_rows import Chunk, StepScorer
from rsr.engine.wire import POOLING_TASK, ScoredTokens, WorkerSettings

CLEANED_ELEMENTS = 1 << 22
"""Elements of a KV cache that are cleaned at a time."""


class ScoringPooler(Pooler):
    """Scores each scheduled chunk at once; hidden states are never kept between chunks."""

    def __init__(self, head_reader: HeadReader, settings: WorkerSettings) -> None:
        super().__init__()
        self.head_reader = head_reader
        self._scorer = StepScorer(
            head_reader,
            entropy=settings.entropy,
            rank_clip=settings.rank_clip,
            has_metrics=settings.has_metrics,
        )

    def get_supported_tasks(self) -> Set[PoolingTask]:
        return {POOLING_TASK}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        # A request brings its targets along: vLLM need not pad and pin its prompts for us.
        return PoolingParamsUpdate(requires_token_ids=False)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> list[torch.Tensor | None]:
        """(tokens of this step, D) to what `wire.PrefillScores.unpack` reads, or None.

        Each finished request has a flat float64 tensor, each other one None.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        chunks = [
            Chunk.of(
                _scored_tokens(params.extra_kwargs, seq_len),
                seq_len - num_scheduled,
                num_scheduled,
                is_last=is_last,
            )
            for params, seq_len, num_scheduled, is_last in zip(
                pooling_metadata.pooling_params,
                cursor.seq_lens_cpu.tolist(),
                cursor.num_scheduled_tokens_cpu.tolist(),
                cursor.get_finished_mask(),
                strict=True,
            )
        ]
        # vLLM's place for what a request keeps between its steps; it empties it with the request.
        kept: list[Any] = [state.hidden_states_cache for state in pooling_metadata.pooling_states]
        try:
            return self._scorer.score(hidden_states, chunks, kept)
        except HeadNotPlainError:
            if any(params.extra_kwargs for params in pooling_metadata.pooling_params):
                raise
            # While vLLM warms up; `ScoringWorker.describe_scoring` is asked next, and says it.
            return [None] * len(chunks)


def _scored_tokens(extra_kwargs: dict[str, Any] | None, seq_len: int) -> ScoredTokens:
    """What a request brings along; all its tokens where vLLM made it up.

    Of such requests vLLM measures the memory that a step takes, and warms up: to score all of them
    counts the head pass at its largest, and compiles the rank kernel before the first real step.
    """
    return ScoredTokens.unpack(extra_kwargs) if extra_kwargs else ScoredTokens.all_of(seq_len)


class ScoringModelMixin:
    """Marks a model class as ours, so that `ScoringWorker` can tell which class vLLM runs."""

    is_pooling_model = True
    pooler: ScoringPooler


_replaced: dict[str, Any] = {}
"""The registry entries of this process that scoring models replace, by architecture."""


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
        """A model of `original`'s architecture that scores tokens."""

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            settings = WorkerSettings.unpack(vllm_config.additional_config)
            self.pooler = ScoringPooler(HeadReader(self, settings.logits_dtype), settings)

    ScoringModel.__name__ = ScoringModel.__qualname__ = f"Scoring{original.__name__}"
    return ScoringModel


class ScoringWorker:
    """Methods that vLLM adds to its worker class; `LLM.collective_rpc` calls them by name."""

    @torch.inference_mode()
    def clean_kv_cache(self) -> None:
        """Zero what is not finite in the KV cache, of which no request may be using anything."""
        worker: Any = self
        for tensor in tree_leaves(worker.model_runner.kv_caches):
            flat = tensor.new_empty(0).set_(tensor.untyped_storage())
            # In parts: no copy of gigabytes, and pages that nobody wrote stay unwritten.
            for part in flat.split(CLEANED_ELEMENTS):
                # Both are NaN where anything is. Five times as fast as `part.isfinite().all()`.
                if not all(extreme.isfinite() for extreme in part.aminmax()):
                    part.zero_()

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
