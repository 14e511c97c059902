"""Inputs that are rewritten once as Parquet, as the run reads them.

JSON, and lists of responses that become a row each. Whatever comes after sees Parquet and rows.
"""

from collections.abc import Sequence

from rsr.jobs.shards.exploded import explode_parquet, is_exploded_from
from rsr.jobs.shards.json_file import is_json
from rsr.jobs.shards.json_input import is_made_of, stage_json


def needs_staging(source: str, exploded: Sequence[str]) -> bool:
    """Whether the file is not read as it stands. exploded: columns, as `Exploder` has them."""
    return is_json(source) or bool(exploded)


def stage(
    source: str, target: str, exploded: Sequence[str], *, max_rows: int | None = None
) -> None:
    """Rewrite a file that needs it. max_rows: the least that is needed of it.

    Raises `UsageError` if the file is not what it should be, or is written to meanwhile.
    """
    if is_json(source):
        stage_json(source, target, exploded)
    else:
        explode_parquet(source, target, exploded, max_rows=max_rows)


def stage_head(source: str, target: str, exploded: Sequence[str], num_rows: int) -> None:
    """Rewrite no more of a file that needs it than its first rows, for somebody to look at.

    Raises `UsageError` if what is read is not what it should be.
    """
    if is_json(source):
        stage_json(source, target, exploded, max_entries=num_rows)
    else:
        explode_parquet(source, target, exploded, max_rows=num_rows)


def is_staged_from(path: str, source: str) -> bool:
    """Whether a staged file, or one written from it, was made of `source` as it is now."""
    return is_made_of(path, source) if is_json(source) else is_exploded_from(path, source)
