"""Which columns of a table hold trajectories."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from rsr.engine.trajectory import USUAL_MESSAGES, USUAL_RESPONSES
from rsr.jobs.errors import UsageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrajectoryColumns:
    """The names of the columns that hold a table's trajectories.

    messages, or prompt and response, or text: the form, as `Trajectory` has it. system, reasoning,
    tools, chat_template_kwargs: what may stand beside messages, or beside prompt and response.
    exploded: columns of lists that become a row for each entry, as `Exploder` has them; the first
    holds the trajectories.
    """

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    system: str | None = None
    reasoning: str | None = None
    tools: str | None = None
    chat_template_kwargs: str | None = None
    exploded: tuple[str, ...] = ()

    @property
    def by_kind(self) -> dict[str, str]:
        """The names that there are, by the field of `Trajectory` that each column fills."""
        return {kind: name for kind in EXPECTED if (name := getattr(self, kind))}

    @property
    def names(self) -> list[str]:
        """Each column once."""
        return list(dict.fromkeys(self.by_kind.values()))

    def to_json(self) -> dict[str, Any]:
        """The columns for a manifest, as JSON gives them back."""
        return asdict(self) | {"exploded": list(self.exploded) or None}

    def describe(self) -> str:
        return " + ".join(f"{kind}={name!r}" for kind, name in self.by_kind.items())


def require_columns(schema: pa.Schema, names: Iterable[str], path: str) -> None:
    """Raises `UsageError` unless the file `path` has each of these columns once."""
    for name in names:
        if schema.names.count(name) != 1:
            problem = "more than one" if name in schema.names else "no"
            there = ", ".join(schema.names)
            raise UsageError(f"{path} has {problem} column {name!r}; it has: {there}")


def choose_columns(schema: pa.Schema, wanted: TrajectoryColumns, path: str) -> TrajectoryColumns:
    """The trajectory columns of a schema: those named, else the first usual ones there are.

    Raises `UsageError` naming the columns that exist, or the type that was expected.
    """
    chosen = _with_form(schema, wanted)
    there = ", ".join(schema.names) or "none"
    if chosen is None:
        raise UsageError(
            f"{path} has no 'messages' (or 'conversations'), 'prompt' and 'response' (or "
            f"'completion'), or 'text' column; it has: {there}. Name yours with --messages-column, "
            "--prompt-column and --response-column, or --text-column"
        )
    if chosen.text and chosen.names != [chosen.text]:
        beside = next(name for name in chosen.names if name != chosen.text)
        raise UsageError(
            f"column {beside!r} beside the text column {chosen.text!r}: a text is scored as it "
            "stands; expected messages, or a prompt and a response"
        )
    require_columns(schema, chosen.names, path)
    for kind, name in chosen.by_kind.items():
        expected, is_one = EXPECTED[kind]
        if not is_one(schema.field(name).type):
            found = schema.field(name).type
            lists = _item_type(found) is not None and kind in ("response", "text")
            remedy = f"; --explode-responses {name} makes a row of each entry" if lists else ""
            raise UsageError(f"column {name!r} of {path} is {found}; expected {expected}{remedy}")
    return chosen


def warn_of_unused_columns(schema: pa.Schema, columns: TrajectoryColumns, path: str) -> None:
    """Name what a trainer would put into the context and this run does not."""
    if columns.text:
        return
    for kind in ("system", "tools", "chat_template_kwargs"):
        if kind in schema.names and kind not in columns.names and kind not in columns.by_kind:
            logger.warning(
                "%s has a column %r, which is not used; to render rows with it: --%s-column %s",
                path,
                kind,
                kind.replace("_", "-"),
                kind,
            )


def _with_form(schema: pa.Schema, wanted: TrajectoryColumns) -> TrajectoryColumns | None:
    """`wanted`, with usual names for what it leaves open; None if there are none."""
    names = set(schema.names)
    responses = [name for name in USUAL_RESPONSES if name in names]
    if wanted.messages or wanted.text:
        return wanted
    if wanted.prompt or wanted.response:
        response = wanted.response or next(iter(responses), USUAL_RESPONSES[0])
        return replace(wanted, prompt=wanted.prompt or "prompt", response=response)
    for name in USUAL_MESSAGES:
        if name in names:
            return replace(wanted, messages=name)
    if "prompt" in names and responses:
        return replace(wanted, prompt="prompt", response=responses[0])
    return replace(wanted, text="text") if "text" in names else None


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _item_type(kind: Any) -> pa.DataType | None:
    """The type of a list's items; None if it is no list."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return kind.value_type if is_list else None


def _is_message_list(kind: pa.DataType) -> bool:
    item = _item_type(kind)
    if item is None:
        return False
    if pa.types.is_struct(item):
        return any(field.name in ("role", "from") for field in item)
    # An empty list may have any item type.
    return bool(pa.types.is_null(item))


def _is_conversation(kind: pa.DataType) -> bool:
    # Messages may also be JSON text, as a whole or each.
    item = _item_type(kind)
    is_texts = item is not None and _is_text(item)
    return _is_message_list(kind) or _is_text(kind) or is_texts


def _is_text_or_messages(kind: pa.DataType) -> bool:
    return _is_text(kind) or _is_message_list(kind)


def _is_object(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_struct(kind))


def _is_object_list(kind: pa.DataType) -> bool:
    item = _item_type(kind)
    return _is_text(kind) or (item is not None and _is_object(item))


EXPECTED: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "messages": ("a list of {role, content} or {from, value}", _is_conversation),
    "prompt": ("a string or a list of {role, content}", _is_text_or_messages),
    "response": ("a string or a list of {role, content}", _is_text_or_messages),
    "text": ("a string", _is_text),
    "system": ("a string", _is_text),
    "reasoning": ("a string", _is_text),
    "tools": ("a list of JSON schemas, or its JSON text", _is_object_list),
    "chat_template_kwargs": ("an object, or its JSON text", _is_object),
}
"""What a column must be, in words and as a check, by the field of `Trajectory` that it fills."""
