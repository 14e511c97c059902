"""The process that runs a verifier: `python -P -m rsr.jobs.grading.child VERIFIER CPU_SECONDS`.

Reads a JSON line `[answer, gold]`, writes a JSON line `[status, extracted, detail]`, until its
input ends. The kernel kills it by SIGPROF once a row has taken more of the processor than it may:
no handler in Python would run while sympy is inside one long multiplication. It ends with its
parent, whichever way that does.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

from rsr.jobs.errors import first_line
from rsr.jobs.grading.grades import Grade, GradeStatus
from rsr.jobs.grading.verifiers import Verifier, VerifierError, load_verifier

MAX_MEMORY_BYTES = 4 << 30
"""Largest address space: a number of gigabytes is an error of its row, not of the machine."""
PR_SET_PDEATHSIG = 1
"""The option of <linux/prctl.h> that sets the signal that the kernel sends when the parent ends."""


def main(name: str, cpu_seconds: float) -> None:
    """Load the verifier, say `{}` or why not as `{"refused": …}`, then grade line by line."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a verifier prints must not pass for an answer of ours.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    try:
        verifier = load_verifier(name)
    except VerifierError as error:
        answers.write(json.dumps({"refused": first_line(error)}) + "\n")
        return
    answers.write("{}\n")
    for line in sys.stdin:
        answer, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        grade = _grade(verifier, answer, gold)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(_as_line(grade)) + "\n")


def _grade(verifier: Verifier, answer: str, gold: str) -> Grade:
    try:
        return verifier(answer, gold)
    except MemoryError:
        return Grade(GradeStatus.ERROR, detail="the verifier ran out of memory")
    # math-verify's alarm, if somebody's verifier has it on, is no Exception.
    except BaseException as error:
        return Grade(GradeStatus.ERROR, detail=f"{type(error).__name__}: {first_line(error)}")


def _as_line(grade: Grade) -> list[Any]:
    return [grade.status.value, grade.extracted, grade.detail]


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
