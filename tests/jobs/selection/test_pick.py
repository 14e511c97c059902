"""`rsr select --pick`: rejection sampling, which takes correct rows whatever they score."""

import json

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from rsr.jobs.cli import main

PROBLEMS = [0, 1, 0, 1, 0, 2, 1, 0]
CORRECT = [False, True, True, True, True, False, None, True]
SAMPLES = [0, 2, 3, 1, 1, 0, 0, 2]
RSR = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@pytest.fixture
def scored(tmp_path, write_scored):
    columns = {"problem": PROBLEMS, "correct": CORRECT, "id": [f"{i}" for i in range(8)]}
    write_scored(tmp_path / "in" / "a.parquet", RSR, columns=columns)
    with_index = columns | {"sample_index": SAMPLES}
    write_scored(tmp_path / "sampled" / "a.parquet", RSR, columns=with_index)
    return tmp_path


def run(source, output, *options):
    arguments = ["select", source, output, "--group-by", "problem", *options, "--json"]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def picked(source, output, *options):
    result = run(source, output, *options)
    assert result.exit_code == 0, result.stderr
    kept = pl.read_parquet(output / "**/*.parquet")["id"].cast(pl.Int64).to_list()
    return json.loads(result.stdout), kept


def test_first_correct_of_each_problem_is_kept(scored):
    options = ("--pick", "first", "--require", "correct")
    told, kept = picked(scored / "in", scored / "out", *options)
    assert kept == [1, 2]
    assert (told["picked"], told["ties_by"], told["largest_rsr"]) == ("first", None, 3.0)
    assert told["num_groups_without_row"] == 1
    assert picked(scored / "in", scored / "two", *options, "--keep", 2)[1] == [1, 2, 3, 4]


def test_first_goes_by_the_index_of_the_sample_where_there_is_one(scored):
    options = ("--pick", "first", "--require", "correct")
    assert picked(scored / "sampled", scored / "out", *options)[1] == [3, 4]
    assert picked(scored / "sampled", scored / "two", *options, "--keep", 2)[1] == [1, 3, 4, 7]


@pytest.mark.seconds
def test_chance_is_the_seeds_alone(scored):
    options = ("--pick", "random", "--require", "correct")
    draws = {}
    for seed in range(20):
        _, draws[seed] = picked(scored / "in", scored / f"{seed}", *options, "--seed", seed)
        places = np.random.Generator(np.random.PCG64(seed)).random(8)
        wanted = []
        for problem in (0, 1):
            rows = [i for i in range(8) if PROBLEMS[i] == problem and CORRECT[i]]
            wanted.append(min(rows, key=lambda row: places[row]))
        assert draws[seed] == sorted(wanted)
    assert len(set(map(tuple, draws.values()))) > 2
    assert picked(scored / "in", scored / "again", *options)[1] == draws[0]
    other = run(scored / "in", scored / "again", *options, "--seed", 1)
    assert other.exit_code == 2
    assert "seed was None and is now 1" in other.stderr


def test_another_condition_moves_no_row_to_another_place(scored):
    options = ("--pick", "random", "--seed", 3, "--keep", 8)
    _, every = picked(scored / "in", scored / "all", *options)
    assert every == list(range(8))
    _, some = picked(scored / "in", scored / "some", *options[:4], "--where", "rsr > 2.5")
    places = np.random.Generator(np.random.PCG64(3)).random(8)
    best = [
        min((i for i in range(2, 8) if PROBLEMS[i] == p), key=lambda i: places[i]) for p in range(3)
    ]
    assert some == sorted(best)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pick", "first", "--metric", "perplexity"], "takes rows whatever they score"),
        (["--pick", "random", "--quality-column", "rsr"], "takes rows whatever they score"),
        (["--pick", "first", "--max-share-per", "problem=0.5"], "goes with --pick best"),
        (["--pick", "first", "--seed", "1"], "--seed goes with --pick random"),
        (["--seed", "1"], "--seed goes with --pick random"),
        (["--pick", "last"], "'last' is not one of"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(scored, options, message):
    result = run(scored / "in", scored / "out", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (scored / "out").exists()
