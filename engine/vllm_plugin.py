"""The door through which vLLM loads our code: a `vllm.general_plugins` entry point.

vLLM calls `register` in every one of its processes, in servers that have nothing to do with
scoring too. So it does nothing, and imports nothing, unless `ARCHITECTURES_VARIABLE` names the
architectures that are to become scoring models in this process and its children.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ARCHITECTURES_VARIABLE = "RSR_SCORE_ARCHITECTURES"
"""Comma-separated architecture names, as in a checkpoint's config.json."""


def register() -> None:
    """Make the named architectures scoring models; called by vLLM, possibly more than once."""
    architectures = os.environ.get(ARCHITECTURES_VARIABLE, "")
    if not architectures:
        return
    from rsr.engine.pooler import register_scoring_model

    for architecture in architectures.split(","):
        register_scoring_model(architecture)


@contextmanager
def chosen(architectures: Sequence[str]) -> Iterator[None]:
    """Make exactly `architectures` scoring models, here and in processes started in the block.

    Those of an engine start while it is opened; a server that this process starts later is none of
    ours. vLLM calls `register` once a process; a second engine in it has other architectures.
    """
    from rsr.engine.pooler import unregister_scoring_models

    unregister_scoring_models()
    os.environ[ARCHITECTURES_VARIABLE] = ",".join(architectures)
    try:
        register()
        yield
    finally:
        del os.environ[ARCHITECTURES_VARIABLE]
