"""Opens vLLM on one model and runs prefill requests through it.

Two engines with one interface: `Prefill` scores inside the worker, `StockPrefill` has vLLM do
it. Together with `head.py` and `pooler.py` this is the only place that names vLLM. Knows nothing of
trajectories: a request is token ids and the spans to score, an answer is numbers.
"""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsr.engine import vllm_plugin
from rsr.engine.config import ScorerConfig
from rsr.engine.student import Student
from rsr.engine.wire import (
    POOLING_TASK,
    PrefillRequest,
    PrefillScores,
    ScoredTokens,
    WorkerSettings,
)

logger = logging.getLogger(__name__)

TESTED_VLLM = ((0, 32), (0, 33))
"""First and last vLLM minor version whose interfaces this file and `pooler.py` fit.

0.32.0 runs the tests. Of 0.33.0, whose wheel is for GPUs, the sources were compared: every name
these two files import, call, override or set is there, with the same parameters; logits
processor, pooler base class, pooling metadata and vLLM's second model runner's pooling are
unchanged. It needs torch 2.14, transformers 5.16.1 and CUDA 13, of which the tests see nothing.
"""

CPU_BLOCK_SIZE = 32
"""Tokens of a KV block on a CPU: the fewest that vLLM's attention takes there. Its default, 128, is
longer than most shared prompts."""

TOO_LONG_FOR_CACHE = re.compile(
    r"max seq len \((?P<length>\d+)\), \((?P<needed>[\d.]+) GiB KV cache is needed, which is "
    r"larger than the available KV cache memory \((?P<available>[\d.]+) GiB\)"
)
FITTING_LENGTH = re.compile(r"estimated maximum model length is (\d+)")
"""What vLLM says when its KV cache cannot hold one request of the model's maximum length."""

CPU_KV_CACHE_BYTES = 2 << 30
"""Holds 16k tokens of an 8B model. vLLM fills it with zeros at its start: all of it is resident."""


NOT_OUR_CLASS = (
    "vLLM does not run the scoring model class: its plugin 'rsr' did not load. Is rsr-engine "
    "installed in this environment, and does VLLM_PLUGINS, if set, name 'rsr'?"
)


class UnsupportedHeadError(RuntimeError):
    """The scoring pooler cannot reproduce this model's logits; `StockPrefill` can."""


