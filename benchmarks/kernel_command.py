"""`rsr bench kernel`: parse, run, print; what is timed, and how, is in `kernel.py`.

Imports only what a machine with torch, click and rich has: GPUs are lent bare.
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from rsr.benchmarks.shapes import DEFAULT_PRESETS, PRESETS
from rsr.engine.config import Dtype
from rsr.engine.errors import first_line
from rsr.jobs.terminal import Console, Table, print_json, styled

if TYPE_CHECKING:
    import torch

    from rsr.benchmarks.kernel import BenchRow

PLOT_SUFFIXES = (".html", ".png")
COLUMNS = ("ms p50", "p20–p80", "tokens/s", "TFLOP/s", "of GEMM", "slow-down", "extra MiB")
# A GPU's clock moves, and its calls take milliseconds.
DEFAULT_REPETITIONS = {"cpu": 5, "cuda": 20}
# One head for each range of hidden sizes.
DEFAULT_TUNED = ("smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen3-8b")


@click.command()
@click.option(
    "--preset",
    "presets",
    multiple=True,
    type=click.Choice(list(PRESETS)),
    help="Student whose LM head to time; may be repeated. "
    + "; ".join(
        f"Default on {kind}: {', '.join(names)}" for kind, names in DEFAULT_PRESETS.items()
    ),
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice([dtype for dtype in get_args(Dtype) if dtype != "auto"]),
    default=("bfloat16",),
    show_default=True,
    help="Dtype of hidden states and weights; may be repeated.",
)
@click.option(
    "--device",
    default=None,
    help="Device to time on. [default: cuda where there is a GPU, else cpu]",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=None, help="Tokens per call. Default: the preset's."
)
@click.option(
    "--repeat",
    type=click.IntRange(1),
    default=None,
    help="Timed calls of each. Default: "
    + ", ".join(f"{number} on {kind}" for kind, number in DEFAULT_REPETITIONS.items())
    + ".",
)
@click.option(
    "--tune",
    is_flag=True,
    help="Instead, time the Triton pass with many tile sizes, and write the fastest for this GPU "
    "to kernels/tuned/, from where they are taken from then on.",
)
@click.option(
    "--tune-to",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Another file for --tune to write: name it in RSR_TUNED_TILES to use it.",
)
@click.option(
    "--busy-cores",
    type=click.IntRange(0),
    default=0,
    help="Time everything once more while a busy loop is pinned to each of so many cores.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Also write a CSV file.")
@click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), help="Also draw to .html or .png."
)
@click.pass_context
def kernel(
    context: click.Context,
    presets: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str | None,
    tokens: int | None,
    repeat: int | None,
    tune: bool,
    tune_to: Path | None,
    busy_cores: int,
    as_json: bool,
    csv_path: Path | None,
    plot_path: Path | None,
) -> None:
    """Time the rank kernel beside what else one would use, on the LM heads of real students.

    Every operation is checked against the reference first; one that fails is listed and not timed,
    and the exit code is then 1.
    """
    if plot_path is not None and plot_path.suffix not in PLOT_SUFFIXES:
        raise click.UsageError(f"--plot must end in {' or '.join(PLOT_SUFFIXES)}, got {plot_path}")
    if busy_cores and busy_cores > len(os.sched_getaffinity(0)):
        raise click.UsageError(
            f"--busy-cores must be at most this process's {len(os.sched_getaffinity(0))} cores, "
            f"got {busy_cores}"
        )
    # torch takes seconds to import: `rsr --help` should not wait for it.
    from rsr.benchmarks.kernel import bench_kernel

    chosen = _device(device)
    console = Console(stderr=True)
    if tune or tune_to is not None:
        with console.status("tuning"):
            console.say(f"wrote {_tune(presets or DEFAULT_TUNED, chosen, repeat, tune_to)}")
        return
    rows: list[BenchRow] = []
    for preset in presets or DEFAULT_PRESETS[chosen.type]:
        shape = PRESETS[preset]
        if tokens is not None:
            shape = type(shape)(tokens, shape.hidden_size, shape.vocab_size)
        for dtype in dtypes:
            with _telling(console, f"{preset}, {dtype}") as tell:
                rows += bench_kernel(
                    preset,
                    shape,
                    dtype,
                    chosen,
                    repeat or DEFAULT_REPETITIONS[chosen.type],
                    busy_cores,
                    tell,
                )
            if csv_path is not None:  # what comes next may run out of memory
                _write_csv(rows, csv_path)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
    else:
        stdout = Console()
        stdout.say(
            f"{rows[0].device}, {rows[0].num_threads} threads, torch {rows[0].torch_version}"
        )
        for table in _tables(rows):
            stdout.print()
            stdout.print(table)
    if plot_path is not None:
        _plot(rows, plot_path)
    # What does not fit on this machine is not wrong.
    failures = [row.failed_check for row in rows if row.failed_check is not None]
    if any(not failure.startswith("OutOfMemoryError") for failure in failures):
        context.exit(1)


@contextmanager
def _telling(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Shows what is done: beside a spinner on a terminal, line after line elsewhere."""
    with console.status(what) as status:
        yield (
            lambda step: (
                status.update(f"{what}: {step}")
                if console.is_terminal
                else console.say(f"{what}: {step}")
            )
        )


