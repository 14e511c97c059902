"""The dispatcher on workers that exist on paper only, with a clock of their own."""

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_pool import HANGS, Misfortune, PaperPool, PaperWorker, done

from rsr.jobs.cluster.answers import Answer, Failed, Lost, Placed, Ready
from rsr.jobs.cluster.deadlines import Deadlines
from rsr.jobs.cluster.dispatcher import (
    LOAD_SECONDS,
    MAX_SETBACKS,
    MIN_BATCHED_TOKENS,
    PLACE_SECONDS,
    CannotStartError,
    Dispatcher,
)
from rsr.jobs.cluster.work import (
    RANGES_LISTED,
    CommitShard,
    RunUnit,
    Task,
    WorkQueue,
)
from rsr.jobs.run.events import (
    BatchShrunk,
    Cause,
    Event,
    Next,
    NoWorkerReady,
    ShardWritten,
    UnitFailed,
    UnitFinished,
    WorkerLost,
)
from rsr.jobs.shards.shard import Shard, Unit


def make_shard(name: str, num_rows: int, *, row_bytes: int = 100) -> Shard:
    return Shard(f"/in/{name}", name, num_rows, num_rows * row_bytes, "fingerprint")


def cut(shard: Shard, step: int) -> list[Unit]:
    return [
        Unit(shard, start, min(start + step, shard.num_rows))
        for start in range(0, shard.num_rows, step)
    ]


def crash() -> Lost:
    return Lost(cause=Cause.CRASH, reason="killed by a test")


def run_on_paper(pool: PaperPool, queue: WorkQueue, **options) -> tuple[Dispatcher, list[Event]]:
    dispatcher = Dispatcher(pool, queue, clock=lambda: pool.now, **options)
    events = []
    for number, event in enumerate(itertools.chain(dispatcher.until_ready(), dispatcher.run())):
        assert number < 100_000, "the run does not end"
        if event is not None:
            events.append(event)
    return dispatcher, events


def rows_of(units: list[Unit]) -> Counter:
    return Counter((u.shard.name, row) for u in units for row in range(u.start, u.stop))


def all_rows(*shards: Shard) -> Counter:
    return Counter((s.name, row) for s in shards for row in range(s.num_rows))


def poison(shard_name: str, row: int, cause: Cause = Cause.CRASH) -> Misfortune:
    def strike(pool: PaperPool, worker: int, unit: Unit) -> Answer | None:
        if unit.shard.name != shard_name or not unit.start <= row < unit.stop:
            return None
        if cause is Cause.CRASH:
            return crash()
        return Failed(cause=cause, reason="struck by a test")

    return strike


def test_every_row_is_scored_once_and_every_shard_written_after_its_rows():
    shards = [make_shard("a", 100), make_shard("b", 1), make_shard("c", 0), make_shard("d", 37)]
    units = [unit for shard in shards for unit in cut(shard, 8)]
    pool = PaperPool(num_places=3)
    queue = WorkQueue({s.name: s for s in shards}, units)
    _, events = run_on_paper(pool, queue)
    assert rows_of(pool.scored) == all_rows(*shards)
    written = [event.shard for event in events if isinstance(event, ShardWritten)]
    assert sorted(written) == ["a", "b", "c", "d"]
    assert not queue.failures()
    assert not queue.unwritten_shards()


def test_long_units_come_first_and_a_shard_stays_together():
    short, long = make_shard("short", 20, row_bytes=10), make_shard("long", 25, row_bytes=1000)
    pool = PaperPool(num_places=1)
    queue = WorkQueue({s.name: s for s in (short, long)}, cut(short, 10) + cut(long, 10))
    run_on_paper(pool, queue)
    assert [(u.shard.name, u.num_rows) for u in pool.scored] == [
        ("long", 10), ("long", 10), ("long", 5), ("short", 10), ("short", 10),
    ]  # fmt: skip


def test_a_worker_has_two_units_in_hand_but_none_waits_while_another_worker_has_nothing():
    shard = make_shard("a", 12)
    pool = PaperPool(num_places=4)
    run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 1)))
    assert pool.now == pytest.approx(3.0)
    assert max(pool.most_in_hand.values()) == 2


