"""Write the constraints files: the versions that pip chooses today for each accelerator.

    python constraints/resolve.py cpu gpu

Installs nothing: `pip install --dry-run` resolves, its report is what is written. pip itself may be
another one than this Python's, by RSR_PIP_PYTHON: a recent pip reads metadata alone, and downloads
no wheels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
OTHER_EXTRAS = ("aws", "cluster", "demo", "dev", "fastokens", "grade", "refine")
"""Resolved together with either accelerator, so that each of them can be installed by one file."""

HEADER = """\
# Versions of {extras}, resolved on Python {python}, {machine} Linux.
# Made by `make constraints` (constraints/resolve.py); not to be edited.
# Used as: pip install --constraint constraints/{accelerator}.txt '.[{accelerator}]'
"""


def main() -> None:
    for accelerator in sys.argv[1:] or ("cpu", "gpu"):
        extras = f"rsr-engine[{','.join((accelerator, *OTHER_EXTRAS))}]"
        report = resolve(f"{FOLDER.parent}{extras.removeprefix('rsr-engine')}")
        header = HEADER.format(
            accelerator=accelerator,
            extras=extras,
            machine=report["environment"]["platform_machine"],
            python=report["environment"]["python_version"],
        )
        (FOLDER / f"{accelerator}.txt").write_text(header + "".join(pins(report)))


def resolve(requirement: str) -> dict[str, Any]:
    """pip's report of what it would install into an empty environment."""
    python = os.environ.get("RSR_PIP_PYTHON", sys.executable)
    command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    told = subprocess.run([*command, "--report", "-", requirement], stdout=subprocess.PIPE)
    if told.returncode:
        sys.exit(f"{requirement} cannot be resolved here; pip says why above")
    report: dict[str, Any] = json.loads(told.stdout)
    return report


def pins(report: dict[str, Any]) -> list[str]:
    """A line for each distribution but our own, in order of their names."""
    found = [(i["metadata"]["name"], i["metadata"]["version"]) for i in report["install"]]
    lines = [f"{name.lower()}=={version}\n" for name, version in found if name != "rsr-engine"]
    return sorted(lines)


if __name__ == "__main__":
    main()
