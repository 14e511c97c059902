"""A file of tuned tiles is part of what a run is: other tiles would change its bits."""

import tempfile

import pytest

from rsr.engine.config import ScorerConfig
from rsr.engine.facts import StudentFacts
from rsr.jobs.errors import UsageError
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.manifest import Identity
from rsr.jobs.run.store import RunStore
from rsr.jobs.scoring.job import ScoringJob
from rsr.jobs.scoring.score import _identity
from rsr.jobs.shards.columns import TrajectoryColumns
from rsr.kernels.tuned_tiles import FILE_VARIABLE, TunedCard, own_file_text


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


@pytest.mark.parametrize("own_file", [None, TunedCard("NVIDIA H100", 90, ()).to_json()])
def test_a_worker_goes_by_the_file_of_who_started_the_run(tmp_path, monkeypatch, own_file):
    """On another machine, where the variable names nothing, or another file."""
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "of another user.json"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    found = []
    job = ScoringJob(
        ScorerConfig(model="m"),
        TrajectoryColumns(text="text"),
        RunStore.of(RunFolder(tmp_path / "out"), Identity({"token_scores": False})),
        tuned_tiles=own_file,
        open_engine=lambda _: found.append(own_file_text()),
    )
    job.open(None)
    assert found == [own_file]
