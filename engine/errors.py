"""What an error says in one line, and whether it says that memory ran out.

Knows names and messages, and no library: whoever asks may not have imported any.
"""

import re
from collections.abc import Iterator, Sequence

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "No available memory for the cache blocks",
)
"""What allocators say that raise a plain RuntimeError, and vLLM if its KV cache does not fit."""

DEVICE_BUSY = re.compile(r"Free memory on device .* on startup is less than", re.DOTALL)
"""What vLLM says of a GPU of which it cannot have the share that it is told to take."""

LOST_RANK_SIGNS = ("initialization failed due to an exception in a background process",)
"""Signs of vLLM's tensor-parallel ranks, whose errors do not reach their parent process."""


def first_line(error: BaseException) -> str:
    """The first line of the message that says anything, else what kind of error it is."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or one it came from, says that memory ran out: less at a time may do."""
    return any(
        isinstance(cause, MemoryError)
        or type(cause).__name__ == "OutOfMemoryError"
        or _says(cause, SIGNS)
        for cause in _causes(error)
    )


def is_device_busy(error: BaseException) -> bool:
    """Whether another process, perhaps one that is ending, holds memory that vLLM starts with."""
    return any(DEVICE_BUSY.search(str(cause)) for cause in _causes(error))


def has_lost_a_rank(error: BaseException) -> bool:
    """Whether a process that vLLM started has ended, for a reason that its own output has."""
    return any(_says(cause, LOST_RANK_SIGNS) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, the one it came from, and so on."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _says(error: BaseException, signs: Sequence[str]) -> bool:
    message = str(error).lower()
    return any(sign.lower() in message for sign in signs)
