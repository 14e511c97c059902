"""How far refined traces have moved from their native ones, told by the student, without a judge.

Edited and unchanged spans are those of a longest-match alignment of the two traces' token ids
(difflib's). Every difference is refined less native, of surprisals in nats. Knows no files.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from rsr.engine.parts import NUM_QUARTERS
from rsr.jobs.comparison.pairs import Pair, pair_rows, read_pairs, why_no_tokens
from rsr.jobs.comparison.streams import Stream
from rsr.jobs.evidence.bootstrap import interval, resampling_weights
from rsr.jobs.evidence.examples import student_tokenizer

SPANS = ("all", *(f"q{number + 1}" for number in range(NUM_QUARTERS)), "unchanged", "edited")
"""Parts of a trace. The quarters are `rsr score`'s: token k of n is in quarter ⌊4k / n⌋ + 1."""

SUMS = tuple(
    f"{stream} {span} {what}"
    for stream in ("native", "refined")
    for span in SPANS
    for what in ("tokens", "surprisal")
)
"""What is summed over pairs, in order; everything of `drift_values` is made of it."""

DRIFT_FORMULA = "edit share + max(0, Δ mean surprisal in nats)"
"""The one number that a gate looks at: ours. A repaired line edits little, whatever it costs the
student; a trace in another register is edited throughout, even where its tokens are likely ones."""

NUM_TOKENS_TOLD = 10


@dataclass(frozen=True, slots=True)
class DriftOptions:
    """How the drift of refined traces is measured.

    max_pairs: looked at; a random choice where there are more. tokenizer: of the student, a
    folder or hub name; None takes the run's model where that is a folder that is there.
    """

    max_pairs: int = 1_000
    num_draws: int = 1_000
    seed: int = 0
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class TokenShare:
    """One token of the student. text: as its vocabulary spells it; None without a tokenizer.

    native, refined: its share of the tokens, or of the first quarter's surprisal.
    """

    id: int
    text: str | None
    native: float
    refined: float


@dataclass(frozen=True, slots=True)
class DriftValue:
    """A number over all pairs with its 95 % bootstrap interval over problems."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Drift:
    """A refined stream beside the native one, over pairs of their rows.

    num_pairs: looked at. num_unpaired: rows of the refined stream with a score that pair with no
    native one. values: by the names of `drift_values`. distance: Jensen–Shannon distance of token
    frequencies, base 2, from 0 to 1. moved: tokens that make up most of it. first_quarter: tokens
    that carry most of the first quarter's surprisal in either stream. note: on the tokens' texts.
    """

    num_pairs: int
    num_pairs_there: int
    num_unpaired: int
    values: dict[str, DriftValue]
    distance: float
    moved: list[TokenShare]
    first_quarter: list[TokenShare]
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"formula": DRIFT_FORMULA}


def drift_values(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The drift of one pair or of many, from the sums of `SUMS` over them; NaN where undefined.

    delta_…: mean surprisal per token, refined less native, in nats: of the whole traces, of each
    quarter, of the tokens that both have (`unchanged`) and of the others (`edited`). edit_share:
    1 − 2 · unchanged / (native tokens + refined tokens). length_ratio: refined / native tokens.
    drift: `DRIFT_FORMULA`.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        means = {
            (stream, span): sums[f"{stream} {span} surprisal"] / sums[f"{stream} {span} tokens"]
            for stream in ("native", "refined")
            for span in SPANS
        }
        values = {
            "delta_surprisal" if span == "all" else f"delta_{span}": means["refined", span]
            - means["native", span]
            for span in SPANS
        }
        ours, theirs = sums["native all tokens"], sums["refined all tokens"]
        values["edit_share"] = 1 - 2 * sums["native unchanged tokens"] / (ours + theirs)
        values["length_ratio"] = theirs / ours
        rise = np.maximum(values["delta_surprisal"], 0.0)
        values["drift"] = values["edit_share"] + rise
    return values


def pair_sums(pair: Pair) -> dict[str, NDArray[np.float64]]:
    """The `SUMS` of one pair, as scalars."""
    unchanged = _unchanged(pair)
    sums: dict[str, Any] = {}
    for stream, tokens, kept in (
        ("native", pair.native, unchanged[0]),
        ("refined", pair.refined, unchanged[1]),
    ):
        length = len(tokens.ids)
        quarters = NUM_QUARTERS * np.arange(length) // max(1, length)
        masks = {"all": np.ones(length, bool), "unchanged": kept, "edited": ~kept}
        masks |= {f"q{number + 1}": quarters == number for number in range(NUM_QUARTERS)}
        for span in SPANS:
            sums[f"{stream} {span} tokens"] = np.float64(masks[span].sum())
            sums[f"{stream} {span} surprisal"] = tokens.surprisals_nats[masks[span]].sum()
    return sums


def measure_drift(
    native: Stream, refined: Stream, problems: pl.Series, options: DriftOptions
) -> Drift | str:
    """The drift over pairs of these problems, or why none can be told.

    Raises `UsageError` if a tokenizer that was asked for is not the student's.
    """
    for stream in (native, refined):
        if (why := why_no_tokens(stream)) is not None:
            return f"no drift of {refined.label}: {why}"
    shared = pair_rows(native, refined).filter(pl.col("problem").is_in(problems.implode()))
    if not len(shared):
        return (
            f"no drift of {refined.label}: none of its rows pairs with one of {native.label}, by "
            "parent_id, or by a problem of which either has one row where there is none"
        )
    chosen = shared
    if len(shared) > options.max_pairs:
        chosen = shared.sample(options.max_pairs, seed=options.seed).sort("refined_row")
    sums, counts = _collect(native, refined, chosen)
    is_usable = refined.is_usable & refined.problem.is_in(problems.implode())
    num_rows = refined.table.scan.select(is_usable.sum()).collect(engine="streaming").item()
    tokenizer, why = student_tokenizer(native.table, options.tokenizer)
    return Drift(
        num_pairs=len(chosen),
        num_pairs_there=len(shared),
        num_unpaired=num_rows - len(shared),
        values=_estimates(sums, chosen["problem"], options),
        distance=_distance(counts.tokens),
        moved=_told(counts.tokens, _divergences(counts.tokens), tokenizer),
        first_quarter=_told(counts.first_quarter, None, tokenizer),
        note=None if why is None else f"Tokens are shown as ids: {why}.",
    )


@dataclass(frozen=True, slots=True)
class _Weights:
    """Counts of each token, native and refined, and its surprisal in quarter 1."""

    tokens: tuple[Counter[int], Counter[int]] = field(
        default_factory=lambda: (Counter(), Counter())
    )
    first_quarter: tuple[Counter[int], Counter[int]] = field(
        default_factory=lambda: (Counter(), Counter())
    )


def _collect(
    native: Stream, refined: Stream, rows: pl.DataFrame
) -> tuple[NDArray[np.float64], _Weights]:
    """(pairs, len(SUMS)) sums of each pair, and the weights of tokens over all of them."""
    sums = np.empty((len(rows), len(SUMS)))
    weights = _Weights()
    for number, pair in enumerate(read_pairs(native, refined, rows)):
        of_pair = pair_sums(pair)
        sums[number] = [of_pair[name] for name in SUMS]
        for index, tokens in enumerate((pair.native, pair.refined)):
            ids = tokens.ids.tolist()
            weights.tokens[index].update(ids)
            # Token k of n is in the first quarter if 4k < n.
            first = ids[: -(-len(ids) // NUM_QUARTERS)]
            for token, surprisal in zip(first, tokens.surprisals_nats.tolist(), strict=False):
                weights.first_quarter[index][token] += surprisal
    return sums, weights


def _unchanged(pair: Pair) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tokens of the native and of the refined trace are in a matching block."""
    ours, theirs = pair.native.ids.tolist(), pair.refined.ids.tolist()
    kept = np.zeros(len(ours), bool), np.zeros(len(theirs), bool)
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        kept[0][block.a : block.a + block.size] = True
        kept[1][block.b : block.b + block.size] = True
    return kept


