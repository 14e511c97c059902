"""What a run would cost, from a sample of its rows, the student's shape and a GPU's data sheet.

Tokens are counted on the sample with the student's own tokenizer; FLOPs and memory follow
from its configuration; hours from a GPU's data sheet and a share of it that is assumed, or
measured by `rsr bench engine`. Everything here is a prediction, and each number is printed with
what it rests on.
"""

import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rsr.benchmarks.engine_runs import OURS
from rsr.engine.config import ScorerConfig
from rsr.jobs.errors import UsageError
from rsr.jobs.inspection.inspection import student_to_read_with
from rsr.jobs.inspection.reading import Reading
from rsr.jobs.planning.gpus import Gpu
from rsr.jobs.planning.sample import Corpus, Sample, histogram, sample_corpus
from rsr.jobs.planning.schedule import WORTH_MORE_WORKERS, PaperRun, Schedule
from rsr.jobs.scoring.score import (
    METRIC_BYTES_PER_ROW,
    SCORE_BYTES_PER_ROW,
    TOKEN_COLUMN_BYTES_PER_TEXT_BYTE,
)
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.jobs.shards.inputs import find_inputs
from rsr.jobs.terminal import format_seconds

if TYPE_CHECKING:
    from rsr.engine.cost import ModelCost

ASSUMED_SHARE_OF_PEAK = 0.4
"""Share of a data sheet's FLOPs that prefill reaches: assumed, not measured."""
ASSUMED_START_S = 180.0
"""Seconds from the command to the first unit: workers, weights, warm-up."""
ASSUMED_WRITE_BYTES_PER_S = 100e6
"""Bytes per second of trajectory text that one worker writes; a slow object store takes longer."""
ACTIVATION_BYTES = 4 * 10**9
"""Kept free on each GPU beside weights and KV cache."""
MAX_BATCHED_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Figure:
    """One predicted number, as text, and what it rests on."""

    name: str
    value: str
    because: str


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A prediction. seconds: of the whole run, from command to last file.

    length_histogram: sampled rows by tokens, from the edge before up to `up_to` (None: beyond
    all). share_busy: of the workers' time after the start, that they score. most_useful_gpus: twice
    as many would shorten the run by less than 5 %. settings: options of `rsr score` that it would
    take. sample: what the student makes of the rows that were tokenized.
    """

    num_rows: int
    num_tokens: float
    num_tokens_error: float
    num_scored_tokens: float
    length_histogram: list[dict[str, int | None]]
    flops: float
    seconds: float
    gpu_hours: float
    weight_bytes_per_gpu: int
    kv_bytes_per_token: int
    kv_tokens_per_worker: int
    num_workers: int
    num_units: int
    share_busy: float
    most_useful_gpus: int
    output_bytes: float
    settings: dict[str, int]
    sample: Reading
    figures: list[Figure]


def plan_run(
    pattern: str,
    scorer: ScorerConfig,
    columns: TrajectoryColumns,
    gpu: Gpu,
    *,
    num_gpus: int,
    sample_rows: int,
    calibration: Path | None = None,
) -> RunPlan:
    """Predict `rsr score` over `pattern`; raises `UsageError` where it could not run at all."""
    inputs = find_inputs(pattern)
    student = student_to_read_with(scorer)
    from rsr.engine.cost import model_cost

    corpus, sample = sample_corpus(inputs, columns, student, sample_rows)
    if not sample.num_rows:
        raise UsageError(f"{pattern} has no rows to plan for")
    cost = model_cost(student.config)
    layout = choose_layout(cost, gpu, num_gpus=num_gpus, max_model_len=student.max_model_len)
    speed = choose_speed(cost, gpu, student.config.dtype, calibration)
    return predict(corpus, sample, cost, layout, speed, scorer)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the student lies on the GPUs. kv_tokens: room for so many per worker."""

    tensor_parallel_size: int
    num_workers: int
    num_gpus: int
    max_num_batched_tokens: int
    kv_tokens: int


