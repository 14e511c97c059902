"""Which columns of a table hold trajectories."""

from dataclasses import asdict, dataclass

import pyarrow as pa

from rsr.jobs.errors import UsageError


@dataclass(frozen=True, slots=True)
class TrajectoryColumns:
    """Which columns hold the trajectory: `messages`, or `prompt` and `response`, or `text`."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None

    @property
    def names(self) -> list[str]:
        return [name for name in asdict(self).values() if name]

    def describe(self) -> str:
        return " + ".join(f"{kind}={name!r}" for kind, name in asdict(self).items() if name)


def choose_columns(schema: pa.Schema, wanted: TrajectoryColumns, path: str) -> TrajectoryColumns:
    """The trajectory columns of a schema: those named, else the first usual ones there are.

    Raises `UsageError` naming the columns that exist, or the type that was expected.
    """
    chosen = wanted if wanted.names else _usual_columns(schema)
    there = ", ".join(schema.names) or "none"
    if chosen is None:
        raise UsageError(
            f"{path} has no 'messages', 'prompt' and 'response', or 'text' column; it has: "
            f"{there}. Name yours with --messages-column, --prompt-column and "
            "--response-column, or --text-column"
        )
    for name in chosen.names:
        if schema.names.count(name) != 1:
            problem = "more than one" if name in schema.names else "no"
            raise UsageError(f"{path} has {problem} column {name!r}; it has: {there}")
    for name in chosen.names:
        kind = schema.field(name).type
        is_chat = name == chosen.messages and _is_message_list(kind)
        if not (is_chat or _is_text(kind)):
            expected = "a list of {role, content}" if name == chosen.messages else "a string"
            raise UsageError(f"column {name!r} of {path} is {kind}; expected {expected}")
    return chosen


def _usual_columns(schema: pa.Schema) -> TrajectoryColumns | None:
    names = set(schema.names)
    if "messages" in names:
        return TrajectoryColumns(messages="messages")
    if {"prompt", "response"} <= names:
        return TrajectoryColumns(prompt="prompt", response="response")
    return TrajectoryColumns(text="text") if "text" in names else None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
    )


def _is_message_list(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    item = kind.value_type
    # A list of strings holds messages as JSON text; an empty list may have any item type.
    return pa.types.is_struct(item) or pa.types.is_null(item) or _is_text(item)
