"""The words of a grade: the statuses, and what each says of correctness.

Imports nothing: whoever runs a verifier has no use for what tables need.
"""

from dataclasses import dataclass
from enum import StrEnum


class GradeStatus(StrEnum):
    """What is known of a row's answer: the values of the output column `grade_status`."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    """The response ends without anything that could be an answer."""
    TRUNCATED = "truncated"
    """The response was cut off, or its reasoning never ends: what stands in it is no answer."""
    GOLD_UNPARSABLE = "gold_unparsable"
    """The gold is missing, or the verifier cannot read it."""
    TIMEOUT = "timeout"
    """The comparison took longer than it may; its process was killed."""
    ERROR = "error"
    """The row cannot be read as a conversation, or the verifier failed."""


KNOWN_VERDICTS = {
    GradeStatus.CORRECT: True,
    GradeStatus.WRONG: False,
    GradeStatus.NO_ANSWER: False,
    GradeStatus.TRUNCATED: False,
}
"""The value of `correct` by status; it is null for any other status."""


@dataclass(frozen=True, slots=True)
class Grade:
    """What a verifier says of one answer.

    extracted: the text that was compared, if any was found. detail: why the status is what it is,
    where that needs words.
    """

    status: GradeStatus
    extracted: str | None = None
    detail: str | None = None

    @property
    def correct(self) -> bool | None:
        return KNOWN_VERDICTS.get(self.status)
