"""A file of tuned tiles is part of what a run is: other tiles would change its bits."""

import pytest

from rsr.engine.config import ScorerConfig
from rsr.engine.facts import StudentFacts
from rsr.jobs.errors import UsageError
from rsr.jobs.scoring.score import _identity
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.kernels.tuned_tiles import FILE_VARIABLE, TunedCard


def identity():
    student = StudentFacts(ScorerConfig(model="student"), True, {"config.json": "1"})
    return _identity(student, TrajectoryColumns())


def test_a_run_keeps_to_its_file_of_tiles(tmp_path, monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    without = identity()
    assert "tuned tiles" in without.versions
    own = tmp_path / "tiles.json"
    own.write_text(TunedCard("NVIDIA H100", 90, ()).to_json())
    monkeypatch.setenv(FILE_VARIABLE, str(own))
    with_file = identity()
    assert with_file.digest != without.digest
    (added,) = without.differences(with_file)
    (dropped,) = with_file.differences(without)
    assert added.startswith("tuned_tiles was None and is now '")
    assert dropped.endswith("and is now None")
    assert with_file.differences(identity()) == []


def test_a_file_that_is_none_is_refused_before_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "absent.json"))
    with pytest.raises(UsageError, match=r"absent\.json cannot be used"):
        identity()
