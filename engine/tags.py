"""The tags between which a chain of thought stands in a text, and texts that leave some out."""

import re

REASONING_TAG = re.compile(r"<think(?:ing)?>|</think(?:ing)?>|\[/?THINK\]")
"""What opens and closes a chain of thought inside `content`."""
OPENING = re.compile(r"<think(?:ing)?>|\[THINK\]")
CLOSING = re.compile(r"</think(?:ing)?>|\[/THINK\]")
FIRST_OPENING = re.compile(r"\s*(?:<think(?:ing)?>|\[THINK\])\s*")
LAST_OPENING = re.compile(r"(?:<think(?:ing)?>|\[THINK\])\s*$")
DOUBLED_OPENING = re.compile(r"<think(?:ing)?>\s*<think(?:ing)?>")
FIRST_EMPTY = re.compile(r"\s*<think(?:ing)?>\s*</think(?:ing)?>\s*")
LAST_EMPTY = re.compile(r"<think(?:ing)?>\s*</think(?:ing)?>\s*$")


def without_opener(text: str) -> str:
    """`text` without the opening tag that it begins with."""
    opened = FIRST_OPENING.match(text)
    return text[opened.end() :] if opened else text


def unrepeated(response: str, prompt: str) -> str:
    """`response` without the opening tag or the empty chain of thought that `prompt` ends with."""
    if LAST_OPENING.search(prompt):
        return without_opener(response)
    empty = FIRST_EMPTY.match(response)
    return response[empty.end() :] if empty and LAST_EMPTY.search(prompt) else response
