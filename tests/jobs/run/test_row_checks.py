"""What `rsr verify` finds wrong with a row whose bytes are as the run's receipt says."""

import pyarrow as pa
import pytest

from rsr.jobs.comparison.verify import CHECKS as GATE
from rsr.jobs.grading.verify import CHECKS as GRADE
from rsr.jobs.refinement.verify import CHECKS as REFINE
from rsr.jobs.run.manifest import Identity, Manifest

MANIFEST = Manifest(
    writer="compare",
    identity=Identity({"max_drift": 0.5}),
    shards=(),
    subject="",
    command=(),
    output="out",
)
CASES = [
    (GRADE, ("correct", True), None),
    (GRADE, ("truncated", False), None),
    (GRADE, ("correct", False), "has a row of status 'correct' with correct False"),
    (GRADE, ("right", True), "has a row of status 'right'"),
    (REFINE, ("refined",), None),
    (REFINE, ("better",), "has a row of status 'better'"),
    (GATE, ("refined", 0.5), None),
    (GATE, ("drifted", 0.7), None),
    (GATE, ("refined", 0.6), "has a refined row of drift 0.6; expected at most 0.5"),
    (GATE, ("refined", None), "has a refined row of drift None; expected at most 0.5"),
    (GATE, ("passed", 0.1), "has a row of status 'passed'"),
]


@pytest.mark.parametrize(("checks", "row", "wrong"), CASES)
def test_a_row_that_no_run_writes_is_told(checks, row, wrong):
    values = zip(checks.looked_at, row, strict=True)
    batch = pa.RecordBatch.from_pydict({name: [value] for name, value in values})
    assert list(checks.statuses(batch, MANIFEST)) == [(row[0], wrong)]
