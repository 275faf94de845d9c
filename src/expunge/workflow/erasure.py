"""Erasure: what derives from removed records is deleted from the workspace, and then looked for."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError
from expunge.core.records import Records
from expunge.ledger.states import State
from expunge.ledger.sweep import Leftover, Needles, Sweep, sweep
from expunge.workflow.transcripts import TRANSCRIPT, steps_told
from expunge.workflow.workspace import Workspace


class Leftovers(ExpungeError):
    """Something of a removed record is still in the workspace, so that its request cannot be completed yet."""

    exit_code = 1


def retire(workspace: Workspace, name: str, serving: str, removed: Collection[str]) -> list[dict[str, Any]]:
    """Delete every version of a model but the served one, and every artefact that derives from removed records.

    Call it within a transaction that holds the model's run: else another worker may serve what this one deletes.

    Args:
        workspace: where.
        name: the model.
        serving: folder of the version that stays, below the workspace.
        removed: pseudonyms of the removed records.

    Returns:
        What was retired, by name; the same again after a crash, as far as it is still there.
    """
    retired = due(workspace, name, serving, removed)
    for folder in others(workspace, name, serving):
        if folder.is_symlink():
            folder.unlink()
        else:
            _delete(folder)
    derived = [artefact.digest for artefact in workspace.store.derived_from(removed)]
    if derived:
        workspace.store.delete(*derived)
    with _no_checkpoint(workspace):
        for leftover in torn(workspace.root):
            leftover.unlink(missing_ok=True)
    return retired


def _delete(folder: Path) -> None:
    """Delete a folder, even while a worker that was taken over still writes into it: then it finds its own gone."""
    for _ in range(_TRIES):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
        if not folder.exists():
            return
    shutil.rmtree(folder)


def due(workspace: Workspace, name: str, serving: str, removed: Collection[str]) -> list[dict[str, Any]]:
    """What `retire` would delete, by name."""
    found = [
        {"what": "unfinished files" if path.name.startswith(".") else "model version", "name": f"{name}/{path.name}"}
        for path in others(workspace, name, serving)
    ]
    many = len(workspace.store.derived_from(removed))
    if many:
        found.append({"what": "artefacts", "name": f"{many} that derived from removed records"})
    return found


def litter(workspace: Workspace, name: str, serving: str) -> bool:
    """Whether there is a version that is not served, or a file that was never finished. Cost: lists the workspace."""
    return bool(others(workspace, name, serving)) or bool(torn(workspace.root))


def others(workspace: Workspace, name: str, serving: str) -> list[Path]:
    """Folders of the versions of a model that are not served."""
    home = workspace.root / "models" / name
    return [path for path in sorted(home.iterdir()) if path.is_dir() and path != workspace.root / serving]


def torn(root: Path) -> list[Path]:
    """Temporary files. Who writes models holds a run, who writes checkpoints their lock: so their writers are dead."""
    return [path for path in root.rglob(".*.part") if path.is_file() and not path.name.startswith(".expunge.toml.")]


@contextmanager
def _no_checkpoint(workspace: Workspace) -> Iterator[None]:
    """Within: nobody writes the checkpoint, so that its unfinished files are of writers that were killed."""
    anchor = workspace.root / workspace.config.anchor
    with anchor.with_name(anchor.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def asked_still(workspace: Workspace, gone: Records) -> frozenset[str]:
    """Ids and owners of removed records that stand in a request which waits: its own run will look for them."""
    found: set[str] = set()
    told = {one["request"]: one["data"] for one in workspace.ledger.requests.outbox() if one["topic"] == "extended"}
    for filed in workspace.ledger.requests.find(state=[state for state in State if not state.final]):
        said = f"{filed.why} {told.get(filed.id, '')}"  # what people wrote of it, until it is done
        found |= {name for name in (*gone.ids, *gone.owners) if name in said}
        with suppress(ExpungeError):  # it was done meanwhile, or means no record that is gone
            request = workspace.asked(filed.id)
            found |= {*request.ids, request.owner or ""}
            found |= set(request.named(gone))
    return frozenset(found)


Asked = Callable[[], frozenset[str]]


def look(workspace: Workspace, forget: Records, stays: Records, asked: Asked = frozenset) -> Sweep:
    """Search the whole workspace for the removed records.

    Args:
        workspace: where.
        forget: the removed records.
        stays: the rows that are still held: what these share with the removed ones is theirs, and stays.
        asked: gives ids and owners that stand in requests which wait: in the ledger's own files no leftovers.
    """
    names = {name: workspace.keys.pseudonym(name) for name in (*forget.ids, *forget.owners)}
    needles = Needles.of(forget, beside=stays, names=names)
    waiting = asked()
    for _ in range(_TRIES):
        workspace.ledger.database.forget_pages()
        found = _searched(workspace, needles)
        if not any(why.endswith(_VANISHED) for _, why in found.not_searched):
            break
    waiting |= asked()  # filed meanwhile
    waits = {names[name] for name in waiting if name in names}
    words = {names[name] for name in names if name in _words(workspace)}
    steps = {names[name] for name in names if name in steps_told(workspace.root)}
    files = (_files_of_ledger, _files_of_ours, _files_of_transcripts)
    ledgers, ours, told = ({needles.hide(path) for path in of(workspace)} for of in files)

    def excused(one: Leftover) -> bool:
        if one.form in ("id", "owner"):  # offset below 0: in a file's name
            if one.record in words and (one.path in ours | told or one.offset < 0):
                return True
            if one.record in steps and one.path in told:
                return True
        return one.record in waits and one.path in ledgers

    left = [one for one in found.leftovers if not excused(one)]
    for path in _copies(workspace):
        left.append(Leftover(path=path, form="copy of a model", through=(), record="", offset=0))
    return replace(found, leftovers=tuple(left))


def _searched(workspace: Workspace, needles: Needles) -> Sweep:
    """The workspace searched; the files of a SQLite ledger by way of copies that another process makes.

    Opening and closing them in this process would cancel the locks that SQLite holds on them: POSIX gives them up when
    any descriptor of the file is closed. Another process would then take the ledger for unused, and cut off its
    write-ahead log with what is committed in it.
    """
    inside = [workspace.root / name for name in sorted(_files_of_ledger(workspace))]
    there = [path for path in inside if path.is_file()]
    found = sweep(workspace.root, needles, skip=inside)
    if not there:
        return found
    with tempfile.TemporaryDirectory(prefix="expunge-sweep-") as folder:
        copies = [Path(folder) / path.name for path in there]
        pairs = [str(one) for pair in zip(there, copies, strict=True) for one in pair]
        subprocess.run([sys.executable, "-I", "-S", "-c", _COPY, *pairs], check=True)
        ledgers = sweep(Path(folder), needles)
    home = there[0].parent.relative_to(workspace.root)
    moved = [replace(one, path=(home / one.path).as_posix()) for one in ledgers.leftovers]
    return replace(
        found,
        leftovers=(*found.leftovers, *moved),
        files=found.files + ledgers.files,
        size_bytes=found.size_bytes + ledgers.size_bytes,
        not_searched=(*found.not_searched, *ledgers.not_searched),
    )


_COPY = """
import shutil, sys
names = sys.argv[1:]
for source, copy in zip(names[::2], names[1::2]):
    try:
        shutil.copyfile(source, copy)
    except FileNotFoundError:  # the write-ahead log comes and goes
        pass