class Prefill:
    """One vLLM engine whose model class scores; costs a model load to make."""

    def __init__(self, student: Student) -> None:
        """Raises `RuntimeError` on an untested vLLM, or if vLLM does not run our model class;
        `UnsupportedHeadError` where its LM head is not a plain matrix.
        """
        config = student.config
        self.has_entropy = config.entropy
        """Whether the entropy column has numbers in it; it is all NaN otherwise."""
        try:
            self._llm = open_vllm(
                student,
                scoring_architectures=student.architectures,
                runner="pooling",
                max_model_len=student.max_model_len,
                additional_config=WorkerSettings.of(config).pack(),
            )
        except ValueError as error:
            # Only of a model that it is to embed with, so not of ours, vLLM wants the tokenizer.
            if "Tokenizer not available" in str(error):
                raise RuntimeError(NOT_OUR_CLASS) from error
            raise
        try:
            self._check_workers()
        except BaseException:
            self.close()
            raise

    def score(self, requests: Sequence[PrefillRequest]) -> list[PrefillScores]:
        """Scores for each request, in the given order."""
        from vllm import PoolingParams

        if not requests:
            return []
        outputs = self._llm.encode(
            [{"prompt_token_ids": r.computed_ids} for r in requests],
            pooling_params=[
                PoolingParams(
                    task=POOLING_TASK,
                    extra_kwargs=r.pack(),
                    skip_reading_prefix_cache=not r.reuse_prefix,
                )
                for r in requests
            ],
            pooling_task=POOLING_TASK,
            use_tqdm=False,
        )
        return [PrefillScores.unpack(output.outputs.data.numpy()) for output in outputs]

    @property
    def shared_block_size(self) -> int | None:
        """Tokens of the blocks in which requests can share a prefix; None where they cannot."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return cache.block_size if cache.enable_prefix_caching else None

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, so that what comes next does not depend on what came before."""
        self._llm.reset_prefix_cache()

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens of one prefill step."""
        return _max_num_batched_tokens(self._llm)

    def clean_cache(self) -> None:
        """Rid the KV cache of what rows that are not finite left in it, and forget prefixes."""
        _clean_cache(self._llm)

    def close(self) -> None:
        """Free the model; another may be opened in this process."""
        close_vllm(self._llm)

    def _check_workers(self) -> None:
        """A plugin that fails to import is only logged by vLLM: ask the workers what they run."""
        for worker in self._llm.collective_rpc("describe_scoring"):
            if worker["model_class"] is None:
                raise RuntimeError(NOT_OUR_CLASS)
            if worker["head_problem"] is not None:
                raise UnsupportedHeadError(
                    f"the LM head of {worker['model_class']} is not a plain matrix with bias, "
                    f"scale and soft cap: {worker['head_problem']}"
                )
        logger.info("vLLM runs %s", worker["model_class"])


class StockPrefill:
    """One vLLM engine that scores with vLLM's own `prompt_logprobs`.

    Slower, for heads that `Prefill` cannot read and as a cross-check of it. Two differences are
    vLLM's: logits have the model's dtype, and a rank counts logits *not below* the target's, so
    that rivals that tie with it come first. It gives no entropy.
    """

    def __init__(self, student: Student) -> None:
        # A request must leave room for a token to generate; that token is never fed back.
        os.environ.setdefault("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
        self._rank_clip = student.config.rank_clip
        self._llm = open_vllm(
            student,
            scoring_architectures=[],
            runner="generate",
            max_model_len=student.max_model_len + 1,
        )

    def score(self, requests: Sequence[PrefillRequest]) -> list[PrefillScores]:
        """Score as `Prefill.score` does; the entropy column is NaN, and no position is missing."""
        # To vLLM a token is scored only if it is part of the prompt.
        prompts = [r.token_ids[: r.spans[-1][1]] for r in requests]
        outputs = self._generate(prompts, prompt_logprobs=0)
        return [
            PrefillScores.of(
                _prompt_logprobs_rows(request, output.prompt_logprobs),
                request.detail_end,
                self._rank_clip,
                has_entropy=self.has_entropy,
                parts=ScoredTokens.unpack(request.pack()).parts,
            )
            for request, output in zip(requests, outputs, strict=True)
        ]

    @property
    def has_entropy(self) -> bool:
        """vLLM gives none."""
        return False

    def run_unscored(self, requests: Sequence[PrefillRequest]) -> None:
        """Prefill and nothing else: the least that any scorer on vLLM takes."""
        self._generate([r.computed_ids for r in requests], prompt_logprobs=None)

    def _generate(self, prompts: Sequence[list[int]], *, prompt_logprobs: int | None) -> list[Any]:
        from vllm import SamplingParams

        if not prompts:
            return []
        outputs: list[Any] = self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(
                temperature=0.0, max_tokens=1, prompt_logprobs=prompt_logprobs, detokenize=False
            ),
            use_tqdm=False,
        )
        return outputs

    @property
    def shared_block_size(self) -> None:
        """vLLM takes no token from a prefix cache that it has to score."""

    def forget_prefixes(self) -> None:
        """Nothing is remembered."""

    def clean_cache(self) -> None:
        """Clean the cache as `Prefill.clean_cache` does."""
        _clean_cache(self._llm)

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens of one prefill step."""
        return _max_num_batched_tokens(self._llm)

    def close(self) -> None:
        """Free the model; another may be opened in this process."""
        close_vllm(self._llm)


def _prompt_logprobs_rows(request: PrefillRequest, prompt_logprobs: Any) -> NDArray[np.float64]:
    """vLLM's mapping of token to Logprob at each position, as rows of `wire.TOKEN_COLUMNS`."""
    rows = []
    for start, end in request.spans:
        for position in range(start, end):
            entry = prompt_logprobs[position][request.token_ids[position]]
            rows.append((position, entry.rank, entry.logprob, float("nan")))
    return np.asarray(rows, dtype=np.float64)


