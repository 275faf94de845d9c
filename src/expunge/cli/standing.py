"""`expunge status` and `expunge export`: what was asked, where it stands, when it is due."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from expunge.cli.options import Folder, Json
from expunge.cli.output import console, outline, say
from expunge.cli.places import counted, day, opened, plain, present, refuse_file, refuse_inside
from expunge.core.errors import Misuse, UnknownRecord
from expunge.core.store import write_atomically
from expunge.ledger.database import moment
from expunge.ledger.log import Entry
from expunge.ledger.requests import Filed
from expunge.ledger.states import State
from expunge.workflow import Workspace

_SOON = 7  # days left from which on a request is marked
_S = State
_NEXT = {
    _S.RECEIVED: "it is screened and carried out: expunge run",
    _S.IDENTITY_UNVERIFIED: "once who asked has proved who they are: expunge identify {id}",
    _S.SCREENING: "its screening was interrupted: expunge run",
    _S.HELD: "look at it, then: expunge release {id} (--exact if in doubt)",
    _S.PENDING: "it is carried out when its batch is due, or now: expunge run {model} --now",
    _S.RUNNING: "a run carries it out; if that was interrupted: expunge run {model}",
    _S.VERIFYING: "a run carries it out; if that was interrupted: expunge run {model}",
    _S.WITHHELD: "expunge release {id} --exact, or retire the model: expunge release --fallback {model}",
    _S.FAILED: "mend what it says, then: expunge release {id} (--exact if in doubt)",
    _S.COMPLETED: "hand over the certificate: expunge certificate {id} --out FOLDER (with --keys until {keys_until})",
}


def clock_of(ws: Workspace, filed: Filed) -> dict[str, Any]:
    """A request as JSON, with what the legal clock says of it now."""
    paused = filed.state is State.IDENTITY_UNVERIFIED and ws.config.clock.regime.pauses
    left = None if filed.state.final or paused else ws.config.clock.days_left(moment(filed.due_at), present(ws))
    late = filed.state.final and filed.updated_at > filed.due_at
    flags = {"paused": paused, "overdue": left is not None and left < 0, "late": late}
    return {**filed.to_json(), "days_left": left, **flags}


def due_text(ws: Workspace, filed: Filed) -> str:
    """When it is due, for people."""
    about = clock_of(ws, filed)
    if filed.state.final:
        return f"was due {day(ws, filed.due_at)}" + (", and was LATE" if about["late"] else "")
    return f"due {day(ws, filed.due_at)} ({_left(about)})"


def _left(about: dict[str, Any]) -> str:
    left = about["days_left"]
    if left is None:
        return "clock stands still" if about["paused"] else "LATE" if about["late"] else "-"
    if left < 0:
        return f"OVERDUE by {counted(-left, 'day')}"
    return f"{counted(left, 'day')} left"


def status(
    request_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One request, with all its events.")] = None,
    state: Annotated[list[State] | None, typer.Option(help="Only requests in this state; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="Only requests about this model.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 if any is overdue.")] = False,
    workspace: Folder = None,
    as_json: Json = False,
) -> int:
    """Show where requests stand and when they are due.

    \b
    Examples:
      expunge status --state held --state withheld
      expunge status 17bf6cd9-3af0-4e39-8285-6aa52cbc3d64
    """
    with opened(workspace) as ws:
        if request_id is not None:
            if state or model is not None:
                raise Misuse("--state and --model choose from the list; leave them out beside an ID")
            found = [ws.ledger.requests.get(ws.ledger.requests.whole_id(request_id))]
        else:
            if model is not None:
                ws.ledger.models.served(model)
            found = ws.ledger.requests.find(model=model, state=state or None)
        told = [clock_of(ws, filed) for filed in found]
        overdue = sum(about["overdue"] for about in told)
        if request_id is not None:
            _one(ws, found[0], told[0], as_json)
        elif as_json:
            print(json.dumps({"requests": told, "count": len(told), "overdue": overdue}))
        elif not found:
            print("no request" + (" like that" if state or model else " was filed yet; file one: expunge request"))
        else:
            _list(ws, found, told)
            print(f"\n{counted(len(found), 'request')}" + (f", {overdue:,} OVERDUE" if overdue else ", none overdue"))
    return 1 if check and overdue else 0


def _list(ws: Workspace, found: list[Filed], told: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("request", "model", "state", "received", "due", "left", "why"):
        table.add_column(name, no_wrap=name != "why")
    for filed, about in zip(found, told, strict=True):
        left = about["days_left"]
        style = "" if left is None or left > _SOON else "bold red" if left < 0 else "yellow"
        cells = (filed.id, filed.model, filed.state.value, day(ws, filed.received_at), day(ws, filed.due_at))
        table.add_row(*map(Text, cells), Text(_left(about), style=style), Text(plain(filed.why or "")))
    console().print(table)


def _one(ws: Workspace, filed: Filed, about: dict[str, Any], as_json: bool) -> None:
    events = [entry.to_json() for entry in ws.ledger.log.entries(filed.id)]
    after, screened = next_of(ws, filed), _screened(ws.ledger.log.entries(filed.id))
    if as_json:
        print(json.dumps({**about, "screened": screened, "events": events, "next": after}))
        return
    print(f"request {filed.id} about {filed.model}: {filed.state.value}, {due_text(ws, filed)}")
    if filed.why:
        print(f"why     {plain(filed.why)}")
    if screened is not None:
        print(f"screen  {plain(screened)}")
    print(f"asked   {plain(_asked(ws, filed))}\n")
    console().print(outline(_event(ws, entry) for entry in ws.ledger.log.entries(filed.id)))
    print(f"\nnext    {after}")


def _screened(entries: Iterable[Entry]) -> str | None:
    """What its screening found and what came of it, in words; None if it was not screened."""
    found, then = None, ""
    for entry in entries:
        if entry.kind in ("screened", "held"):
            said = dict(one.split(": ", 1) for one in entry.body["stages"]).get("screen")
            found, then = said or found, ""
            if said is not None and said.startswith(("held", "failed")):
                then = "held for a person" if entry.kind == "held" else "sent to exact retraining"
        elif entry.kind == "released" and then:
            then = "released by a person" + (", to exact retraining" if entry.body["exact"] else "")
    if found is None or found == "not done":
        return None
    word, _, told = found.partition(": ")
    what = told or {"held": "flagged", "failed": "the screen itself failed"}.get(word, word)
    return f"{what}: {then}" if then else what


def _event(ws: Workspace, entry: Entry) -> tuple[str, str, str]:
    """One line of a timeline: what the log says of an event, less what only programs read."""
    at = moment(entry.at).astimezone(ws.config.clock.zone).strftime("%Y-%m-%d %H:%M:%S %Z")
    said = {name: value for name, value in entry.body.items() if name not in ("body_mac", "key_mac", "model", "state")}
    words = (f"{name} {', '.join(value) if isinstance(value, list) else value}" for name, value in said.items())
    return at, entry.kind, plain("; ".join(words))


def _asked(ws: Workspace, filed: Filed) -> str:
    try:
        request = ws.asked(filed.id)
    except UnknownRecord:
        return "erased, for it is done"
    if request.owner is not None:
        return f'{request.kind} what owner "{request.owner}" holds'
    if request.label is not None:
        return f"{request.kind} class {request.label}"
    more = f" and {len(request.ids) - 5:,} more" if len(request.ids) > 5 else ""
    return f"{request.kind} {', '.join(request.ids[:5])}{more}"


def next_of(ws: Workspace, filed: Filed) -> str:
    """What comes next for a request, with the command for it."""
    if filed.state not in _NEXT:
        return "nothing: it is final"
    until = moment(filed.updated_at) + timedelta(days=ws.config.policy.keys_days)
    return _NEXT[filed.state].format(id=filed.id, model=filed.model, keys_until=until.date().isoformat())


_HEADER = (
    *("Status", "Request Type", "Time Received", "Deadline", "Days Left", "Model", "Request ID", "Denial Reason"),
    *("Last Updated", "Completed On"),
)


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT.csv", help="New file, outside the workspace.")],
    workspace: Folder = None,
    as_json: Json = False,
) -> None:
    """Write the list of requests as a CSV file. It names nobody.

    \b
    Examples:
      expunge export ../requests.csv
      expunge export /reports/requests.csv --workspace shop --json
    """
    with opened(workspace) as ws:
        refuse_inside(ws.root, out, "exported copies belong elsewhere")
        refuse_file(out)
        found = ws.ledger.requests.find()
        rows = [_row(filed, clock_of(ws, filed)) for filed in found]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([_HEADER, *([safe_cell(value) for value in row] for row in rows)])
    write_atomically(out, text.getvalue().encode("utf-8"))
    say(as_json, {"path": str(out), "requests": len(rows)}, f"{counted(len(rows), 'request')} written to {out}")


def _row(filed: Filed, about: dict[str, Any]) -> list[str | int]:
    denied = filed.why or "" if filed.state is State.DENIED else ""
    done = filed.updated_at if filed.state is State.COMPLETED else ""
    left = "late" if about["late"] else "" if about["days_left"] is None else about["days_left"]
    when = (filed.received_at, filed.due_at, left, filed.model, filed.id, denied, filed.updated_at, done)
    return [filed.state.value, filed.kind, *when]


def safe_cell(value: str | int) -> str | int:
    """A cell that no spreadsheet takes for a formula: text that begins like one gets a quote before it."""
    if isinstance(value, str) and value.lstrip(" ").startswith(_FORMULA):
        return f"'{value}"
    return value


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four full-width
