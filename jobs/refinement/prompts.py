"""What the oracle is asked: the template of each mode, rendered, and its hash."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import get_args

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rsr.jobs.refinement.outcome import Mode
from rsr.jobs.storage.hashing import hash_bytes

MODES: tuple[Mode, ...] = get_args(Mode)
OPENING, CLOSING = "<refined_trace>", "</refined_trace>"
"""What stands around the trace in an oracle's reply; whatever it thinks aloud is outside."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The template of one mode. text: Jinja, over `problem`, `trace` and `answer`."""

    mode: Mode
    text: str

    @property
    def digest(self) -> str:
        """Hash of the template: another one asks something else."""
        return hash_bytes(self.text.encode())

    def render(self, problem: str, trace: str, answer: str) -> str:
        """The message to the oracle. answer: of the problem, "" if it is not to be told."""
        return _template(self.text).render(problem=problem, trace=trace, answer=answer)


def load_prompt(mode: Mode) -> Prompt:
    """The template that comes with the package."""
    place = files("rsr.jobs.refinement") / "templates" / f"{mode}.txt"
    return Prompt(mode, place.read_text(encoding="utf-8"))


def trace_in(reply: str) -> str | None:
    """What stands in the last pair of tags of a reply; None where no pair is whole.

    A reply without them is not taken for a trace: nothing says where its preamble ends.
    """
    end = reply.rfind(CLOSING)
    start = reply.rfind(OPENING, 0, max(0, end))
    if start < 0:
        return None
    inside = reply[start + len(OPENING) : end]
    return inside.removeprefix("\n").removesuffix("\n")


@cache
def _template(text: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(text)
