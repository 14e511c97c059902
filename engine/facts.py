"""What a run must know of its student, as something that can be sent: no tokenizer, no weights.

Knows no library, so that a process can hold it without importing any.
"""

from dataclasses import dataclass
from typing import Any

from rsr.engine.config import ScorerConfig


@dataclass(frozen=True, slots=True)
class StudentFacts:
    """What a run knows of its student, in a form that can be sent to another process.

    config: with dtype and max_model_len resolved. fingerprint: tells it from other students.
    """

    config: ScorerConfig
    has_chat_template: bool
    fingerprint: dict[str, Any]
