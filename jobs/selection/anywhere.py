"""`rsr filter` and `rsr select`, on this machine alone or by calls that anybody answers."""

from rsr.jobs.interrupt import StopRequest
from rsr.jobs.run.calls import Calls
from rsr.jobs.selection.filter import FilterOptions, run_filter
from rsr.jobs.selection.filter_in_passes import run_filter_in_passes
from rsr.jobs.selection.result import SelectionResult
from rsr.jobs.selection.select import SelectOptions, run_select
from rsr.jobs.selection.select_in_passes import run_select_in_passes


def filter_anywhere(
    options: FilterOptions, calls: Calls | None, stop: StopRequest
) -> SelectionResult:
    """`run_filter`, or `run_filter_in_passes` where there are calls; the rows are the same."""
    if calls is None:
        return run_filter(options, stop)
    return run_filter_in_passes(options, calls, stop)


def select_anywhere(
    options: SelectOptions, calls: Calls | None, stop: StopRequest
) -> SelectionResult:
    """`run_select`, or `run_select_in_passes` where there are calls; the rows are the same."""
    if calls is None:
        return run_select(options, stop)
    return run_select_in_passes(options, calls, stop)
