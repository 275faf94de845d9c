"""Comparisons of models: before, after, and what exact retraining would have given."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from expunge.audit.metrics import Row, Table, measure
from expunge.core.claim import Claim
from expunge.core.errors import BadRecords, Misuse
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import Report
from expunge.learn.training import train


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Rows of the models compared; gaps only if retraining is among them.

    Attributes:
        rows: ``before``, ``after`` and, if it was trained, ``retrain``.
        removed: how many records were removed in between.
        equals_retraining: whether the model after is retraining byte for byte; None if not measured.
    """

    rows: tuple[Row, ...]
    removed: int
    equals_retraining: bool | None

    @property
    def table(self) -> Table | None:
        """The rows with gaps to retraining; None if that was not measured."""
        return Table(rows=self.rows) if self.equals_retraining is not None else None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values; without gaps if retraining was not measured."""
        rows = self.table.to_json()["rows"] if self.table is not None else [row.to_json() for row in self.rows]
        return {"removed": self.removed, "equals_retraining": self.equals_retraining, "rows": rows}

    def __str__(self) -> str:
        lines = [f"{self.removed:,} records removed"]
        for row in self.rows:
            test = "not measured" if row.test is None else f"{row.test:.1%} %"
            lines.append(f"{row.method:<8} forget {row.forget:.1%} %  retain {row.retain:.1%} %  test {test}")
        return "\n".join(lines)


def compare(
    before: Trained,
    after: Trained,
    records: Records,
    test: Records | None = None,
    *,
    retrain: bool = False,
    report: Report | None = None,
) -> Comparison:
    """Compare two models of one lineage on what was removed between them.

    Args:
        before: the model before.
        after: the model after; its `gone` holds more than that of `before`.
        records: the whole data set as registered.
        test: rows that neither was trained on; without them, test accuracy and attack are not measured.
        retrain: train the exact reference too, with the recipe of `after` on what remains.
        report: hears of the progress of that training.

    Raises:
        BadRecords: if the records do not fit the model, or the test rows do not fit the records.
        Misuse: if nothing was removed in between, or the models are not of one lineage.
        UnknownRecord: if `records` lacks rows that were removed, or that the model after stands on.
    """
    removed = after.gone - before.gone
    if not removed or not before.gone <= after.gone:
        raise Misuse("no record was removed between these two models; is the order before, after?")
    if not before.ids - removed <= after.ids:
        raise Misuse("these two models are not of one lineage: the one after lacks records that were not removed")
    after.recipe.completed(records)  # refuses rows of another shape
    if test is not None and (test.shape, test.classes) != (records.shape, records.classes):
        raise BadRecords(f"test rows {test} do not fit the records {records}; shape and classes must agree")
    records.positions(sorted(after.ids))  # all must be here, or retraining would be on less than the model stands on
    forget = records.take(sorted(removed))
    retain = records.where(lambda record_id, _: record_id in after.ids)
    models = [("before", before, _standing(before), 0.0), ("after", after, _standing(after), 0.0)]
    equals = None
    if retrain:
        started = time.perf_counter()
        reference = train(after.recipe, retain, report=report)
        models.append(("retrain", reference, "reference", time.perf_counter() - started))
        equals = reference.digest() == after.digest()
    rows = tuple(
        measure(model, forget, retain, test, method=name, claim=claim, seconds=seconds)
        for name, model, claim, seconds in models
    )
    return Comparison(rows=rows, removed=len(removed), equals_retraining=equals)


def _standing(model: Trained) -> str:
    """What may be said of what was removed so far; of a model from which nothing was, nothing."""
    if not model.gone:
        return "nothing removed"
    return f"{model.standing.value}, {model.exactness}" if model.standing is Claim.EXACT else model.standing.value
