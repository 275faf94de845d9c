"""`expunge demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from expunge.cli.options import Json, Quiet, Seed
from expunge.cli.output import console, outline, progress
from expunge.core.errors import Misuse
from expunge.demo import Settings, tell
from expunge.report import Report, print_grid, write


def demo(
    chapter: Annotated[
        str | None,
        typer.Argument(help="One chapter at length: train, requests, unlearn, certify, certificate, sweep, verify."),
    ] = None,
    workspace: Annotated[Path, typer.Option(help="Folder for report, workspace and certificates.")] = Path(
        "build/demo"
    ),
    seed: Seed = 0,
    seeds: Annotated[int | None, typer.Option(help="Trainings to average over (1; 3 for a single chapter).")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 5,
    show_removed: Annotated[
        Path | None, typer.Option(help="Write pictures of removed images here, outside the workspace.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Tell the whole story on real data.

    Full MNIST divided among 200 owners, two removals, every method, and an honest table. Exit code 1 if a method that
    claims to be exact is not.

    \b
    Examples:
      expunge demo
      expunge demo unlearn --seeds 3 --workspace build/unlearn
    """
    if seeds is not None and seeds < 1:
        raise Misuse(f"--seeds must be >= 1, got {seeds}")
    _refuse_pictures(show_removed, workspace, chapter)
    count = seeds if seeds is not None else 1 if chapter is None else 3
    settings = Settings(seed=seed, seeds=count, epochs=epochs, folder=workspace, show_removed=show_removed)
    with progress(quiet or as_json) as show:
        report = tell(settings, chapters=None if chapter is None else [chapter], progress=show)
    html, data = write(report, workspace)
    if show_removed is not None:
        print(f"warning: pictures of removed rows are in {show_removed}; delete them yourself", file=sys.stderr)
    if as_json:
        print(json.dumps({**report.to_json(), "report": str(html)}))
    else:
        _show(report, f"seed {seed} · workspace {workspace}", f"report  {html}\njson    {data}")
    return 0 if report.sound else 1


def _show(report: Report, about: str, files: str) -> None:
    screen = console()
    screen.print(Text(f"{report.title} · {about}\n"))
    screen.print(outline((f"{number:>2}", told.name, told.headline) for number, told in enumerate(report.chapters, 1)))
    screen.print()
    for told in report.chapters:
        for grid in told.grids:
            print_grid(grid, screen)
    screen.print(Text(f"{report.verdict}\n"))
    limits = [(" ", told.name, told.does_not_show) for told in report.chapters if told.does_not_show]
    if limits:
        screen.print("What this does not show:")
        screen.print(outline(limits))
        screen.print()
    screen.print(Text(files), soft_wrap=True)


def _refuse_pictures(pictures: Path | None, workspace: Path, chapter: str | None) -> None:
    if pictures is None:
        return
    if chapter not in (None, "requests"):
        raise Misuse("--show-removed belongs to the chapter requests; leave it out, or tell that chapter")
    if pictures.resolve().is_relative_to(workspace.resolve()):
        raise Misuse(
            f"{pictures} lies inside the workspace {workspace}, which must not keep removed rows; name another"
        )
