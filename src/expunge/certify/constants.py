"""Where the numbers of a guarantee come from, in a form that can be computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from expunge.core.claim import Constant
from expunge.core.errors import Misuse

SETTING = "setting "
CHECKED = "checked "
STANDS_ON = ("mu", "epsilon", "sensitivity", "sigma")
"""Constants that a guarantee stands on: no formula gives them that does not say so."""
_GIVES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(["zhang-exact", "zhang-cg", "zhang-lissa"], ("sensitivity",)),
        **dict.fromkeys(["guo-worst-residual", "guo-paper-cap"], ("sensitivity",)),
        **dict.fromkeys(["guo-worst-epsilon", "guo-paper-epsilon", "gaussian-epsilon-but-rho"], ("epsilon",)),
        "sigma-of-share": ("sigma",),
        "radius-with-bias": ("radius",),
        "softmax-hessian-lipschitz": ("hessian_lipschitz",),
        "softmax-gradient-lipschitz": ("gradient_lipschitz",),
        "strong-convexity": ("lambda_min",),
        "interior-minimum": ("gradient_norm",),
        **{f"clipped-steps-{name}": (name,) for name in ("sigma", "sensitivity", "mu")},
        **{f"clipped-models-{name}": (name,) for name in ("sigma", "sensitivity", "epsilon")},
        **{f"private-steps-{name}": (name,) for name in ("sigma", "sensitivity", "epsilon")},
    }
)
# What formulas give that do not say it themselves: names never change their meaning, so that neither does this.
_CALLED = frozenset(
    {
        ("delta", "method.budget.delta"),
        ("budget", "method.budget.epsilon"),
        ("dimension", "model.parameters"),
        ("classes", "recipe.outputs"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """A formula that gives one constant from others.

    Attributes:
        name: how a `Constant` names it; one name, one formula, for ever.
        formula: for people, with its source.
        of: names of the constants that it takes, in order.
        compute: the formula.
        gives: names of the constants that it may give; empty: any but those that a guarantee stands on (`STANDS_ON`),
            which only a formula gives that says so.
    """

    name: str
    formula: str
    of: tuple[str, ...]
    compute: Callable[..., float]
    gives: tuple[str, ...] = ()

    def may_give(self, name: str) -> bool:
        """Whether a constant of this name may come from this formula."""
        known = self.gives or _GIVES.get(self.name, ())
        return name in known if known else name not in STANDS_ON


@dataclass(frozen=True, kw_only=True)
class Check:
    """A count of what must not be, made on rows by the method itself while it makes the guarantee; it must be zero.

    No flag sets it: a method that counts anything else refuses. It is `proved` for whoever runs the method, and from
    the guarantee alone it cannot be computed again; who holds the rows can count again (`recheck`, `counted`).

    Attributes:
        name: how a `Constant` names it; one name, one count, for ever.
        says: for people, what is counted.
        gives: name of the one constant that it gives.
    """

    name: str
    says: str
    gives: str


def checked(check: Check) -> Constant:
    """That the count was made, and is zero: only for the code that made it just now."""
    return Constant(0.0, "proved", CHECKED + check.name)


def setting(value: float, where: str) -> Constant:
    """A number that somebody chose before the request was known: ``method.sigma``, ``recipe.weight_decay``.

    `where` names the attribute that holds it, so that whoever has the method and the recipe can compare. The constant
    must be called as the attribute is (see `is_called`), or another setting could pass for it.
    """
    return Constant(float(value), "proved", SETTING + where)


def is_called(name: str, where: str) -> bool:
    """Whether a constant of this name may be this setting: ``budget_delta`` for ``method.budget.delta``."""
    return where.partition(".")[2].replace(".", "_") == name or (name, where) in _CALLED


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
