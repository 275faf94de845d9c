"""Erasure: what derives from removed records is deleted from the workspace, and then looked for."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from expunge.core.errors import ExpungeError
from expunge.core.records import Records
from expunge.ledger.sweep import Needles, Sweep, sweep
from expunge.workflow.workspace import Workspace


class Leftovers(ExpungeError):
    """Something of a removed record is still in the workspace, so that its request cannot be completed yet."""

    exit_code = 1


def retire(workspace: Workspace, name: str, serving: str, removed: Collection[str]) -> list[dict[str, Any]]:
    """Delete every version of a model but the served one, and every artefact that derives from removed records.

    Args:
        workspace: where.
        name: the model.
        serving: folder of the version that stays, below the workspace.
        removed: pseudonyms of the removed records.

    Returns:
        What was retired, by name; the same again after a crash, as far as it is still there.
    """
    retired = []
    home = workspace.root / "models" / name
    for folder in sorted(home.iterdir()):
        if folder != workspace.root / serving:
            shutil.rmtree(folder)
            retired.append({"what": "model version", "name": f"{name}/{folder.name}"})
    derived = [artefact.digest for artefact in workspace.store.derived_from(removed)]
    if derived:
        workspace.store.delete(*derived)
        retired.append({"what": "artefacts", "name": f"{len(derived)} that derived from removed records"})
    for leftover in _torn(workspace.root):
        leftover.unlink(missing_ok=True)
    return retired


def _torn(root: Path) -> Iterable[Path]:
    """Temporary files of writers that were killed. Writers that live hold the run's lease, so there are none."""
    return [path for path in root.rglob(".*.part") if path.is_file()]


def look(workspace: Workspace, forget: Records, records: Records) -> Sweep:
    """Search the whole workspace for the removed records.

    Args:
        workspace: where.
        forget: the removed records.
        records: the data set, removed records included: rows that others hold alike are theirs, and stay.
    """
    gone = set(forget.ids)
    stays = records.where(lambda record_id, _: record_id not in gone)
    names = {record_id: workspace.keys.pseudonym(record_id) for record_id in forget.ids}
    workspace.ledger.database.forget_pages()
    return sweep(workspace.root, Needles.of(forget, beside=stays, names=names))


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
