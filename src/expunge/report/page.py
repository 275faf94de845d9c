"""A report as a value, and that value as one HTML page without links to anything outside it, beside its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from expunge.core.store import write_atomically


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as people read it.

    Attributes:
        caption: what it is, in one line.
        headers: one for each column.
        rows: cells as text, in the headers' order. An interval follows its figure: ``96.4 (95.9 to 96.8)``.
        words: how many of the first columns are words; the others are figures, and stand to the right.
        notes: what the columns mean, and what the figures do not cover.
    """

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 2
    notes: str = ""


_INTERVAL = re.compile(r"(\S+) \((\S+ to \S+)\)")


def folded(cell: str) -> tuple[str, str]:
    """A cell's figure and its interval; the whole cell and nothing if it has none."""
    found = _INTERVAL.fullmatch(cell)
    return (found[1], found[2]) if found else (cell, "")


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """One stage of the story.

    Attributes:
        name: one word; also the command that tells it at length.
        done: False for a stage that did not take place: it is shown as not done, never as passed.
        headline: one line.
        text: what was done, a paragraph each.
        grids: tables.
        plots: caption to SVG.
        shows: what follows from it.
        does_not_show: what does not.
        check: a command by which the reader can see for himself.
        data: everything as plain JSON values.
    """

    name: str
    headline: str
    done: bool = True
    text: tuple[str, ...] = ()
    grids: tuple[Grid, ...] = ()
    plots: Mapping[str, str] = field(default_factory=dict)
    shows: str = ""
    does_not_show: str = ""
    check: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A whole report, its verdict first.

    Attributes:
        title: what is reported on.
        verdict: what came out, in a sentence or two.
        facts: what it was made with.
        chapters: in the order in which they are told.
        sound: False if a check within it failed.
    """

    title: str
    verdict: str
    facts: Mapping[str, str]
    chapters: tuple[Chapter, ...]
    sound: bool = True

    def to_json(self) -> dict[str, Any]:
        """Title, verdict, facts, whether all checks held, and each chapter's data as plain JSON values."""
        chapters = {
            chapter.name: {"done": chapter.done, "headline": chapter.headline, **chapter.data}
            for chapter in self.chapters
        }
        about = {"title": self.title, "verdict": self.verdict, "sound": self.sound, "facts": dict(self.facts)}
        return {**about, "chapters": chapters}


def write(report: Report, folder: Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.json`` into the folder, each whole or not at all.

    Every text is escaped; only plots, which expunge draws itself, go in as they are.
    """
    template = (files("expunge.report") / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["folded"] = folded
    page = environment.from_string(template).render(report=report)
    values = json.dumps(report.to_json(), indent=1, allow_nan=False)
    html, data = folder / "report.html", folder / "report.json"
    write_atomically(html, page.encode("utf-8"))
    write_atomically(data, values.encode("utf-8"))
    return html, data
