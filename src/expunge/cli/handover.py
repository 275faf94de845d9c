"""`expunge certificate`: what an owner is handed, to be checked without us."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.inputs import refuse_existing
from expunge.cli.options import Folder, Json
from expunge.cli.output import say
from expunge.cli.places import opened, refuse_inside
from expunge.ledger.check import key_id, open_note, parse
from expunge.workflow import Workspace


def certificate(
    request_id: Annotated[str, typer.Argument(metavar="ID", help="The completed request.")],
    out: Annotated[Path, typer.Option(help="New folder outside the workspace.")],
    with_keys: Annotated[
        bool, typer.Option("--keys", help="Add the keys to the removed records: for their owner's eyes alone.")
    ] = False,
    workspace: Folder = None,
    as_json: Json = False,
) -> None:
    """Write a certificate, to be checked offline.

    The folder holds bundle.json, the public key, check.py (Python and its package cryptography run it) and README.txt.

    \b
    Examples:
      expunge certificate 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --out ../answer
      expunge certificate 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --out ../answer --keys
    """
    with opened(workspace) as ws:
        refuse_inside(ws.root, out, "exported copies belong elsewhere")
        refuse_existing(out)
        request_id = ws.ledger.requests.whole_id(request_id)
        found: dict[str, bytes] = {"bundle.json": ws.ledger.certificates.bundle(request_id)}
        if with_keys:
            found["keys.json"] = ws.ledger.certificates.record_keys(request_id)
        statement = ws.ledger.certificates.get(request_id).statement(ws.keys)
        found |= _public_keys(ws)
        found["check.py"] = files("expunge.ledger").joinpath("check.py").read_bytes()
        found["README.txt"] = _readme(ws, statement, found).encode("utf-8")
        days = ws.config.policy.keys_days
    _write(out, found)
    removed = statement["predicate"]["removed"]
    about = {
        "request": request_id,
        "folder": str(out),
        "files": sorted(found),
        "removed": removed["count"],
        "already_gone": removed["alreadyGone"],
        "claim": statement["predicate"]["claim"]["level"],
    }
    lines = [f"certificate of {request_id} written to {out}: {', '.join(sorted(found))}"]
    if with_keys:
        lines.append("keys.json opens the owner's commitments: hand it to the owner alone, and keep no copy")
        lines.append(f"the ledger's own copies of these keys are destroyed {days:g} days after completion")
    say(as_json, about, "\n".join(lines))


def _public_keys(ws: Workspace) -> dict[str, bytes]:
    """The key that signs, and those that signed before."""
    folder = ws.root / "keys"
    return {path.name: path.read_bytes() for path in (folder / "expunge.pub", *sorted(folder.glob("retired-*.pub")))}


def _write(out: Path, found: Mapping[str, bytes]) -> None:
    """The whole folder or nothing; keys that at no time anybody else can read."""
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = out.absolute().parent / f".{out.name}.{uuid.uuid4().hex[:8]}.part"
    temporary.mkdir(mode=0o700 if "keys.json" in found else 0o755)
    try:
        for name, data in found.items():
            mode = 0o600 if name == "keys.json" else 0o644
            with os.fdopen(os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(data)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _readme(ws: Workspace, statement: Mapping[str, Any], found: Mapping[str, bytes]) -> str:
    said = statement["predicate"]
    trusted = " ".join(f"--key {name}" for name in sorted(found) if name.endswith(".pub"))
    model = statement["subject"][0]
    text = _README.format(
        request=said["request"]["id"],
        received=said["request"]["receivedAt"],
        completed=said["completedAt"],
        model=model["name"],
        digest=model["digest"]["sha256"],
        removed=f"{said['removed']['count']:,}",
        already=f"{said['removed']['alreadyGone']:,}",
        method=said["method"]["name"],
        claim=said["claim"]["level"] + (f" ({said['claim']['exactness']})" if said["claim"]["exactness"] else ""),
        caveat=said["claim"]["caveat"],
        trusted=trusted,
        size=open_note(parse(found["bundle.json"])["checkpoint"], ws.keys.trusted).size,
        key=key_id(ws.keys.signing.public_key()),
    )
    return text + (_OPENING.format(trusted=trusted) if "keys.json" in found else _NO_KEYS)


_README = """\
What was done
  Request {request}, received {received}, completed {completed}.
  Model {model}: {removed} records were removed for it by the method {method}; {already} had been removed before.
  Claim: {claim}. {caveat}
  The model that is served since then has the digest {digest}.

How to check it
  You need Python 3.11 or newer and its package cryptography (pip install cryptography). No network, no account:

    python check.py bundle.json {trusted}

  It prints what it checked, a verdict, and all that the certificate does not prove. Exit code 0: every check passed;
  1: one failed, so do not rely on the certificate; 2: a file cannot be read.

  A key that came with the certificate proves little: whoever forges one can forge the other. Get expunge.pub from
  where it is published, or compare its key id by another way: {key}

What it proves, if every check passes
  The provider signed that your records were taken out of the set that the model stands on, in a log that it cannot
  rewrite unseen. The set after is the set before less the records removed, to the last record; and if the check says
  so, the rows that training read are exactly the set after, as the provider's program counted them.

What it does not prove
  That no copy of your data is left elsewhere: in source files, backups, exports, or with others. That the provider's
  program told the truth about the rows that it read. That the model served to you is the one named here: ask for its
  digest. That anything was forgotten beyond the claim above: the claim "none" means that nothing is proved about
  what the model still remembers. Anything about later models. check.py lists all of this each time.

  Keep this folder: with the checkpoint in it you can tell later whether the log was rewritten. Ask the provider for a
  proof that its log goes on from size {size}, and check it: python check.py --consistency proof.json {trusted}
"""
_OPENING = """
How to open the commitments
  keys.json holds one key for each removed record. It is yours alone: with it and your data anybody can tell that the
  record was there; without it nobody can, and the provider destroys its own copy. To see that the records counted as
  removed are yours:

    python check.py bundle.json {trusted} --keys keys.json --owner YOUR-NAME --row DIGEST

  YOUR-NAME is the name by which the data set knows you. DIGEST is the SHA-256 of a row; --row may be repeated. It is
  taken over: four bytes, the length of the header, little-endian; the header, which is the JSON text
  [dtype of the values, their shape, dtype of the label, its shape] without spaces; the values; the label; all as
  little-endian bytes, as the data set holds them. In Python, from a table of your own rows read with the
  provider's columns, scale and classes (ask for them):

    import expunge
    rows = expunge.load_records("mine.csv", id="id", label="label", classes=["no", "yes"])
    print(*[digest.tobytes().hex() for digest in rows.digests()])
"""
_NO_KEYS = """
How to open the commitments
  You were not given the keys to your records. Ask for them before the provider destroys them; without them you can
  count the removed records but not tell that they are yours.
"""
