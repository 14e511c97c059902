"""What a scorer is told: one frozen dataclass that refuses nonsense when it is made.

The command line's options, the run manifest and the README all name these fields; their
meaning, unit and default are said here and nowhere else.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from rsr.engine.metrics import DEFAULT_RANK_CLIP

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
LogitsDtype = Literal["float32", "model"]
OnLong = Literal["truncate", "skip"]
PrefixReuse = Literal["auto", "on", "off"]
ScorerKind = Literal["kernel", "prompt-logprobs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerConfig:
    """How to score. Raises `ValueError` naming the field, what was given and what is allowed.

    model: a folder, or a name on the Hugging Face hub.
    revision: branch, tag or commit of a hub model; None is its default branch.
    dtype: of weights and activations; "auto" is the checkpoint's own.
    logits_dtype: "float32" ranks what float32 accumulation of the given hidden states and
        weights gives; "model" rounds every logit to `dtype` first, as the published code does
        (bf16 ties then favour the target: RSR about 2 % low).
    rank_clip: r_max of Eq. 7, in ranks; None leaves ranks unclipped.
    entropy: also compute each token's predictive entropy.
    token_scores: keep per-token values in the scores.
    max_model_len: longest sequence in tokens, context and response; None is the model's own.
    on_long: score the first `max_model_len` tokens of a longer row, or skip it.
    chat_template: "auto" is the tokenizer's own, "none" scores text without one, anything else
        is the path of a Jinja file.
    score_end_of_turn: also score the token that ends each assistant turn.
    prefix_reuse: compute a prompt that several trajectories share once; "auto" does so where it
        saves work.
    tensor_parallel_size: GPUs (or CPU processes) that share one copy of the model.
    gpu_memory_utilization: share of a GPU's memory vLLM may take.
    max_num_batched_tokens: tokens of one prefill step; None lets vLLM choose.
    scorer: "kernel" ranks inside vLLM's worker without forming logits; "prompt-logprobs" has vLLM
        do it, slower, with logits in `dtype`, ranks that count ties, and no entropy. It is a
        cross-check, and what models are scored with whose LM head is not a plain matrix.
    compile: let vLLM compile the model: faster steps, for a minute or more at the start.
    trust_remote_code: run Python code that comes with the checkpoint.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    logits_dtype: LogitsDtype = "float32"
    rank_clip: int | None = DEFAULT_RANK_CLIP
    entropy: bool = True
    token_scores: bool = False
    max_model_len: int | None = None
    on_long: OnLong = "truncate"
    chat_template: str = "auto"
    score_end_of_turn: bool = False
    prefix_reuse: PrefixReuse = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int | None = None
    scorer: ScorerKind = "kernel"
    compile: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, literal in (
            ("dtype", Dtype),
            ("logits_dtype", LogitsDtype),
            ("on_long", OnLong),
            ("prefix_reuse", PrefixReuse),
            ("scorer", ScorerKind),
        ):
            self._require(name, getattr(self, name) in get_args(literal), list(get_args(literal)))
        self._require("model", bool(self.model), "a folder or a hub name")
        self._require(
            "rank_clip", self.rank_clip is None or self.rank_clip >= 1, "at least 1, or None"
        )
        self._require(
            "max_model_len",
            self.max_model_len is None or self.max_model_len >= 2,
            "at least 2 tokens, or None",
        )
        self._require(
            "max_num_batched_tokens",
            self.max_num_batched_tokens is None or self.max_num_batched_tokens >= 1,
            "at least 1 token, or None",
        )
        self._require("tensor_parallel_size", self.tensor_parallel_size >= 1, "at least 1")
        self._require("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "in (0, 1]")

    def _require(self, name: str, is_valid: bool, expected: object) -> None:
        if not is_valid:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")
