"""`expunge request`, `identify`, `extend`, `cancel`, `deny` and `release`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from expunge.cli.filing import file_all, key_of_file, received, requests_in
from expunge.cli.inputs import load_model, make_request
from expunge.cli.options import AllowCode, Folder, Json, Quiet
from expunge.cli.output import progress, say
from expunge.cli.places import counted, opened
from expunge.cli.served import Source
from expunge.cli.standing import clock_of, due_text
from expunge.cli.workspace import journey_of, worker_name
from expunge.core.errors import Misuse, UnknownRecord
from expunge.core.request import Request
from expunge.ledger.requests import Filed
from expunge.workflow import Workspace

Id = Annotated[str, typer.Argument(metavar="ID", help="The request; as much of its id as tells it apart.")]


def request(
    model: Annotated[str, typer.Argument(metavar="NAME", help="The model that it is about.")],
    record: Annotated[list[str] | None, typer.Option("--id", help="A record to remove; may be repeated.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with one record id a line.")] = None,
    owner: Annotated[str | None, typer.Option(help="Remove all that this owner holds.")] = None,
    label: Annotated[int | None, typer.Option("--class", help="Remove a whole class.")] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="File one request for each owner listed here.")] = None,
    owner_column: Annotated[str | None, typer.Option(help="With --csv: the column of owners (owner).")] = None,
    id_column: Annotated[str | None, typer.Option(help="With --csv: the column of record ids.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: under it, the same is filed once. With --csv: begins each key.")
    ] = None,
    received_at: Annotated[
        str | None, typer.Option(metavar="DATE", help="When it came in, as 2026-11-01 (now); the clock runs from then.")
    ] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Who asks must still prove who they are: see expunge identify.")
    ] = False,
    workspace: Folder = None,
    as_json: Json = False,
) -> None:
    """File a request to remove records.

    Keeps it durably and says when an answer is due by law. With --csv all requests of the file are kept, or none.

    \b
    Examples:
      expunge request digits --owner owner-017 --key ticket-4711
      expunge request churn --csv leaving.csv --owner-column customer --received-at 2026-11-01
    """
    with opened(workspace) as ws:
        when = received(received_at, ws.config.clock.zone)
        if table is None:
            if owner_column is not None or id_column is not None:
                raise Misuse("--owner-column and --id-column read a file of requests; give it: --csv")
            requests: Mapping[str, Request] = {"": make_request(record, ids_file, owner, label)}
        else:
            if record or ids_file or owner is not None or label is not None:
                raise Misuse("--csv names what to remove line by line; leave out --id, --ids-file, --owner and --class")
            requests = requests_in(table, owner_column, id_column)
            key = key_of_file(table) if key is None else key
        filed = file_all(ws, model, requests, key=key, received_at=when, identified=not unverified)
        new = sum(is_new for _, is_new in filed)
        told = [{**clock_of(ws, one), "new": is_new} for one, is_new in filed]
        lines = [_filed_line(ws, one, is_new) for one, is_new in filed]
    if table is None:
        say(as_json, told[0], lines[0])
    else:
        total = f"{counted(len(filed), 'request')}, {new:,} of them new; file the same again and nothing is filed twice"
        say(as_json, {"requests": told, "count": len(told), "new": new}, "\n".join([*lines, total]))


def _filed_line(ws: Workspace, filed: Filed, is_new: bool) -> str:
    said = "new" if is_new else f"filed before under this key, now {filed.state.value}"
    return f"{filed.id}  {due_text(ws, filed)}  {said}"


def identify(request_id: Id, workspace: Folder = None, as_json: Json = False) -> None:
    """Say that who asked has proved who they are.

    From now on the legal clock runs again.

    \b
    Examples:
      expunge identify 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64
      expunge identify 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --json
    """
    with opened(workspace) as ws:
        _say(ws, ws.ledger.requests.verify_identity(ws.ledger.requests.whole_id(request_id)), as_json)


def extend(
    request_id: Id,
    why: Annotated[str, typer.Option(help="The reason, which who asked is told.")],
    workspace: Folder = None,
    as_json: Json = False,
) -> None:
    """Extend the legal period, once and within the first period. You must tell who asked.

    \b
    Examples:
      expunge extend 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --why "40,000 requests after the incident of 3 November"
      expunge extend 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --why "records in eleven archives" --json
    """
    if not why.strip():
        raise Misuse("--why must say why: the law wants the reason told to who asked")
    with opened(workspace) as ws:
        _say(ws, ws.ledger.requests.extend(ws.ledger.requests.whole_id(request_id), why), as_json)


def cancel(request_id: Id, workspace: Folder = None, as_json: Json = False) -> None:
    """Take a request back, as long as its run has not begun.

    \b
    Examples:
      expunge cancel 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64
      expunge cancel 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --workspace shop
    """
    with opened(workspace) as ws:
        _say(ws, ws.ledger.requests.cancel(ws.ledger.requests.whole_id(request_id)), as_json)


def deny(
    request_id: Id,
    reason: Annotated[str, typer.Option(help="One of the reasons above.")],
    workspace: Folder = None,
    as_json: Json = False,
) -> None:
    """Deny a request for a reason of law or identity.

    That a screen flagged it is never such a reason: release it, with --exact if in doubt.

    \b
    Reasons:
      insuf_verification    who asked could not be identified
      suspected_fraud       who asked seems to be somebody else; only while unverified
      no_match              no record of who asked is held
      claim_not_covered     the law gives no right to this erasure: a duty to keep the data, say
      outside_jurisdiction  the law invoked does not apply to who asked
      too_many_requests     manifestly excessive repetition (GDPR, article 12(5)), yours to prove

    \b
    Examples:
      expunge deny 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --reason insuf_verification
      expunge deny 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --reason claim_not_covered --json
    """
    with opened(workspace) as ws:
        _say(ws, ws.ledger.requests.deny(ws.ledger.requests.whole_id(request_id), reason), as_json)


def release(
    what: Annotated[str, typer.Argument(metavar="ID", help="The request; with --fallback, the model's name will do.")],
    exact: Annotated[bool, typer.Option("--exact", help="Carry it out by exact retraining.")] = False,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Retire the model: serve its fallback, for all that is withheld.")
    ] = False,
    workspace: Folder = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Let a held, withheld or failed request go on.

    The next `expunge run` carries it out. With --fallback at once, by serving the other model in this one's place.

    \b
    Examples:
      expunge release 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64 --exact
      expunge release --fallback digits
    """
    with opened(workspace) as ws:
        if not fallback:
            _say(ws, ws.ledger.requests.release(ws.ledger.requests.whole_id(what), exact=exact), as_json)
            return 0
        if exact:
            raise Misuse("--exact retrains the model and --fallback retires it; choose one")
        name = _model_of(ws, what)
        folder = Source.of(ws, name).fallback
        if folder is None:
            raise Misuse(
                f'model "{name}" has no fallback; train one without the records in question, and write under '
                f'[models.{name}] in expunge.toml: fallback = "FOLDER"'
            )
        with progress(quiet or as_json) as show:
            done = journey_of(ws, name, allow_code, show).fall_back(load_model(Path(folder), allow_code), worker_name())
        served = ws.ledger.models.served(name)
        about = {"model": name, "version": served.version, "digest": served.digest, **done.to_json()}
        count = len(done.completed)
    text = (
        f"{name} is retired; its fallback is served as version {served.version}: {counted(count, 'request')} completed"
    )
    say(as_json, about, f"{text}\nnothing is claimed of it but that it never read the records that had to go")
    return 0 if done.good else 1


def _model_of(ws: Workspace, what: str) -> str:
    if any(model.name == what for model in ws.ledger.models.all()):
        return what
    try:
        return ws.ledger.requests.get(ws.ledger.requests.whole_id(what)).model
    except UnknownRecord:
        raise UnknownRecord(f'there is no model and no request "{what}"; list requests with: expunge status') from None


def _say(ws: Workspace, filed: Filed, as_json: bool) -> None:
    about: dict[str, Any] = clock_of(ws, filed)
    say(as_json, about, f"{filed.id}  {filed.state.value}  {due_text(ws, filed)}")