"""


def _words(workspace: Workspace) -> set[str]:
    """Words that stand in files of ours whoever is removed: those of this program, of the settings and of the models.

    An owner who is called "model" or "completed" is looked for everywhere but there.
    """
    text = (workspace.root / "expunge.toml").read_text(encoding="utf-8")
    text += " ".join(one.name for one in workspace.ledger.models.all())
    return _words_of_program() | set(re.findall(r"[\w.-]+", text)) | set(re.findall(r"\w+", text))


@cache
def _words_of_program() -> set[str]:
    root = Path(__file__).parents[1]
    found: set[str] = set()
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall("[A-Za-z_]+", text))
    return found


def _files_of_ours(workspace: Workspace) -> set[str]:
    """Relative to the workspace: the ledger's files, the settings, and what is written beside models' parameters."""
    books = {path.relative_to(workspace.root).as_posix() for path in workspace.root.glob("models/**/trained.json")}
    return _files_of_ledger(workspace) | books | {"expunge.toml"}


def _files_of_transcripts(workspace: Workspace) -> set[str]:
    """Relative to the workspace: what lies in the transcripts of versions."""
    found = workspace.root.glob(f"models/*/*/{TRANSCRIPT}/**/*")
    return {path.relative_to(workspace.root).as_posix() for path in found}


def _copies(workspace: Workspace) -> list[str]:
    """Saved models in the workspace that are no version of a model that is served: nobody would retire them."""
    homes = {workspace.root / "models" / one.name for one in workspace.ledger.models.all()}
    found = []
    for path in workspace.root.rglob("trained.json"):
        inside = path.relative_to(workspace.root).parts
        if "part-" not in path.parent.name and not (len(inside) == 4 and path.parent.parent in homes):
            found.append(path.parent.relative_to(workspace.root).as_posix())
    return sorted(found)


def _files_of_ledger(workspace: Workspace) -> set[str]:
    """Relative to the workspace; none on PostgreSQL."""
    database = workspace.ledger.database
    if not database.on_sqlite:
        return set()
    path = os.path.relpath(str(database.url.database), workspace.root.resolve())
    return {path.replace(os.sep, "/") + end for end in ("", "-wal", "-shm", "-journal")}


_TRIES = 5
_VANISHED = os.strerror(errno.ENOENT)
"""Of another worker's temporary file, which was renamed before it could be opened: then the search begins again."""


def refuse_leftovers(found: Sweep) -> None:
    """Leftovers if anything was found, or could not be searched."""
    if found.clean:
        return
    first = found.leftovers[0] if found.leftovers else None
    what = (
        f"{len(found.leftovers)} leftovers, first {first.form} in {first.path}"
        if first is not None
        else f"{found.not_searched[0][0]} could not be searched ({found.not_searched[0][1]})"
    )
    raise Leftovers(
        f"the sweep found {what}; delete or move it out of the workspace, then go on with: expunge run "
        "(all findings: expunge sweep)"
    )
