"""The scores that the paper's authors' own script gives, reproduced on part of its rows.

All 400 rows, and bfloat16: `python benchmarks/published_scores.py --model STUDENT`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "published_scores.py"


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.slow
def test_float32_scores_are_the_published_ones(shared_data, real_student):
    arguments = ["--model", str(real_student), "--rows", "60", "--data", str(shared_data)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=500
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["num_rows"] == 60
    assert report["num_token_counts_equal"] == 60
    assert report["relative_difference_max"] <= 1e-3
    assert report["relative_difference_median"] <= 1e-5
    assert report["teachers_in_published_order"]
