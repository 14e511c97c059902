"""Calls at an address; Ray, which takes seconds to import, is imported only where there is one."""

from collections.abc import Iterator
from contextlib import contextmanager

from rsr.jobs.cluster.address import named_address
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import Calls


@contextmanager
def calls_at(address: str | None, stop: StopRequest) -> Iterator[Calls | None]:
    """Calls on the Ray cluster at `address`, or of a Ray that is started here; None without one.

    address: None is what RAY_ADDRESS says. Raises `UsageError` if no cluster answers there.
    """
    address = named_address(address)
    if address is None:
        yield None
        return
    from rsr.jobs.cluster.calls import calls_on_cluster

    with calls_on_cluster(address, stop) as calls:
        yield calls
