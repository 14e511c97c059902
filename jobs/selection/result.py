"""What `rsr filter` and `rsr select` tell when they are done.

Measured on the written files, not remembered, so that a run that went on says the same as one
that never stopped. Knows nothing of how rows were chosen.
"""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rsr.jobs.files import write_text_atomically
from rsr.jobs.output import OutputFolder
from rsr.jobs.scored import ScoredTable, open_scored
from rsr.jobs.selection.composition import Composition, DescribingColumns, describe
from rsr.jobs.selection.subset import result_path

FACTS = {
    "num_rows": "rows of INPUT",
    "num_scored": "of them scored",
    "num_candidates": "of them candidates",
    "num_groups": "groups of candidates",
    "num_groups_without_row": "groups that keep no row",
    "num_ungrouped": "rows without a group, left out",
    "num_unjudged": "candidates without a finite quality, left out",
    "num_groups_short": "groups that keep fewer rows than --keep",
    "num_kept": "rows kept",
    "num_tokens": "scored tokens kept",
    "largest_rsr": "largest RSR kept",
    "ties_by": "equal RSR in order of",
}
"""What a fact is called in print; facts that are 0 or none go unsaid there."""


@dataclass(frozen=True, slots=True)
class SelectionResult:
    """output: the run's folder. facts: counts by the names of `FACTS`."""

    output: OutputFolder
    facts: dict[str, Any]
    composition: Composition

    def to_json(self) -> dict[str, Any]:
        """The object that `--json` prints and OUTPUT keeps."""
        return {
            "output": str(self.output.root),
            **self.facts,
            "composition": self.composition.to_json(),
        }

    def print(self, console: Console) -> None:
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        for name, label in FACTS.items():
            if value := self.facts.get(name):
                spec = {float: ".4f", int: ","}.get(type(value), "")
                table.add_row(label, format(value, spec))
        table.add_row("result", f"{self.output.root}/")
        console.print(table, highlight=False, soft_wrap=True)
        console.print()
        console.print(self.composition.to_table(), highlight=False)


def finish(
    output: OutputFolder, pool: ScoredTable, by: DescribingColumns, facts: dict[str, Any]
) -> SelectionResult:
    """Describe what was written against its pool, and keep that beside it."""
    selected = open_scored(str(output.root), rank_clip=pool.rank_clip, allow_mixed_students=True)
    composition = describe(selected, pool, by)
    total = composition.selected_total
    told = {
        "num_rows": pool.num_rows,
        **facts,
        "num_kept": total.num_rows,
        "num_tokens": total.num_tokens,
    }
    result = SelectionResult(output, told, composition)
    text = json.dumps(result.to_json(), indent=2, default=str) + "\n"
    write_text_atomically(result_path(output), text)
    return result
