"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from expunge.report.page import Grid, folded

_ENDLESS = 10_000


def print_grid(grid: Grid, console: Console) -> None:
    """Print the table with its caption and notes; words to the left, figures to the right.

    Where it is wider than the console, each interval goes below its figure; where it is wider still, onto two lines,
    and words are broken at their hyphens.
    """
    rows: Sequence[Sequence[str]] = grid.rows
    table = _table(grid, rows, 2)
    wide = console.options.update(max_width=_ENDLESS)
    if Measurement.get(console, wide, table).maximum > console.width:
        rows = [[*row[: grid.words], *(_below(cell, "-") for cell in row[grid.words :])] for row in grid.rows]
        table = _table(grid, rows, 1)
        if Measurement.get(console, wide, table).minimum > console.width:
            words = [[cell.replace("-", "-\n") for cell in row[: grid.words]] for row in grid.rows]
            figures = [[_below(cell, " to\n") for cell in row[grid.words :]] for row in grid.rows]
            rows = [[*left, *right] for left, right in zip(words, figures, strict=True)]
            table = _table(grid, rows, 1)
    console.print(Text(grid.caption, style="bold"))
    console.print(table)
    console.print()
    if grid.notes:
        console.print(Text(grid.notes, style="dim"))
        console.print()


def _table(grid: Grid, rows: Sequence[Sequence[str]], gap: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for index, header in enumerate(grid.headers):
        side = "left" if index < grid.words else "right"
        table.add_column(Text(header), justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _below(cell: str, to: str) -> str:
    """The cell with its interval, if it has one, below its figure; a minus sign is not taken for a dash."""
    value, interval = folded(cell)
    short = interval if to == "-" and "-" in interval else interval.replace(" to ", to)
    return f"{value}\n{short}" if interval else value
