"""Files about the project say what is so: workflows, the citation, and versions in one accord."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=str)
def test_workflow_runs_what_there_is(path):
    workflow = yaml.safe_load(path.read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [
        line.split() for step in steps if "run" in step for line in step["run"].splitlines()
    ]
    assert commands
    for program, *arguments in commands:
        if program == "make":
            assert {a for a in arguments if "=" not in a and a[0] != "-"} <= MAKE_TARGETS
        elif "/" in program:
            assert (ROOT / program).is_file()
    named = re.findall(r"github.workspace \}\}/(\S+)|dependency-path: ([^\s,}]+)", path.read_text())
    assert named
    assert all((ROOT / "".join(pair)).is_file() for pair in named)


def test_workflows_try_every_python_that_is_promised():
    tests = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["tests"]
    lowest = re.search(r"[\d.]+", PROJECT["requires-python"])[0]
    assert lowest in tests["strategy"]["matrix"]["python"]


def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert all("authors" in reference for reference in citation["references"])


def test_make_targets_that_are_named_exist():
    told = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    named = set(re.findall(r"(?:\$ |`)make\s+([a-z-]+)", told))
    assert named
    assert named <= MAKE_TARGETS


def test_every_package_is_in_the_wheel():
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    there = {
        ".".join(("rsr", *path.parent.relative_to(ROOT).parts))
        for room in ("benchmarks", "engine", "jobs", "kernels")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed - {"rsr"} == there - {"rsr"}