@pytest.mark.parametrize("num_workers", [1, 2, 7])
@pytest.mark.parametrize("row", [0, 37, 63])
@pytest.mark.parametrize("cause", [Cause.CRASH, Cause.ENGINE])
def test_poison_row_is_refused_alone(num_workers, row, cause):
    shards = [make_shard("a", 64), make_shard("b", 256)]
    pool = PaperPool(num_places=num_workers, misfortune=poison("a", row, cause))
    queue = WorkQueue({s.name: s for s in shards}, cut(shards[0], 64) + cut(shards[1], 64))
    _, events = run_on_paper(pool, queue)
    assert [(u.shard.name, u.start, u.stop) for u in pool.refused] == [("a", row, row + 1)]
    assert rows_of(pool.scored) + rows_of(pool.refused) == all_rows(*shards)
    assert not queue.unwritten_shards()
    (failure,) = queue.failures()
    assert failure.where == f"a row {row}"
    # One loss that may be anybody's, then one to a halving, and two of the row alone.
    assert len([e for e in events if isinstance(e, WorkerLost)]) == 2 + 5 + 2


def test_unit_that_waits_behind_a_poisoned_one_is_innocent():
    shard = make_shard("a", 128)
    pool = PaperPool(num_places=1, misfortune=poison("a", 3))
    _, events = run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 32)))
    blamed = {(e.start, e.stop) for e in events if isinstance(e, UnitFailed)}
    assert all(start <= 3 < stop for start, stop in blamed)


def test_suspect_has_its_worker_to_itself():
    shard = make_shard("a", 640)
    pool = PaperPool(num_places=2, misfortune=poison("a", 100))
    run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 16)))
    for worker in {w for w, _ in pool.sent}:
        tasks = [t for w, t in pool.sent if w == worker and isinstance(t, RunUnit)]
        fatal = [t for t in tasks if t.unit.start <= 100 < t.unit.stop]
        if fatal and fatal[0].may_be_kept:
            assert tasks[-1] == fatal[0], "something was sent to a worker that had a suspect"


def test_workers_lost_at_random_cost_no_row_its_score():
    for seed in range(20):
        dice = random.Random(seed)
        shards = [make_shard("a", 500), make_shard("b", 300)]
        pool = PaperPool(
            num_places=3,
            misfortune=lambda pool, worker, unit, dice=dice: (
                crash() if dice.random() < 0.1 else None
            ),
        )
        queue = WorkQueue({s.name: s for s in shards}, cut(shards[0], 16) + cut(shards[1], 16))
        run_on_paper(pool, queue)
        kept = rows_of(pool.scored) + rows_of(pool.refused)
        assert kept == all_rows(*shards)
        assert not queue.unwritten_shards()
        assert not pool.refused


def test_hanging_worker_is_killed_and_its_unit_goes_to_another():
    shard = make_shard("a", 40)
    hung = []

    def hang_once(pool: PaperPool, worker: int, unit: Unit) -> object | None:
        if unit.start == 20 and not hung:
            hung.append(worker)
            return HANGS
        return None

    pool = PaperPool(num_places=2, misfortune=hang_once)
    _, events = run_on_paper(
        pool, WorkQueue({"a": shard}, cut(shard, 10)), deadlines=Deadlines(60.0)
    )
    assert pool.killed == hung
    assert rows_of(pool.scored) == all_rows(shard)
    (failed,) = [e for e in events if isinstance(e, UnitFailed)]
    assert (failed.cause, failed.next) == (Cause.TIMEOUT, Next.AGAIN_ALONE)
    assert 60 <= pool.now < 70


def test_deadline_grows_with_the_unit_and_is_learned():
    shard = make_shard("a", 100_000)
    deadlines = Deadlines()
    first = deadlines.seconds(Unit(shard, 0, 10))
    deadlines.observe(Unit(shard, 0, 100), 30.0)
    assert deadlines.seconds(Unit(shard, 0, 100)) == pytest.approx(600.0)
    assert deadlines.seconds(Unit(shard, 0, 200)) == pytest.approx(1200.0)
    assert deadlines.seconds(Unit(shard, 0, 1)) == 120.0 < first


def test_out_of_memory_halves_the_batch_until_it_fits():
    shard = make_shard("a", 64)

    def too_much(pool: PaperPool, worker: int, unit: Unit) -> Answer | None:
        if pool.workers[worker].max_num_batched_tokens <= 2048:
            return None
        return Failed(cause=Cause.MEMORY, reason="CUDA out of memory")

    pool = PaperPool(num_places=1, misfortune=too_much)
    queue = WorkQueue({"a": shard}, cut(shard, 16))
    _, events = run_on_paper(pool, queue)
    shrunk = [(e.tokens_before, e.tokens_now) for e in events if isinstance(e, BatchShrunk)]
    assert shrunk == [(8192, 4096), (4096, 2048)]
    assert rows_of(pool.scored) == all_rows(shard)
    assert not queue.failures()