def _estimates(
    sums: NDArray[np.float64], problems: pl.Series, options: DriftOptions
) -> dict[str, DriftValue]:
    numbers = problems.rank("dense").to_numpy().astype(np.int64) - 1
    by_problem = np.zeros((numbers.max() + 1, len(SUMS)))
    np.add.at(by_problem, numbers, sums)
    rng = np.random.default_rng(options.seed)
    drawn = resampling_weights(rng, options.num_draws, len(by_problem)) @ by_problem
    values = drift_values(dict(zip(SUMS, by_problem.sum(axis=0), strict=True)))
    draws = drift_values(dict(zip(SUMS, drawn.T, strict=True)))
    told = {}
    for name, value in values.items():
        low, high = interval(draws[name]) or (None, None)
        is_there = bool(np.isfinite(value))
        told[name] = DriftValue(
            float(value) if is_there else None,
            low if is_there else None,
            high if is_there else None,
        )
    return told


def _shares(counts: Sequence[Mapping[int, float]]) -> dict[int, tuple[float, float]]:
    """The share of each token in each of two totals."""
    totals = [sum(count.values()) or 1 for count in counts]
    return {
        token: (counts[0].get(token, 0) / totals[0], counts[1].get(token, 0) / totals[1])
        for token in {**counts[0], **counts[1]}
    }


def _divergences(counts: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The part of each token in the Jensen–Shannon divergence, in bits."""

    def part(p: float, q: float) -> float:
        return p * np.log2(2 * p / (p + q)) if p > 0 else 0.0

    shares = _shares(counts)
    return {token: float(part(p, q) + part(q, p)) / 2 for token, (p, q) in shares.items()}


def _distance(counts: Sequence[Mapping[int, float]]) -> float:
    return float(np.sqrt(max(0.0, sum(_divergences(counts).values()))))


def _told(
    counts: Sequence[Mapping[int, float]], order: Mapping[int, float] | None, tokenizer: Any
) -> list[TokenShare]:
    """The first tokens by `order`, or by the larger of their two shares."""
    shares = _shares(counts)
    weight = order or {token: max(pair) for token, pair in shares.items()}
    chosen = sorted(shares, key=lambda token: (-weight[token], token))[:NUM_TOKENS_TOLD]
    texts: Sequence[str | None] = [None] * len(chosen)
    if tokenizer is not None:
        texts = [_text(token, tokenizer) for token in chosen]
    return [
        TokenShare(token, text, *shares[token]) for token, text in zip(chosen, texts, strict=True)
    ]


def _text(token: int, tokenizer: Any) -> str:
    """What a token writes; the vocabulary's own spelling where that is no whole character."""
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if not text or "\ufffd" in text:
        return piece
    # SentencePiece leaves the space out of what it takes for the start of a text.
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text
