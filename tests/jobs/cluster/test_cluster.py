"""Ray for real, with a job that stands in for scoring: deaths, hangs and errors by a row's text."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from texts_run import run_texts

from rsr.jobs.errors import UsageError
from rsr.jobs.run.events import read_events

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("poison", [pytest.param("die", marks=pytest.mark.slow), "raise"])
def test_poison_row_is_refused_and_the_rest_is_finished(tmp_path, poison, address):
    texts = [f"text {i}" for i in range(40)]
    texts[21] = poison
    report, table, events = run_texts(tmp_path, texts, unit_rows=2, address=address)
    assert table is not None
    expected: list[int | None] = [len(text) for text in texts]
    expected[21] = None
    assert table["length"].to_pylist() == expected
    assert [f.where for f in report.failures] == ["rows.parquet row 21"]
    (summary,) = report.written
    assert summary.rows_by_status == {"ok": 39, "refused": 1}
    assert report.notices == {"lengths are of characters"}
    # A unit whose answer was on its way when the process died may be suspected once, not twice.
    blamed = [e for e in events if e["event"] == "unit_failed" and e["attempts"] > 1]
    assert all(e["start"] <= 21 < e["stop"] for e in blamed)
    assert events[-1]["event"] == "run_ended"
    assert events[-1]["outcome"] == "failed"


def test_out_of_memory_shrinks_the_batch_and_goes_on(tmp_path, address):
    report, table, events = run_texts(
        tmp_path, ["text", "at-most 4096", "text"] * 8, address=address
    )
    assert table is not None
    assert None not in table["length"].to_pylist()
    assert not report.failures
    shrunk = [e for e in events if e["event"] == "batch_shrunk"]
    assert {e["tokens_now"] for e in shrunk} == {4096}
    assert report.setbacks["out_of_memory"] >= 1


@pytest.mark.slow
def test_stopped_worker_is_killed_after_the_deadline_and_its_unit_run_again(tmp_path, address):
    texts = ["text"] * 30 + [f"hang-once {tmp_path / 'hung'}"] + ["text"] * 30
    report, table, events = run_texts(tmp_path, texts, unit_timeout_s=3.0, address=address)
    assert table is not None
    assert None not in table["length"].to_pylist()
    assert not report.failures
    assert [e["cause"] for e in events if e["event"] == "worker_lost"] == ["timeout"]


def test_model_that_cannot_be_loaded_is_refused(tmp_path, address):
    with pytest.raises(UsageError, match=r"stand-in cannot be run.*weights of an unknown shape"):
        run_texts(tmp_path, ["text"], is_whole=False, address=address)


def test_machine_that_does_not_see_the_files_is_refused(tmp_path, address):
    nowhere = tmp_path / "on" / "another" / "disk"
    with pytest.raises(UsageError, match=f"has no {nowhere}: every machine"):
        run_texts(tmp_path, ["text"], must_see=(nowhere,), address=address)
    assert not list(tmp_path.glob("out/.rsr/probe-*"))


def test_cluster_that_does_not_answer_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"no Ray cluster answers at 127\.0\.0\.1:1"):
        run_texts(tmp_path, ["text"], address="127.0.0.1:1")


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "http://head:8265"])
def test_address_of_another_kind_is_refused(tmp_path, address):
    with pytest.raises(UsageError, match=r"expected auto, host:port|no Ray cluster answers"):
        run_texts(tmp_path, ["text"], address=address)


def test_reading_and_writing_overlap_the_engine(tmp_path, address):
    _, table, events = run_texts(tmp_path, ["sleep 0.2"] * 20, unit_rows=1, address=address)
    assert table is not None
    finished = [e for e in events if e["event"] == "unit_finished"]
    started = next(e for e in events if e["event"] == "worker_started")
    assert len(finished) == 20
    assert started["node"] == finished[0]["node"]
    assert all(0.2 <= e["seconds"] < 0.4 for e in finished)


@contextmanager
def when_a_start_has_failed(log: Path, then: Callable[[], object]) -> Iterator[None]:
    """Calls `then` as soon as the event log says that a worker could not be set up."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.05):
            if any(event.get("cause") == "setup" for event in read_events(log)):
                then()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def texts_that_move(model: Path) -> list[str]:
    """In their middle, the model's folder is moved away and the worker killed."""
    model.mkdir()
    return [*["text"] * 20, f"move-and-die-once {model}", *["text"] * 19]


@pytest.mark.slow
def test_model_folder_that_goes_with_a_worker_and_comes_back_costs_no_row(tmp_path):
    model, log = tmp_path / "model", tmp_path / "out" / ".rsr" / "events.jsonl"
    texts = texts_that_move(model)
    with when_a_start_has_failed(log, lambda: Path(f"{model}.away").rename(model)):
        report, table, events = run_texts(
            tmp_path, texts, num_workers=1, must_see=(model,), unit_rows=4
        )
    assert table is not None
    assert table["length"].to_pylist() == [len(text) for text in texts]
    assert not report.failures
    lost = [e["cause"] for e in events if e["event"] == "worker_lost"]
    assert lost[:2] == ["crash", "setup"]
    assert events[-1]["outcome"] == "done"


@pytest.mark.slow
def test_model_folder_that_stays_away_ends_the_run_with_the_reason(tmp_path):
    model = tmp_path / "model"
    report, table, events = run_texts(
        tmp_path,
        texts_that_move(model),
        num_workers=1,
        must_see=(model,),
        unit_rows=4,
        # A process must have time to start; longer only makes the test longer.
        start_timeout_s=45.0,
    )
    assert table is None
    assert report.unwritten == ["rows.parquet"]
    (failure,) = report.failures
    assert f"has no {model}" in failure.reason
    assert report.num_rows + failure.num_rows == 40
    # Units in hand behind the one that moved it may have been finished before or not.
    assert report.num_rows >= 12
    assert events[-1]["outcome"] == "failed"
