"""Processes that grade, as their parent sees them: asked row by row, killed when late, replaced.

The processor's time limits a row, so that a busy machine changes no grade; the clock limits it
too, much later, for a verifier that waits for something. Either costs the row its process.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any, Self

from rsr.jobs.errors import Interrupted, UsageError
from rsr.jobs.grading.answers import GradableRow
from rsr.jobs.grading.grades import Grade, GradeStatus

START_SECONDS = 120.0
"""Seconds for a process to load its verifier: sympy takes two, on a loaded file server more."""
CLOCK_PER_CPU, CLOCK_EXTRA_SECONDS = 6.0, 20.0
"""The clock's limit, from the processor's: a process that gets a sixth of a core is not hanging."""
ROWS_PER_PROCESS = 20_000
"""Then it is replaced by a fresh one, whatever sympy has piled up in its caches."""


class _Gone(Exception):
    """The process is dead or was killed: the grade of the row it had is the argument."""


class GradingChild:
    """A process that grades one row at a time; a context manager, which leaves none alive.

    Used by one thread at a time.
    """

    def __init__(self, verifier: str, cpu_seconds: float, log: IO[bytes] | int) -> None:
        """log: what the process and its verifier print goes there.

        Raises `UsageError` if the verifier cannot be loaded.
        """
        self._verifier, self._cpu_seconds, self._log = verifier, cpu_seconds, log
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""
        self._num_rows = 0
        self._is_interrupted = False
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _where: TracebackType | None,
    ) -> None:
        self.kill()

    def grade(self, row: GradableRow) -> Grade:
        """The row's grade; whatever happens to the process is the row's `timeout` or `error`.

        Raises `Interrupted` once `interrupt` was called.
        """
        if self._process is None or self._num_rows >= ROWS_PER_PROCESS:
            self.kill()
            self._start()
        self._num_rows += 1
        try:
            self._send([row.answer, row.gold])
            seconds = CLOCK_PER_CPU * self._cpu_seconds + CLOCK_EXTRA_SECONDS
            status, extracted, detail = self._receive(seconds)
        except _Gone as gone:
            if self._is_interrupted:
                raise Interrupted from None
            grade: Grade = gone.args[0]
            return grade
        return Grade(GradeStatus(status), extracted, detail)

    def interrupt(self) -> None:
        """Let another thread's `grade` end at once."""
        self._is_interrupted = True
        if (process := self._process) is not None:
            process.kill()

    def kill(self) -> None:
        """End the process, busy or not."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def _start(self) -> None:
        self._read, self._num_rows = b"", 0
        self._process = subprocess.Popen(
            _command(self._verifier, self._cpu_seconds),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            # Ctrl-C is for the run, which then ends its processes.
            start_new_session=True,
        )
        try:
            greeting = self._receive(START_SECONDS)
        except _Gone as gone:
            reason = gone.args[0].detail
            raise UsageError(f"--verifier {self._verifier} cannot be loaded: {reason}") from gone
        if "refused" in greeting:
            self.kill()
            raise UsageError(f"--verifier {self._verifier}: {greeting['refused']}")

    def _send(self, value: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        content = memoryview(json.dumps(value).encode() + b"\n")
        try:
            while content:
                content = content[os.write(self._process.stdin.fileno(), content) :]
        except BrokenPipeError:
            raise _Gone(self._bury()) from None

    def _receive(self, seconds: float) -> Any:
        """The next line's value; raises `_Gone` with a grade if none comes."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._read:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                self.kill()
                detail = f"no answer within {seconds:.0f} s"
                raise _Gone(Grade(GradeStatus.TIMEOUT, detail=detail))
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise _Gone(self._bury())
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return json.loads(line)

    def _bury(self) -> Grade:
        """The grade of a row whose process ended by itself or by the kernel."""
        assert self._process is not None
        code = self._process.wait()
        self.kill()
        if code == -signal.SIGPROF:
            detail = f"more than {self._cpu_seconds:g} s of the processor"
            return Grade(GradeStatus.TIMEOUT, detail=detail)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return Grade(GradeStatus.ERROR, detail=f"the verifier's process {how}")


def _command(verifier: str, cpu_seconds: float) -> Sequence[str]:
    # -P: a user's own random.py or json.py is not taken for Python's.
    return [sys.executable, "-P", "-m", "rsr.jobs.grading.child", verifier, str(cpu_seconds)]
