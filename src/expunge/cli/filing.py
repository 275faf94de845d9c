"""From the words of the command line, or the lines of a CSV file, to requests that are filed once each."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, datetime, time, tzinfo
from pathlib import Path

from expunge.core.digest import sha256_hex
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.request import Request
from expunge.ledger.requests import Filed
from expunge.workflow import Workspace
from expunge.workflow.workspace import submission


def received(text: str | None, zone: tzinfo) -> datetime | None:
    """When a request came in: a date of the legal clock's zone, or an instant with an offset."""
    if text is None:
        return None
    try:
        if len(text) == 10:
            return datetime.combine(date.fromisoformat(text), time(), zone)
        when = datetime.fromisoformat(text)
    except ValueError:
        when = None
    if when is None or when.tzinfo is None:
        raise Misuse(
            f'--received-at must be a date or an instant, as 2026-11-01 or 2026-11-01T09:30+01:00, got "{text}"'
        )
    return when


def requests_in(path: Path, owner_column: str | None, id_column: str | None) -> Mapping[str, Request]:
    """The requests that a CSV file lists, by what each is told apart by within the file.

    With an owner column one request an owner: for all that the owner holds, or, with an id column too, for the
    records listed. With an id column alone one request a record. Without either, the column ``owner``, else ``id``.

    Raises:
        UnreadableFile: if the file is no such table, or a cell is empty; the message names the line.
        Misuse: if it has no such column.
    """
    lines = _lines(path)
    header = lines[0][1]
    if owner_column is None and id_column is None:
        owner_column, id_column = ("owner", None) if "owner" in header else (None, "id")
    places = {}
    for option, name in (("--owner-column", owner_column), ("--id-column", id_column)):
        if name is not None:
            if name not in header:
                raise Misuse(f'{path} has no column "{name}"; it has {", ".join(header)}; name one with {option}')
            places[option] = header.index(name)
    named: dict[str, dict[str, None]] = {}
    for number, line in lines[1:]:
        cells = {option: line[at].strip() if at < len(line) else "" for option, at in places.items()}
        empty = next((option for option, cell in cells.items() if not cell), None)
        if empty is not None:
            raise UnreadableFile(
                f"line {number} of {path} has nothing in the column of {empty}; fill it or drop the line"
            )
        record = cells.get("--id-column")
        named.setdefault(cells.get("--owner-column", record or ""), {})[record or ""] = None
    if owner_column is None:
        return {record: Request.remove([record]) for record in named}
    if id_column is None:
        return {owner: Request.remove_owner(owner) for owner in named}
    return {owner: Request.remove(list(ids)) for owner, ids in named.items()}


def _lines(path: Path) -> list[tuple[int, list[str]]]:
    """The lines that are not empty, each with its number; the header first, and at least one more."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableFile(f"{path} cannot be read as CSV ({error}); give a table in UTF-8 with a header") from None
    if len(lines) < 2:
        raise UnreadableFile(f"{path} lists no request; give a header and one line for each")
    return [(number, [cell.strip() for cell in line]) for number, line in lines]


def file_all(
    workspace: Workspace,
    model: str,
    requests: Mapping[str, Request],
    *,
    key: str | None,
    received_at: datetime | None,
    identified: bool,
) -> list[tuple[Filed, bool]]:
    """File requests in one transaction; returns each, and whether it is new.

    Args:
        workspace: where.
        model: what they are about.
        requests: by what tells them apart among themselves.
        key: begins the idempotency key of each; None for keys that are never the same again.
        received_at: when they came in; None for now.
        identified: False if who asks must still prove who they are.

    Raises:
        OtherBody: if a key was used before for something else, another model included; nothing is filed.
    """
    workspace.ledger.models.served(model)
    lone = len(requests) == 1 and next(iter(requests)) == ""
    return workspace.ledger.requests.submit_many(
        [
            submission(
                model,
                replace(request, received_at=received_at),
                key="" if key is None else key if lone else f"{key}/{name}",
                identified=identified,
            )
            for name, request in requests.items()
        ]
    )


def key_of_file(path: Path) -> str:
    """A key for the requests of a file: the same file filed again files nothing anew."""
    return sha256_hex(path.read_bytes())
