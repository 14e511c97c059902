"""Rows as the student reads them, on the terminal; and the table over many rows."""

from collections.abc import Iterator

from rsr.jobs.inspection.inspection import InspectedRow, Inspection
from rsr.jobs.inspection.reading import Reading
from rsr.jobs.terminal import Console, Table, fact_table, styled

SCORED_STYLE, CONTEXT_STYLE, HEADING_STYLE, REFUSED_STYLE = "green", "dim", "bold", "red"
SCORED_MARKS = ("⟦", "⟧")
"""Around scored text where there is no colour."""

HEAD_CHARS, HEAD_LINES = 700, 14
TAIL_CHARS, TAIL_LINES = 300, 6
"""Ends of a part of the text that is shown of the first rows; what is between them is counted."""
LEAST_CUT_CHARS = 60
"""Fewer are not worth a word about them."""


def print_inspection(inspection: Inspection, console: Console, *, whole: bool) -> None:
    """whole: do not cut long texts short."""
    is_coloured = console.color_system is not None and not console.no_color
    if any(row.seen.scored for row in inspection.rows):
        legend = "in colour" if is_coloured else f"between {' and '.join(SCORED_MARKS)}"
        console.say(f"scored tokens stand {legend}; all else is context")
        console.say("")
    for row in inspection.rows:
        _print_row(row, console, whole=whole, is_coloured=is_coloured)
    print_reading(inspection.reading, console)


def print_reading(reading: Reading, console: Console) -> None:
    """Rows by status and reason, and what of the others would be scored."""
    table = Table("rows", "share", "status", "such as", "what may help")
    for found in reading.outcomes():
        table.add_row(
            f"{found.num_rows:,}", f"{found.share:.1%}", found.name, found.example, found.hint
        )
    console.show(table)
    console.say("")
    facts = fact_table()
    for name, told in reading.facts():
        facts.add_row(name, told)
    console.show(facts)


def _print_row(row: InspectedRow, console: Console, *, whole: bool, is_coloured: bool) -> None:
    encoded = row.seen.encoded
    told = [f"row {row.source.number:,}", encoded.status.value]
    if encoded.sequences:
        told.append(f"{encoded.num_tokens:,} tokens, {encoded.num_scored:,} scored")
    told += [f"{row.source.shard} row {row.source.row:,}", *encoded.notes]
    console.say(styled((" · ".join(told), HEADING_STYLE)))
    if not encoded.status.is_scored:
        console.say(styled((encoded.detail, REFUSED_STYLE)))
        if encoded.hint:
            console.say(styled((encoded.hint, REFUSED_STYLE)))
    pieces = _pieces(row, whole=whole, is_coloured=is_coloured)
    console.print(styled(*pieces, multiline=True), soft_wrap=True)
    if not row.seen.text.endswith("\n"):
        console.say("")


def _pieces(row: InspectedRow, *, whole: bool, is_coloured: bool) -> Iterator[tuple[str, str]]:
    """The row's text with styles, and with marks where there is no colour."""
    for text, is_scored in row.parts():
        style = SCORED_STYLE if is_scored else CONTEXT_STYLE
        opened, closed = SCORED_MARKS if is_scored and not is_coloured else ("", "")
        if not text:
            continue
        head, num_cut, tail = (text, 0, "") if whole else _shortened(text)
        yield opened + head, style
        if num_cut:
            yield f" [… {num_cut:,} characters …] ", HEADING_STYLE
        yield tail + closed, style


def _shortened(text: str) -> tuple[str, int, str]:
    """The beginning and the end of `text`, and how many characters are left out between."""
    head = len("".join(text.splitlines(keepends=True)[:HEAD_LINES])[:HEAD_CHARS])
    tail = len("".join(text.splitlines(keepends=True)[-TAIL_LINES:])[-TAIL_CHARS:])
    num_cut = len(text) - head - tail
    if num_cut < LEAST_CUT_CHARS:
        return text, 0, ""
    return text[:head], num_cut, text[len(text) - tail :]
