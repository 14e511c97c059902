"""How much memory this machine can still give, and the refusal of what needs more than that."""

import re
from pathlib import Path

from rsr.jobs.errors import UsageError

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Of this process, as its container shows it."""


def free_memory_bytes() -> int | None:
    """Memory that programs may still take, within the container's limit; None if nobody says."""
    values = [_entry_bytes(MEMINFO, "MemAvailable"), _left_to_group_bytes(CONTROL_GROUP)]
    return min((value for value in values if value is not None), default=None)


def require_memory(needed_bytes: float, who: str, instead: str) -> None:
    """Raises `UsageError` if neither memory nor swap has room for `needed_bytes`.

    A process that took them all the same would be killed without a word, hours later perhaps.
    who: what takes the memory; instead: what the user can do.
    """
    free_bytes = free_memory_bytes()
    if free_bytes is None:
        return
    free_bytes += _entry_bytes(MEMINFO, "SwapFree") or 0
    if free_bytes < needed_bytes:
        raise UsageError(
            f"{who} takes about {in_gib(needed_bytes)} of memory, and "
            f"{in_gib(free_bytes)} are free here; {instead}"
        )


def in_gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):,.1f} GiB"


def _entry_bytes(meminfo: Path, name: str) -> int | None:
    if not meminfo.exists():
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _left_to_group_bytes(group: Path) -> int | None:
    """What a control group (cgroup v2) has left to its limit; None without one.

    Files that are kept in memory count as used there, and give way to whoever needs it.
    """
    limit, used = group / "memory.max", group / "memory.current"
    if not (limit.exists() and used.exists() and limit.read_text().strip().isdigit()):
        return None
    kept = re.findall(r"^(?:in)?active_file (\d+)$", (group / "memory.stat").read_text(), re.M)
    return int(limit.read_text()) - int(used.read_text()) + sum(map(int, kept))
