"""`expunge records` and `expunge methods`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import MISSING, fields
from typing import Annotated, Any

import typer

from expunge.cli.inputs import METHODS, read_records
from expunge.cli.options import Classes, Columns, Data, IdColumn, Json, LabelColumn, OwnerColumn
from expunge.core.errors import Misuse


def records(
    data: Data,
    by_owner: Annotated[bool, typer.Option("--owners", help="List owners and how much each holds.")] = False,
    limit: Annotated[int, typer.Option(help="Lines at most; 0 lists all.")] = 20,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    as_json: Json = False,
) -> None:
    """List the records of a data set, or its owners.

    \b
    Examples:
      expunge records --data mnist --owners
      expunge records --data customers.csv --id-column id --label-column churned --limit 0 --json
    """
    if limit < 0:
        raise Misuse(f"--limit must be >= 0, got {limit}")
    found = read_records(data, id_column, owner_column, label_column, classes, columns, None)[0]
    lines: list[dict[str, Any]]
    if by_owner:
        held = sorted(Counter(found.owners).items())
        lines = [{"owner": owner, "records": count} for owner, count in held]
    else:
        rows = zip(found.ids, found.owners, found.y.tolist(), strict=True)
        lines = [{"id": name, "owner": owner, "label": label} for name, owner, label in rows]
    shown = lines[:limit] if limit else lines
    if as_json:
        print(json.dumps({"data": data, "count": len(lines), "shown": shown}))
        return
    kind = "float targets" if found.classes is None else f"{found.classes} classes"
    print(f"{data}: {len(found):,} records of {len(set(found.owners)):,} owners, rows of shape {found.shape}, {kind}\n")
    widths = {name: max(len(str(line[name])) for line in [*shown, {name: name}]) for name in lines[0]}
    for line in [{name: name for name in widths}, *shown]:
        print("  ".join(f"{line[name]:<{width}}" for name, width in widths.items()).rstrip())
    if len(shown) < len(lines):
        print(f"... {len(lines) - len(shown):,} more; --limit 0 lists all")


def methods(as_json: Json = False) -> None:
    """List the unlearning methods.

    What each may claim at most, which rows it needs, its settings, and what it does not guarantee.

    \b
    Examples:
      expunge methods
      expunge methods --json
    """
    found: list[dict[str, Any]] = []
    for word, kind in METHODS.items():
        settings = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
        found.append(
            {
                "method": word,
                "claim": kind.claim.value,
                "needs": sorted(need.value for need in kind.needs),
                "settings": settings,
                "source": kind.source,
                "not_guaranteed": kind.not_guaranteed,
            }
        )
    if as_json:
        print(json.dumps({"methods": found}))
        return
    for about in found:
        chosen = ", ".join(f"{name}={value}" for name, value in about["settings"].items())
        print(f"{about['method']:<16} claims at most: {about['claim']:<6} needs: {', '.join(about['needs'])}")
        print(f"{'':<16} settings: {chosen or 'none'}")
        print(f"{'':<16} not guaranteed: {about['not_guaranteed']}\n")
