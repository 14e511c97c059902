"""Being told to stop: by Ctrl-C, by a SIGTERM such as a spot machine's warning, by a hangup.

A handler that raises would do so inside Ray's native code, which turns it into an error of its
own. So the first signal only leaves a mark, which the run looks at between two events.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rsr.jobs.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Whether somebody asked this process to stop."""

    def __init__(self) -> None:
        self._is_set = False

    @property
    def is_set(self) -> bool:
        return self._is_set

    def check(self) -> None:
        """Raises `Interrupted` if so."""
        if self._is_set:
            raise Interrupted

    def wait(self, seconds: float) -> None:
        """Sleep; raises `Interrupted` as soon as somebody asks."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.1))
        self.check()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the signals that arrive; a second SIGINT or SIGTERM acts as if nobody listened.

        A SIGHUP that is ignored already, as nohup has it, stays so.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] is signal.SIG_IGN:
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        self._is_set = True
        # A terminal that goes tells its shell and its jobs, and the shell tells the jobs again.
        again = signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL
        signal.signal(number, again)
