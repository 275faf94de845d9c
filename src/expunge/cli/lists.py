"""`expunge records` and `expunge methods`."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from expunge.cli.inputs import METHODS, default_of, read_records
from expunge.cli.options import Classes, Columns, Data, IdColumn, Json, LabelColumn, OwnerColumn
from expunge.core.errors import Misuse
from expunge.unlearn import Method
from expunge.unlearn.sparsity import CRITERIA


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


def methods(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/methods.md.")] = False,
    as_json: Json = False,
) -> None:
    """List the unlearning methods.

    What each may claim at most, which rows it needs, its settings and cost, and what it does not guarantee.

    \b
    Examples:
      expunge methods
      expunge methods --json
    """
    found = [_about(word, kind) for word, kind in METHODS.items()]
    if as_json:
        print(json.dumps({"methods": found}))
    elif as_markdown:
        print(_page(found))
    else:
        for about in found:
            print(f"{about['method']:<26} claims at most: {about['claim']:<9} needs: {', '.join(about['needs'])}")
            print(f"{'':<26} settings: {_settings(about)}")
            print(f"{'':<26} not guaranteed: {about['not_guaranteed']}\n")


def _about(word: str, kind: type[Method]) -> dict[str, Any]:
    told = inspect.cleandoc(kind.__doc__ or "")
    cost = re.search(r"^Cost: (.*?)(?=\n\n|\n[A-Z][a-z]+:\n|\Z)", told, re.DOTALL | re.MULTILINE)
    return {
        "method": word,
        "class": kind.__name__,
        "what": told.partition("\n")[0],
        "claim": kind.claim.value,
        "needs": sorted(need.value for need in kind.needs),
        "settings": {f.name: _plain(default_of(f)) for f in fields(kind)},
        "choices": {name: words for name, words in _choices(kind).items() if words},
        "cost": " ".join(cost[1].split()) if cost else None,
        "source": kind.source,
        "learns_new": kind().learns_new,
        "not_guaranteed": kind.not_guaranteed,
    }


def _choices(kind: type[Method]) -> dict[str, list[str]]:
    """The words that a setting may be, where there are few."""
    hints, defaults = get_type_hints(kind), {f.name: default_of(f) for f in fields(kind)}
    known = {name: list(map(str, get_args(hints[name]))) for name in defaults if get_origin(hints[name]) is Literal}
    by = {name: list(CRITERIA) for name, one in defaults.items() if isinstance(one, tuple(CRITERIA.values()))}
    return {**known, **by}


def _plain(value: Any) -> Any:
    """A setting's default as one says it on the command line."""
    named = {kind: word for word, kind in CRITERIA.items()}
    return value.name if isinstance(value, Method) else named.get(type(value), value)


def _settings(about: dict[str, Any]) -> str:
    """The settings with their defaults, and what else they may be."""
    told = []
    for name, value in about["settings"].items():
        others = [word for word in about["choices"].get(name, []) if word != str(value)]
        told.append(f"{name}={value}" + (f" (or {', '.join(others)})" if others else ""))
        if name == "then":
            told.append("then.NAME=... (a setting of that method)")
    return ", ".join(told) or "none"


def _page(found: list[dict[str, Any]]) -> str:
    """What is known of each method, as Markdown."""
    lines = [
        "# The unlearning methods",
        "",
        "Written by `expunge methods --markdown` from the classes themselves. Claims are the most that a method may",
        "say; what a result does say stands in its `claim`. A method that claims none proves nothing, however well it",
        "does: `expunge compare` shows how near it comes to exact retraining on your data.",
        "",
        "| method | claims at most | needs | source |",
        "|---|---|---|---|",
    ]
    for about in found:
        needs = " and ".join(about["needs"])
        lines.append(f"| [{about['method']}](#{about['method']}) | {about['claim']} | {needs} | {about['source']} |")
    for about in found:
        lines += [
            "",
            f"## {about['method']}",
            "",
            f"`{about['class']}`. {about['what']}",
            "",
            f"- Settings: {_settings(about)}",
            f"- Cost: {about['cost']}",
            f"- Requests to replace rows: {'the new rows are learnt' if about['learns_new'] else 'refused'}",
            f"- Not guaranteed: {about['not_guaranteed']}",
        ]
    return "\n".join(lines)
