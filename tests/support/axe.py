"""What axe-core, which npm carries, finds of faults that keep people from reading a page."""

from typing import Any

import pytest
from npm_packages import NotAvailableError, npm_files

VERSION = "4.10.3"
GRAVE = {"serious", "critical"}


def serious_violations(tab: Any) -> list[tuple[str, list[str]]]:
    """The rules that the page in this tab of a browser breaks, and the elements that do.

    Skips the test where axe-core cannot be had.
    """
    try:
        folder = npm_files("axe-core", VERSION, ["axe.min.js"])
    except NotAvailableError as error:
        pytest.skip(str(error))
    tab.evaluate((folder / "axe.min.js").read_text(encoding="utf-8"))
    found = tab.evaluate("axe.run()")["violations"]
    return [
        (violation["id"], [node["html"] for node in violation["nodes"]])
        for violation in found
        if violation["impact"] in GRAVE
    ]