def _tune(
    presets: Sequence[str], device: "torch.device", repeat: int | None, path: Path | None
) -> Path:
    """Writes the file of this card's tiles."""
    from rsr.benchmarks.tune import candidates, tune
    from rsr.kernels import tuned_tiles

    if device.type != "cuda":
        raise click.UsageError(f"--tune needs an NVIDIA GPU, got --device {device}")
    import torch

    tiles = candidates(torch.cuda.get_device_capability(device))
    shapes = [PRESETS[preset] for preset in presets]
    card = tune(shapes, device, tiles, num_repetitions=repeat or DEFAULT_REPETITIONS["cuda"])
    path = path or tuned_tiles.FOLDER / tuned_tiles.file_name(card.card)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(card.to_json())
    return path


def _device(name: str | None) -> "torch.device":
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {name}: {first_line(error)}") from None
    if device.type not in DEFAULT_PRESETS:
        raise click.UsageError(f"--device must be cpu or cuda, got {name}")
    return device


def _tables(rows: Sequence["BenchRow"]) -> Iterator[Table]:
    """One table per head: what is compared stands together."""
    same_conditions = attrgetter("preset", "dtype", "busy_cores")
    for (preset, dtype, busy_cores), group in groupby(rows, key=same_conditions):
        of_head = list(group)
        first = of_head[0]
        shape = f"{first.num_tokens:,} × {first.hidden_size:,} × {first.vocab_size:,}"
        busy = f", {busy_cores} cores busy" if busy_cores else ""
        title = f"{preset}, {dtype}, {shape}{busy}"
        table = Table(title=title, title_justify="left", pad_edge=True)
        table.add_column("operation", no_wrap=True)
        for column in (
            "ms p50",
            "p20–p80",
            "tokens/s",
            "TFLOP/s",
            "of GEMM",
            "slow-down",
            "extra MiB",
        ):
            table.add_column(column, justify="right")
        for row in of_head:
            table.add_row(row.operation, *_cells(row))
        yield table


def _cells(row: "BenchRow") -> list[Any]:
    if row.time_ms_p50 is None:
        return [styled((f"not timed: {row.failed_check}", "red"))]
    return [
        f"{row.time_ms_p50:,.1f}",
        f"{row.time_ms_p20:,.0f}–{row.time_ms_p80:,.0f}",
        f"{row.tokens_per_s:,.0f}",
        f"{row.tflop_per_s:.3f}",
        f"{row.share_of_gemm:.0%}",
        f"{row.slow_down:.2f} ×",
        f"{row.peak_extra_mib:,.0f}",
    ]


def _write_csv(rows: Sequence["BenchRow"], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )


def _plot(rows: Sequence["BenchRow"], path: Path) -> None:
    """Bars of the median time, one panel per head, with 20th and 80th percentile."""
    import altair as alt

    timed = [row for row in rows if row.time_ms_p50 is not None]
    values = [asdict(row) | {"head": f"{row.preset}, {row.dtype}"} for row in timed]
    operation = alt.Y("operation:N", sort=None, title=None)
    base = alt.Chart(alt.Data(values=values)).encode(y=operation)
    bars = base.mark_bar(color="#0072b2").encode(x=alt.X("time_ms_p50:Q", title="median, ms"))
    spread = base.mark_rule().encode(x="time_ms_p20:Q", x2="time_ms_p80:Q")
    chart = (bars + spread).facet(row=alt.Row("head:N", title=None)).resolve_scale(x="independent")
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.properties(title=f"Rank kernel on {timed[0].device}" if timed else "").save(path)
