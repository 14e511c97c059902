"""Work shared out among threads of one core each: the same bits, and nobody else's threads touched.

What concerns a whole process (thread counts, affinity, forks) runs in a process of its own.
"""

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from rsr.kernels import rank_logprob, tiled
from rsr.kernels.cores import share_out


@pytest.fixture
def with_threads():
    """A function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run_alone(program: str, **environment: str) -> None:
    code = "import os, threading, torch\nfrom rsr.kernels.cores import share_out\n"
    done = subprocess.run(
        [sys.executable, "-c", code + textwrap.dedent(program)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.seconds
@pytest.mark.parametrize("entropy", [True, False], ids=["entropy", "no entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_depend_on_neither_number_nor_speed_of_threads(
    dtype, entropy, normal_operands, with_threads, monkeypatch
):
    # Two kinds of rows, so that the second, exact pass over some of them runs too.
    operands = normal_operands(1200, 5000, 72, dtype=dtype, spread=40.0)
    with_threads(1)
    expected = rank_logprob(*operands, entropy=entropy)
    work, threads = tiled._Tiles.__call__, set()

    def sometimes_slow(tiles, piece):
        threads.add(threading.get_ident())
        if threading.get_ident() == min(threads):
            time.sleep(0.003)
        work(tiles, piece)

    monkeypatch.setattr(tiled._Tiles, "__call__", sometimes_slow)
    for num_threads in (2, 3):
        with_threads(num_threads)
        result = rank_logprob(*operands, entropy=entropy)
        assert torch.equal(result.rank, expected.rank)
        assert torch.equal(result.logprob, expected.logprob)
        assert not entropy or torch.equal(result.entropy, expected.entropy)
    assert len(threads) > 1


def test_a_slow_thread_gets_fewer_pieces_and_every_piece_is_worked_on_once(with_threads):
    with_threads(2)
    both_started = threading.Barrier(2)
    done = []  # (piece, whether by the slow thread)

    def start():
        is_slow = both_started.wait() == 0

        def work_on(piece):
            done.append((piece, is_slow))
            while is_slow and len(done) < 40:
                time.sleep(0.001)

        return work_on

    share_out(range(40), start)
    assert sorted(piece for piece, _ in done) == list(range(40))
    assert sum(is_slow for _, is_slow in done) <= 1


@pytest.mark.seconds
def test_an_exception_is_raised_when_no_thread_works_any_more(with_threads):
    with_threads(2)
    working = set()

    def work_on(piece):
        working.add(piece)
        time.sleep(0.01)
        if piece == 3:
            raise RuntimeError("piece 3")
        working.remove(piece)

    with pytest.raises(RuntimeError, match="piece 3"):
        share_out(range(1000), lambda: work_on)
    assert working == {3}


def test_inference_tensors_are_welcome(normal_operands, with_threads):
    with_threads(2)
    expected = rank_logprob(*normal_operands(40, 3000, 16))
    with torch.inference_mode():
        result = rank_logprob(*normal_operands(40, 3000, 16))
    assert torch.equal(result.logprob, expected.logprob)
    assert not expected.logprob.is_inference()


@pytest.mark.seconds
def test_only_our_threads_use_one_core():
    run_alone(
        """
        torch.set_num_threads(3)
        seen, matrix = [], torch.ones(512, 512)
        num_before = len(os.listdir("/proc/self/task"))
        def work_on(piece):
            torch.mm(matrix, matrix).exp()
            seen.append(torch.get_num_threads())
        share_out(range(50), lambda: work_on)
        assert set(seen) == {1}, seen
        assert len(os.listdir("/proc/self/task")) <= num_before + 3, "OpenMP's threads run as well"
        assert torch.get_num_threads() == 3
        # Threads that torch has not met before take the number that was set last.
        fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert seen[-1] == 3, seen
        """
    )


@pytest.mark.seconds
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_threads_run_where_openmp_is_bound_to():
    first, second = sorted(os.sched_getaffinity(0))[:2]
    run_alone(
        f"""
        torch.set_num_threads(2)
        torch.ones(1 << 20).add_(1)
        assert os.sched_getaffinity(0) == {{{first}}}, "OpenMP has bound this thread"
        seen = []
        share_out(range(50), lambda: lambda piece: seen.append(os.sched_getaffinity(0)))
        assert all(mask == {{{first}, {second}}} for mask in seen), seen
        """,
        GOMP_CPU_AFFINITY=f"{first} {second}",
    )


@pytest.mark.seconds
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_starts_threads_of_its_own():
    run_alone(
        """
        torch.set_num_threads(2)
        share_out(range(8), lambda: lambda piece: None)
        child = os.fork()
        done = []
        share_out(range(8), lambda: done.append)
        if not child:
            os._exit(0 if sorted(done) == list(range(8)) else 3)
        assert os.waitpid(child, 0)[1] == 0
        """
    )
