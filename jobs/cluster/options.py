"""What a user says of the cluster; imports nothing of Ray."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Which cluster a run joins, and how it uses it.

    address: of the Ray cluster to join; None is RAY_ADDRESS, or this machine alone.
    num_workers: None is as many as fit. unit_timeout_s: None is learned from finished units.
    start_timeout_s: how long starts are tried while no worker is ready; None is half an hour.
    """

    address: str | None = None
    num_workers: int | None = None
    unit_timeout_s: float | None = None
    start_timeout_s: float | None = None
