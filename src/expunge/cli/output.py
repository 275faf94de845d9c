"""What commands print: results to standard output, progress to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def say(as_json: bool, about: Mapping[str, Any], text: str) -> None:
    """Print the one object, or the text."""
    print(json.dumps(about) if as_json else text)


def outline(lines: Iterable[Sequence[str]]) -> Table:
    """Lines of words in columns, the last of which wraps below itself."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def console() -> Console:
    """Standard output for tables: wide where there is no terminal, so that no figure is cut off."""
    return Console(width=None if sys.stdout.isatty() else 160)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with time left on standard error; nothing if quiet or not a terminal."""
    screen = Console(stderr=True)
    if quiet or not screen.is_terminal:
        yield lambda what, done, total: None
        return
    parts = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*parts, console=screen, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
