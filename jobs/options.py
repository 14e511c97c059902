"""The options that become a `ScorerConfig`: each once, named as its field is.

`rsr score` has all of them; what else opens a student takes those that it needs.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args

import click

from rsr.engine.config import (
    Dtype,
    LogitsDtype,
    OnLong,
    PrefixReuse,
    ScorerConfig,
    ScorerKind,
)
from rsr.engine.metrics import DEFAULT_RANK_CLIP
from rsr.engine.model_folder import require_model_folder
from rsr.jobs.command import RankClip
from rsr.jobs.errors import refusing_values
from rsr.jobs.shards.scored import RANK_CLIP_NAMES

DEFAULTS = ScorerConfig(model="-")


def _choices(literal: Any) -> click.Choice[str]:
    return click.Choice(get_args(literal))


OPTIONS: dict[str, Callable[..., Any]] = {
    "model": click.option(
        "--model", required=True, help="The student: a folder, or a Hugging Face hub name."
    ),
    "revision": click.option("--revision", help="Branch, tag or commit of a hub model."),
    "dtype": click.option(
        "--dtype",
        type=_choices(Dtype),
        default=DEFAULTS.dtype,
        show_default=True,
        help="Of weights and activations; auto is the checkpoint's own. float32 is exact, and "
        "faster than bfloat16 on CPUs without bfloat16 instructions.",
    ),
    "logits_dtype": click.option(
        "--logits-dtype",
        type=_choices(LogitsDtype),
        default=DEFAULTS.logits_dtype,
        show_default=True,
        help="float32 ranks unrounded logits; model rounds them to --dtype first, as the "
        "published code does (RSR then comes out about 2 % low in bfloat16).",
    ),
    "rank_clip": click.option(
        "--rank-clip",
        type=RankClip(),
        default=str(DEFAULT_RANK_CLIP),
        show_default=True,
        help="r_max of Eq. 7, in ranks, or none. 100 is the paper's; sums at 50, 100, 200, "
        "500 and none are stored whatever it is.",
    ),
    "entropy": click.option(
        "--entropy/--no-entropy",
        default=DEFAULTS.entropy,
        show_default=True,
        help="Fill rsr_mean_entropy (nats); without, it is null.",
    ),
    "token_scores": click.option(
        "--token-columns",
        "token_scores",
        is_flag=True,
        help="Also write each scored token's id, rank and log-probability (nats).",
    ),
    "max_model_len": click.option(
        "--max-model-len",
        type=click.IntRange(min=2),
        help="Longest sequence, in tokens; default: what the model's config.json says.",
    ),
    "on_long": click.option(
        "--on-long",
        type=_choices(OnLong),
        default=DEFAULTS.on_long,
        show_default=True,
        help="A longer row: score its first --max-model-len tokens (status truncated), or "
        "skip it (status too_long).",
    ),
    "chat_template": click.option(
        "--chat-template",
        default=DEFAULTS.chat_template,
        show_default=True,
        help="auto is the tokenizer's own; none scores prompt + response as plain text; "
        "else a Jinja file.",
    ),
    "score_end_of_turn": click.option(
        "--score-end-of-turn",
        is_flag=True,
        help="Also score the token that ends each assistant turn; the paper does not.",
    ),
    "prefix_reuse": click.option(
        "--prefix-reuse",
        type=_choices(PrefixReuse),
        default=DEFAULTS.prefix_reuse,
        show_default=True,
        help="Compute a prompt shared by several rows once; auto where it saves work.",
    ),
    "tensor_parallel_size": click.option(
        "--tensor-parallel-size",
        type=click.IntRange(min=1),
        default=DEFAULTS.tensor_parallel_size,
        show_default=True,
        help="GPUs that share one copy of the model.",
    ),
    "gpu_memory_utilization": click.option(
        "--gpu-memory-utilization",
        type=click.FloatRange(min=0, max=1, min_open=True),
        default=DEFAULTS.gpu_memory_utilization,
        show_default=True,
        help="Share of each GPU's memory for weights and KV cache.",
    ),
    "max_num_batched_tokens": click.option(
        "--max-num-batched-tokens",
        type=click.IntRange(min=1),
        help="Tokens of one prefill step; default: vLLM's choice.",
    ),
    "scorer": click.option(
        "--scorer",
        type=_choices(ScorerKind),
        default=DEFAULTS.scorer,
        show_default=True,
        help="kernel ranks without forming logits; prompt-logprobs has vLLM do it, as a "
        "cross-check: slower, ties count against the target, no entropy.",
    ),
    "compile": click.option(
        "--compile/--no-compile",
        default=DEFAULTS.compile,
        show_default=True,
        help="Let vLLM compile the model: faster steps, for a minute or more at the start.",
    ),
    "trust_remote_code": click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run Python code that comes with the checkpoint. Off: it could do anything.",
    ),
}


def scorer_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options of these fields, or of all, which the command gets as keywords."""
    chosen = names or tuple(field.name for field in fields(ScorerConfig))

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(chosen):
            command = OPTIONS[name](command)
        return command

    return add


def scorer_config(options: dict[str, Any]) -> ScorerConfig:
    """From what `scorer_options` passed on; raises `UsageError` on what the fields refuse.

    Also on a model folder or a template file that cannot be used, before anything else is done.
    """
    from rsr.engine.template_file import require_template_file

    with refusing_values():
        config = ScorerConfig(**options)
        require_model_folder(config.model)
        require_template_file(config.chat_template)
    return config


def _field_of_rank_clip(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    return None if value is None else RANK_CLIP_NAMES[value]


rank_clip_option = click.option(
    "--rank-clip",
    type=click.Choice(list(RANK_CLIP_NAMES)),
    callback=_field_of_rank_clip,
    help="r_max of Eq. 7, in ranks, or none: recomputed from the stored sums, needing no GPU. "
    "[default: the run's own]",
)
"""Passes on a name of `STORED_RANK_CLIPS`, or None for the r_max that the run was scored at."""
