"""Where the numbers of a guarantee come from, in a form that can be computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from expunge.core.claim import Constant
from expunge.core.errors import Misuse

SETTING = "setting "


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A formula that gives one constant from others.

    Attributes:
        name: how a `Constant` names it; one name, one formula, for ever.
        formula: for people, with its source.
        of: names of the constants that it takes, in order.
        compute: the formula.
    """

    name: str
    formula: str
    of: tuple[str, ...]
    compute: Callable[..., float]


def setting(value: float, where: str) -> Constant:
    """A number that somebody chose before the request was known: ``method.sigma``, ``recipe.weight_decay``.

    `where` names the attribute that holds it, so that whoever has the method and the recipe can compare.
    """
    return Constant(float(value), "proved", SETTING + where)


def supplied(value: float) -> Constant:
    """A number that somebody vouches for: what rests on it is conditional."""
    return Constant(float(value), "supplied")


def estimated(value: float) -> Constant:
    """A number measured on data: what rests on it is not proved at all."""
    return Constant(float(value), "estimated")


def derived(derivation: Derivation, constants: Mapping[str, Constant]) -> Constant:
    """The constant that a formula gives: no better than the worst that it takes.

    Raises:
        Misuse: if a constant that the formula takes is missing.
    """
    missing = [name for name in derivation.of if name not in constants]
    if missing:
        raise Misuse(f'{derivation.name} takes {", ".join(derivation.of)}, and there is no "{missing[0]}"')
    taken = [constants[name] for name in derivation.of]
    value = float(derivation.compute(*(constant.value for constant in taken)))
    sources = {constant.source for constant in taken}
    worst: Literal["proved", "supplied", "estimated"] = (
        "estimated" if "estimated" in sources else "supplied" if "supplied" in sources else "proved"
    )
    return Constant(value, worst, derivation.name)
