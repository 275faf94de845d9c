"""Tables for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from expunge.report.page import Grid


def print_grid(grid: Grid, console: Console) -> None:
    """Print the table with its caption and notes; text columns to the left, figures to the right."""
    table = Table(title=grid.caption, caption=grid.notes or None, box=box.SIMPLE_HEAD, title_justify="left")
    table.caption_justify = "left"
    for index, header in enumerate(grid.headers):
        table.add_column(header, justify="left" if index < 2 else "right", no_wrap=index < 2)
    for row in grid.rows:
        table.add_row(*row)
    console.print(table)
