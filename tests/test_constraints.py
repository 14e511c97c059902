"""The constraints files pin what pyproject asks for, and nothing of another range."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_pins_are_in_the_ranges_of_pyproject(accelerator):
    text = (ROOT / "constraints" / f"{accelerator}.txt").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    resolved = set(re.search(r"rsr-engine\[(.*?)\]", header[0])[1].split(","))
    # Nothing but the site is made with docs.
    assert resolved == set(EXTRAS) - {"cpu", "gpu", "docs"} | {accelerator}
    assert "make constraints" in " ".join(header)

    lines = [line.split("==") for line in text.splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): Version(version) for name, version in lines}
    assert len(pinned) == len(lines)
    asked = [*PROJECT["dependencies"], *(line for extra in resolved for line in EXTRAS[extra])]
    for requirement in map(Requirement, asked):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement
