"""What a scorer is told: one frozen dataclass that refuses nonsense when it is made.

The command line's options, the run manifest and the README all name these fields; their meaning,
unit and default are said here and nowhere else. `rsr score` makes its options of them.
"""

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rsr.engine.metrics import DEFAULT_RANK_CLIP

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Metrics = Literal["all", "rsr"]
LogitsDtype = Literal["float32", "model"]
OnLong = Literal["truncate", "skip"]
DEFAULT_STEP_PATTERN = r"\. |\? "
"""What ends a step in ASLEC's code (arXiv 2604.06834): a full stop or a question mark, and a
space."""

PrefixReuse = Literal["auto", "on", "off"]
ScorerKind = Literal["kernel", "prompt-logprobs"]
RenderMode = Literal["auto", "template", "verbatim"]
Turns = Literal["all", "last"]
TokenizerBackend = Literal["tokenizers", "fastokens"]
SecondPass = Literal["unconditional", "window"]


def _said(help: str, *, at_least: int | None = None) -> dict[str, Any]:
    """Metadata of a field: what it means, and the smallest number that it may be."""
    return {"help": help, "at_least": at_least}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerConfig:
    """How to score; each field's `help` says what it means.

    Raises `ValueError` naming the field, what was given and what is allowed.
    """

    model: str = field(metadata=_said("The student: a folder, or a Hugging Face hub name."))
    revision: str | None = field(
        default=None, metadata=_said("Branch, tag or commit of a hub model.")
    )
    dtype: Dtype = field(
        default="auto",
        metadata=_said(
            "Dtype of weights and activations; auto is the checkpoint's own. float32 is exact, and "
            "faster than bfloat16 on CPUs without bfloat16 instructions."
        ),
    )
    logits_dtype: LogitsDtype = field(
        default="float32",
        metadata=_said(
            "Dtype in which logits are ranked: float32 ranks unrounded logits; model rounds "
            "them to the dtype first, as the published code does (ties then favour the target: "
            "RSR comes out about 2 % low in bfloat16)."
        ),
    )
    rank_clip: int | None = field(
        default=DEFAULT_RANK_CLIP,
        metadata=_said(
            "Rank that larger ones are clipped to (r_max of Eq. 7), or none. 100 is the "
            "paper's; sums at 50, 100, 200, 500 and none are stored whatever it is.",
            at_least=1,
        ),
    )
    entropy: bool = field(
        default=True, metadata=_said("Fill rsr_mean_entropy (nats); without, it is null.")
    )
    token_scores: bool = field(
        default=False,
        metadata=_said("Also write each scored token's id, rank and log-probability (nats)."),
    )
    metrics: Metrics = field(
        default="all",
        metadata=_said(
            "Metrics to store sums for: all also stores the sums that every metric of one pass "
            "is made of (rsr metrics --list), at most 200 bytes a row; rsr stores RSR's own."
        ),
    )
    prompt_metrics: bool = field(
        default=False,
        metadata=_said(
            "Also sum up the surprisal of the prompt: one more row through the LM head for each of "
            "its tokens."
        ),
    )
    step_pattern: str = field(
        default=DEFAULT_STEP_PATTERN,
        metadata=_said(
            "A regular expression of what ends a step of a response, for the metrics that treat "
            "the first token of each step apart."
        ),
    )
    max_model_len: int | None = field(
        default=None,
        metadata=_said(
            "Longest sequence, in tokens. [default: what the model's config.json says]", at_least=2
        ),
    )
    on_long: OnLong = field(
        default="truncate",
        metadata=_said(
            "A longer row: score as many of its first tokens as the model takes (status "
            "truncated), or skip it (status too_long)."
        ),
    )
    chat_template: str = field(
        default="auto",
        metadata=_said(
            "Chat template: auto is the tokenizer's own; none scores prompt + response as plain "
            "text; else a Jinja file."
        ),
    )
    score_end_of_turn: bool = field(
        default=False,
        metadata=_said("Also score the token that ends each assistant turn; the paper does not."),
    )
    prefix_reuse: PrefixReuse = field(
        default="auto",
        metadata=_said("Compute a prompt shared by several rows once; auto where it saves work."),
    )
    tensor_parallel_size: int = field(
        default=1,
        metadata=_said("GPUs (or CPU processes) that share one copy of the model.", at_least=1),
    )
    gpu_memory_utilization: float = field(
        default=0.9, metadata=_said("Share of each GPU's memory for weights and KV cache.")
    )
    max_num_batched_tokens: int | None = field(
        default=None,
        metadata=_said("Tokens of one prefill step; default: vLLM's choice.", at_least=1),
    )
    scorer: ScorerKind = field(
        default="kernel",
        metadata=_said(
            "Who ranks: kernel ranks without forming logits; prompt-logprobs has vLLM do it, as "
            "a cross-check and for an LM head that is not a plain matrix: slower, ties count "
            "against the target, no entropy."
        ),
    )
    compile: bool = field(
        default=False,
        metadata=_said(
            "Let vLLM compile the model: faster steps, for a minute or more at the start."
        ),
    )
    trust_remote_code: bool = field(
        default=False,
        metadata=_said(
            "Run Python code that comes with the checkpoint. Off: it could do anything."
        ),
    )
    render: RenderMode = field(
        default="auto",
        metadata=_said(
            "Form of a row's text: template prints whole conversations by the chat template; "
            "verbatim puts each response as it stands after its history and generation prompt, "
            "as prompt-completion trainers do; auto is verbatim for rows whose reasoning the "
            "template drops."
        ),
    )
    turns: Turns = field(
        default="all", metadata=_said("Score all assistant turns, or the last one.")
    )
    chat_template_kwargs: str = field(
        default="{}",
        metadata=_said(
            "A JSON object that the chat template is given beside the messages, such as "
            '{"enable_thinking": true}; a row\'s own fields go before these.'
        ),
    )
    tokenizer_backend: TokenizerBackend = field(
        default="tokenizers",
        metadata=_said(
            "Whose token ids: those of tokenizers, or the same ones by fastokens, in a tenth of "
            "the time; for a byte-level vocabulary. The first million characters that a worker "
            "reads are encoded by both, and a difference is refused."
        ),
    )
    unconditional: bool = field(
        default=False,
        metadata=_said(
            "A second pass: score each response without its prompt, into a column of its own, "
            "rsr_unconditional, beside what INPUT has (for rsr metrics: ifd)."
        ),
    )
    window: int | None = field(
        default=None,
        metadata=_said(
            "A second pass: score each step after its prompt and this many steps alone, into a "
            "column of its own, rsr_window (for rsr metrics: local_naturalness).",
            at_least=1,
        ),
    )

    def __post_init__(self) -> None:
        self._require("model", bool(self.model), "a folder or a hub name")
        for name, kind in get_type_hints(ScorerConfig).items():
            if choices := choices_of(kind):
                self._require(name, getattr(self, name) in choices, list(choices))
        for each in fields(self):
            value, least = getattr(self, each.name), each.metadata["at_least"]
            if least is not None:
                self._require(each.name, value is None or value >= least, f"at least {least}")
        self._require("gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "in (0, 1]")
        self._require(
            "chat_template_kwargs",
            _json_object(self.chat_template_kwargs) is not None,
            'a JSON object such as {"enable_thinking": true}',
        )

        self._require("step_pattern", _ends_something(self.step_pattern), PATTERN_EXPECTED)
        self._require(
            "prompt_metrics",
            not self.prompt_metrics or self.has_metrics,
            "False where metrics is 'rsr', which stores no sums of them",
        )
        self._require(
            "window", self.window is None or not self.unconditional, "none beside unconditional"
        )
        for name in ("token_scores", "prompt_metrics"):
            self._require(
                name,
                not getattr(self, name) or self.second_pass is None,
                "False in a second pass (unconditional, window), which stores sums alone",
            )

    @property
    def has_metrics(self) -> bool:
        """Whether the sums of all metrics are stored."""
        return self.metrics == "all" and self.second_pass is None

    @property
    def second_pass(self) -> SecondPass | None:
        """What less than the whole trajectory the student reads; None if it reads all."""
        if self.unconditional:
            return "unconditional"
        return None if self.window is None else "window"

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """`chat_template_kwargs`, read."""
        return _json_object(self.chat_template_kwargs) or {}

    def _require(self, name: str, is_valid: bool, expected: object) -> None:
        if not is_valid:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values of a `Literal`; of any other type none."""
    return get_args(kind) if get_origin(kind) is Literal else ()


PATTERN_EXPECTED = "a regular expression that matches no empty text, such as \\n\\n"


def _ends_something(pattern: str) -> bool:
    try:
        return re.compile(pattern).match("") is None
    except re.error:
        return False


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
