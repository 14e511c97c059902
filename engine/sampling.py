"""The nouns of generation: how tokens are drawn, what is asked, what comes back.

Imports nothing: a run's own process needs them, and neither vLLM nor a tokenizer.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. max_tokens: of an answer; fewer where the student takes no more."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 4096


@dataclass(frozen=True, slots=True)
class SampledText:
    """An answer. finish_reason: `stop`, or `length` where it was cut off."""

    text: str
    finish_reason: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """A prompt and the seeds of its answers: the first one's, and how many follow one by one."""

    token_ids: list[int]
    first_seed: int
    num_samples: int
