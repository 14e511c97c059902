"""The course of a run that `rsr filter` and `rsr select` share: read, choose, copy, describe.

What is described is measured on the written files, not remembered, so that a run that went on
says the same as one that never stopped. Knows nothing of how rows are chosen.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rsr.jobs.files import write_text_atomically
from rsr.jobs.interrupt import StopRequest
from rsr.jobs.scored import open_scored
from rsr.jobs.selection.candidates import Candidates
from rsr.jobs.selection.composition import Composition, Part, parts_of
from rsr.jobs.selection.opening import OpenedInput
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.subset import Mask, result_path, write_subset

Facts = dict[str, Any]


def run_selection(
    opened: OpenedInput,
    read: Callable[[], Candidates],
    choose: Callable[[Candidates], tuple[Mask, Callable[[], Facts]]],
    stop: StopRequest,
    *,
    command: str,
    output: Path,
    settings: dict[str, Any],
    overwrite: bool,
) -> SelectionResult:
    """Write what `choose` keeps of the candidates that `read` finds, and describe it.

    choose: gives the choice, and what counts the facts of it, which is done beside the copying.
    Raises what `write_subset` raises, and what `read` and `choose` do.
    """
    table, by = opened.table, opened.by
    pool: list[Future[dict[Any, Part]]] = []
    counted: list[Future[Facts]] = []
    with ThreadPoolExecutor(1) as aside:

        def read_and_choose() -> Mask:
            candidates = read()
            # Choosing keeps one core busy: the others describe the pool meanwhile.
            pool.append(aside.submit(parts_of, table, by))
            keep, count = choose(candidates)
            counted.append(aside.submit(lambda: count() | _common_facts(candidates, keep)))
            return keep

        folder = write_subset(
            table,
            output,
            read_and_choose,
            stop,
            command=command,
            settings=settings,
            overwrite=overwrite,
        )
        selected = open_scored(str(output), rank_clip=table.rank_clip, allow_mixed_students=True)
        composition = Composition(by.teacher, parts_of(selected, by), pool[0].result())
    total = composition.selected_total
    facts = {"num_rows": table.num_rows} | counted[0].result()
    facts |= {"num_kept": total.num_rows, "num_tokens": total.num_tokens}
    result = SelectionResult(folder, facts, composition)
    text = json.dumps(result.to_json(), indent=2, default=str) + "\n"
    write_text_atomically(result_path(folder), text)
    return result


def _common_facts(candidates: Candidates, keep: Mask) -> Facts:
    return {
        "num_scored": candidates.num_scored,
        "num_candidates": candidates.num_candidates,
        "largest_rsr": float(candidates.rsr[keep].max()),
    }
