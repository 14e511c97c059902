"""What sampling and refining have in common as jobs of the cluster: a model that answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rsr.engine.config import ScorerConfig
from rsr.engine.model_folder import told_model
from rsr.engine.sampling import PromptRequest, SampledText, Sampling
from rsr.jobs.cluster.student import cause_of_engine_error
from rsr.jobs.run.events import Cause
from rsr.jobs.run.folder import RunFolder
from rsr.jobs.run.store import RunStore


class Engine(Protocol):
    """What a worker needs of `rsr.engine.generation.Generator`."""

    @property
    def max_num_batched_tokens(self) -> int | None: ...

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]: ...

    def sample(self, requests: Sequence[PromptRequest]) -> list[list[SampledText]]: ...


def open_generator(config: ScorerConfig, sampling: Sampling) -> Engine:
    # vLLM takes seconds to import, and the driver never needs it.
    from rsr.engine.allocator import keep_freed_memory
    from rsr.engine.generation import Generator

    # This process opens one model and ends with it.
    keep_freed_memory()
    return Generator(config, sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratingJob:
    """The part of a `UnitJob` that is the same for every run of a model that answers.

    config: how the model is opened. seed: of the run. store: what is kept, and for which settings.
    must_see: local paths that every machine must have. open_engine: loads the model.
    """

    config: ScorerConfig
    sampling: Sampling
    seed: int
    store: RunStore
    must_see: tuple[Path, ...] = ()
    open_engine: Callable[[ScorerConfig, Sampling], Engine] = open_generator

    @property
    def name(self) -> str:
        return self.config.model

    @property
    def told_model(self) -> str:
        """What the rows call the model."""
        return told_model(self.config.model)

    @property
    def folder(self) -> RunFolder:
        return self.store.folder

    @property
    def max_num_batched_tokens(self) -> int | None:
        return self.config.max_num_batched_tokens

    def engine(self, max_num_batched_tokens: int | None) -> Engine:
        """The model, loaded; steps of so many tokens, None for as many as vLLM chooses."""
        config = replace(self.config, max_num_batched_tokens=max_num_batched_tokens)
        return self.open_engine(config, self.sampling)

    def cause_of(self, error: Exception) -> Cause:
        return cause_of_engine_error(error)
