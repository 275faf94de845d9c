"""What a study measured: a cell for each model, and a trial for each candidate of the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from expunge.audit import Row
from expunge.core.estimate import Estimate

Kind = Literal["original", "retrain", "floor", "method", "yardstick"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model, measured; or the reason why it was not.

    Attributes:
        sparsity: of the original.
        scenario: what was forgotten.
        seed: of the replica.
        method: name of the row; of a yardstick, the method that it belongs to.
        kind: ``yardstick`` is retraining that stopped after as much compute as the method took.
        row: accuracies, attack and seconds; None if there is no model.
        efficacy: the field's MIA-efficacy; None if not measured.
        why: why there is no row; empty if there is one.
        settings: the method's, as used.
        steps: optimiser steps of a retraining, else 0.
        gradients: gradients of single rows' losses.
        original_seconds: what training the original took, on the original's own cell.
        sparsity_found: share of the prunable weights that are zero in this model; None without a model.
    """

    sparsity: float
    scenario: str
    seed: int
    method: str
    kind: Kind
    row: Row | None = None
    efficacy: Estimate | None = None
    why: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    gradients: int = 0
    original_seconds: float | None = None
    sparsity_found: float | None = None

    @property
    def key(self) -> tuple[str | float | int, ...]:
        """What tells this cell from all others."""
        return ("cell", self.sparsity, self.scenario, self.seed, self.kind, self.method)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        data = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value.to_json() if isinstance(value, Row | Estimate) else value for name, value in data.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cell:
        """The cell that `to_json` wrote; other keys are left alone."""
        known = {one.name: data[one.name] for one in fields(cls)}
        return cls(**{**known, "row": _row(known["row"]), "efficacy": _estimate(known["efficacy"])})


def _row(data: Mapping[str, Any] | None) -> Row | None:
    if data is None:
        return None
    known: dict[str, Any] = {one.name: data[one.name] for one in fields(Row)}
    made: dict[str, Any] = {n: Estimate.from_json(one) if isinstance(one, dict) else one for n, one in known.items()}
    return Row(**made)


def _estimate(data: dict[str, Any] | None) -> Estimate | None:
    return None if data is None else Estimate.from_json(data)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate of the search.

    Attributes:
        sparsity: of the search's original.
        scenario: what was forgotten.
        method: whose settings are tried.
        number: 0 is the method as it was given.
        settings: those that differ from the given ones.
        value: of the criterion, smaller is better; None if there was no model.
        why: why there was none.
        figures: what the value is made of.
        seconds: what the method took.
    """

    sparsity: float
    scenario: str
    method: str
    number: int
    settings: Mapping[str, Any]
    value: float | None = None
    why: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str | float | int, ...]:
        """What tells this trial from all others."""
        return ("trial", self.sparsity, self.scenario, self.method, self.number)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """The trial that `to_json` wrote; other keys are left alone."""
        return cls(**{one.name: data[one.name] for one in fields(cls)})


def best(trials: list[Trial]) -> Trial | None:
    """The trial of the smallest value, of several the first; None if none gave a model."""
    valued = [(trial.value, trial.number, trial) for trial in trials if trial.value is not None]
    return min(valued, key=lambda one: one[:2])[2] if valued else None
