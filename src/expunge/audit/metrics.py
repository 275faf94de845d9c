"""The field's table: how a model after unlearning compares with exact retraining, and with doing nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from scipy import special, stats
from torch import Tensor

from expunge.core.errors import Misuse, Unsupported
from expunge.core.estimate import Estimate, mean, proportion
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.loop import row_losses
from expunge.learn.predict import outputs

COLUMNS = ("forget", "retain", "test", "attack")

Ask = Callable[[Trained, Records], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: one model.

    Attributes:
        method: what made it.
        claim: what its maker claims, e.g. ``exact (pathwise)``.
        forget: accuracy on the removed rows.
        retain: accuracy on the rows that stay.
        test: accuracy on test rows, of the classes that still stand in the retained rows; None if not measured.
        attack: AUC of the threshold membership attack; None if there are no test rows to compare with.
        seconds: what it took.
    """

    method: str
    claim: str
    forget: Estimate
    retain: Estimate
    test: Estimate | None
    attack: Estimate | None
    seconds: float

    @property
    def unlearning_accuracy(self) -> Estimate:
        """UA = 1 - accuracy on the removed rows (Jia et al., 2023)."""
        f = self.forget
        return replace(f, value=1 - f.value, low=1 - f.high, high=1 - f.low)

    def gaps(self, reference: Row) -> dict[str, float]:
        """Absolute difference to the reference in each column that both have."""
        pairs = {name: (getattr(self, name), getattr(reference, name)) for name in COLUMNS}
        return {name: abs(a.value - b.value) for name, (a, b) in pairs.items() if a is not None and b is not None}

    def mean_gap(self, reference: Row) -> float:
        """Average of `gaps`. Hides trade-offs between columns: look at them too."""
        gaps = self.gaps(reference)
        return math.fsum(gaps.values()) / len(gaps)

    def tug_of_war(self, reference: Row) -> float | None:
        """Product over forget, retain and test of one minus the gap (Zhao et al., 2024); 1 only at the reference.

        None if test accuracy was not measured.
        """
        gaps = self.gaps(reference)
        return math.prod(1 - gaps[name] for name in ("forget", "retain", "test")) if "test" in gaps else None

    def to_json(self) -> dict[str, Any]:
        """All fields and the unlearning accuracy as plain JSON values."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["unlearning_accuracy"] = self.unlearning_accuracy
        return {name: value.to_json() if isinstance(value, Estimate) else value for name, value in data.items()}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of one removal, with the one that all are compared with."""

    rows: tuple[Row, ...]
    reference: str = "retrain"

    def __post_init__(self) -> None:
        self[self.reference]

    def __getitem__(self, method: str) -> Row:
        for row in self.rows:
            if row.method == method:
                return row
        names = ", ".join(row.method for row in self.rows)
        raise Misuse(f'the table has no row "{method}"; it has {names}')

    def to_json(self) -> dict[str, Any]:
        """Rows with their gaps to the reference."""
        reference = self[self.reference]
        rows = [
            {
                **row.to_json(),
                "gaps": row.gaps(reference),
                "mean_gap": row.mean_gap(reference),
                "tug_of_war": row.tug_of_war(reference),
                "seconds_over_reference": row.seconds / reference.seconds if reference.seconds else None,
            }
            for row in self.rows
        ]
        return {"reference": self.reference, "rows": rows}


def ask(trained: Trained, records: Records) -> Float[Tensor, "n outputs"]:
    """What the model says of these rows; `answers.Answers` is the same and remembers."""
    return outputs(trained.module, records)


def measure(
    trained: Trained,
    forget: Records,
    retain: Records,
    test: Records | None,
    *,
    method: str,
    claim: str = "",
    seconds: float = 0.0,
    level: float = 0.95,
    ask: Ask = ask,
) -> Row:
    """One line of the table.

    Test rows of classes that no retained row has are left out of the test accuracy, as usual when a class is
    forgotten. The intervals cover the choice of rows, not the choice of seed: use several seeds and `summarise`.

    Args:
        trained: the model.
        forget: the removed rows; at least one.
        retain: the rows that stayed.
        test: rows that no model was trained on; None: test accuracy and attack are not measured.
        method: name of the line.
        claim: what is claimed of it.
        seconds: what it took.
        level: of the intervals.
        ask: gives the model's outputs on some rows.

    Raises:
        Unsupported: for regression, which has no accuracy.

    Cost: one forward pass of all rows.
    """
    if trained.recipe.loss != "cross_entropy":
        raise Unsupported("this table is of accuracies, and the model has float targets; compare losses instead")
    gone, stay = ask(trained, forget), ask(trained, retain)
    tested = attack = None
    if test is not None:
        told, seen = ask(trained, test), torch.isin(test.y, retain.y.unique())
        tested = _accuracy(told[seen], test.y[seen], level)
        attack = _attack(trained, (gone, forget.y), (told, test.y), level)
    return Row(
        method=method,
        claim=claim,
        forget=_accuracy(gone, forget.y, level),
        retain=_accuracy(stay, retain.y, level),
        test=tested,
        attack=attack,
        seconds=seconds,
    )


