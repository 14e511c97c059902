"""Rows and bytes encoded in a second: `python benchmarks/bench_encoding.py --help`.

Two corpora of one-round rows made of English words: of 1 kB, and long traces with reasoning.
Beside each stands the least that it can cost, one rendering of each row and one call of
`tokenizers` for all texts without their offsets, on the same rows in turns. Each backend is held
against `tokenizers` on all of these rows first. Times are this process's CPU time, all of its
threads together, and so rates are those of one core. Prints one JSON line each.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import click

from rsr.benchmarks.bench_jobs import cpu_name
from rsr.engine.chat import TrajectoryEncoder, load_tokenizer
from rsr.engine.config import TokenizerBackend
from rsr.engine.template import ChatTemplate, resolve_chat_template
from rsr.engine.trajectory import EncodedTrajectory, Trajectory

TEXT = (
    "so the sum of these two numbers is then equal to wait let me check that again because if we "
    "multiply both sides by x we get 3x + 7 = 22 and hence x = 5 which fits the first condition "
    "but not yet the second one, therefore the answer must be \\boxed{5}.\n\n"
)


Rows = Sequence[list[dict[str, str]]]


def make_rows(num_rows: int, num_bytes: int, seed: int) -> Rows:
    source, words = random.Random(seed), TEXT.split(" ")
    rows = []
    for _ in range(num_rows):
        text = " ".join(source.choices(words, k=num_bytes // 4))[:num_bytes]
        thought, answer = text[: num_bytes * 3 // 4], text[num_bytes * 3 // 4 :]
        question = " ".join(source.choices(words, k=20))
        content = f"<think>\n{thought}\n</think>\n\n{answer}"
        rows.append(
            [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
        )
    return rows


def seconds_of(call: Callable[[Rows], object], rows: Rows) -> float:
    start = time.process_time()
    call(rows)
    return time.process_time() - start


@click.command()
@click.option("--model", required=True, help="Folder or hub name with a tokenizer and a template.")
@click.option("--repetitions", default=5, show_default=True)
def main(model: str, repetitions: int) -> None:
    tokenizer = load_tokenizer(model)
    source = resolve_chat_template(tokenizer, "auto")
    if source is None:
        raise click.UsageError(f"{model} has no chat template")
    template, reference = ChatTemplate(tokenizer, source), tokenizer.backend_tokenizer

    def encoded_by(backend: TokenizerBackend) -> Callable[[Rows], list[EncodedTrajectory]]:
        encoder = TrajectoryEncoder(
            tokenizer, chat_template=source, max_model_len=1 << 20, tokenizer_backend=backend
        )
        return lambda rows: encoder.encode_all([Trajectory(messages=row) for row in rows])

    def least(rows: Rows) -> None:
        texts = [template.render(row)[0] for row in rows]
        reference.encode_batch_fast(texts, add_special_tokens=False)

    encoders = {backend: encoded_by(backend) for backend in get_args(TokenizerBackend)}
    for name, num_rows, num_bytes in (("1 kB", 1000, 1000), ("64 kB traces", 30, 64_000)):
        rows = make_rows(num_rows, num_bytes, seed=0)
        size = sum(len(m["content"].encode()) for row in rows for m in row)
        expected = encoders["tokenizers"](rows)
        assert all(row.status.is_scored for row in expected)
        for encode in encoders.values():
            assert encode(rows) == expected
        calls = [*encoders.values(), least]
        times = [[seconds_of(call, rows) for call in calls] for _ in range(repetitions)]
        # The quickest of each: what disturbs a run only ever adds to it.
        *ours, bare = (min(column) for column in zip(*times, strict=True))
        for backend, seconds in zip(encoders, ours, strict=True):
            print(
                json.dumps(
                    {
                        "corpus": name,
                        "backend": backend,
                        "model": Path(model).name,
                        "cpu": cpu_name(),
                        "rows_per_s": round(num_rows / seconds),
                        "megabytes_per_s": round(size / seconds / 1e6, 1),
                        "bare_rows_per_s": round(num_rows / bare),
                        "bare_megabytes_per_s": round(size / bare / 1e6, 1),
                        "times_bare": round(seconds / bare, 3),
                    }
                )
            )


if __name__ == "__main__":
    main()
