"""What a certificate says: the in-toto statement of one request, from what its run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from expunge._version import __version__
from expunge.core.claim import Claim, Constant, Guarantee
from expunge.ledger import check
from expunge.ledger.requests import Filed
from expunge.ledger.tree import set_of_leaves

OUTSIDE = (
    "copies of the data outside the workspace: source files, backups, exports",
    "copies of the model outside the workspace, unless named as retired",
    "other models trained on the same records, here or elsewhere: each needs a request of its own",
    "the write-ahead log and backups of a PostgreSQL server, if the ledger is kept in one",
    "blocks that the disk has freed and not yet overwritten",
)
"""What no run of a workspace can reach."""


def statement(
    filed: Filed,
    detail: Mapping[str, Any],
    stages: Sequence[Mapping[str, str]],
    removed: Sequence[bytes],
    already: int,
    completed_at: str,
    run: str,
) -> bytes:
    """The payload of a request's certificate.

    Args:
        filed: the request.
        detail: what its run recorded.
        stages: outcome of each stage of the journey.
        removed: commitments of the records that were removed for it.
        already: how many of its records were gone before.
        completed_at: time stamp.
        run: the run's id.
    """
    predicate = {
        "request": {"id": filed.id, "receivedAt": filed.received_at, "dueAt": filed.due_at},
        "run": {"id": run, "requests": len(detail["removed"])},
        "modelBefore": {"digest": {"sha256": detail["before"]["digest"]}, "version": detail["before"]["version"]},
        "modelAfter": {"version": detail["after"]["version"]},
        "removed": {
            "count": len(removed),
            "commitmentRoot": set_of_leaves(removed).hex(),
            "alreadyGone": already,
        },
        "dataset": {
            "anchor": detail["anchor"],
            "before": detail["set_before"],
            "after": detail["set_after"],
            "rowsRead": detail["rows_read"],
        },
        "method": detail["method"],
        "claim": detail["claim"],
        "stages": [dict(stage) for stage in stages],
        "retired": detail["retired"],
        "sweep": detail["sweep"],
        "secretState": [],
        "outside": list(OUTSIDE),
        "completedAt": completed_at,
        "software": {"name": "expunge", "version": __version__},
    }
    subject = [{"name": filed.model, "digest": {"sha256": detail["after"]["digest"]}}]
    return check.canonical(
        {
            "_type": check.STATEMENT_TYPE,
            "subject": subject,
            "predicateType": check.PREDICATE_TYPE,
            "predicate": predicate,
        }
    )


def claim_of(claim: Claim, exactness: str | None, guarantee: Guarantee | None, caveat: str) -> dict[str, Any]:
    """The claim as a certificate states it; of a guarantee only what was fixed before the run, numbers as text."""
    said: dict[str, Any] = {"level": claim.value, "exactness": exactness, "caveat": caveat, "guarantee": None}
    if guarantee is not None and claim is Claim.CERTIFIED:
        said["guarantee"] = _texts(guarantee.to_json())
    return said


def _texts(value: Any) -> Any:
    """The same value with every float as the shortest text that reads back as it: certificates hold no floats."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(name): _texts(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_texts(inner) for inner in value]
    if isinstance(value, Constant):
        return {"value": repr(value.value), "source": value.source}
    return value


def method_of(method: object) -> dict[str, Any]:
    """A method's name and settings, numbers as text; of a certified one the name alone: its guarantee says the rest."""
    certified = getattr(method, "claim", None) is Claim.CERTIFIED
    settings = fields(method) if is_dataclass(method) and not certified else ()
    said = {one.name: getattr(method, one.name) for one in settings}
    return {
        "name": getattr(method, "name", type(method).__name__),
        "settings": {name: _texts(value) for name, value in said.items() if isinstance(value, (int, float, str))},
    }
