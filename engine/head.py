"""The LM head as the model itself applies it, read off a call of the model's own.

Together with `pooler.py` and `prefill.py` this is the only place that names vLLM. Knows nothing
of requests.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from rsr.engine.config import LogitsDtype
from rsr.kernels import RankLogprob, VocabShard, VocabStats


class HeadNotPlainError(RuntimeError):
    """The LM head is not a plain matrix with bias, scale and soft cap; the text says how not."""


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head as the model itself applies it, or this tensor-parallel rank's part of it.

    num_shards: ranks among which the vocabulary is divided; 1 where each has all of it.
    """

    shard: VocabShard
    num_shards: int

    def score(
        self, hidden_states: torch.Tensor, targets: torch.Tensor, *, entropy: bool
    ) -> RankLogprob:
        """`rsr.kernels.rank_logprob` over all ranks' columns, the same result on each.

        Five floats a token cross the wire, never a logit of another token.
        """
        shard = self.shard
        target_raw = shard.target_raw(hidden_states, targets)
        if self.num_shards == 1:
            stats = shard.stats(hidden_states, targets, target_raw, entropy)
            return shard.finish([stats], target_raw, entropy)
        target_raw = tensor_model_parallel_all_reduce(target_raw)
        stats = shard.stats(hidden_states, targets, target_raw, entropy)
        gathered = tensor_model_parallel_all_gather(stats.pack(), dim=0)
        parts = gathered.view(self.num_shards, -1, len(targets))
        return shard.finish([VocabStats.unpack(part) for part in parts], target_raw, entropy)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(N, V) logits over all ranks' columns, formed with plain torch operations."""
        shard = self.shard
        raw = torch.nn.functional.linear(hidden_states, shard.weight, shard.bias).float()
        logits = shard.transform(raw)
        if self.num_shards == 1:
            return logits
        # The last rank has fewer columns than the others; the excess falls behind all others'.
        num_columns = logits.new_tensor([logits.shape[1]])  # CPU ranks gather floats only
        nums_columns = tensor_model_parallel_all_gather(num_columns, dim=0).int().tolist()
        padded = torch.nn.functional.pad(logits, (0, max(nums_columns) - logits.shape[1]))
        gathered: torch.Tensor = tensor_model_parallel_all_gather(padded, dim=1)
        return gathered[:, : sum(nums_columns)]


class HeadReader:
    """Lets a model say what its head is, instead of guessing by attribute names.

    Gemma 2 multiplies by its embedding, Granite scales, MiniCPM divides its hidden states
    first: whatever `compute_logits` does up to its `LogitsProcessor` is done here too, by
    calling it and stopping it there.
    """

    def __init__(self, model: Any, logits_dtype: LogitsDtype) -> None:
        self._model = model
        self._logits_dtype = logits_dtype
        self._head: Head | None = None

    @functools.cached_property
    def _processor(self) -> LogitsProcessor:
        processors = [m for m in self._model.modules() if isinstance(m, LogitsProcessor)]
        if len(processors) != 1:
            raise HeadNotPlainError(f"it has {len(processors)} logits processors; expected one")
        return processors[0]

    def prepare(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, Head]:
        """(N, D) hidden states as they meet the head, and the head.

        Raises `HeadNotPlainError` where there is no weight matrix in the hidden states' dtype, or
        more than one logits processor.
        """
        call = self._intercept(hidden_states)
        if self._head is None:
            self._head = self._read(call)
        return call.hidden_states, self._head

    def _intercept(self, hidden_states: torch.Tensor) -> "_HeadCall":
        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = ("lm_head", "hidden_states", "embedding_bias")
            raise _HeadCall(**dict(zip(names, args, strict=False)) | kwargs)

        hook = self._processor.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._model.compute_logits(hidden_states)
        except _HeadCall as call:
            return call
        finally:
            hook.remove()
        raise HeadNotPlainError("it computes logits without its logits processor")

    def _read(self, call: "_HeadCall") -> Head:
        """The head of an intercepted call, without its padding columns."""
        layer, processor = call.lm_head, self._processor
        weight = getattr(layer, "weight", None)
        if weight is None or weight.ndim != 2 or weight.dtype != call.hidden_states.dtype:
            raise HeadNotPlainError(f"{type(layer).__name__} has no plain weight matrix")
        start, end = 0, processor.org_vocab_size
        if layer.tp_size > 1:
            start = layer.shard_indices.org_vocab_start_index
            end = min(end, layer.shard_indices.org_vocab_end_index)
        bias = call.embedding_bias
        try:
            shard = VocabShard(
                weight[: end - start],
                None if bias is None else bias[: end - start],
                vocab_start=start,
                vocab_size=processor.org_vocab_size,
                scale=processor.scale,
                soft_cap=processor.soft_cap,
                logits_dtype=self._logits_dtype,
            )
        except ValueError as error:
            raise HeadNotPlainError(str(error)) from error
        return Head(shard, layer.tp_size)

    @torch.inference_mode()
    def check(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compare the head read here with the model's own logits on random hidden states.

        Raises `HeadNotPlainError` where they differ: a quantised head, or one that changes its
        logits after its logits processor. Every tensor-parallel rank must call it.
        """
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(4, hidden_size, generator=generator).to(device, dtype)
        try:
            expected = self._model.compute_logits(hidden)
        # vLLM runs pooling models' heads in float32, and refuses to where one is quantised.
        except ValueError as error:
            raise HeadNotPlainError(str(error)) from error
        rows, head = self.prepare(hidden)
        logits = head.logits(rows)
        if expected is None:  # gathered on another rank, which compares
            return
        expected = expected.float()
        # A head with a weight that is no number is a plain matrix too: rows say what it costs.
        largest = float(expected.where(expected.isfinite(), 0.0).abs().max())
        tolerance = 8 * torch.finfo(dtype).eps * largest
        if logits.shape != expected.shape or not torch.allclose(
            logits, expected, rtol=0.0, atol=tolerance, equal_nan=True
        ):
            raise HeadNotPlainError("its logits are not those of its LM head's matrix")


class _HeadCall(BaseException):
    """Carries the arguments of a model's call of its logits processor out of it."""

    def __init__(
        self,
        lm_head: Any,
        hidden_states: torch.Tensor,
        embedding_bias: torch.Tensor | None = None,
        **_options: Any,
    ) -> None:
        self.lm_head = lm_head
        self.hidden_states = hidden_states
        self.embedding_bias = embedding_bias