def test_row_that_never_fits_is_refused_once_the_batch_is_smallest():
    shard = make_shard("a", 4)
    pool = PaperPool(num_places=1, misfortune=poison("a", 2, Cause.MEMORY))
    queue = WorkQueue({"a": shard}, cut(shard, 4))
    run_on_paper(pool, queue)
    assert [(u.start, u.stop) for u in pool.refused] == [(2, 3)]
    assert rows_of(pool.scored) + rows_of(pool.refused) == all_rows(shard)
    assert all(w.max_num_batched_tokens == MIN_BATCHED_TOKENS for w in pool.workers.values())


def test_unreadable_rows_are_given_up_after_a_few_attempts_and_listed():
    shards = [make_shard("bad", 20), make_shard("good", 20)]
    pool = PaperPool(num_places=2, misfortune=poison("bad", 12, Cause.INPUT))
    queue = WorkQueue({s.name: s for s in shards}, cut(shards[0], 10) + cut(shards[1], 10))
    run_on_paper(pool, queue)
    (failure,) = queue.failures()
    assert (failure.where, failure.attempts) == ("bad rows 10 to 19", 3)
    assert queue.unwritten_shards() == ["bad"]
    assert not pool.killed


def test_long_shard_that_cannot_be_read_costs_itself_alone():
    shards = [make_shard("bad", 500, row_bytes=1000), make_shard("good", 20)]

    def unreadable(pool: PaperPool, worker: int, unit: Unit) -> Answer | None:
        if unit.shard.name == "good":
            return None
        return Failed(cause=Cause.INPUT, reason="not Parquet")

    pool = PaperPool(num_places=1, misfortune=unreadable)
    queue = WorkQueue({s.name: s for s in shards}, cut(shards[0], 10) + cut(shards[1], 10))
    run_on_paper(pool, queue)
    assert queue.unwritten_shards() == ["bad"]
    assert sum(failure.num_rows for failure in queue.failures()) == 500
    assert len(queue.failures()) == RANGES_LISTED + 1


def test_engine_that_fails_on_everything_ends_the_run_without_refusing_its_rows():
    shard = make_shard("a", 10_000)

    def always(pool: PaperPool, worker: int, unit: Unit) -> Answer:
        return crash()

    pool = PaperPool(num_places=2, misfortune=always)
    queue = WorkQueue({"a": shard}, cut(shard, 100))
    run_on_paper(pool, queue)
    assert not pool.refused
    assert len(pool.killed) <= MAX_SETBACKS + 2
    (failure,) = queue.failures()
    assert failure.num_rows == 10_000
    assert "killed by a test" in failure.reason


def test_lost_node_is_held_against_nobody_and_fewer_workers_go_on():
    shard = make_shard("a", 400)

    def lose_node(pool: PaperPool, worker: int, unit: Unit) -> Answer | None:
        if worker == 0 and unit.start >= 100:
            pool.num_places = 1
            return Lost(cause=Cause.NODE, reason="its node has died")
        return None

    pool = PaperPool(num_places=2, misfortune=lose_node)
    _, events = run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 10)))
    assert rows_of(pool.scored) == all_rows(shard)
    assert len(pool.workers) == 1
    assert {e.next for e in events if isinstance(e, UnitFailed)} == {Next.AGAIN}


def test_cluster_that_grows_gets_more_workers():
    shard = make_shard("a", 4000)

    def grow(pool: PaperPool, worker: int, unit: Unit) -> None:
        if unit.start >= 1000:
            pool.num_places = 6

    pool = PaperPool(num_places=2, misfortune=grow)
    run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 10)))
    assert len({worker for worker, _ in pool.sent}) == 6
    assert pool.now < 100 / 2 + 5 + 300 / 6 + 10


