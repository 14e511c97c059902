"""Calls at an address: a cluster's where there is one, and none where there is not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import Calls


@contextmanager
def calls_at(address: str | None, stop: StopRequest) -> Iterator[Calls | None]:
    """Calls on the Ray cluster at `address`; None where there is no address.

    address: None is what RAY_ADDRESS says, as `ray job submit` sets it. Raises `UsageError` if no
    cluster answers there.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if not address:
        yield None
        return
    # Ray takes seconds to import, which one machine alone need not spend.
    from rsr.jobs.cluster.calls import calls_on_cluster

    with calls_on_cluster(address, stop) as calls:
        yield calls
