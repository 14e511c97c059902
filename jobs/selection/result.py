"""What `rsr filter` and `rsr select` tell when they are done, as a table and as JSON.

Knows nothing of how rows were chosen or written.
"""

from dataclasses import dataclass
from typing import Any

import polars as pl

from rsr.jobs.run.folder import RunFolder
from rsr.jobs.selection.composition import Composition
from rsr.jobs.shards.scored import open_scored
from rsr.jobs.terminal import Console, fact_table

FACTS = {
    "num_rows": "rows of INPUT",
    "num_scored": "of them scored",
    "num_candidates": "of them candidates",
    "num_groups": "groups of candidates",
    "num_groups_without_row": "groups that keep no row",
    "num_ungrouped": "rows without a group, left out",
    "num_unjudged": "candidates without a finite quality, left out",
    "num_unmeasured": "rows without a value of the metric, left out",
    "num_groups_short": "groups that keep fewer rows than --keep",
    "num_kept": "rows kept",
    "num_kept_wrong": "of them not known to be correct",
    "num_tokens": "scored tokens kept",
    "largest_rsr": "largest RSR kept",
    "metric": "ranked by",
    "worst_value": "worst value kept",
    "picked": "picked of each group",
    "ties_by": "equal RSR in order of",
}
"""What a fact is called in print; facts that are 0 or none go unsaid there."""


@dataclass(frozen=True, slots=True)
class SelectionResult:
    """What a finished `rsr filter` or `rsr select` returns.

    output: the run's folder. facts: counts by the names of `FACTS`.
    """

    output: RunFolder
    facts: dict[str, Any]
    composition: Composition

    def scan(self) -> pl.LazyFrame:
        """The chosen rows, in the order of INPUT; nothing is read yet."""
        return open_scored(str(self.output.root), allow_mixed_students=True).scan

    def to_polars(self) -> pl.DataFrame:
        """The chosen rows, in memory."""
        return self.scan().collect()

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints and OUTPUT keeps."""
        return {
            "output": str(self.output.root),
            **self.facts,
            "composition": self.composition.to_json(),
        }

    def print(self, console: Console) -> None:
        table = fact_table()
        for name, label in FACTS.items():
            if name == "ties_by" and "metric" in self.facts:
                label = "equal values in order of"
            if value := self.facts.get(name):
                spec = {float: ".4f", int: ","}.get(type(value), "")
                table.add_row(label, format(value, spec))
        table.add_row("result", str(self.output))
        console.show(table)
        console.print()
        console.print(self.composition.to_table())