def accuracy(trained: Trained, records: Records, level: float = 0.95, *, ask: Ask = ask) -> Estimate:
    """Share of rows whose best class is their label, with the exact binomial interval; Misuse without rows."""
    return _accuracy(ask(trained, records), records.y, level)


def _accuracy(told: Tensor, y: Tensor, level: float) -> Estimate:
    if not len(y):
        raise Misuse("accuracy needs rows, got none; is every class of the test set forgotten?")
    return proportion(int((told.argmax(1) == y).sum()), len(y), level)


def threshold_attack(trained: Trained, members: Records, strangers: Records, level: float = 0.95) -> Estimate | None:
    """AUC of telling removed rows from rows never trained on by their loss alone (Yeom et al., 2018).

    Strangers are taken of the members' classes only. 0.5: not told apart by this attack; above: the removed rows
    have lower loss, as if still known; well below 0.5: they stand out by higher loss, which betrays them as well.
    0.5 is chance only if both sides are alike in class mix and difficulty: read it beside retraining's own. Rows of
    one owner are taken as independent; where they are not, the interval is too narrow.
    A weak attack: what it cannot tell, a per-example attack may.

    Returns:
        The AUC (ties count half) with DeLong's interval, over rows of this one model; None without strangers.
    """
    ours, theirs = ask(trained, members), ask(trained, strangers)
    return _attack(trained, (ours, members.y), (theirs, strangers.y), level)


def _attack(
    trained: Trained, members: tuple[Tensor, Tensor], strangers: tuple[Tensor, Tensor], level: float
) -> Estimate | None:
    """The threshold attack from outputs and labels of both sides."""
    alike = torch.isin(strangers[1], members[1].unique())
    if not len(members[1]) or not bool(alike.any()):
        return None
    loss = row_losses(trained.recipe)
    ours, theirs = loss(*members), loss(strangers[0][alike], strangers[1][alike])
    return auc(-ours.double(), -theirs.double(), level)


def auc(positives: Float[Tensor, " p"], negatives: Float[Tensor, " q"], level: float = 0.95) -> Estimate:
    """Area under the ROC curve: P(positive > negative) + P(equal) / 2, with the interval of DeLong et al. (1988).

    The interval is normal on the AUC's scale, cut to [0, 1]; with fewer than two rows on a side it is [0, 1].
    Cost: O((p + q) log(p + q)), by midranks (Sun and Xu, 2014).
    """
    p, q = len(positives), len(negatives)
    if not p or not q:
        raise Misuse(f"an AUC needs rows on both sides, got {p} and {q}")
    ranks = torch.from_numpy(stats.rankdata(torch.cat([positives, negatives]).cpu().numpy()))
    above = (ranks[:p] - torch.from_numpy(stats.rankdata(positives.cpu().numpy()))) / q
    below = 1 - (ranks[p:] - torch.from_numpy(stats.rankdata(negatives.cpu().numpy()))) / p
    value = float(above.mean())
    how = f"DeLong over rows ({p} against {q})"
    if p < 2 or q < 2:
        return Estimate(value, 0.0, 1.0, p + q, level, how)
    if not float(above.var()) and not float(below.var()):  # all alike or all apart: DeLong would claim certainty
        rough = proportion(round(value * min(p, q)), min(p, q), level)
        low, high = min(rough.low, value), max(rough.high, value)
        return Estimate(value, low, high, p + q, level, f"binomial over the smaller side ({p} against {q})")
    half = float(special.ndtri((1 + level) / 2)) * math.sqrt(float(above.var() / p + below.var() / q))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half), p + q, level, how)


def summarise(tables: Sequence[Table], level: float = 0.95) -> list[dict[str, Any]]:
    """One line a method over several seeds: means with Student's t interval of every column, gap and time.

    Each table is one seed, and its gaps are to its own reference, so that seeds are paired.

    Raises:
        Misuse: if the tables do not hold the same methods.
    """
    names = [tuple(row.method for row in table.rows) for table in tables]
    if not names or len(set(names)) != 1:
        raise Misuse("summaries need at least one table, and the same methods in each")
    return [_line(name, tables, level) for name in names[0]]


def _line(name: str, tables: Sequence[Table], level: float) -> dict[str, Any]:
    pairs = [(table[name], table[table.reference]) for table in tables]
    values: Mapping[str, list[float]] = {
        **{
            column: [getattr(row, column).value for row, _ in pairs]
            for column in COLUMNS
            if all(getattr(row, column) is not None for row, _ in pairs)
        },
        "mean_gap": [row.mean_gap(reference) for row, reference in pairs],
        "tug_of_war": [value for row, reference in pairs if (value := row.tug_of_war(reference)) is not None],
        "seconds": [row.seconds for row, _ in pairs],
    }
    figures = {column: mean(numbers, level) for column, numbers in values.items() if numbers}
    return {"method": name, "claim": pairs[0][0].claim, "seeds": len(tables), **figures}
