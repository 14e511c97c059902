"""A Ray cluster that the tests of a file share: to start one takes longer than most of them."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a cluster of two cores answers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    try:
        yield cluster.address
    finally:
        cluster.shutdown()
