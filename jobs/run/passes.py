"""Passes of a run over shards: each makes many calls, and the run's events say when it begins."""

import logging
import os
import socket
from dataclasses import dataclass, replace
from typing import Self

from rsr.jobs.run.calls import Calls
from rsr.jobs.run.events import EventLog, PassStarted
from rsr.jobs.run.folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes of the run that writes `folder`, and how their calls are made."""

    folder: RunFolder
    calls: Calls

    def by(self, calls: Calls) -> Self:
        """The same with calls that are made otherwise."""
        return replace(self, calls=calls)

    def begin(self, name: str, num_calls: int) -> Calls:
        """Calls for the pass `name`, which is about to begin."""
        event = PassStarted(
            name=name, num_calls=num_calls, host=socket.gethostname(), pid=os.getpid()
        )
        try:
            with EventLog(self.folder.events_path) as log:
                log.write(event)
        except OSError as error:
            # A full disk must stop no run for the sake of its diary.
            logger.warning("%s cannot be written: %s", self.folder.events_path, error)
        return self.calls
