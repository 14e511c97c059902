"""What `rsr inspect` shows as one page: no scripts, no requests, and every text as text."""

from pathlib import Path

import jinja2

from rsr.jobs.errors import UsageError
from rsr.jobs.inspection.inspection import Inspection, InspectOptions
from rsr.jobs.inspection.reading import told_rows
from rsr.jobs.storage.atomic import write_text_atomically
from rsr.jobs.terminal import printable

ASSETS = Path(__file__).parent / "assets"


def write_page(inspection: Inspection, options: InspectOptions, target: Path) -> None:
    """Write the page to `target`, whole or not at all; `UsageError` if it cannot be written."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    # A browser obeys what turns the order of writing round, too.
    environment.filters |= {"shown": _shown, "rows": told_rows}
    page = environment.get_template("page.html").render(
        rows=inspection.rows,
        reading=inspection.reading,
        source=_shown(options.input),
        model=_shown(options.scorer.model),
        style=(ASSETS / "page.css").read_text(encoding="utf-8"),
    )
    try:
        write_text_atomically(target, page)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error


def _shown(text: str) -> str:
    return printable(text, multiline=True)
