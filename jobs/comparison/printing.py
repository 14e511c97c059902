"""What `rsr compare` prints on a terminal: results in, tables out, and how numbers are told."""

from rsr.jobs.comparison.compare import ComparedMetric, Estimate, StreamComparison
from rsr.jobs.comparison.drift import DRIFT_FORMULA, Drift, DriftValue, TokenShare
from rsr.jobs.terminal import Console, Table, styled

DRIFT_NAMES = {
    "delta_surprisal": "Δ mean surprisal (nats)",
    "delta_unchanged": "  on unchanged spans",
    "delta_edited": "  on edited spans",
    "delta_q1": "  in quarter 1",
    "delta_q2": "  in quarter 2",
    "delta_q3": "  in quarter 3",
    "delta_q4": "  in quarter 4",
    "edit_share": "edit share",
    "length_ratio": "length ratio",
    "drift": f"drift = {DRIFT_FORMULA}",
}


def print_comparison(comparison: StreamComparison, console: Console) -> None:
    """The streams' table, the drift of each refined one, and what to know of the numbers."""
    console.say(styled((comparison.student, "bold"), f": {comparison.left_out_sentence}"))
    console.show(_metric_table(comparison))
    for label, drift in comparison.drifts.items():
        console.print()
        _print_drift(comparison.streams[0], label, drift, console)
    for warning in comparison.warnings:
        console.say(styled(("warning:", "yellow"), f" {warning}"))
    for why in dict.fromkeys(comparison.lacking.values()):
        names = ", ".join(name for name, reason in comparison.lacking.items() if reason == why)
        console.say(f"note: without {names}: {why}")
    for note in comparison.notes:
        console.say(f"note: {note}")


def _metric_table(comparison: StreamComparison) -> Table:
    native, *others = comparison.streams
    table = Table()
    table.add_column("")
    table.add_column(native, justify="right")
    for label in others:
        table.add_column(label, justify="right")
        table.add_column("less native, 95 % interval", justify="right")
    rows = [f"{comparison.num_rows[label]:,}" for label in comparison.streams]
    table.add_row("rows", rows[0], *(cell for count in rows[1:] for cell in (count, "")))
    for compared in comparison.metrics:
        table.add_row(name_of(compared), *_cells(compared, native, others))
    return table


def name_of(compared: ComparedMetric) -> str:
    """What is compared, with its unit."""
    unit = compared.metric.unit
    return compared.metric.name + (f" ({unit})" if unit else "")


def _cells(compared: ComparedMetric, native: str, others: list[str]) -> list[str]:
    cells = [told_number(compared.values[native].value)]
    for label in others:
        cells += [
            told_number(compared.values[label].value),
            told_difference(compared.differences[label]),
        ]
    return cells


def told_number(value: float | None) -> str:
    """Four digits of it."""
    return "–" if value is None else f"{value:.4g}"


def told_difference(estimate: Estimate | DriftValue) -> str:
    """Three digits of it with its sign, and of its interval."""
    if estimate.value is None:
        return "–"
    bounds = "" if estimate.low is None else f" ({estimate.low:+.3g} to {estimate.high:+.3g})"
    return f"{estimate.value:+.3g}{bounds}"


def _print_drift(native: str, label: str, drift: Drift, console: Console) -> None:
    of = "" if drift.num_pairs == drift.num_pairs_there else f" of {drift.num_pairs_there:,}"
    rest = f"; {drift.num_unpaired:,} rows pair with none" if drift.num_unpaired else ""
    heading = f" from {native}, over {drift.num_pairs:,}{of} pairs of rows{rest}"
    console.say(styled((f"Drift of {label}", "bold"), heading))
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, told in DRIFT_NAMES.items():
        table.add_row(told, told_difference(drift.values[name]))
    table.add_row("Jensen–Shannon distance of token frequencies", f"{drift.distance:.3f}")
    console.print(table)
    console.print(_token_table("tokens that moved most", drift.moved))
    console.print(_token_table("of the first quarter's surprisal", drift.first_quarter))
    if drift.note:
        console.say(f"note: {drift.note}")


def _token_table(heading: str, tokens: list[TokenShare]) -> Table:
    table = Table()
    table.add_column(heading)
    for column in ("native", "refined"):
        table.add_column(column, justify="right")
    for token in tokens:
        table.add_row(told_token(token), f"{token.native:.2%}", f"{token.refined:.2%}")
    return table


def told_token(token: TokenShare) -> str:
    """Its text, quoted, or its id where no tokenizer has said it."""
    return str(token.id) if token.text is None else repr(token.text)
