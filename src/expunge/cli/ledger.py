"""`expunge log` and `expunge verify-bundle`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.options import Folder, Json
from expunge.cli.output import console, outline, say
from expunge.cli.places import opened, plain, refuse_file, refuse_inside
from expunge.core.errors import Corrupt, Misuse, UnreadableFile
from expunge.core.store import write_atomically
from expunge.ledger import check
from expunge.workflow import Workspace


def log(
    entries: Annotated[int | None, typer.Option(help="Show the last so many entries; 0 shows all (20).")] = None,
    checkpoint: Annotated[bool, typer.Option("--checkpoint", help="Sign the log as it is now and print that.")] = False,
    since: Annotated[
        int | None, typer.Option(metavar="SIZE", help="Prove that the log goes on from a checkpoint of this size.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="With --since: new file for the proof.")] = None,
    replace_checkpoint: Annotated[
        bool, typer.Option("--replace-checkpoint", help="Write the checkpoint outside anew, if it is lost for good.")
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check all of the ledger; exit code 1 for faults.")] = False,
    workspace: Folder = None,
    as_json: Json = False,
) -> int:
    """Show, sign, prove or check the log of all events. It names nobody.

    \b
    Examples:
      expunge log --verify
      expunge log --since 120 --out ../proof.json
    """
    if sum((entries is not None, checkpoint, since is not None, verify, replace_checkpoint)) > 1:
        raise Misuse("--entries, --checkpoint, --since, --verify and --replace-checkpoint: choose one")
    if (since is None) != (out is None):
        raise Misuse("--since and --out go together: the size of the old checkpoint, and a file for the proof")
    if verify:
        return _verify(workspace, as_json)
    with opened(workspace, replace_anchor=replace_checkpoint) as ws:
        if checkpoint or replace_checkpoint:
            note = ws.ledger.log.checkpoint()
            say(as_json, {**_about(note, ws), "note": note}, note.rstrip("\n"))
        elif since is not None and out is not None:
            _prove(ws, since, out, as_json)
        else:
            _show(ws, 20 if entries is None else entries, as_json)
    return 0


def _about(note: str, ws: Workspace) -> dict[str, Any]:
    signed = check.open_note(note, ws.keys.trusted)
    return {"origin": signed.origin, "size": signed.size, "root": signed.root.hex()}


def _prove(ws: Workspace, since: int, out: Path, as_json: bool) -> None:
    refuse_inside(ws.root, out, "exported copies belong elsewhere")
    refuse_file(out)
    new = _about(ws.ledger.log.checkpoint(), ws)["size"]
    write_atomically(out, ws.ledger.log.consistency(since))
    about = {"origin": ws.ledger.log.origin, "old_size": since, "new_size": new, "proof": str(out)}
    how = f"check it with: python check.py --consistency {out} --key expunge.pub"
    say(as_json, about, f"proof from {since:,} to {new:,} entries written to {out}; {how}")


def _show(ws: Workspace, count: int, as_json: bool) -> None:
    if count < 0:
        raise Misuse(f"--entries must be >= 0, got {count}")
    size = len(ws.ledger.log)
    found = list(ws.ledger.log.entries(start=size - count if 0 < count < size else 0))
    if as_json:
        shown = [entry.to_json() for entry in found]
        print(json.dumps({"origin": ws.ledger.log.origin, "size": size, "shown": shown}))
        return
    lines = [("entry", "at", "event", "request or model", "")]
    for entry in found:
        about = entry.request or str(entry.body.get("model", ""))
        short = {name: value for name, value in entry.body.items() if name in ("state", "version", "reason", "keys")}
        said = "; ".join(f"{name} {value}" for name, value in short.items())
        lines.append((str(entry.index), entry.at[:19].replace("T", " "), entry.kind, plain(about), plain(said)))
    print(f"log {ws.ledger.log.origin}, {size:,} entries, times in UTC\n")
    console().print(outline(lines))


def _verify(folder: Path | None, as_json: bool) -> int:
    size: int | None = None
    try:
        with opened(folder) as ws:
            size = len(ws.ledger.log)
            faults = ws.ledger.verify()
    except Corrupt as error:  # so bad that the ledger refuses to open
        faults = [str(error)]
    about = {"sound": not faults, "faults": faults, "entries": size}
    good = f"sound: {size or 0:,} entries, every proof and table agrees with them"
    say(as_json, about, "\n".join(f"FAULT {plain(fault)}" for fault in faults) or good)
    return 1 if faults else 0


def verify_bundle(
    bundle: Annotated[Path, typer.Argument(help="The certificate's bundle.json.")],
    key: Annotated[list[Path], typer.Option(help="A public key that you trust (PEM); may be repeated.")],
    keys: Annotated[Path | None, typer.Option(help="Keys to the records (keys.json), to open the commitments.")] = None,
    owner: Annotated[str | None, typer.Option(help="With --keys: the owner's name.")] = None,
    row: Annotated[list[str] | None, typer.Option(help="With --keys: SHA-256 of a row; may be repeated.")] = None,
    as_json: Json = False,
) -> int:
    """Check a certificate offline.

    As the check.py beside it does; needs no workspace. Exit code 1 if a check failed. Take the key from where it was
    published, not from beside the bundle.

    \b
    Examples:
      expunge verify-bundle answer/bundle.json --key published/expunge.pub
      expunge verify-bundle answer/bundle.json --key published/expunge.pub --json
    """
    if len({keys is None, owner is None, not row}) > 1:
        raise Misuse("--keys, --owner and at least one --row go together")
    trusted = [_public_key(path) for path in key]
    data = _bytes(bundle)
    checked = check.check_bundle(data, trusted)
    if keys is not None and owner is not None and row and checked.passed:
        removed = check.parse(data)["removed"]["commitments"]
        extra = check.check_keys(_bytes(keys), removed, owner, row)
        checked = check.Checked((*checked.outcomes, extra), checked.statement, checked.not_proved)
    about = {
        "bundle": str(bundle),
        "passed": checked.passed,
        "checks": [{"check": one.check, "passed": one.passed, "why": one.why} for one in checked.outcomes],
        "statement": checked.statement,
        "not_proved": list(checked.not_proved),
    }
    say(as_json, about, str(checked))
    return 0 if checked.passed else 1


def _public_key(path: Path) -> Any:
    try:
        return check.read_public_key(path)
    except check.Refused as error:
        raise UnreadableFile(f"{error.why}; give the provider's public key as a PEM file") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableFile(f"{path} cannot be read ({error.strerror or error}); check the path") from None
