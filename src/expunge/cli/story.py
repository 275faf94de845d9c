"""`expunge demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from expunge.cli.options import Json, Quiet, Seed
from expunge.cli.output import console, progress
from expunge.core.errors import Misuse
from expunge.demo import Settings, tell
from expunge.report import print_grid, write


def demo(
    chapter: Annotated[
        str | None, typer.Argument(help="Tell one chapter at length: train, requests or unlearn.")
    ] = None,
    workspace: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("build/demo"),
    seed: Seed = 0,
    seeds: Annotated[int | None, typer.Option(help="Trainings to average over (1; 3 for a single chapter).")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 5,
    show_removed: Annotated[
        Path | None, typer.Option(help="Write pictures of removed images here, outside the workspace.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tell the whole story on real data: full MNIST, 200 owners, real requests, an honest table.

    \b
    Examples:
      expunge demo
      expunge demo unlearn --seeds 3 --workspace build/unlearn
    """
    if seeds is not None and seeds < 1:
        raise Misuse(f"--seeds must be >= 1, got {seeds}")
    _refuse_pictures_inside(show_removed, workspace)
    count = seeds if seeds is not None else 1 if chapter is None else 3
    settings = Settings(seed=seed, seeds=count, epochs=epochs, show_removed=show_removed)
    with progress(quiet or as_json) as show:
        report = tell(settings, chapters=None if chapter is None else [chapter], progress=show)
    html, data = write(report, workspace)
    if as_json:
        print(json.dumps({**report.to_json(), "report": str(html)}))
        return
    screen = console()
    screen.print(f"{report.title} · seed {seed} · workspace {workspace}\n", highlight=False)
    for number, told in enumerate(report.chapters, 1):
        screen.print(f"{number:>2} {told.name:<10} {told.headline}", highlight=False, soft_wrap=True)
    for told in report.chapters:
        for grid in told.grids:
            print_grid(grid, screen)
    screen.print(f"report  {html}      json  {data}", highlight=False, soft_wrap=True)
    screen.print(f"\n{report.verdict}", highlight=False, soft_wrap=True)
    limits = " ".join(told.does_not_show for told in report.chapters if told.does_not_show)
    screen.print(f"This does not show: {limits}", highlight=False, soft_wrap=True)


def _refuse_pictures_inside(pictures: Path | None, workspace: Path) -> None:
    if pictures is None:
        return
    if pictures.resolve().is_relative_to(workspace.resolve()):
        raise Misuse(
            f"{pictures} lies inside the workspace {workspace}, which must not keep removed rows; name another"
        )
    print(f"warning: pictures of removed rows go to {pictures}; nothing will delete them but you", file=sys.stderr)
