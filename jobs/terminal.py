"""What reaches the terminal: names as data, tables, commands to type again, and the two streams.

File names, teachers, manifests and messages come from outside. Whatever they hold, they are shown
as text: without markup, and with every character that a terminal would obey spelled out. Nothing
else in `jobs` or `benchmarks` imports rich's consoles, tables and texts, or writes to a stream.
"""

import codecs
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Column as Column
from rich.table import Table as RichTable
from rich.text import Text

UNLIMITED_WIDTH = 1 << 20
PROSE_WIDTH = 24
"""Columns of a terminal below which a cell of several words is not squeezed."""

OBEYED = (
    "\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: escape sequences begin with one of them
    "\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"  # order of writing, and no width at all
    "\u2028\u2029"  # line and paragraph separators
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # byte order mark, annotations, tags
    "\ud800-\udfff"  # lone surrogates: bytes of a file name that are not UTF-8
)
_OBEYED = re.compile(f"[{OBEYED}]")
_OBEYED_IN_LINES = re.compile(f"(?!\n)[{OBEYED}]")

ASCII = {"×": "x", "–": "-", "−": "-", "…": "...", "→": "->", "·": "|", "±": "+-", "█": "#"} | {
    "⟦": "[[",
    "⟧": "]]",
}
"""How our own texts look where the terminal has no such character."""


def printable(text: str, *, multiline: bool = False) -> str:
    """`text` with whatever a terminal would obey, and not show, as a backslash sequence.

    multiline: leave line feeds alone.
    """
    return (_OBEYED_IN_LINES if multiline else _OBEYED).sub(_spelled_out, text)


def _spelled_out(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape", "surrogatepass").decode("ascii")


def styled(*parts: str | tuple[str, str], multiline: bool = False) -> Text:
    """One text of `printable` parts; a pair is a part and its style."""
    pairs = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((printable(part, multiline=multiline), style) for part, style in pairs))


def shell_command(arguments: Sequence[str]) -> str:
    """A command line that is safe to show and that a shell reads as these arguments.

    Characters that a terminal obeys need bash's, ksh's or zsh's quotes ($'…').
    """
    return " ".join(_quoted(argument) for argument in arguments)


def _quoted(argument: str) -> str:
    if printable(argument) == argument:
        return shlex.quote(argument)
    return f"$'{''.join(map(_in_ansi_quotes, argument))}'"


def _in_ansi_quotes(char: str) -> str:
    if char in "\\'":
        return f"\\{char}"
    if printable(char) == char:
        return char
    is_byte = "\udc80" <= char <= "\udcff"  # how Python spells a byte that is not UTF-8
    encoded = char.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in encoded)


