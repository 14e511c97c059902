"""A comparison of streams as a section of the page that `rsr report` writes."""

from pathlib import Path

import jinja2
from markupsafe import Markup

from rsr.jobs.comparison.compare import StreamComparison
from rsr.jobs.comparison.printing import (
    DRIFT_NAMES,
    name_of,
    told_difference,
    told_number,
    told_token,
)

ASSETS = Path(__file__).parent / "assets"


def comparison_section(comparison: StreamComparison) -> Markup:
    """HTML in the report's own classes; text out of data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    native, *others = comparison.streams
    section = environment.get_template("comparison.html").render(
        comparison=comparison,
        native=native,
        others=others,
        drift_names=DRIFT_NAMES,
        name_of=name_of,
        told_number=told_number,
        told_difference=told_difference,
        told_token=told_token,
    )
    # Jinja has escaped what needs it.
    return Markup(section)
