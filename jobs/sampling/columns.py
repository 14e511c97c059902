"""The columns that a candidate adds to its problem's, and how a unit keeps them until then.

A unit has one row for each problem, with lists of its samples; the output has one for each sample.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl
import pyarrow as pa

from rsr.engine.sampling import SampledText
from rsr.jobs.sampling.blocks import Block
from rsr.jobs.shards.score_columns import Reason, Summary
from rsr.jobs.shards.shard import Shard

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
CANDIDATE_SCHEMA = pa.schema(
    [
        ("messages", pa.list_(MESSAGE)),
        ("response", pa.string()),
        ("sample_index", pa.int32()),
        ("seed", pa.int64()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int32()),
        ("sample_detail", pa.string()),
        ("sample_model", pa.string()),
        ("prompt_hash", pa.string()),
    ]
)
"""What a candidate has besides its problem's columns."""


def is_candidate_column(name: str) -> bool:
    return name in CANDIDATE_SCHEMA.names


REFUSED = "refused"
"""The `finish_reason` of a problem that was put to nobody; `sample_detail` says why."""
SEED_BITS = 62
"""Bits of a problem's first seed: with the number of a sample added to it, it is still an int64."""


@dataclass(frozen=True, slots=True)
class ProblemSamples:
    """What became of one problem: its prompt's messages, and its answers or why there are none.

    reason: in words that are the same for every such problem; detail: of this one.
    """

    prompt: list[dict[str, str]] = field(default_factory=list)
    prompt_hash: str = ""
    answers: tuple[SampledText, ...] = ()
    reason: str = ""
    detail: str = ""
    hint: str = ""


def seed_of(run_seed: int, stem: str, row: int) -> int:
    """The seed of a problem's sample 0; sample k has this plus k. Runs of one `run_seed` agree."""
    text = f"{run_seed} {stem} {row}".encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return number >> (64 - SEED_BITS)


def to_frame(samples: Sequence[ProblemSamples]) -> pl.DataFrame:
    """One row for each problem, in order."""
    return pl.DataFrame(
        {
            "roles": [[m["role"] for m in s.prompt] for s in samples],
            "contents": [[m["content"] for m in s.prompt] for s in samples],
            "prompt_hash": [s.prompt_hash for s in samples],
            "responses": [[a.text for a in s.answers] for s in samples],
            "finish_reasons": [[a.finish_reason for a in s.answers] for s in samples],
            "num_tokens": [[a.num_tokens for a in s.answers] for s in samples],
            "detail": [s.detail or None for s in samples],
        },
        schema={
            "roles": pl.List(pl.String),
            "contents": pl.List(pl.String),
            "prompt_hash": pl.String,
            "responses": pl.List(pl.String),
            "finish_reasons": pl.List(pl.String),
            "num_tokens": pl.List(pl.Int32),
            "detail": pl.String,
        },
    )


def summary_of(samples: Sequence[ProblemSamples], shard: Shard, first_row: int) -> Summary:
    """num_rows are problems, which are consecutive; statuses count samples."""
    num_samples = Block.parse(shard.name).num_samples
    summary = Summary()
    for row, problem in enumerate(samples, first_row):
        finish_reasons = [answer.finish_reason for answer in problem.answers]
        one = Summary(
            num_rows=1,
            num_tokens=sum(answer.num_tokens for answer in problem.answers),
            rows_by_status=dict(Counter(finish_reasons or [REFUSED] * num_samples)),
        )
        if not finish_reasons:
            reason = Reason(1, f"{shard.name} row {row}", problem.hint)
            one.reasons[f"{REFUSED}: {problem.reason}"] = reason
        summary.merge(one)
    return summary


def candidates(
    frame: pl.DataFrame, block: Block, first_row: int, seed: int, model: str
) -> pa.Table:
    """A row of `CANDIDATE_SCHEMA` for each sample of consecutive problems from `first_row` on."""
    rows = []
    for row, problem in enumerate(frame.iter_rows(named=True), first_row):
        prompt = [
            {"role": role, "content": content}
            for role, content in zip(problem["roles"], problem["contents"], strict=True)
        ]
        first_seed = seed_of(seed, block.stem, row)
        for place in range(block.num_samples):
            index = block.first + place
            is_refused = not problem["responses"]
            response = None if is_refused else problem["responses"][place]
            answer = [] if is_refused else [{"role": "assistant", "content": response}]
            rows.append(
                {
                    "messages": [*prompt, *answer] or None,
                    "response": response,
                    "sample_index": index,
                    "seed": first_seed + index,
                    "finish_reason": REFUSED if is_refused else problem["finish_reasons"][place],
                    "num_tokens": None if is_refused else problem["num_tokens"][place],
                    "sample_detail": problem["detail"],
                    "sample_model": model,
                    "prompt_hash": problem["prompt_hash"] or None,
                }
            )
    return pa.Table.from_pylist(rows, CANDIDATE_SCHEMA)