def test_workers_beyond_the_places_wait_for_room_and_are_not_taken_to_hang():
    """An autoscaler sees what is asked for, and brings machines when it likes."""
    grown_at = 3 * PLACE_SECONDS

    def grow(pool: PaperPool, worker: int, unit: Unit) -> None:
        if pool.now >= grown_at:
            pool.num_places = 5

    shard = make_shard("a", 100)
    pool = PaperPool(
        misfortune=grow,
        seconds_of=lambda unit: 100.0,
        start_answers=lambda pool, worker: None if worker < 2 else [],
    )
    queue = WorkQueue({"a": shard}, cut(shard, 1))
    dispatcher = Dispatcher(pool, queue, num_workers=5, clock=lambda: pool.now)
    lost_at = []
    for event in itertools.chain(dispatcher.until_ready(), dispatcher.run()):
        if isinstance(event, WorkerLost):
            lost_at.append(pool.now)
    assert rows_of(pool.scored) == all_rows(shard)
    # There is room for them now, and still they do not come.
    assert len(lost_at) >= 3
    assert min(lost_at) >= grown_at + PLACE_SECONDS


def test_model_that_cannot_be_loaded_is_refused_at_once():
    def refuse(pool: PaperPool, worker: int) -> list[Answer]:
        reason = "ValueError: no such architecture"
        return [
            Placed(node="paper", pid=1),
            Failed(cause=Cause.ENGINE, reason=reason),
        ]

    shard = make_shard("a", 4)
    pool = PaperPool(start_answers=refuse)
    with pytest.raises(CannotStartError, match="no such architecture"):
        run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 2)))


def test_card_that_a_dying_process_still_holds_is_waited_for():
    """Half a minute, in which nothing else goes on."""

    def busy_until(end: float) -> Callable[[PaperPool, int], list[Answer] | None]:
        def answers(pool: PaperPool, worker: int) -> list[Answer] | None:
            held = Failed(cause=Cause.BUSY, reason="Free memory on device is less than desired")
            return [Placed(node="paper", pid=1), held] if pool.now < end else None

        return answers

    shard = make_shard("a", 4)
    pool = PaperPool(num_places=2, start_answers=busy_until(25.0))
    run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 2)))
    assert rows_of(pool.scored) == all_rows(shard)
    pool = PaperPool(num_places=2, start_answers=busy_until(1e9))
    with pytest.raises(CannotStartError, match="Free memory on device"):
        run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 2)))
    assert pool.now < 120


def test_worker_that_dies_while_it_loads_is_replaced():
    def die_first(pool: PaperPool, worker: int) -> list[Answer] | None:
        placed = Placed(node="paper", pid=1)
        return [placed, crash()] if worker < 3 else None

    shard = make_shard("a", 4)
    pool = PaperPool(num_places=1, start_answers=die_first)
    run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 2)))
    assert rows_of(pool.scored) == all_rows(shard)


def test_model_on_which_every_start_dies_is_given_up():
    shard = make_shard("a", 4)
    pool = PaperPool(num_places=1, start_answers=lambda pool, worker: [crash()])
    with pytest.raises(CannotStartError, match="killed by a test"):
        run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 2)))


def placed(worker: int) -> Placed:
    return Placed(node="paper", pid=worker)


def no_folder(worker: int) -> list[Answer]:
    return [Failed(cause=Cause.SETUP, reason="no such folder")]


def test_model_folder_that_goes_and_comes_back_costs_time_alone():
    shard = make_shard("a", 100)
    killed_at: list[float] = []

    def kill_once(pool: PaperPool, worker: int, unit: Unit) -> Answer | None:
        if unit.start != 50 or killed_at:
            return None
        killed_at.append(pool.now)
        return crash()

    def start(pool: PaperPool, worker: int) -> list[Answer] | None:
        is_gone = killed_at and pool.now < killed_at[0] + 900.0
        return no_folder(worker) if is_gone else None

    pool = PaperPool(num_places=1, misfortune=kill_once, start_answers=start)
    queue = WorkQueue({"a": shard}, cut(shard, 10))
    _, events = run_on_paper(pool, queue)
    assert rows_of(pool.scored) == all_rows(shard)
    assert not queue.failures()
    # It is noticed within the longest pause, and a pause that grows keeps the log short.
    assert 900 < pool.now < 900 + 60 + 30
    assert len([e for e in events if isinstance(e, WorkerLost)]) < 25
    (notice,) = [e for e in events if isinstance(e, NoWorkerReady)]
    assert notice.reason == "no such folder"
    assert notice.seconds + notice.seconds_left == pytest.approx(1800)


