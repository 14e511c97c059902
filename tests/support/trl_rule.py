"""Which tokens TRL puts the loss on when it prepares a prompt-completion row, in 30 lines.

Source: `SFTTrainer._prepare_dataset` of TRL (its rule, not its code). The prompt is rendered with
the generation prompt, prompt and completion together without; all tokens after as many as the
prompt has are labels. Text rows are joined, with the end-of-sequence token after.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


def chat_labels(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Mapping[str, Any]],
    completion: Sequence[Mapping[str, Any]],
    **template_options: Any,
) -> list[int]:
    """Ids with loss of a row of two message lists."""

    def ids(messages: list[Mapping[str, Any]], **options: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, **options, **template_options
        )

    context = ids(list(prompt), add_generation_prompt=True)
    return ids([*prompt, *completion])[len(context) :]


def text_labels(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> list[int]:
    """Ids with loss of a row of two texts, which have their special tokens already."""
    context = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = tokenizer(prompt + completion + tokenizer.eos_token, add_special_tokens=False)
    return whole.input_ids[len(context) :]
