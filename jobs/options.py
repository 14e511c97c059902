"""Options that become a `ScorerConfig` or `TrajectoryColumns`: each once, named as its field is.

`rsr score` has all of them; what else reads INPUT with a student takes those that it needs.
"""

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, replace
from typing import Any, get_type_hints

import click

from rsr.engine.catalogue import BY_NAME, RSR
from rsr.engine.config import ScorerConfig, choices_of
from rsr.engine.model_folder import require_model_folder
from rsr.jobs.command import RankClip
from rsr.jobs.errors import UsageError, refusing_values
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.scored import RANK_CLIP_NAMES

FIELDS = {field.name: field for field in fields(ScorerConfig)}
FIELD_TYPES = get_type_hints(ScorerConfig)

NAMES = {"token_scores": "token-columns"}
"""Options that are not called as their field is: `rsr score` writes columns."""

OPTION_TYPES: dict[str, click.ParamType[Any]] = {
    "rank_clip": RankClip(),
    "gpu_memory_utilization": click.FloatRange(min=0, max=1, min_open=True),
}
"""Types of the options of fields whose own type does not say what may be typed."""

ENCODING_FIELDS = (
    "model",
    "revision",
    "max_model_len",
    "on_long",
    "chat_template",
    "chat_template_kwargs",
    "render",
    "turns",
    "score_end_of_turn",
    "trust_remote_code",
    "tokenizer_backend",
)
"""Fields of `ScorerConfig` on which it depends what the student reads, and which tokens score."""

COLUMN_HELP = {
    "messages": "Column of {role, content} or {from, value} lists. "
    "[default: messages, conversations]",
    "prompt": "Column of prompts, texts or messages. [default: prompt]",
    "response": "Column of responses, texts or messages. [default: response, completion]",
    "text": "Column of texts, scored as a whole. [default: text]",
    "system": "Column of system prompts that are not among the messages.",
    "reasoning": "Column of reasoning that comes before the response.",
    "tools": "Column of the tools that the student may call, JSON schemas.",
    "chat_template_kwargs": "Column of further arguments of the chat template.",
}
"""Help texts, by field of `TrajectoryColumns`."""


def _option(field: Field[Any]) -> Callable[..., Any]:
    """A choice of a `Literal`, a pair of flags of a `bool`, a number or a text of the others."""
    name, kind = NAMES.get(field.name, field.name.replace("_", "-")), FIELD_TYPES[field.name]
    least = field.metadata["at_least"]
    if choices := choices_of(kind):
        option_type: Any = click.Choice(choices)
    elif field.name not in OPTION_TYPES and least is not None:
        option_type = click.IntRange(min=least)
    else:
        option_type = OPTION_TYPES.get(field.name)
    is_required = field.default is MISSING
    return click.option(
        f"--{name}/--no-{name}" if kind is bool else f"--{name}",
        field.name,
        type=option_type,
        required=is_required,
        default=None if is_required else field.default,
        show_default=not is_required and field.default is not None,
        help=field.metadata["help"],
    )


def scorer_options(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the options of these fields, or of all, which the command gets as keywords."""
    chosen = names or tuple(FIELDS)

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(chosen):
            command = _option(FIELDS[name])(command)
        return command

    return add


def scorer_config(options: dict[str, Any], *, with_weights: bool = True) -> ScorerConfig:
    """The config of what `scorer_options` passed on, whatever else is among `options`.

    with_weights: the model folder must hold them, too. Raises `UsageError` on what the fields
    refuse; also on a model folder or a template file that cannot be used, before anything else is
    done.
    """
    from rsr.engine.template_file import require_template_file

    with refusing_values():
        config = ScorerConfig(**{k: v for k, v in options.items() if k in FIELDS})
        require_model_folder(config.model, with_weights=with_weights)
        require_template_file(config.chat_template)
    return config


def column_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds an option for each field of `TrajectoryColumns`, as keywords `messages_column` etc."""
    command = click.option(
        "--explode-column",
        "explode_columns",
        multiple=True,
        metavar="NAME",
        help="Column of lists beside --explode-responses, as long, that is exploded with it. "
        "[may be given more than once]",
    )(command)
    command = click.option(
        "--explode-responses",
        metavar="COLUMN",
        help="Column of a list of responses for each prompt: each becomes a row of its own.",
    )(command)
    for kind, told in reversed(COLUMN_HELP.items()):
        command = click.option(f"--{kind.replace('_', '-')}-column", help=told)(command)
    return command


def trajectory_columns(options: dict[str, Any]) -> TrajectoryColumns:
    """The columns of what `column_options` passed on, whatever else is among `options`.

    Raises `UsageError` if columns of more than one form are named, or lists that are exploded are
    not those of the trajectories.
    """
    columns = TrajectoryColumns(**{kind: options[f"{kind}_column"] for kind in COLUMN_HELP})
    forms = [columns.messages, columns.prompt or columns.response, columns.text]
    if sum(map(bool, forms)) > 1:
        raise UsageError(
            "give --messages-column, or --prompt-column and --response-column, or --text-column"
        )
    return _exploded(columns, options["explode_responses"], options["explode_columns"])


def _exploded(
    columns: TrajectoryColumns, responses: str | None, others: tuple[str, ...]
) -> TrajectoryColumns:
    if responses is None:
        if others:
            raise UsageError(
                f"--explode-column {others[0]} goes with --explode-responses COLUMN, whose lists "
                "say how many rows there are"
            )
        return columns
    named = columns.messages or columns.response or columns.text
    if named not in (None, responses):
        raise UsageError(
            f"--explode-responses {responses} is where the responses are, and {named!r} is named "
            "for them too: leave that out"
        )
    exploded = tuple(dict.fromkeys((responses, *others)))
    return replace(columns, response=columns.response if named else responses, exploded=exploded)


def _field_of_rank_clip(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    return None if value is None else RANK_CLIP_NAMES[value]


rank_clip_option = click.option(
    "--rank-clip",
    type=click.Choice(list(RANK_CLIP_NAMES)),
    callback=_field_of_rank_clip,
    help="Rank that larger ones are clipped to (r_max of Eq. 7), or none: recomputed from "
    "stored sums. [default: the run's own]",
)
"""Passes on a name of `STORED_RANK_CLIPS`, or None for the r_max that the run was scored at."""

metric_option = click.option(
    "--metric",
    type=click.Choice(list(BY_NAME)),
    default=RSR,
    show_default=True,
    metavar="NAME",
    help="Metric to compare by; rsr metrics --list says what there is, and which values are "
    "better.",
)
