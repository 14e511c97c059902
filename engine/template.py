"""A student's chat template: messages in, text out, the same text every day.

Knows Jinja templates; knows nothing of what the text means (`layout.py`), of tokens or models.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rsr.engine.messages import BadMessagesError
from rsr.engine.tags import REASONING_TAG

TEMPLATE_DATE = datetime(2024, 7, 26)
"""What templates that print today's date print here (Llama 3.1's own fallback date), so that a
score does not depend on the day it was computed."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def resolve_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> str | None:
    """The Jinja text behind `ScorerConfig.chat_template`; None scores text without one.

    Raises `ValueError` if `choice` is a path that cannot be read.
    """
    if choice == "none":
        return None
    if choice == "auto":
        return tokenizer.get_chat_template() if tokenizer.chat_template else None
    try:
        return Path(choice).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"chat_template={choice!r}: expected 'auto', 'none' or a readable Jinja file ({error})"
        ) from error


class RefusedByTemplateError(BadMessagesError):
    """The template raised an exception."""


class ChatTemplate:
    """A Jinja chat template with the special tokens of one tokenizer.

    source: its text. control_tokens: matches text that the tokenizer reads as a control token;
    None if it has none. marks_responses: whether it says with `{% generation %}` what a student
    is trained on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        self.source = source
        self.marks_responses = bool(_GENERATION_TAG.search(source))
        self.control_tokens = _control_token_pattern(tokenizer)
        self._variables = {
            **tokenizer.special_tokens_map,
            "strftime_now": TEMPLATE_DATE.strftime,
        }

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: list[Any] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character ranges that the template marks as generated.

        Raises `BadMessagesError` with what the template raised.
        """
        try:
            rendered, marks = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks_responses,
                add_generation_prompt=add_generation_prompt,
                **{**self._variables, **(template_kwargs or {})},
            )
        # Templates run arbitrary expressions over the row: what they raise is not enumerable.
        except Exception as error:
            raise RefusedByTemplateError(
                "the chat template refuses it", detail=f"the chat template refuses it: {error}"
            ) from error
        return rendered[0], marks[0] if marks else []

    def require_no_control_token(self, role: str, text: str, end_of_turn: str) -> None:
        """Raises `BadMessagesError` if the tokenizer would read part of `text` as control.

        Reasoning tags in an assistant's text are meant as the tokens that they are. end_of_turn:
        what the template puts after a response, which verbatim rows may bring along.
        """
        if self.control_tokens is None:
            return
        for found in self.control_tokens.finditer(text):
            if role == "assistant" and REASONING_TAG.fullmatch(found.group()):
                continue
            reason, hint = "a message contains one of this student's control tokens", ""
            is_last = not text[found.end() :].strip()
            if role == "assistant" and found.group() == end_of_turn and is_last:
                reason = "a response brings its end-of-turn token along"
                hint = "try --render verbatim, which leaves it out"
            raise BadMessagesError(
                reason,
                detail=f"{role} text contains this student's control token {found.group()!r}",
                hint=hint,
            )


def _control_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if not tokens:
        return None
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