def test_model_folder_that_stays_away_ends_the_run_with_what_was_finished():
    shard = make_shard("a", 100)
    pool = PaperPool(
        num_places=1,
        misfortune=lambda pool, worker, unit: crash() if unit.start == 50 else None,
        start_answers=lambda pool, worker: no_folder(worker) if worker else None,
    )
    queue = WorkQueue({"a": shard}, cut(shard, 10))
    run_on_paper(pool, queue, start_timeout_s=300.0)
    assert rows_of(pool.scored) == Counter(("a", row) for row in range(50))
    (failure,) = queue.failures()
    assert failure.num_rows == 50
    assert "no such folder" in failure.reason
    assert 300 < pool.now < 400


@pytest.mark.seconds
def test_machine_without_the_model_folder_leaves_the_work_to_others_but_is_asked_again():
    shard = make_shard("a", 4000)
    bad: list[int] = []

    def start(pool: PaperPool, worker: int) -> list[Answer] | None:
        # The third worker's machine; whatever is started later finds no other place.
        if worker < 2 or pool.now > 1000:
            return None
        bad.append(worker)
        return no_folder(worker)

    pool = PaperPool(num_places=3)
    dispatcher = Dispatcher(pool, WorkQueue({"a": shard}, cut(shard, 1)), clock=lambda: pool.now)
    list(dispatcher.until_ready())
    pool.start_answers = start
    list(dispatcher.run())
    assert rows_of(pool.scored) == all_rows(shard)
    assert len({worker for worker, _ in pool.sent}) == 3
    assert len(bad) < 12


def test_cluster_that_shrinks_to_nothing_and_comes_back_goes_on():
    shard = make_shard("a", 100)

    class Spot(PaperPool):
        @property
        def num_places(self) -> int:
            return 0 if 20 < self.now < 1000 else 2

        @num_places.setter
        def num_places(self, _value: int) -> None:
            pass

    def preempt(pool: PaperPool, worker: int, unit: Unit) -> Answer | None:
        if 20 < pool.now < 1000:
            return Lost(cause=Cause.NODE, reason="its node has died")
        return None

    pool = Spot(misfortune=preempt)
    queue = WorkQueue({"a": shard}, cut(shard, 1))
    _, events = run_on_paper(pool, queue)
    assert rows_of(pool.scored) == all_rows(shard)
    assert not queue.failures()
    assert any(isinstance(e, NoWorkerReady) for e in events)


def test_cluster_that_stays_empty_is_given_up():
    shard = make_shard("a", 10)
    pool = PaperPool(num_places=0)
    with pytest.raises(CannotStartError, match=r"1,800 s: the cluster has no place"):
        run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 1)))


@pytest.mark.parametrize("words", [0, 1])
def test_worker_that_is_started_and_never_ready_is_replaced_and_given_up(words):
    shard = make_shard("a", 10)
    pool = PaperPool(num_places=1, start_answers=lambda pool, worker: [placed(worker)][:words])
    with pytest.raises(CannotStartError, match="not finished after"):
        run_on_paper(pool, WorkQueue({"a": shard}, cut(shard, 1)))
    assert len(pool.killed) >= 1
    assert pool.now < 1900 + words * 2 * LOAD_SECONDS


@pytest.mark.seconds
def test_several_workers_that_hang_at_once_are_given_up_together():
    shard = make_shard("a", 1000)
    pool = PaperPool(num_places=30, misfortune=lambda pool, worker, unit: HANGS)
    queue = WorkQueue({"a": shard}, cut(shard, 1))
    run_on_paper(pool, queue, deadlines=Deadlines(10.0))
    assert sum(failure.num_rows for failure in queue.failures()) == 1000


START_FATES = (
    "ready", "setup", "crash", "crash_loading", "memory", "engine", "node", "silent",
    "silent_loading",
)  # fmt: skip
TASK_FATES = ("done", "crash", "engine", "memory", "node", "input", "output", "setup", "silent")
WRITE_FATES = ("done", "crash", "node", "output", "silent")


def fates(names: Sequence[str]) -> st.SearchStrategy[list[tuple[str, float]]]:
    """What happens to the first, the second, …; the last one's fate is that of all others."""
    seconds = st.sampled_from([0.0, 0.5, 7.0, 45.0, 400.0])
    return st.lists(st.tuples(st.sampled_from(names), seconds), min_size=1, max_size=12)


