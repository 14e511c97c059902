"""`rsr` whose bundles and parts are small, so that a corpus of a soak has many of each.

As they are, they are made for corpora of millions of rows: a smaller one is one bundle and one
part, and needs no pass that refines. Only sizes are changed, of which no result depends.
"""

import sys

from rsr.jobs.cli import main
from rsr.jobs.selection import admission, boundaries, bundles, select_in_passes

BUNDLE_ROWS, PART_ROWS = 8_000, 12_000
REFINED_ABOVE_ROWS = 200

if __name__ == "__main__":
    bundles.MIN_BUNDLE_ROWS = BUNDLE_ROWS
    select_in_passes.MIN_PART_ROWS = PART_ROWS
    boundaries.REFINED_ABOVE_ROWS = admission.REFINED_ABOVE_ROWS = REFINED_ABOVE_ROWS
    sys.exit(main())
