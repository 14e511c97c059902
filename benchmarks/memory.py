"""How much memory a process has taken at most, as the kernel counts it (Linux)."""

from pathlib import Path


def peak_rss_mib(pid: int | None = None) -> float:
    """Largest resident memory so far of a process, this one by default; 0 once it has ended.

    Not ru_maxrss: a child inherits its parent's. Raises `OSError` if there is no such process.
    """
    status = Path(f"/proc/{pid or 'self'}/status").read_text()
    lines = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return next((int(line.split()[1]) / 1024 for line in lines), 0.0)
