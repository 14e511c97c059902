"""`rsr bench`: its commands by name."""

import click

from rsr.benchmarks.engine import engine
from rsr.benchmarks.kernel_command import kernel


@click.group()
def bench() -> None:
    """Measure this machine."""


bench.add_command(engine)
bench.add_command(kernel)
