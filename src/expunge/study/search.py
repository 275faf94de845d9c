"""Hyper-parameters found with a budget that is equal for every method, from ranges that stand in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from expunge.core.coins import seed_of
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.predict import outputs
from expunge.unlearn.method import Method

_RETAINED = 2000


@dataclass(frozen=True)
class Log:
    """A number drawn uniformly on the scale of its logarithm, rounded to three digits."""

    low: float
    high: float

    def at(self, coin: float) -> float:
        """The value at a coin between 0 and 1."""
        return float(f"{self.low * (self.high / self.low) ** coin:.3g}")


@dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    values: tuple[Any, ...]

    def at(self, coin: float) -> Any:
        """The value at a coin between 0 and 1."""
        return self.values[min(int(coin * len(self.values)), len(self.values) - 1)]


Space = Mapping[str, Log | Choice]

_EPOCHS = Choice((1, 2, 3, 5))

# Ranges by class and field. A class that is not here is searched by `lr` and `epochs`, where it has such fields.
# The default of each class lies within its range.
SPACES: Mapping[str, Space] = MappingProxyType(
    {
        "AmnesiacUnlearning": {"lr": Log(1e-3, 0.2), "repair_epochs": Choice((1, 2, 5, 10))},
        "BadTeacher": {"lr": Log(1e-4, 0.1), "epochs": _EPOCHS, "weight": Log(5e-3, 0.5)},
        "BoundaryShrink": {"lr": Log(1e-5, 0.03), "epochs": _EPOCHS},
        "FineTune": {"lr": Log(1e-3, 0.2), "epochs": _EPOCHS},
        "FisherForgetting": {"alpha": Log(1e-4, 10)},
        "GradientAscent": {"lr": Log(1e-5, 0.1), "epochs": _EPOCHS},
        "InfluenceUnlearning": {"damping": Log(0.01, 1e3), "step": Log(0.3, 30)},
        "L1Sparse": {"lr": Log(1e-3, 0.1), "epochs": Choice((2, 5, 10)), "gamma": Log(1e-5, 0.05)},
        "NegGradPlus": {"lr": Log(1e-4, 0.1), "epochs": _EPOCHS, "weight": Choice((0.9, 0.95, 0.98, 0.99, 0.995))},
        "RandomLabels": {"lr": Log(1e-4, 0.2), "epochs": _EPOCHS, "weight": Log(5e-3, 0.5)},
        "SalUn": {
            **{"lr": Log(1e-4, 0.2), "epochs": _EPOCHS, "weight": Log(5e-3, 0.5)},
            "share": Choice((0.1, 0.3, 0.5, 0.7, 0.9)),
        },
        "Scrub": {"lr": Log(1e-4, 0.1), "max_epochs": Choice((1, 2)), "alpha": Choice((0.1, 0.5, 1.0))},
        "SelectiveSynapticDampening": {"alpha": Log(0.5, 8), "dampening": Log(0.1, 2)},
        "UnrollingSGD": {"scale": Log(1e-3, 1)},
        "SaliencyMasked": {"share": Choice((0.1, 0.3, 0.5, 0.7, 0.9))},
        "Masked": {},
        "Pruned": {},
        "Retrain": {},
        "RetrainBriefly": {},
        "RetrainSameMask": {},
        "Sisa": {},
    }
)


def space_of(method: Method) -> Space:
    """What is searched for this method, and as ``then.lr`` for the one that it leads to; empty if nothing is."""
    then = getattr(method, "then", None)
    inner = {f"then.{name}": span for name, span in space_of(then).items()} if isinstance(then, Method) else {}
    known = SPACES.get(type(method).__name__)
    return {**(_guessed(method) if known is None else known), **inner}


def _guessed(method: Method) -> Space:
    has = {field.name: getattr(method, field.name) for field in fields(method)}
    space: dict[str, Log | Choice] = {}
    if isinstance(has.get("lr"), float) and has["lr"] > 0:
        space["lr"] = Log(has["lr"] / 10, has["lr"] * 10)
    if isinstance(has.get("epochs"), int):
        space["epochs"] = Choice(tuple(sorted({*_EPOCHS.values, has["epochs"]})))
    return space


def drawn(method: Method, name: str, trial: int, seed: int) -> Mapping[str, Any]:
    """The settings of a trial: none for the first, which is the method as it was given; else one from each range.

    A function of the study's search seed, the method's name, the field and the number of the trial: the same for all
    sparsities and scenarios, so that they are searched over the same candidates.
    """
    if not trial:
        return {}
    space = space_of(method)
    return {field: span.at(seed_of("search", seed, name, field, trial) / 2**63) for field, span in space.items()}


def with_settings(method: Method, settings: Mapping[str, Any]) -> Method:
    """The method with some settings replaced; Misuse if it does not take them."""
    inner = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith("then.")}
    own = {name: value for name, value in settings.items() if not name.startswith("then.")}
    if inner:
        own["then"] = with_settings(getattr(method, "then"), inner)  # noqa: B009  # some methods have one
    return replace(method, **own)


def settings_of(value: Any, where: str = "a method") -> Any:
    """A method's settings as plain JSON values; Misuse for one that cannot be written down."""
    if hasattr(value, "__dataclass_fields__"):
        inner = {field.name: settings_of(getattr(value, field.name), where) for field in fields(value)}
        return {"class": type(value).__name__, **inner}
    if isinstance(value, (tuple, list)):
        return [settings_of(one, where) for one in value]
    if isinstance(value, Mapping):
        return {str(name): settings_of(one, where) for name, one in value.items()}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise Misuse(f"{where} has a setting that cannot be written down: {value!r}; use numbers and words")


