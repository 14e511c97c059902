"""What the turns of a conversation say, and the probe words that stand for it in a rendering."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rsr.engine.tags import CLOSING, OPENING, REASONING_TAG

PROBE = re.compile(r"Zq(\d+)q(\d+)Z")
PLAIN = "ZqplainqZ"


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a turn says, cut at its reasoning tags.

    words: the pieces, in the order in which a template prints them: reasoning from a field, then
    content; blank ones beside tags left out. shape: all else, hashable. closes: number of closing
    tags in the content. ends_with_word: whether the content's last piece is a word.
    """

    words: tuple[str, ...]
    shape: tuple[Any, ...]
    closes: int = 0
    ends_with_word: bool = True

    @property
    def is_blank(self) -> bool:
        return not self.words and not isinstance(self.shape[2], tuple)


def cut(turn: Mapping[str, Any]) -> Pieces:
    """The words and the shape of one turn of a `Conversation`, fields that it has aside."""
    content = turn["content"]
    words: list[str] = []
    if "reasoning" in turn:
        words.append(turn["reasoning"])
    if turn["role"] != "assistant" or ("hink>" not in content and "THINK]" not in content):
        if content:
            words.append(content)
            return Pieces(tuple(words), (turn["role"], turn.get("reasoning_field"), None))
        return Pieces(
            tuple(words), (turn["role"], turn.get("reasoning_field"), content), ends_with_word=False
        )
    kinds: list[str | None] = []
    last = 0
    for tag in (*REASONING_TAG.finditer(content), None):
        piece = content[last : tag.start() if tag else len(content)]
        if piece and not piece.isspace():
            words.append(piece)
            kinds.append(None)
        if tag:
            kinds.append(tag.group())
            last = tag.end()
    return Pieces(
        tuple(words),
        (turn["role"], turn.get("reasoning_field"), tuple(kinds)),
        closes=sum(kind is not None and bool(CLOSING.fullmatch(kind)) for kind in kinds),
        ends_with_word=kinds[-1] is None,
    )


def probe_turn(index: int, turn: Mapping[str, Any], pieces: Pieces) -> dict[str, Any]:
    """`turn` with probe words for its words."""
    probes = (f"Zq{index}q{number}Z" for number in range(len(pieces.words)))
    probe = {k: v for k, v in turn.items() if k != "content"}
    if "reasoning" in turn:
        probe["reasoning"] = next(probes)
    kinds = pieces.shape[2]
    if kinds is None:
        probe["content"] = next(probes)
    elif isinstance(kinds, str):
        probe["content"] = kinds
    else:
        probe["content"] = _probe_content(kinds, probes)
    return probe


def _probe_content(kinds: Sequence[str | None], probes: Iterator[str]) -> str:
    """Words and tags with the white space between them that most templates write."""
    content = ""
    for kind in kinds:
        if kind is None:
            content += next(probes)
        elif OPENING.fullmatch(kind):
            content += ("\n" if content else "") + kind + "\n"
        else:
            content = content.rstrip("\n") + "\n" + kind + "\n\n"
    return content.rstrip("\n")


def first_closing(kinds: Sequence[str | None]) -> int:
    """Where the first closing tag is; 0 if there is none."""
    return next((i for i, kind in enumerate(kinds) if kind and CLOSING.fullmatch(kind)), 0)


def probe_value(value: Any, expected: list[str], *, top: str = "") -> Any:
    """`value` with probe words for names, keys and leaves, which are added to `expected`."""
    if isinstance(value, list):
        return [probe_value(item, expected) for item in value]
    if isinstance(value, Mapping):
        if "function" in value:
            return {**value, "function": probe_value(value["function"], expected, top="call")}
        if top == "" and "name" in value:
            top = "call"
        if top == "call":
            name = f"Zc{len(expected)}Z"
            expected.append(name)
            arguments = value.get("arguments")
            probe = {**value, "name": name}
            if arguments is not None:
                probe["arguments"] = probe_value(arguments, expected, top="arguments")
            return probe
        probe = {}
        for item in value.values():
            name = f"Zc{len(expected)}Z"
            expected.append(name)
            probe[name] = probe_value(item, expected, top="arguments")
        return probe
    if isinstance(value, str):
        expected.append(f"Zc{len(expected)}Z")
        return expected[-1]
    if isinstance(value, int | float) and not isinstance(value, bool):
        expected.append(str(7_000_000 + len(expected)))
        return int(expected[-1])
    return value
