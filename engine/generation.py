"""Generates candidates with vLLM: n answers a prompt, each from a seed of its own.

Knows prompts; knows nothing of files. One `vllm.LLM` a process.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rsr.engine.config import ScorerConfig
from rsr.engine.prefill import can_keep_prefixes, close_vllm, import_vllm, open_vllm
from rsr.engine.prompts import PromptEncoder
from rsr.engine.sampling import PromptRequest, SampledText, Sampling
from rsr.engine.student import Student, open_student

CPU_STEP_TOKENS = 4096
"""Tokens of one step on a CPU, vLLM's default; a longer prompt raises it."""


class Generator:
    """A student that answers; making one loads the model.

    Raises `ValueError` on a model folder that lacks something, or a student without a chat
    template; `RuntimeError` where vLLM cannot run it.
    """

    def __init__(self, config: ScorerConfig, sampling: Sampling) -> None:
        student = open_student(config)
        self._prompts = PromptEncoder(student)
        self._student, self._sampling = student, sampling
        self._stop_ids = _stop_ids(student)
        import_vllm()
        self._llm = open_vllm(
            student,
            scoring_architectures=[],
            runner="generate",
            max_model_len=student.max_model_len,
            # The answers of a prompt share its prefill by the prefix cache.
            enable_prefix_caching=can_keep_prefixes(student.architectures),
            # Where the model is compiled, with the graphs that vLLM records for decoding.
            compilation_config={},
            **_step_settings(student),
        )

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt's tokens; `BadMessagesError` as `PromptEncoder.encode`."""
        return self._prompts.encode(messages)

    def sample(self, requests: Sequence[PromptRequest]) -> list[list[SampledText]]:
        """The answers to each prompt, in order: the same for the same `requests`.

        vLLM runs requests together, and which run together moves the last bits of their logits.
        Among other requests an answer may therefore, once in a while, be another one.
        """
        from vllm import SamplingParams

        if not requests:
            return []
        # What was asked before would shorten the first steps, and so change who runs together.
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.token_ids} for request in requests],
            [
                SamplingParams(
                    n=request.num_samples,
                    # vLLM gives the answers of one request this seed and those that follow.
                    seed=request.first_seed,
                    temperature=self._sampling.temperature,
                    top_p=self._sampling.top_p,
                    max_tokens=self._sampling.max_tokens,
                    stop_token_ids=self._stop_ids,
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        return [
            [self._text(answer) for answer in sorted(output.outputs, key=lambda a: a.index)]
            for output in outputs
        ]

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens of one step."""
        return int(self._llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens)

    def close(self) -> None:
        """Free the model; another may be opened in this process."""
        close_vllm(self._llm)

    def _text(self, answer: Any) -> SampledText:
        token_ids = list(answer.token_ids)
        num_tokens = len(token_ids)
        if token_ids and token_ids[-1] in self._stop_ids:
            del token_ids[-1]
        text = self._student.tokenizer.decode(token_ids, skip_special_tokens=True)
        return SampledText(text, str(answer.finish_reason), num_tokens)


def _step_settings(student: Student) -> dict[str, Any]:
    """Settings that put each prompt into a step as a whole, on a CPU.

    After a step with a part of a prompt, vLLM rewinds the generator of the prompt's seed. That of a
    CPU cannot be rewound: vLLM raises, and every request is lost.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    wanted = student.config.max_num_batched_tokens or CPU_STEP_TOKENS
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(wanted, student.max_model_len),
    }


def _stop_ids(student: Student) -> list[int]:
    """Tokens that end an answer: of the tokenizer, and of the checkpoint's generation config."""
    from transformers import GenerationConfig

    found = {student.tokenizer.eos_token_id}
    try:
        config = GenerationConfig.from_pretrained(
            student.config.model, revision=student.config.revision
        )
    except OSError:
        config = GenerationConfig()
    eos = config.eos_token_id
    found |= set(eos) if isinstance(eos, list) else {eos}
    return sorted(int(token) for token in found if token is not None)
