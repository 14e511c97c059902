"""What every job whose workers load a student needs: to ask for it, and to tell its errors.

Knows that workers run vLLM; knows nothing of what they do with it.
"""

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from rsr.engine.errors import has_lost_a_rank, is_device_busy, is_out_of_memory
from rsr.jobs.cluster.venue import Venue
from rsr.jobs.errors import refusing_values
from rsr.jobs.run.events import Cause

T = TypeVar("T")


def ask_of_student(question: Callable[[], T], venue: Venue, *, with_cluster: bool) -> T:
    """What the student is. with_cluster: there is work for a worker, so let it have a look.

    Raises `UsageError` where `question` raises ValueError.
    """
    if with_cluster and (answer := venue.ask(question, then=_import_engine)) is not None:
        return answer
    with refusing_values():
        return question()


def cause_of_engine_error(error: Exception) -> Cause:
    """What an error while the student is loaded or run means for its worker."""
    if is_out_of_memory(error):
        return Cause.MEMORY
    if is_device_busy(error):
        return Cause.BUSY
    return Cause.CRASH if has_lost_a_rank(error) else Cause.ENGINE


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without the garbage collector, which takes a fifth of the time and finds nothing.

    What is imported stays, so later collections skip it, but for the last one: what that one
    leaves, Triton would report as leaked, on thirty lines after the last of ours.
    """
    atexit.register(gc.unfreeze)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _import_engine() -> None:
    """Import what a worker will need to load its student."""
    # If this raises, so will the loading, whose caller listens.
    with suppress(Exception), quick_imports():
        from rsr.engine.prefill import import_vllm

        import_vllm()
        # Whatever vLLM has of models hangs on this.
        import rsr.engine.pooler  # noqa: F401
