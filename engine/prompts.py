"""Conversations to prompts: what a student reads before it answers.

Knows tokenizers and chat templates; knows nothing of vLLM.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rsr.engine.messages import BadMessagesError
from rsr.engine.student import Student
from rsr.engine.template import ChatTemplate


class PromptEncoder:
    """A student's chat template and tokenizer, as far as prompts need them.

    Raises `ValueError` for a student without a chat template.
    """

    def __init__(self, student: Student) -> None:
        if student.chat_template is None:
            raise ValueError(
                f"{student.config.model} has no chat template to put prompts in: give one with "
                "--chat-template FILE"
            )
        self._student = student
        self._template = ChatTemplate(student.tokenizer, student.chat_template)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt's text, up to where the answer begins.

        Raises `BadMessagesError` if the template refuses it, or a message brings a control token.
        """
        for message in messages:
            self._template.require_no_control_token(
                message["role"], message["content"], end_of_turn=""
            )
        text, _ = self._template.render(
            messages,
            template_kwargs=self._student.config.template_kwargs,
            add_generation_prompt=True,
        )
        return text

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt's tokens.

        Raises `BadMessagesError` as `render` does, or if the student cannot read them, or they
        leave no room for an answer.
        """
        text = self.render(messages)
        if not _is_unicode(text):
            raise BadMessagesError("not valid Unicode")
        token_ids: list[int] = self._student.tokenizer.encode(text, add_special_tokens=False)
        limit = self._student.max_model_len
        if len(token_ids) >= limit:
            raise BadMessagesError(
                f"the prompt leaves no room for an answer within {limit} tokens",
                detail=f"the prompt has {len(token_ids):,} tokens; the student takes {limit:,} "
                "with the answer",
                hint="try a higher --max-model-len",
            )
        if not token_ids or max(token_ids) >= self._student.vocab_size:
            # vLLM would refuse all requests beside it.
            raise BadMessagesError("a token is beyond the student's vocabulary, or there is none")
        return token_ids


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
