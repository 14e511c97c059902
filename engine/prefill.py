"""Opens vLLM on one model and runs prefill requests through it.

Together with `pooler.py` this is the only place that names vLLM. Knows nothing of trajectories:
a request is token ids and the spans to score, an answer is an array.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsr.engine.config import ScorerConfig
from rsr.engine.prefix_reuse import BLOCK_SIZE
from rsr.engine.student import Student
from rsr.engine.vllm_plugin import ARCHITECTURES_VARIABLE

logger = logging.getLogger(__name__)

TESTED_VLLM = ((0, 32), (0, 33))
"""First and last vLLM minor version whose interfaces `pooler.py` was checked against."""

CPU_KV_CACHE_BYTES = 2 << 30
"""Holds 16k tokens of an 8B model. Pages never written cost nothing, but vLLM wants them free."""


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """token_ids: the whole sequence. spans: half-open [start, end) ranges of positions ≥ 1."""

    token_ids: list[int]
    spans: list[tuple[int, int]]


class Prefill:
    """One vLLM engine whose model class scores; costs a model load to make."""

    def __init__(self, student: Student) -> None:
        """Raises `RuntimeError` on an untested vLLM, or if vLLM does not run our model class."""
        config = student.config
        _set_environment(student.architectures, in_process=config.tensor_parallel_size == 1)
        import vllm

        _check_version(vllm.__version__)
        from rsr.engine.pooler import OPTIONS_KEY

        self._llm = vllm.LLM(
            model=config.model,
            revision=config.revision,
            runner="pooling",
            dtype=config.dtype,
            max_model_len=student.max_model_len,
            tensor_parallel_size=config.tensor_parallel_size,
            **_memory_settings(config),
            max_num_batched_tokens=config.max_num_batched_tokens,
            trust_remote_code=config.trust_remote_code,
            additional_config={
                OPTIONS_KEY: {"logits_dtype": config.logits_dtype, "entropy": config.entropy}
            },
            **_prefix_cache_settings(config),
            enable_chunked_prefill=True,
            enforce_eager=True,
            disable_log_stats=True,
        )
        self._check_model_class()

    def score(
        self, requests: Sequence[PrefillRequest], *, reuse_prefixes: bool = False
    ) -> list[NDArray[np.float32]]:
        """A (T, 4) array of `pooler.OUTPUT_COLUMNS` for each request, in the given order.

        With `reuse_prefixes`, rows at the front are missing where a prefix that an earlier
        request computed covers scored positions.
        """
        from vllm import PoolingParams

        from rsr.engine.pooler import POOLING_TASK, SPANS_KEY

        if not requests:
            return []
        outputs = self._llm.encode(
            [{"prompt_token_ids": r.token_ids} for r in requests],
            pooling_params=[
                PoolingParams(
                    task=POOLING_TASK,
                    extra_kwargs={SPANS_KEY: r.spans},
                    skip_reading_prefix_cache=not reuse_prefixes,
                )
                for r in requests
            ],
            pooling_task=POOLING_TASK,
            use_tqdm=False,
        )
        return [output.outputs.data.numpy() for output in outputs]

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, so that what comes next does not depend on what came before."""
        self._llm.reset_prefix_cache()

    def _check_model_class(self) -> None:
        """A plugin that fails to import is only logged by vLLM: ask the workers what they run."""
        names = self._llm.apply_model(_scoring_class_name)
        if not all(names):
            raise RuntimeError(
                "vLLM does not run the scoring model class: its plugin 'rsr' did not load. "
                "Is rsr-engine installed in this environment, and does VLLM_PLUGINS, if set, "
                "name 'rsr'?"
            )
        logger.info("vLLM runs %s", names[0])


def _scoring_class_name(model: Any) -> str | None:
    from rsr.engine.pooler import ScoringModelMixin

    return type(model).__name__ if isinstance(model, ScoringModelMixin) else None


def _memory_settings(config: ScorerConfig) -> dict[str, Any]:
    """On a GPU a share of its memory; on a CPU a KV cache of fixed size.

    vLLM's CPU backend would reserve that share of one NUMA node's memory, and refuses to start
    where other processes have some of it. `VLLM_CPU_KVCACHE_SPACE` (GiB) still has its say.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {"gpu_memory_utilization": config.gpu_memory_utilization}
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    return {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}


def _prefix_cache_settings(config: ScorerConfig) -> dict[str, Any]:
    if config.prefix_reuse == "off":
        return {"enable_prefix_caching": False}
    return {"enable_prefix_caching": True, "block_size": BLOCK_SIZE}


def _set_environment(architectures: Sequence[str], *, in_process: bool) -> None:
    """vLLM reads its environment when it is imported and when it starts its workers."""
    os.environ[ARCHITECTURES_VARIABLE] = ",".join(architectures)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On a CPU vLLM keeps one core for a front end that an in-process engine does not have.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if in_process:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def _check_version(version: str) -> None:
    first, last = TESTED_VLLM
    minor = tuple(int(part) for part in version.split(".")[:2])
    if not first <= minor <= last:
        raise RuntimeError(
            f"vLLM {version} is not supported: this release was tested with "
            f"{'.'.join(map(str, first))} to {'.'.join(map(str, last))}"
        )