def import_vllm() -> Any:
    """The module, after seconds; raises `RuntimeError` if it is missing or of another version."""
    _set_environment()
    try:
        import vllm
    except ImportError as error:
        raise RuntimeError(
            f"vLLM cannot be imported ({error}); install rsr-engine[gpu] or rsr-engine[cpu]"
        ) from error
    _check_version(vllm.__version__)
    # vLLM imports its parts when they are first asked for.
    _ = vllm.LLM
    # It would try its chat template, miss the tokenizer it is told to skip, and print a traceback.
    logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
    return vllm


def open_vllm(student: Student, *, scoring_architectures: Sequence[str], **settings: Any) -> Any:
    """A `vllm.LLM` whose processes have a scoring model class for the architectures named."""
    vllm = import_vllm()
    num_ranks = student.config.tensor_parallel_size
    with (
        vllm_plugin.chosen(scoring_architectures),
        _cores_divided_among(num_ranks),
        _naming_the_length_that_fits(),
    ):
        return vllm.LLM(**vllm_settings(student, scoring_architectures, **settings))


def vllm_settings(
    student: Student, scoring_architectures: Sequence[str], **settings: Any
) -> dict[str, Any]:
    """What vLLM is told; `settings` go before those that are made here."""
    config = student.config
    if config.tensor_parallel_size > 1:
        # Within a Ray placement group vLLM would take Ray, of which our workers know nothing.
        settings["distributed_executor_backend"] = "mp"
    compilation = settings.pop("compilation_config", _compilation_settings(config))
    return {
        "model": config.model,
        "revision": config.revision,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "trust_remote_code": config.trust_remote_code,
        # It gets token ids; to open a tokenizer, several times over, would take it seconds.
        "skip_tokenizer_init": True,
        # Nor does it get images, whose processor would want that tokenizer.
        "language_model_only": True,
        "enforce_eager": not config.compile,
        "disable_log_stats": True,
        "use_tqdm_on_load": logging.getLogger("vllm").isEnabledFor(logging.INFO),
        # Asynchronous scheduling is left to vLLM: see docs/architecture.md.
        "worker_extension_cls": "rsr.engine.pooler.ScoringWorker",
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_chunked_prefill": True,
        **_memory_settings(config),
        **_prefix_cache_settings(config, scoring_architectures),
        **settings,
        "compilation_config": compilation | _rotary_settings(student.architectures),
    }


def _max_num_batched_tokens(llm: Any) -> int:
    return int(llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens)


def _clean_cache(llm: Any) -> None:
    llm.reset_prefix_cache()
    llm.collective_rpc("clean_kv_cache")


