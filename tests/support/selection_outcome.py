"""What a run of `rsr filter` or `rsr select` left and told, to be held against another's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rsr.jobs.errors import UsageError
from rsr.jobs.run.events import read_events


def written(output: Path) -> dict[str, bytes]:
    """Rows and which rows they are, as bytes by file."""
    folder = output / ".rsr" / "kept"
    files = [*output.glob("*.parquet"), *(folder.rglob("*") if folder.exists() else ())]
    return {str(f.relative_to(output)): f.read_bytes() for f in files if f.is_file()}


def outcome(run: Callable[[], Any], output: Path) -> str | tuple[dict[str, bytes], Any]:
    """What it wrote and told, or why it refused."""
    try:
        result = run()
    except UsageError as error:
        assert not output.exists()
        return str(error)
    told = result.to_json()
    # Sums over shards may differ in the last bit from sums over the table.
    told = json.loads(json.dumps(told, default=str), parse_float=lambda x: f"{float(x):.12g}")
    del told["output"]
    return written(output), told


def passes_of(output: Path) -> list[tuple[str, int]]:
    """Names of the passes that it has begun, and how many calls each made."""
    events = read_events(output / ".rsr" / "events.jsonl")
    return [(e["name"], e["num_calls"]) for e in events if e["event"] == "pass_started"]
