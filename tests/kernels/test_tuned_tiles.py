"""Files of tuned tiles: which row is taken, and what is said of a file that is none."""

import json

import pytest

from rsr.kernels import tuned_tiles as tuned
from rsr.kernels.tuned_tiles import TunedCard, TunedFileError, TunedRow
from rsr.kernels.tuning import Call, Tiles

SMALL, LARGE, CAPPED, POINTER = (Tiles(rows, 128, 64, 8, 3) for rows in (32, 64, 128, 256))
DESCRIBED = Tiles(128, 256, 64, 8, 4, design="descriptor")


def row(tiles: Tiles, *, has_soft_cap=False, max_depth=None, max_tokens=None) -> TunedRow:
    return TunedRow(2, has_soft_cap, max_depth, max_tokens, tiles)


H100 = TunedCard(
    "NVIDIA H100",
    90,
    (
        row(SMALL, max_depth=1024, max_tokens=64),
        row(LARGE, max_depth=1024),
        row(CAPPED, has_soft_cap=True),
        row(DESCRIBED),
        row(POINTER),
    ),
)


def call(**changes) -> Call:
    usual = dict(
        capability=90,
        operand_bytes=2,
        num_tokens=8192,
        depth=896,
        has_soft_cap=False,
        can_describe=True,
    )
    return Call(**usual | changes)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """In the place of the package's own files; has an H100's."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.delenv(tuned.FILE_VARIABLE, raising=False)
    (tmp_path / tuned.file_name(H100.card)).write_text(H100.to_json())
    tuned._find_tiles.cache_clear()
    yield tmp_path
    tuned._find_tiles.cache_clear()


@pytest.mark.parametrize(
    ("changes", "tiles"),
    [
        ({"num_tokens": 64}, SMALL),
        ({}, LARGE),
        ({"depth": 4096}, DESCRIBED),
        ({"depth": 4096, "can_describe": False}, POINTER),
        ({"has_soft_cap": True}, CAPPED),
        ({"operand_bytes": 4}, None),
    ],
    ids=str,
)
def test_the_first_row_that_fits_is_taken(folder, changes, tiles):
    assert tuned.find_tiles("NVIDIA H100", call(**changes)) == tiles


def test_a_card_goes_before_its_capability_and_a_user_s_file_before_both(folder, monkeypatch):
    assert tuned.find_tiles("NVIDIA H200", call()) == LARGE
    assert tuned.find_tiles("NVIDIA A100", call(capability=80)) is None
    h200 = TunedCard("NVIDIA H200", 90, (row(CAPPED),))
    (folder / "NVIDIA_H200.json").write_text(h200.to_json())
    tuned._find_tiles.cache_clear()
    assert tuned.find_tiles("NVIDIA H200", call()) == CAPPED
    assert tuned.find_tiles("NVIDIA H100", call()) == LARGE
    own = folder / "own.txt"
    own.write_text(TunedCard("NVIDIA H200", 90, (row(POINTER),)).to_json())
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(own))
    assert tuned.find_tiles("NVIDIA H200", call()) == POINTER


def test_hashes_follow_the_files(folder, monkeypatch):
    assert tuned.own_file_text() is None
    shipped = tuned.shipped_hash()
    own = folder / "own.txt"
    own.write_text(H100.to_json())
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(own))
    before = tuned.own_file_text()
    assert tuned.shipped_hash() == shipped
    own.write_text(TunedCard("NVIDIA H100", 90, ()).to_json())
    assert tuned.own_file_text() != before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file or directory"),
        ("{", "it is not what `rsr bench kernel --tune` writes"),
        ("[]", "it is not what"),
        (json.dumps({"card": "x", "capability": 90}), "it is not what"),
        (json.dumps({"card": "x", "capability": 90, "rows": [{"tiles": {}}]}), "it is not what"),
    ],
    ids=["missing", "no JSON", "a list", "no rows", "half a row"],
)
def test_a_file_that_is_none_is_refused_by_name(folder, monkeypatch, text, reason):
    own = folder / "own.txt"
    if text is not None:
        own.write_text(text)
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(own))
    for look in (tuned.own_file_text, lambda: tuned.find_tiles("NVIDIA H100", call())):
        with pytest.raises(TunedFileError, match=rf"tuned tiles \S*own\.txt cannot.*{reason}"):
            look()


def test_a_file_says_what_was_written(folder):
    assert TunedCard.parse(H100.to_json()) == H100