class FatefulPool(PaperPool):
    """Workers whose starts, units and writes go as it is written, on places that come and go."""

    def __init__(self, starts, units, writes, places, reported_tokens) -> None:
        super().__init__()
        self.fates = {"start": starts, "unit": units, "write": writes}
        self.places = places
        self.reported_tokens = reported_tokens
        self.counts: Counter[str] = Counter()

    @property
    def num_places(self) -> int:
        return self.places[min(int(self.now // 60), len(self.places) - 1)]

    @num_places.setter
    def num_places(self, _value: int) -> None:
        pass

    def start(self, worker: int, max_num_batched_tokens: int | None) -> None:
        self.workers[worker] = PaperWorker(max_num_batched_tokens or 8192)
        fate, seconds = self._next_fate("start")
        if fate in ("crash", "silent"):
            if fate == "crash":
                self._answer_at(self.now + seconds, worker, crash())
            return
        self._answer_at(self.now, worker, placed(worker))
        self._answer_at(self.now + seconds, worker, self._loaded(fate, worker))

    def _next_fate(self, of: str) -> tuple[str, float]:
        fates = self.fates[of]
        self.counts[of] += 1
        return fates[min(self.counts[of], len(fates)) - 1]

    def _loaded(self, fate: str, worker: int) -> Answer | object:
        match fate:
            case "ready":
                return Ready(
                    seconds=1.0,
                    max_num_batched_tokens=self.reported_tokens,
                )  # fmt: skip
            case "silent_loading":
                return HANGS
            case "crash_loading":
                return crash()
        return self._failed(fate, worker, None)

    def _failed(self, fate: str, worker: int, task: Task | None) -> Answer:
        if fate == "node":
            return Lost(cause=Cause.NODE, reason="its node has died")
        cause = Cause.MEMORY if fate == "memory" else Cause(fate)
        return Failed(cause=cause, reason=fate)

    def send(self, worker: int, task: Task) -> None:
        hand = self.workers[worker]
        fate, seconds = self._next_fate("unit" if isinstance(task, RunUnit) else "write")
        hand.engine_free_at = max(hand.engine_free_at, self.now) + seconds
        answer: Answer | object = done(task)
        if fate == "silent":
            answer = HANGS
        elif fate == "crash":
            answer = crash()
        elif fate != "done":
            answer = self._failed(fate, worker, task)
        self._answer_at(hand.engine_free_at, worker, answer, task)


def check_that_it_ends(pool, num_rows, unit_rows, num_workers):
    shards = [make_shard(f"s{n}", rows) for n, rows in enumerate(num_rows)]
    queue = WorkQueue({s.name: s for s in shards}, [u for s in shards for u in cut(s, unit_rows)])
    try:
        _, events = run_on_paper(
            pool, queue, num_workers=num_workers, deadlines=Deadlines(100.0), start_timeout_s=900.0
        )
    except CannotStartError:
        assert set(pool.counts) <= {"start"}
    else:
        finished = rows_of(
            [
                Unit(next(s for s in shards if s.name == e.shard), e.start, e.stop)
                for e in events
                if isinstance(e, UnitFinished)
            ]
        )
        assert max(finished.values(), default=1) == 1
        listed = [f for f in queue.failures() if not f.reason.startswith("engine_error")]
        assert finished.total() + sum(f.num_rows for f in listed) == sum(num_rows)
        written = [e.shard for e in events if isinstance(e, ShardWritten)]
        assert sorted(written + queue.unwritten_shards()) == [s.name for s in shards]
        assert bool(queue.unwritten_shards()) <= bool(listed)
    # Every halving of every row's unit, twice, and every shard's three attempts; between two that
    # are finished, at most so many losses, each with its deadline and a start for it.
    num_finished = 1 + sum(num_rows) + len(shards)
    num_losses = MAX_SETBACKS * num_finished
    assert pool.now <= num_losses * (500.0 + 900.0 + 4 * LOAD_SECONDS)


@pytest.mark.seconds
@settings(max_examples=100, deadline=None)
@given(
    starts=fates(START_FATES),
    units=fates(TASK_FATES),
    writes=fates(WRITE_FATES),
    places=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    num_workers=st.sampled_from([None, None, 1, 3]),
    num_rows=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    unit_rows=st.integers(1, 5),
    reported_tokens=st.sampled_from([None, 256, 8192]),
)
def test_every_run_ends_and_every_row_is_finished_or_listed(
    starts, units, writes, places, num_workers, num_rows, unit_rows, reported_tokens
):
    pool = FatefulPool(starts, units, writes, places, reported_tokens)
    check_that_it_ends(pool, num_rows, unit_rows, num_workers)


@pytest.mark.seconds
@pytest.mark.parametrize("later_start", START_FATES)
@pytest.mark.parametrize("unit", TASK_FATES)
@pytest.mark.parametrize("write", ["done", "node", "silent"])
def test_run_ends_that_goes_the_same_way_for_ever(later_start, unit, write):
    starts = [("ready", 0.5), (later_start, 0.5)]
    pool = FatefulPool(starts, [(unit, 0.5)], [(write, 0.5)], [1], 8192)
    check_that_it_ends(pool, [1, 3], 2, None)


def test_pool_that_ends_ends_the_run_with_what_was_finished():
    shard = make_shard("a", 100)
    queue = WorkQueue({"a": shard}, cut(shard, 10))
    pool = PaperPool(num_places=2, ends_at=2.5)
    run_on_paper(pool, queue)
    (failure,) = queue.failures()
    assert failure.reason == "its house burned down"
    assert failure.num_rows == 100 - len(pool.scored) * 10
    assert 0 < len(pool.scored) < 10
    with pytest.raises(CannotStartError, match="its house burned down"):
        run_on_paper(PaperPool(ends_at=0.0), WorkQueue({"a": shard}, cut(shard, 10)))


def test_worker_that_is_lost_while_the_head_is_away_is_replaced_when_it_is_back():
    shard = make_shard("a", 100)
    queue = WorkQueue({"a": shard}, cut(shard, 10))

    def lose(pool, worker, unit):
        if pool.now < 5.0 and pool.answers_from == 0.0:
            pool.answers_from = 90.0
            return Lost(cause=Cause.NODE, reason="its machine is gone")
        return None

    pool = PaperPool(num_places=1, misfortune=lose)
    run_on_paper(pool, queue)
    assert not queue.failures()
    assert pool.answers_from <= pool.now < 120.0


def test_shard_that_cannot_be_written_is_tried_a_few_times_and_listed():
    shards = [make_shard("a", 4), make_shard("b", 4)]

    class FullDisk(PaperPool):
        def send(self, worker: int, task: Task) -> None:
            if isinstance(task, CommitShard) and task.shard.name == "a":
                self.sent.append((worker, task))
                failed = Failed(cause=Cause.OUTPUT, reason="disk full")
                self._answer_at(self.now, worker, failed, task)
            else:
                super().send(worker, task)

    pool = FullDisk()
    queue = WorkQueue({s.name: s for s in shards}, cut(shards[0], 2) + cut(shards[1], 2))
    run_on_paper(pool, queue)
    assert queue.unwritten_shards() == ["a"]
    assert [(f.where, f.reason, f.attempts) for f in queue.failures()] == [("a", "disk full", 3)]


def test_draining_waits_for_units_in_hand_and_hands_out_no_more():
    shard = make_shard("a", 1000)
    pool = PaperPool(num_places=2)
    dispatcher = Dispatcher(pool, WorkQueue({"a": shard}, cut(shard, 1)), clock=lambda: pool.now)
    list(dispatcher.until_ready())
    for _ in dispatcher.run():
        if len(pool.scored) >= 10:
            break
    list(dispatcher.drain(10.0))
    assert rows_of(pool.scored) == rows_of([t.unit for _, t in pool.sent])
    assert len(pool.scored) <= 14


def test_draining_does_not_wait_for_ever():
    shard = make_shard("a", 10)
    pool = PaperPool(num_places=1, misfortune=lambda pool, worker, unit: HANGS)
    dispatcher = Dispatcher(pool, WorkQueue({"a": shard}, cut(shard, 1)), clock=lambda: pool.now)
    list(dispatcher.until_ready())
    next(dispatcher.run())
    before = pool.now
    list(dispatcher.drain(10.0))
    assert pool.now - before <= 11


def test_queue_keeps_nothing_of_finished_units():
    shard = make_shard("a", 5000)
    queue = WorkQueue({"a": shard}, cut(shard, 1))
    run_on_paper(PaperPool(num_places=8), queue)
    kept = [value for value in vars(queue).values() if hasattr(value, "__len__")]
    assert sum(map(len, kept)) == 0
