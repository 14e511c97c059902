"""Texts to token ids, and where in the ids a position of the text is.

Asking `tokenizers` for offsets costs up to a third of its time. In a byte-level vocabulary they
come for less: a token's own text says how many bytes it stands for, and the bytes of all tokens
are those of the text, one after another. A text for which they are not, for whatever reason, and
every text of another kind of vocabulary, is encoded with offsets.

Knows tokenizers; knows nothing of conversations, templates or models.
"""

import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from rsr.engine.config import TokenizerBackend
from rsr.engine.fast_ids import ADVICE, FastIds, encode_ids

BATCH_CHARS = 1 << 20
"""Characters that are tokenized at a time: `tokenizers` makes some fifty bytes of each."""

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text's tokens, and where positions of the text fall among them.

    token_ids: of the whole text. borders: for each position that was asked for, the first token
    whose first character is there or after; behind the last such token if there is none.
    """

    token_ids: list[int]
    borders: list[int]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A text that can be read, its bytes, and the positions whose borders are asked for."""

    text: str
    utf8: bytes
    positions: Sequence[int]


class TextTokenizer:
    """A student's tokenizer, which also says where its tokens stand in the text.

    backend: whose ids; raises `ValueError` where fastokens can give none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, backend: TokenizerBackend = "tokenizers"
    ) -> None:
        settings: Settings = json.loads(tokenizer.backend_tokenizer.to_str())
        self._backend = _untrimmed_backend(settings)
        self._token_bytes = _token_bytes(settings)
        self._is_normalizing = bool(_steps(settings, "normalizer"))
        self._adds_tokens = self._backend.num_special_tokens_to_add(False) > 0
        self._fast = None
        if backend == "fastokens":
            if self._token_bytes is None:
                raise ValueError(
                    "fastokens tells no offsets, and the vocabulary of this student is not "
                    f"byte-level, which would tell them: {ADVICE}"
                )
            self._fast = FastIds(self._backend)

    def tokenize(
        self,
        texts: Sequence[str],
        positions: Sequence[Sequence[int]],
        *,
        add_special_tokens: bool,
    ) -> list[TokenizedText | None]:
        """Each text's tokens; None for a text with a lone surrogate, which no tokenizer reads.

        positions: of characters in each text, whose borders are asked for. add_special_tokens:
        also those that the tokenizer puts around a text, which have no place in it. Works on all
        cores and without Python's lock if there are several texts; the tokens of a text do not
        depend on the others. Raises `ValueError` if two backends differ, see `FastIds`.
        """
        found: list[TokenizedText | None] = []
        lengths = None if add_special_tokens and self._adds_tokens else self._token_bytes
        for batch in _batches(texts):
            wanted = positions[len(found) : len(found) + len(batch)]
            asked = [
                None if (utf8 := _utf8(text)) is None else _Asked(text, utf8, borders)
                for text, borders in zip(batch, wanted, strict=True)
            ]
            readable = [one for one in asked if one is not None]
            if lengths is None:
                read = self._with_offsets(readable, add_special_tokens)
            else:
                read = self._with_lengths(readable, lengths)
            found += [None if one is None else next(read) for one in asked]
        return found

    def offsets(self, text: str, *, add_special_tokens: bool) -> list[tuple[int, int]]:
        """The characters that each token of a text stands for, [start, end)."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        offsets: list[tuple[int, int]] = encoding.offsets
        return offsets

    def _with_offsets(
        self, asked: Sequence[_Asked], add_special_tokens: bool
    ) -> Iterator[TokenizedText]:
        encodings = self._backend.encode_batch(
            [one.text for one in asked], add_special_tokens=add_special_tokens
        )
        for one, encoding in zip(asked, encodings, strict=True):
            yield _by_offsets(encoding, len(one.text), one.positions)

    def _with_lengths(
        self, asked: Sequence[_Asked], lengths: NDArray[np.int64]
    ) -> Iterator[TokenizedText]:
        for one, ids in zip(asked, self._ids([one.text for one in asked]), strict=True):
            borders = self._borders(one, lengths[ids])
            if borders is None:
                yield from self._with_offsets([one], add_special_tokens=False)
            else:
                yield TokenizedText(ids.tolist(), borders)

    def _ids(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return encode_ids(self._backend, texts) if self._fast is None else self._fast.encode(texts)

    def _borders(self, asked: _Asked, lengths: NDArray[np.int64]) -> list[int] | None:
        """Borders by the tokens' lengths in bytes; None if those are not the text's."""
        text, utf8, positions = asked.text, asked.utf8, asked.positions
        ends = lengths.cumsum()
        if (ends[-1] if len(ends) else 0) != len(utf8):
            return None
        if self._is_normalizing and not unicodedata.is_normalized("NFC", text):
            # What was read is not this text, and may be as long by accident.
            return None
        if len(utf8) != len(text):
            positions = _byte_positions(text, positions)
        borders: list[int] = np.searchsorted(ends - lengths, positions).tolist()
        return borders


def _byte_positions(text: str, positions: Sequence[int]) -> list[int]:
    """How many bytes of UTF-8 come before each of these characters; looks at each byte once."""
    before = {0: 0}
    last = 0
    for position in sorted(set(positions)):
        before[position] = before[last] + len(text[last:position].encode())
        last = position
    return [before[position] for position in positions]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        if batch and num_chars + len(text) > BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
        batch.append(text)
        num_chars += len(text)
    if batch:
        yield batch


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def _by_offsets(encoding: Encoding, num_chars: int, positions: Sequence[int]) -> TokenizedText:
    borders = [_first_token_from(encoding, position, num_chars) for position in positions]
    return TokenizedText(encoding.ids, borders)


def _first_token_from(encoding: Encoding, position: int, num_chars: int) -> int:
    """The first token whose first character is at `position` or after; past the last if none.

    Tokens that a post-processor added (BOS) have no place in the text and are not counted.
    """
    # Not by the list of all offsets, which takes longer to make than everything else here.
    for covered in range(position, num_chars):
        token = encoding.char_to_token(covered)
        if token is not None:
            break
    else:
        token = len(encoding)
        while token and encoding.token_to_chars(token - 1) is None:
            token -= 1
        return token
    while (chars := encoding.token_to_chars(token)) is not None and chars[0] < position:
        token += 1
    return token


def _untrimmed_backend(settings: Settings) -> Tokenizer:
    """A copy whose offsets tile the text.

    Byte-level tokenizers as shipped trim white space off their offsets, which moves a header's
    final newline into the response.
    """

    def untrimmed(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: False if k == "trim_offsets" else untrimmed(v) for k, v in node.items()}
        return [untrimmed(v) for v in node] if isinstance(node, list) else node

    # The vocabulary is by far the largest part, and has no offsets in it.
    parts = {name: untrimmed(settings.get(name)) for name in ("pre_tokenizer", "post_processor")}
    backend = Tokenizer.from_str(json.dumps(settings | parts))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_bytes(settings: Settings) -> NDArray[np.int64] | None:
    """How many bytes of a text each token stands for, by its id; None if it is not byte-level."""
    model = settings["model"]
    if model["type"] != "BPE" or not _is_byte_level(settings):
        return None
    if any(step["type"] != "NFC" for step in _steps(settings, "normalizer")):
        return None
    # In a byte-level vocabulary each character of a token's name is one byte.
    sizes = {token_id: len(token) for token, token_id in model["vocab"].items()}
    for token in settings["added_tokens"]:
        sizes[token["id"]] = len(token["content"].encode())
    lengths = np.zeros(max(sizes) + 1, np.int64)
    lengths[list(sizes)] = list(sizes.values())
    return lengths


def _is_byte_level(settings: Settings) -> bool:
    steps = _steps(settings, "pre_tokenizer")
    return any(s["type"] == "ByteLevel" and not s.get("add_prefix_space") for s in steps)


def _steps(settings: Settings, part: str) -> list[Settings]:
    """The steps of a `normalizer` or a `pre_tokenizer`, none if there is no such part."""
    whole = settings.get(part) or {"type": "Sequence"}
    steps: list[Settings] = [whole]
    if whole["type"] == "Sequence":
        steps = whole.get(f"{part.replace('_', '')}s", [])
    return steps