def close_vllm(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def _memory_settings(config: ScorerConfig) -> dict[str, Any]:
    """Settings of memory: a share of a GPU's, or a KV cache of fixed size on a CPU.

    vLLM's CPU backend would reserve that share of one NUMA node's memory, and refuses to start
    where other processes have some of it. `VLLM_CPU_KVCACHE_SPACE` (GiB) still takes precedence.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {"gpu_memory_utilization": config.gpu_memory_utilization}
    if "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return {}
    return {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES}


def _prefix_cache_settings(
    config: ScorerConfig, scoring_architectures: Sequence[str]
) -> dict[str, Any]:
    """Whether vLLM keeps prefixes, and in blocks of how many tokens.

    It takes no token from its cache that it has to score itself. Layers that keep a state instead
    of keys and values (Mamba, linear attention) make it cut prefill at the edges of blocks of
    hundreds of tokens, so that little is shared, and only on demand.
    """
    from vllm.platforms import current_platform

    wanted = config.prefix_reuse == "on" or (
        config.prefix_reuse == "auto" and not _keeps_states(scoring_architectures)
    )
    if not (wanted and scoring_architectures):
        return {"enable_prefix_caching": False}
    if not can_keep_prefixes(scoring_architectures):
        logger.warning(
            "prefix_reuse=on: on a CPU vLLM keeps no prefix of %s, so each prompt is computed anew",
            ", ".join(scoring_architectures),
        )
        return {"enable_prefix_caching": False}
    if not current_platform.is_cpu():
        return {"enable_prefix_caching": True}
    return {"enable_prefix_caching": True, "block_size": CPU_BLOCK_SIZE}


def can_keep_prefixes(architectures: Sequence[str]) -> bool:
    """Whether vLLM's prefix cache serves models of `architectures` on this machine.

    Of models that keep states it caches the state at the end of a block, which its Mamba-2
    operation for CPUs does not return: the first row that is longer than a block ends the engine.
    """
    from vllm.platforms import current_platform

    return not (current_platform.is_cpu() and _keeps_states(architectures))


def _keeps_states(architectures: Sequence[str]) -> bool:
    """Whether one of `architectures` has layers that keep a state, beside attention or without."""
    from vllm.model_executor.models.registry import ModelRegistry

    entries = (ModelRegistry.models.get(architecture) for architecture in architectures)
    models = [entry.inspect_model_cls() for entry in entries if entry is not None]
    return any(model.is_hybrid or model.is_attention_free for model in models)


def _compilation_settings(config: ScorerConfig) -> dict[str, Any]:
    """Of a GPU's graphs, which vLLM records for up to 512 tokens, prefill replays none."""
    return {"cudagraph_mode": "NONE"} if config.compile else {}


def _rotary_settings(architectures: Sequence[str]) -> dict[str, Any]:
    """On a CPU, have torch turn the queries of models that keep states.

    vLLM's own operation there turns the first head alone, without a word, where it gets queries
    with a dimension of heads, as from LFM2. Models without states give it none.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and _keeps_states(architectures):
        return {"custom_ops": ["-rotary_embedding"]}
    return {}


@contextmanager
def _naming_the_length_that_fits() -> Iterator[None]:
    """Say in our words that the KV cache cannot hold one row of the longest length allowed.

    A smaller prefill step would hardly enlarge the cache, so this is no lack of memory that one
    cures.
    """
    try:
        yield
    except ValueError as error:
        refusal = TOO_LONG_FOR_CACHE.search(str(error))
        if refusal is None:
            raise
        length, needed, available = refusal.group("length", "needed", "available")
        fitting = FITTING_LENGTH.search(str(error))
        advice = f"max_model_len={fitting.group(1)} fits" if fitting else "no length fits"
        raise RuntimeError(
            f"max_model_len={length} needs {needed} GiB of KV cache, and {available} GiB are left "
            f"for it: {advice}; a larger gpu_memory_utilization leaves more"
        ) from error


def silence_vllm() -> None:
    """Have vLLM log errors alone, here and in the processes that it starts.

    `VLLM_LOGGING_LEVEL` still takes precedence.
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        return
    # Read when vLLM is imported; where it is already, its logger is there to be told.
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    logging.getLogger("vllm").setLevel(logging.ERROR)


def _set_environment() -> None:
    """vLLM reads its environment when it is imported and when it starts its workers."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On a CPU vLLM keeps one core for a front end that an in-process engine does not have.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    # Scheduling in this process saves seconds at the start and shuts down cleanly.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


@contextmanager
def _cores_divided_among(num_ranks: int) -> Iterator[None]:
    """While workers start: give each CPU rank its part of this process's cores.

    vLLM itself wants a NUMA node for each rank. `VLLM_CPU_OMP_THREADS_BIND` wins.
    """
    from vllm.platforms import current_platform

    variable = "VLLM_CPU_OMP_THREADS_BIND"
    if num_ranks == 1 or not current_platform.is_cpu() or variable in os.environ:
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    num_each = max(1, len(cores) // num_ranks)
    parts = [cores[i % len(cores) :][:num_each] for i in range(0, num_ranks * num_each, num_each)]
    os.environ[variable] = "|".join(",".join(map(str, part)) for part in parts)
    try:
        yield
    finally:
        del os.environ[variable]


def _check_version(version: str) -> None:
    first, last = TESTED_VLLM
    minor = tuple(int(part) for part in version.split(".")[:2])
    if not first <= minor <= last:
        raise RuntimeError(
            f"vLLM {version} is not supported: this release was tested with "
            f"{'.'.join(map(str, first))} to {'.'.join(map(str, last))}"
        )