class Goal:
    """What makes one candidate better than another when no retrained model may be looked at.

    The value of a candidate is the sum of three differences, and smaller is better:

    - of its accuracy on the removed rows to what is to be expected of rows never seen: the original's accuracy on
      validation rows of the same classes, mixed alike; zero for a class of which no row is left, for such a class is
      never answered by a model that never met it;
    - of its accuracy on retained rows to the original's, if it is lower;
    - of its accuracy on validation rows of the classes that are left to the original's, if it is lower.

    The first is wrong where the removed rows are unlike validation rows, as mislabelled ones are.
    """

    def __init__(self, original: Trained, forget: Records, retain: Records, validation: Records, seed: int) -> None:
        """The goal of one replica; of the retained rows, at most 2,000 are asked for, drawn by the seed."""
        order = sorted(range(len(retain)), key=lambda i: seed_of("retained", seed, retain.ids[i]))
        self._sets = {"forget": forget, "retain": retain.select(sorted(order[:_RETAINED])), "validation": validation}
        self._left = torch.isin(validation.y, retain.y.unique())
        if not bool(self._left.any()):
            raise Misuse("no validation row is of a class that is left; give more test rows")
        told = outputs(original.module, validation)
        self.target = _expected(told.argmax(1) == validation.y, validation.y, forget.y, retain.y)
        self.original = self.figures(original)

    def figures(self, candidate: Trained) -> dict[str, float]:
        """The candidate's accuracy on removed, retained and validation rows. Cost: one forward pass of these."""
        right = {name: outputs(candidate.module, one).argmax(1) == one.y for name, one in self._sets.items()}
        right["validation"] = right["validation"][self._left]
        return {name: float(one.double().mean()) for name, one in right.items()}

    def value(self, figures: Mapping[str, float]) -> float:
        """How far from the goal; 0 is the best."""
        lost = [max(0.0, self.original[name] - figures[name]) for name in ("retain", "validation")]
        return math.fsum([abs(figures["forget"] - self.target), *lost])


def _expected(right: Tensor, y: Tensor, forget: Tensor, retain: Tensor) -> float:
    """Accuracy on the removed rows that a model which never saw them is expected to have."""
    overall, parts = float(right.double().mean()), []
    for label in forget.unique():
        share = float((forget == label).double().mean())
        alike = right[y == label]
        known = float(alike.double().mean()) if len(alike) else overall
        parts.append(share * known if bool((retain == label).any()) else 0.0)
    return math.fsum(parts)
