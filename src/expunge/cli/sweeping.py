"""`expunge sweep`: whether anything of removed records remains in the workspace."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from expunge.cli.options import Folder, Json, Models, Quiet
from expunge.cli.output import progress, say
from expunge.cli.places import opened, plain, present
from expunge.cli.served import Source
from expunge.core.errors import Misuse, UnknownRecord
from expunge.ledger.database import stamp
from expunge.ledger.sweep import Sweep
from expunge.workflow import Workspace
from expunge.workflow.erasure import asked_still, look, others, torn


@dataclass(frozen=True, kw_only=True)
class _Swept:
    """What was found for one model.

    `wanted` are the records that were searched for by content; `gone` counts all that were removed and are no longer
    in the data source, for which only lineage can be followed; `remains` names what derives from removed records.
    """

    found: Sweep | None
    wanted: frozenset[str]
    gone: int
    remains: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not self.remains and (self.found is None or self.found.clean)

    def to_json(self) -> dict[str, Any]:
        found = None if self.found is None else self.found.to_json()
        lists = {"remains": list(self.remains), "search": found}
        return {"clean": self.clean, "searched_records": len(self.wanted), "not_in_source": self.gone, **lists}


def sweep(
    names: Models = None,
    owner: Annotated[str | None, typer.Option(help="Search for the rows of this owner.")] = None,
    record: Annotated[list[str] | None, typer.Option("--id", help="Search for this record; may be repeated.")] = None,
    destroy_keys: Annotated[
        bool, typer.Option("--destroy-keys", help="Search nothing: destroy the keys to all removed records now.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --destroy-keys: it is meant.")] = False,
    workspace: Folder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Search the workspace for what is left of removed records.

    Reads the rows from the data source, and looks for them, their digests and names in every file. Exit code 1 if
    anything is found; shows where, never what. Without --owner and --id it looks for all that were ever removed.

    \b
    Examples:
      expunge sweep
      expunge sweep digits --owner owner-017 --json
    """
    if owner is not None and record:
        raise Misuse("search in one way: --owner or --id")
    with opened(workspace) as ws:
        chosen = names or [model.name for model in ws.ledger.models.all()]
        for name in chosen:
            ws.ledger.models.served(name)
        if destroy_keys:
            if owner is not None or record:
                raise Misuse("--destroy-keys is for all removed records; leave out --owner and --id")
            return _destroy(ws, chosen, yes, as_json)
        with progress(quiet or as_json) as show:
            swept: dict[str, _Swept] = {}
            for number, name in enumerate(dict.fromkeys(chosen)):
                show(f"sweep for {name}", number, len(chosen))
                swept[name] = _one(ws, name, owner, record or [])
    _refuse_unknown(owner, record or [], {one for found in swept.values() for one in found.wanted})
    clean = all(one.clean for one in swept.values())
    if as_json:
        print(json.dumps({"clean": clean, "models": {name: one.to_json() for name, one in swept.items()}}))
    else:
        print("\n".join(line for name, one in swept.items() for line in _lines(name, one)))
    return 0 if clean else 1


def _refuse_unknown(owner: str | None, ids: Sequence[str], found: Collection[str]) -> None:
    unknown = next((record_id for record_id in ids if record_id not in found), None)
    if unknown is not None:
        raise UnknownRecord(f'record "{unknown}" is not in the data of these models; list it with: expunge records')
    if owner is not None and not found:
        raise UnknownRecord(f'owner "{owner}" holds no record in the data of these models; list them: expunge records')


def _one(ws: Workspace, name: str, owner: str | None, ids: Sequence[str]) -> _Swept:
    records = Source.of(ws, name).records()
    with ws.ledger.database.read() as connection:
        gone = ws.ledger.commitments.gone(connection, name)
    here = {ws.keys.pseudonym(record_id): record_id for record_id in records.ids}
    removed = {here[one] for one in gone if one in here}
    if owner is not None:
        wanted = {record_id for record_id, of in zip(records.ids, records.owners, strict=True) if of == owner}
    elif ids:
        wanted = {record_id for record_id in ids if record_id in records}
    else:
        wanted = set(removed)
    stays = records.where(lambda record_id, _: record_id not in wanted | removed)
    rows = records.where(lambda record_id, _: record_id in wanted)
    found = None if not wanted else look(ws, rows, stays, lambda: asked_still(ws, rows))
    lost = 0 if owner is not None or ids else len(gone - here.keys())
    return _Swept(found=found, wanted=frozenset(wanted), gone=lost, remains=tuple(_remains(ws, name, gone)))


def _remains(ws: Workspace, name: str, gone: frozenset[str]) -> list[str]:
    """What the books say should not be there any more: artefacts, earlier versions, torn files."""
    served = ws.ledger.models.served(name)
    found = [f"artefact {one.digest[:16]} derives from removed records" for one in ws.store.derived_from(gone)]
    for folder in others(ws, name, served.folder):
        version = folder.name[1:5]
        later = version.isdecimal() and int(version) > served.version  # of a run that is not at its end
        if not later:
            found.append(f"model version {name}/{folder.name} is served no more")
    left = sorted(path.relative_to(ws.root).as_posix() for path in torn(ws.root))
    return [*found, *(f"{path} was left by a process that was killed" for path in left)]


def _lines(name: str, swept: _Swept) -> list[str]:
    found = swept.found
    lines = [
        f"{name}: {found}" if found is not None else f"{name}: no removed record is in the data source to look for"
    ]
    if swept.gone:
        lines.append(
            f"  {swept.gone:,} removed records are no longer in the data source: only what derives from them "
            "was looked for"
        )
    lines += [f"  LEFT {plain(remain)}" for remain in swept.remains]
    if found is None:
        return lines
    for one in found.leftovers:
        through = f" through {' in '.join(one.through)}" if one.through else ""
        where = "in its name" if one.offset < 0 else f"at byte {one.offset:,}"
        lines.append(f"  LEFT {plain(one.path)}: {one.form} of {one.record}{through}, {where}")
    lines += [f"  NOT SEARCHED {plain(path)}: {why}" for path, why in found.not_searched]
    if found.not_searched_as_text:
        lines.append(f"  not as text, for they hold too few digits: {found.not_searched_as_text:,} records")
    if found.not_searched_by_content:
        lines.append(
            f"  by digest and name only, for their content is too short: {found.not_searched_by_content:,} records"
        )
    if found.not_searched_by_id:
        lines.append(
            f"  as quoted text only, for they are short or numbers: {found.not_searched_by_id:,} ids and owners"
        )
    lines.append("  no leftovers: names in requests that still wait to be carried out")
    lines.append("  not looked for: rows cropped, resized, rounded, lossily compressed or encrypted; what weights say")
    return lines


def _destroy(ws: Workspace, names: Sequence[str], yes: bool, as_json: bool) -> int:
    if not yes:
        raise Misuse(
            "owners who have not fetched their keys could never open their commitments, and there is no way back; "
            "if that is meant, add --yes"
        )
    mine = {filed.run for name in names for filed in ws.ledger.requests.find(model=name)}
    runs = [run for run in ws.ledger.runs.finished(stamp(present(ws))) if run in mine]
    count = sum(ws.ledger.destroy_keys(run) for run in runs)
    ws.ledger.database.forget_pages()
    ws.ledger.log.checkpoint()
    say(
        as_json,
        {"keys_destroyed": count, "runs": len(runs)},
        f"{count:,} keys of {len(runs):,} runs destroyed for good",
    )
    return 0
