"""Which Ray an address means: a cluster's, or one that is started on this machine."""

import os

LOCAL = "local"
"""The address of a Ray that a run starts on this machine for itself, as Ray calls it."""


def named_address(address: str | None) -> str | None:
    """The address, or what RAY_ADDRESS says, as `ray job submit` sets it; None if nothing is."""
    return address or os.environ.get("RAY_ADDRESS") or None


def cluster_to_join(address: str | None) -> str | None:
    """Where a cluster is by that name; None where Ray is to be started here."""
    named = named_address(address)
    return None if named == LOCAL else named