def choose_layout(cost: "ModelCost", gpu: Gpu, *, num_gpus: int, max_model_len: int) -> Layout:
    """The fewest GPUs per copy that hold the weights and one longest sequence.

    Raises `UsageError` if not even all of them together do.
    """
    usable = ScorerConfig(model="-").gpu_memory_utilization * gpu.memory_bytes - ACTIVATION_BYTES
    size = 1
    while size <= num_gpus:
        free = usable * size - cost.weight_bytes
        kv_tokens = int(max(0.0, free) // cost.kv_bytes_per_token)
        if kv_tokens >= max_model_len and cost.num_heads % size == 0:
            batched = min(MAX_BATCHED_TOKENS, max(2048, 2 ** int(math.log2(kv_tokens))))
            return Layout(size, num_gpus // size, num_gpus, batched, kv_tokens)
        size *= 2
    raise UsageError(
        f"{cost.weight_bytes / 1e9:,.0f} GB of weights and one sequence of {max_model_len:,} "
        f"tokens do not fit {num_gpus} × {gpu.name} ({gpu.memory_bytes / 1e9:.0f} GB each): give "
        "more GPUs with --num-gpus, or a shorter --max-model-len"
    )


@dataclass(frozen=True, slots=True)
class Speed:
    """FLOP/s of one GPU on this work, and why one should believe it."""

    flop_per_s: float
    because: str


def choose_speed(cost: "ModelCost", gpu: Gpu, dtype: str, calibration: Path | None) -> Speed:
    """Measured if there is a measurement, else an assumed share of the data sheet's."""
    if calibration is not None:
        return _measured_speed(cost, calibration)
    peak = gpu.fp32_flop_per_s if dtype == "float32" else gpu.bf16_flop_per_s
    return Speed(
        ASSUMED_SHARE_OF_PEAK * peak,
        f"ASSUMED: {ASSUMED_SHARE_OF_PEAK:.0%} of {peak / 1e12:,.0f} TFLOP/s ({dtype}, "
        f"{gpu.source}); measure it with rsr bench engine --json, and give --calibration",
    )


def _measured_speed(cost: "ModelCost", path: Path) -> Speed:
    """What one GPU did in `rsr bench engine --json`, in FLOP/s, at that workload's mean length."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        (ours,) = [row for row in rows if row["way"] == OURS]
        tokens_per_s = float(ours["tokens_per_s"])
        mean_tokens = max(1, round(ours["num_tokens"] / ours["num_rows"]))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UsageError(
            f"--calibration {path}: expected the output of rsr bench engine --json, with a row "
            f"of way {OURS!r} ({error!r})"
        ) from error
    per_token = cost.prefill_flops(mean_tokens) / mean_tokens + cost.head_flops_per_scored_token
    return Speed(
        tokens_per_s * per_token,
        f"measured: {tokens_per_s:,.0f} tokens/s on one GPU in {path}, taken to be this GPU and "
        "this student",
    )


def predict(
    corpus: Corpus,
    sample: Sample,
    cost: "ModelCost",
    layout: Layout,
    speed: Speed,
    scorer: ScorerConfig,
) -> RunPlan:
    """The arithmetic, from the sample to the whole input."""
    scale = corpus.num_rows / sample.num_rows
    num_tokens = scale * sum(sample.num_tokens)
    scored = scale * sum(sample.scored_tokens)
    spread = statistics.stdev(sample.num_tokens) if sample.num_rows > 1 else 0.0
    error = 2 * corpus.num_rows * spread / math.sqrt(sample.num_rows)
    body = scale * sum(map(cost.prefill_flops, sample.num_tokens))
    flops = body + scored * cost.head_flops_per_scored_token
    size = layout.tensor_parallel_size
    run = PaperRun(
        corpus.files,
        seconds_per_byte=flops / (max(1, corpus.text_bytes) * speed.flop_per_s * size),
        write_seconds_per_byte=1 / ASSUMED_WRITE_BYTES_PER_S,
    )
    schedule, useful = run.on(layout.num_workers), run.on_most_useful(ASSUMED_START_S)
    seconds = ASSUMED_START_S + schedule.seconds
    per_text_byte = TOKEN_COLUMN_BYTES_PER_TEXT_BYTE if scorer.token_scores else 0
    plan = RunPlan(
        num_rows=corpus.num_rows,
        num_tokens=num_tokens,
        num_tokens_error=error,
        num_scored_tokens=scored,
        length_histogram=histogram(sample.num_tokens),
        flops=flops,
        seconds=seconds,
        gpu_hours=seconds * layout.num_gpus / 3600,
        weight_bytes_per_gpu=cost.weight_bytes // size,
        kv_bytes_per_token=cost.kv_bytes_per_token,
        kv_tokens_per_worker=layout.kv_tokens,
        num_workers=layout.num_workers,
        num_units=schedule.num_units,
        share_busy=schedule.share_busy,
        most_useful_gpus=size * useful.num_workers,
        output_bytes=corpus.num_bytes
        + (SCORE_BYTES_PER_ROW + METRIC_BYTES_PER_ROW * scorer.has_metrics) * corpus.num_rows
        + per_text_byte * corpus.text_bytes,
        settings={
            "workers": layout.num_workers,
            "tensor_parallel_size": layout.tensor_parallel_size,
            "max_num_batched_tokens": layout.max_num_batched_tokens,
        },
        sample=sample.reading,
        figures=[],
    )
    return replace(
        plan, figures=_figures(plan, corpus, sample, cost, layout, schedule, useful, speed)
    )


def _figures(
    plan: RunPlan,
    corpus: Corpus,
    sample: Sample,
    cost: "ModelCost",
    layout: Layout,
    schedule: Schedule,
    useful: Schedule,
    speed: Speed,
) -> list[Figure]:
    refused, truncated = sample.reading.num_refused, sample.reading.num_truncated
    head = plan.num_scored_tokens * cost.head_flops_per_scored_token
    useful_s = ASSUMED_START_S + useful.seconds
    useful_gpu_hours = useful_s * plan.most_useful_gpus / 3600
    limits = schedule.limits
    unit_s = schedule.share_busy * schedule.seconds * layout.num_workers / plan.num_units
    return [
        Figure(
            "rows",
            f"{plan.num_rows:,}",
            f"counted in the footers of {len(corpus.files):,} files",
        ),
        Figure(
            "tokens",
            f"{plan.num_tokens:,.0f} ± {plan.num_tokens_error:,.0f}",
            f"{sample.num_rows:,} sampled rows through the student's tokenizer and template; two "
            "standard errors, as if they were drawn at random; prompts that siblings share count "
            "each time",
        ),
        Figure(
            "scored tokens",
            f"{plan.num_scored_tokens:,.0f}",
            f"rows through the LM head; of the sample, {refused:,} rows have no score and "
            f"{truncated:,} are cut to the longest sequence",
        ),
        Figure(
            "FLOPs",
            f"{plan.flops:.3g}",
            f"2 × {cost.num_active_parameters:,} active parameters a token, causal attention, and "
            f"the LM head on scored rows alone ({head / max(1.0, plan.flops):.0%})",
        ),
        Figure("speed of a GPU", f"{speed.flop_per_s / 1e12:,.3g} TFLOP/s", speed.because),
        Figure(
            "time",
            format_seconds(plan.seconds),
            f"{format_seconds(ASSUMED_START_S)} to start (ASSUMED), "
            f"{format_seconds(schedule.scored_seconds)} of FLOPs at that speed, unit by unit over "
            f"{layout.num_workers} workers, and the writing of what is scored last at "
            f"{ASSUMED_WRITE_BYTES_PER_S / 1e6:.0f} MB/s (ASSUMED); the workers score "
            f"{plan.share_busy:.0%} of the time after the start",
        ),
        Figure(
            "GPUs that help",
            f"up to {plan.most_useful_gpus:,}",
            f"they take {format_seconds(useful_s)} and {useful_gpu_hours:,.2f} GPU-hours; twice "
            f"as many would save less than {WORTH_MORE_WORKERS:.0%} of the time",
        ),
        Figure("GPU-hours", f"{plan.gpu_hours:,.2f}", f"time × {layout.num_gpus} GPUs"),
        Figure(
            "weights",
            f"{plan.weight_bytes_per_gpu / 1e9:,.1f} GB per GPU",
            f"{cost.num_parameters:,} parameters of {cost.dtype_bytes} bytes over "
            f"{layout.tensor_parallel_size} GPU(s)",
        ),
        Figure(
            "KV cache",
            f"{plan.kv_bytes_per_token / 1024:,.0f} KiB a token; room for "
            f"{plan.kv_tokens_per_worker:,} tokens per worker",
            "90 % of memory, less weights and "
            f"{ACTIVATION_BYTES / 1e9:.0f} GB for activations (ASSUMED)",
        ),
        Figure(
            "output",
            f"{plan.output_bytes / 1e9:,.2f} GB",
            f"INPUT's files again and {SCORE_BYTES_PER_ROW} bytes a row, with all metrics "
            f"{METRIC_BYTES_PER_ROW} more, and more with token columns",
        ),
        Figure(
            "units",
            f"{plan.num_units:,}, about {format_seconds(unit_s)} each",
            f"{limits.max_bytes >> 10:,} KiB of text or {limits.max_rows:,} rows: what an "
            "interruption costs each worker at most",
        ),
    ]
