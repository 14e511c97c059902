"""A problem's row as the messages that the student answers: from a column, or by a prompt file.

A prompt file is YAML with `user`, and `system` if there is to be one: Jinja templates over the
row's columns, in a sandbox, strict about columns that are missing.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import jinja2
import jinja2.meta
import jinja2.sandbox
import pyarrow as pa
import yaml  # type: ignore[import-untyped]

from rsr.engine.messages import BadMessagesError, to_conversation
from rsr.engine.trajectory import Trajectory
from rsr.jobs.errors import UsageError, first_line

USUAL_PROMPTS = ("messages", "conversations", "prompt", "problem", "question", "instruction")
"""Columns that hold a problem, where none is named."""
PARTS = ("system", "user")


@dataclass(frozen=True, slots=True)
class PromptSource:
    """Where prompts come from. column: of texts or messages; or parts: Jinja by `PARTS`."""

    column: str | None = None
    parts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_file(cls, path: str) -> Self:
        """Raises `UsageError` unless it is YAML of `user`, and perhaps `system`."""
        try:
            told = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"--prompt-file {path}: {first_line(error)}") from error
        is_right = isinstance(told, dict) and "user" in told and set(told) <= set(PARTS)
        if not is_right or not all(isinstance(text, str) for text in told.values()):
            raise UsageError(
                f"--prompt-file {path}: expected a text `user`, and a text `system` if there is to "
                "be one, and nothing else"
            )
        source = cls(parts=tuple((part, told[part]) for part in PARTS if part in told))
        try:
            source.columns_needed()
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"--prompt-file {path}: {first_line(error)}") from error
        return source

    @classmethod
    def choose(cls, schema: pa.Schema, named: str | None, path: str) -> Self:
        """The named column, else the first usual one; raises `UsageError` if there is none."""
        names = [named] if named else [n for n in USUAL_PROMPTS if n in schema.names]
        if not names or schema.names.count(names[0]) != 1:
            what = f"column {named!r}" if named else f"column of {', '.join(USUAL_PROMPTS)}"
            raise UsageError(
                f"{path} has no {what}; it has: {', '.join(schema.names)}. Name yours with "
                "--prompt-column, or write a --prompt-file"
            )
        return cls(column=names[0])

    def columns_needed(self) -> list[str]:
        """Columns that a prompt is made of."""
        if self.column is not None:
            return [self.column]
        needed: set[str] = set()
        for _, text in self.parts:
            needed |= jinja2.meta.find_undeclared_variables(_environment().parse(text))
        return sorted(needed)

    def messages(self, row: Mapping[str, Any]) -> list[dict[str, str]]:
        """The conversation so far; raises `BadMessagesError` if the row makes none."""
        if self.column is None:
            return [{"role": part, "content": _rendered(text, row)} for part, text in self.parts]
        value = row[self.column]
        if value is None or (isinstance(value, str) and not value.strip()):
            raise BadMessagesError("the problem is empty")
        if isinstance(value, str):
            return [{"role": "user", "content": value}]
        if not isinstance(value, list):
            raise BadMessagesError("the problem is neither text nor messages")
        turns = to_conversation(Trajectory(messages=value), {}).turns
        if not turns or turns[-1]["role"] == "assistant":
            raise BadMessagesError(
                "the messages do not end with a question",
                hint="name a column of problems with --prompt-column",
            )
        if any(set(turn) - {"role", "content"} for turn in turns):
            raise BadMessagesError("a message has fields besides role and content")
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def prompt_hash(messages: list[dict[str, str]]) -> str:
    """The same for the same prompt."""
    text = json.dumps(messages, ensure_ascii=True, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, finalize=_require_value, keep_trailing_newline=False
    )


def _require_value(value: Any) -> Any:
    """What a template prints; the word None is never meant."""
    if value is None:
        raise ValueError("a column that it prints is null")
    return value


def _rendered(text: str, row: Mapping[str, Any]) -> str:
    try:
        return _environment().from_string(text).render(**row)
    # Templates run arbitrary expressions over the row: what they raise is not enumerable.
    except Exception as error:
        reason = "the prompt file cannot be filled in"
        raise BadMessagesError(reason, detail=f"{reason}: {first_line(error)}") from error
