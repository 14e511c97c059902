"""Token ids by `fastokens`: the same as those of `tokenizers`, in a tenth of its time.

It is another program that reads the same `tokenizer.json`, so that its ids are to be believed only
as far as they were seen to be the same. They were, in all texts that `make fuzz` makes to tell the
two apart, but for one letter: where a tokenizer ignores case, whether the long s is an "s". Texts
with that letter are left to `tokenizers`, and the first of each process are encoded by both.

Knows tokenizers; knows nothing of conversations, templates or models.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from rsr.engine.errors import first_line

if TYPE_CHECKING:
    from fastokens import Tokenizer as FastTokenizer

LONG_S = "\u017f"
CHECKED_CHARS = 1 << 20
"""Characters that a process encodes in both ways before it relies on one."""
SHOWN_CHARS = 60
ADVICE = "leave out tokenizer_backend=fastokens"


class FastIds:
    """Encodes texts by `fastokens`, the first million characters by its reference as well.

    reference: of a byte-level vocabulary. Raises `ValueError` where fastokens is not installed or
    cannot read the tokenizer.
    """

    def __init__(self, reference: Tokenizer) -> None:
        self._reference = reference
        self._fast = _load(reference)
        self._num_unchecked = CHECKED_CHARS

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, nothing added; works on all cores and without Python's lock.

        Raises `ValueError` if one of the first texts has other ids by the reference.
        """
        if any(LONG_S in text for text in texts):
            return encode_ids(self._reference, texts)
        try:
            packed, packed_borders = self._fast.encode_batch_flat(list(texts))
        except ValueError:
            # A byte that the vocabulary lacks, which the reference leaves out.
            return encode_ids(self._reference, texts)
        ids = np.frombuffer(packed, np.uint32)
        borders = np.frombuffer(packed_borders, np.uint64).astype(np.int64)
        found = [ids[start:end] for start, end in pairwise(borders)]
        if self._num_unchecked > 0:
            self._check(texts, found)
        return found

    def _check(self, texts: Sequence[str], found: Sequence[NDArray[np.uint32]]) -> None:
        for text, ids, expected in zip(
            texts, found, encode_ids(self._reference, texts), strict=True
        ):
            if not np.array_equal(ids, expected):
                raise ValueError(
                    f"fastokens gives other tokens than tokenizers for {text[:SHOWN_CHARS]!r}"
                    f"{'…' if len(text) > SHOWN_CHARS else ''}: {ADVICE}"
                )
            self._num_unchecked -= len(text)


def encode_ids(reference: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
    """Token ids of each text by `tokenizers`, nothing added."""
    encodings = reference.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array(encoding.ids, np.uint32) for encoding in encodings]


def _load(reference: Tokenizer) -> "FastTokenizer":
    try:
        from fastokens import Tokenizer as FastTokenizer
    except ImportError:
        raise ValueError(
            f"fastokens is not installed: pip install 'rsr-engine[fastokens]', or {ADVICE}"
        ) from None
    try:
        return FastTokenizer.from_json_str(reference.to_str())
    except ValueError as error:
        reason = first_line(error)
        raise ValueError(f"fastokens cannot read this tokenizer: {reason}; {ADVICE}") from error
