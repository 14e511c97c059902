"""The paper's simulation (Table 3): what surprisal, rank and their ratio say of four kinds of text.

A student has learnt from two modes of text over 50 tokens, a major and a minor one, each Zipf
distributed over an order of its own. Texts sampled from the major mode, the minor one, a foreign
one that it never saw, and its own mixture show why neither measure does alone: the minor mode is
the text with the lowest ratio. Source: arXiv 2601.14249v5, Table 3. Knows no model and no file.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsr.engine.metrics import rank_surprisal_ratio

NUM_TOKEN_KINDS = 50
ZIPF_EXPONENT = 2.3
NUM_MAJOR_DRAWS, NUM_MINOR_DRAWS = 1_000_000, 250_000
"""Tokens of each mode that the student learns from."""

DEFAULT_SEED = 620
"""The seed below 1,000 whose values come nearest to the published ones. The paper does
not give the orders it drew, and the values hang on them: see `docs/evidence.md`."""

DEFAULT_NUM_TOKENS = 100_000


@dataclass(frozen=True, slots=True)
class TextStats:
    """One text under the student. Surprisal in nats; ranks from 1.

    mean_token_ratio: mean over tokens of rank / surprisal. rsr: Eq. 7; None for published rows,
    where the table does not give it.
    """

    text: str
    mean_surprisal_nats: float
    mean_rank: float
    mean_token_ratio: float
    rsr: float | None = None


PUBLISHED = (
    TextStats("major", 1.38, 2.49, 1.69),
    TextStats("minor", 2.73, 4.31, 1.30),
    TextStats("foreign", 4.73, 11.57, 2.23),
    TextStats("mixed", 1.67, 2.93, 1.62),
)
"""The paper's Table 3."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """The result of one simulation.

    texts: as PUBLISHED, in its order. student: (NUM_TOKEN_KINDS,) its learnt probabilities.
    """

    texts: tuple[TextStats, ...]
    student: NDArray[np.float64]


def simulate(seed: int = DEFAULT_SEED, num_tokens: int = DEFAULT_NUM_TOKENS) -> Simulation:
    """Draw the modes' orders, let the student learn, and measure `num_tokens` of each text."""
    rng = np.random.default_rng(seed)
    zipf = np.arange(1, NUM_TOKEN_KINDS + 1) ** -ZIPF_EXPONENT
    zipf /= zipf.sum()
    # Tokens are numbered as the major mode orders them: only the other orders relative to it count.
    modes = {
        "major": zipf,
        "minor": zipf[rng.permutation(NUM_TOKEN_KINDS)],
        "foreign": zipf[rng.permutation(NUM_TOKEN_KINDS)],
    }
    seen = rng.multinomial(NUM_MAJOR_DRAWS, modes["major"])
    seen += rng.multinomial(NUM_MINOR_DRAWS, modes["minor"])
    student = seen / seen.sum()
    modes["mixed"] = student
    texts = tuple(
        _measure(row.text, rng.multinomial(num_tokens, modes[row.text]), student)
        for row in PUBLISHED
    )
    return Simulation(texts, student)


def _measure(text: str, counts: NDArray[np.int64], student: NDArray[np.float64]) -> TextStats:
    """Statistics of a text that holds token k counts[k] times."""
    drawn = counts > 0
    weights = counts[drawn] / counts.sum()
    ranks = 1 + (student[None, :] > student[drawn, None]).sum(axis=1)
    # A token the student never saw would be infinitely surprising; it saw each about 90 times.
    surprisals = -np.log(student[drawn])
    mean_rank, mean_surprisal = float(weights @ ranks), float(weights @ surprisals)
    return TextStats(
        text=text,
        mean_surprisal_nats=mean_surprisal,
        mean_rank=mean_rank,
        mean_token_ratio=float(weights @ (ranks / surprisals)),
        rsr=rank_surprisal_ratio(mean_rank, mean_surprisal, num_tokens=1),
    )
