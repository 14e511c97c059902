"""Two starts of one run: the same, grown by a higher --limit, or refused with the difference."""

from dataclasses import replace

import pytest

from rsr.jobs.run.manifest import Identity, InputShard, Manifest


def manifest(*rows_by_shard: int, limit: int | None = None, names: str = "abc", **settings):
    shards = tuple(
        InputShard(f"{name}.parquet", num_rows, f"fingerprint of {name}", "", f"/in/{name}")
        for name, num_rows in zip(names, rows_by_shard, strict=False)
    )
    return Manifest(writer="score", identity=Identity(settings), shards=shards, limit=limit)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (manifest(4, limit=4), manifest(6, 3, limit=9)),
        (manifest(6, limit=6), manifest(6, 6)),
        (manifest(6, 1, limit=7), manifest(6, 6, 5)),
        (manifest(6, 6, limit=12), manifest(6, 6, 0)),
    ],
)
def test_higher_limit_takes_more_of_the_same_rows(before, now):
    assert before.grows_to(now)
    assert not now.grows_to(before)
    (told,) = now.differences(before)
    limits = ("not given" if m.limit is None else m.limit for m in (now, before))
    assert told == "--limit was {} and is now {}: it can be raised only".format(*limits)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (manifest(4, limit=4), replace(manifest(6), identity=Identity({"k": 1})), "k was None"),
        (manifest(4, limit=4), manifest(6, names="b"), "new: b.parquet, gone: a.parquet"),
        (manifest(6), manifest(6, 3), "new: b.parquet"),
        # The limit took nothing away: a file is new.
        (manifest(6, limit=100), manifest(6, 3, limit=100), "new: b.parquet"),
        (manifest(6, 1, limit=7), manifest(5, 6), "changed: a.parquet"),
    ],
)
def test_other_runs_are_told_apart(before, now, told):
    assert not before.grows_to(now)
    assert told in "; ".join(before.differences(now))


@pytest.mark.parametrize("limits", [(6, 6), (6, None), (9, 20), (None, 6)])
def test_limit_that_changes_no_row_is_the_same_run(limits):
    before, now = (manifest(6, limit=limit) for limit in limits)
    assert not before.grows_to(now)
    assert before.differences(now) == []


def test_limit_is_kept():
    for limit in (None, 7):
        assert Manifest.parse(manifest(6, 1, limit=limit).to_json()).limit == limit
