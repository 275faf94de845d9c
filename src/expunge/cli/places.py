"""Where commands work: the workspace that they are in, and what must lie outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from expunge.core.errors import Misuse
from expunge.ledger.database import moment
from expunge.workflow import Workspace
from expunge.workflow.workspace import SETTINGS


@contextmanager
def opened(folder: Path | None, *, replace_anchor: bool = False) -> Iterator[Workspace]:
    """Within: the workspace in this folder; None looks for the nearest one upward from here."""
    workspace = Workspace(find_root(folder), replace_anchor=replace_anchor)
    try:
        yield workspace
    finally:
        workspace.close()


def find_root(folder: Path | None) -> Path:
    """The workspace's folder; Misuse if there is none."""
    here = Path.cwd() if folder is None else folder
    places = [here] if folder is not None else [here, *here.parents]
    for place in places:
        if (place / SETTINGS).is_file():
            return place
    if folder is not None:
        raise Misuse(f"{folder} is no workspace; make one with: expunge init {folder}")
    raise Misuse("neither here nor above is a workspace; name one: --workspace DIR, or make one: expunge init DIR")


def refuse_inside(root: Path, path: Path, why: str) -> None:
    """Misuse if the path lies inside the workspace; `why` says why it must not."""
    if path.resolve().is_relative_to(root.resolve()):
        raise Misuse(f"{path} lies inside the workspace {root}; {why}: name a place outside")


def present(workspace: Workspace) -> datetime:
    """The present instant by the ledger's clock."""
    with workspace.ledger.database.read() as connection:
        return moment(workspace.ledger.database.utc(connection))


def day(workspace: Workspace, when: str) -> str:
    """The date of a time stamp where the legal clock is read."""
    return moment(when).astimezone(workspace.config.clock.zone).date().isoformat()


def plain(text: object) -> str:
    """The text with every control and direction mark spelled out: what people filed must not steer a terminal."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in str(text))


def counted(number: int, what: str) -> str:
    """The number and what it counts, as people write it."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def refuse_file(out: Path) -> None:
    """Misuse if the file is there already, or its folder is not."""
    if out.exists():
        raise Misuse(f"{out} is there already and is not overwritten; name a new file")
    if not out.absolute().parent.is_dir():
        raise Misuse(f"{out} cannot be written, for its folder is not there; make it first")