def quantity(number: int, noun: str) -> str:
    """`1 unit`, `2 units` or `1,000 units`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_seconds(seconds: float) -> str:
    """`1 h 02 min`, `3 min 20 s` or `42 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Console(RichConsole):
    """A console that takes every string as data: no markup, no emoji codes, nothing to obey."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, multiline=True), **options)

    def say(self, line: str | Text) -> None:
        """Print one line, however long; the terminal wraps it."""
        self.print(styled(line) if isinstance(line, str) else line, soft_wrap=True)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does; a table that goes to a file or a pipe is as wide as it is."""
        if self.is_terminal or not any(isinstance(each, RichTable) for each in objects):
            super().print(*objects, **options)
            return
        for each in objects:
            if isinstance(each, RichTable):
                self.show(each)
            else:
                super().print(each, **options)

    def show(self, table: RichTable) -> None:
        """Print a table as wide as it is: no cell is cut, and a terminal wraps what is too long."""
        unlimited = self.options.update(width=UNLIMITED_WIDTH)
        needed = self.measure(table, options=unlimited).maximum
        before, self.width = self._width, max(self.width, needed)
        try:
            super().print(table, soft_wrap=True)
        finally:
            self._width = before


class Table(RichTable):
    """A table without a frame whose headings and cells are data, each in a line of its own.

    Where it is wider than the terminal, it becomes several, one below the other, each with the
    first column and as many others as fit. Numbers, which stand to the right, are never cut or
    wrapped; other cells are wrapped to no less than `PROSE_WIDTH`, and nothing is left out.
    """

    def __init__(self, *headings: str, **options: Any) -> None:
        super().__init__(*headings, **{"box": None, "pad_edge": False} | options)

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "overflow": "fold",
            "no_wrap": options.get("justify") == "right",
        }
        super().add_column(_cell(header), *arguments, **defaults | options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*map(_cell, cells), **options)

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        parts = self._stacked(console, options)
        for number, part in enumerate(parts):
            part.title = None if number else self.title
            part.caption = self.caption if part is parts[-1] else None
            rendered = RichTable.__rich_console__(part, console, options)
            for line in Segment.split_lines(s for s in rendered if isinstance(s, Segment)):
                yield from _without_trailing_spaces(line)
                yield Segment.line()

    def _stacked(self, console: RichConsole, options: ConsoleOptions) -> "list[Table]":
        """The same in tables of columns that fit beside the first."""
        unlimited, room = options.update(width=UNLIMITED_WIDTH), options.max_width
        if not self.show_header or self.__rich_measure__(console, unlimited).maximum <= room:
            return [self._of_columns(self.columns)]
        between = self.padding[1] + self.padding[3]
        if self.box is not None:
            between += 1
            room -= 2 * self.show_edge

        def needed(column: Column) -> int:
            alone = self._of_columns([column])
            alone.pad_edge, alone.box = False, None
            return alone.__rich_measure__(console, unlimited).maximum + between

        first, *others = self.columns
        # A name longer than that is folded, so that something fits beside it.
        key = min(needed(first), room // 2)
        groups: list[list[Column]] = [[]]
        taken = key
        for column in others:
            width = needed(column) if column.no_wrap else min(needed(column), PROSE_WIDTH)
            if groups[-1] and taken + width - (0 if self.pad_edge else between) > room:
                groups.append([])
                taken = key
            is_whole = column.no_wrap and key + width <= room
            groups[-1].append(replace(column, no_wrap=is_whole))
            taken += width
        first = replace(first, no_wrap=key < room // 2)
        return [self._of_columns([first, *group]) for group in groups]

    def _of_columns(self, columns: Sequence[Column]) -> "Table":
        """A table of these columns alone, with every row."""
        part = copy(self)
        part.columns = [replace(column, _index=i) for i, column in enumerate(columns)]
        return part


def fact_table() -> Table:
    """A table of names, in bold, and what is to be said of each."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    return table


def _without_trailing_spaces(line: list[Segment]) -> list[Segment]:
    kept = list(line)
    while kept and not kept[-1].text.strip(" "):
        kept.pop()
    if kept:
        kept[-1] = kept[-1]._replace(text=kept[-1].text.rstrip(" "))
    return kept


def _cell(cell: Any) -> Any:
    return styled(cell) if isinstance(cell, str) else cell


def print_json(value: Any, **options: Any) -> None:
    """One JSON object and a line feed on stdout, in ASCII. options: of `json.dumps`."""
    # The only character of ASCII that JSON leaves as it is and a terminal does not show.
    sys.stdout.write(json.dumps(value, **options).replace("\x7f", "\\u007f") + "\n")
    sys.stdout.flush()


def complain(line: str) -> None:
    """One line on stderr, after the name of the program."""
    sys.stderr.write(f"rsr: {printable(line)}\n")
    sys.stderr.flush()


class OutputError(OSError):
    """Stdout cannot be written: its disk is full, say."""


class _Outlet(io.FileIO):
    """A standard stream's file: what nobody reads any more is dropped.

    is_read: whether nothing went wrong yet. Raises `OutputError` the first time that a write
    fails for any other reason than a reader that has gone, unless `is_silent`.
    """

    def __init__(self, descriptor: int, *, is_silent: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._is_silent = is_silent
        self.is_read = True

    def write(self, content: Any) -> int:
        if self.is_read:
            try:
                return super().write(content) or 0
            except OSError as error:
                self.is_read = False
                if not self._is_silent and not isinstance(error, BrokenPipeError):
                    raise OutputError(*error.args) from error
        return len(content)


def prepare_streams() -> None:
    """Make stdout and stderr take any text, and outlive their readers.

    Characters that they cannot encode are spelled out. Of a stream that was closed when the
    program began, the null device takes the place, or else the next file that is opened would.
    """
    codecs.register_error("rsr", _encode_otherwise)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest descriptor that is free: this one
    sys.stdout = _prepared(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _prepared(sys.stderr, sys.__stderr__, 2)


def _prepared(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    if stream is not original:
        # Somebody catches what is written, a test say.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="rsr")
        assert stream is not None
        return stream
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Outlet(descriptor, is_silent=descriptor == 2)),
        encoding=stream.encoding if stream else "utf-8",
        errors="rsr",
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )


def is_stdout_read() -> bool:
    """Whether there is still somebody for whom to go on printing."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return not isinstance(raw, _Outlet) or raw.is_read


def _encode_otherwise(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    chars = error.object[error.start : error.end]
    told = (ASCII.get(c) or c.encode("unicode_escape", "surrogatepass").decode() for c in chars)
    return "".join(told), error.end
