"""What an error says in one line, and whether it says that memory ran out.

Knows names and messages, and no library: whoever asks may not have imported any.
"""

SIGNS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "No available memory for the cache blocks",
)
"""Of allocators that raise a plain RuntimeError, and of vLLM when its KV cache does not fit."""


def first_line(error: BaseException) -> str:
    """The first line of the message that says anything, else what kind of error it is."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or one it came from, says that memory ran out: less at a time may do."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        message = str(cause).lower()
        if any(sign.lower() in message for sign in SIGNS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
