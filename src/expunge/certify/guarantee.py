"""Guarantees: computed from constants, and computed again by whoever doubts them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from expunge.certify import gaussian
from expunge.certify.constants import SETTING, Derivation, derived
from expunge.core.claim import Constant, Guarantee, Spent
from expunge.core.errors import Misuse

GAUSSIAN_MU = Derivation(
    name="gaussian-mu",
    formula="mu = sensitivity / sigma: one addition of Gaussian noise (Dong, Roth and Su, 2022, Th. 1)",
    of=("sensitivity", "sigma"),
    compute=lambda sensitivity, sigma: sensitivity / sigma if sigma > 0 else math.inf,
)


def guarantee_of(
    module: nn.Module,
    *,
    parameters: Iterable[str],
    constants: Mapping[str, Constant],
    delta: float,
    mechanism: str,
    reference: str,
    transcript: Spent | None,
    remarks: Iterable[str] = (),
) -> Guarantee:
    """The guarantee that these constants give.

    Args:
        module: what is released; what of its state is not among `parameters` is said to be outside.
        parameters: names of what the noise covers.
        constants: all that the proof needs, `sigma` and `sensitivity` among them, and either `mu` or, of a mechanism
            that has none, `epsilon` (at this `delta`).
        delta: additive bound of the current model's figure.
        mechanism: what added the noise.
        reference: what the result is compared with.
        transcript: what all releases have spent.
        remarks: what else the reader must know.

    Raises:
        Misuse: if one of the constants named above is missing.
    """
    missing = [name for name in ("sigma", "sensitivity") if name not in constants]
    if missing or not {"mu", "epsilon"} & set(constants):
        raise Misuse(
            f"a guarantee needs sigma, sensitivity, and mu or epsilon, got {', '.join(constants) or 'nothing'}"
        )
    covered = tuple(parameters)
    mu = constants["mu"].value if "mu" in constants else None
    return Guarantee(
        epsilon=constants["epsilon"].value if mu is None else gaussian.epsilon_of(mu, delta),
        delta=delta,
        mu=mu,
        sigma=constants["sigma"].value,
        sensitivity=constants["sensitivity"].value,
        mechanism=mechanism,
        reference=reference,
        parameters=covered,
        releases="current",
        constants=dict(constants),
        transcript=transcript,
        outside=tuple(name for name in module.state_dict() if name not in set(covered)),
        remarks=tuple(remarks),
    )


def gaussian_mu(constants: Mapping[str, Constant]) -> Constant:
    """The mu of one addition of noise, from `sensitivity` and `sigma`."""
    return derived(GAUSSIAN_MU, constants)


def recheck(
    guarantee: Guarantee, derivations: Mapping[str, Derivation], settings: Mapping[str, float] | None = None
) -> tuple[str, ...]:
    """What does not hold of a guarantee, computed again from its constants alone; empty if all does.

    Args:
        guarantee: by whomever it was made.
        derivations: formulas by name.
        settings: what the method and the recipe hold, by the names that `setting` was given; None: not compared.
    """
    problems = []
    for name, constant in guarantee.constants.items():
        problems += _problems_of(name, constant, guarantee.constants, derivations, settings)
    for name in ("sigma", "sensitivity", "mu"):
        value, known = getattr(guarantee, name), guarantee.constants.get(name)
        if value is not None and (known is None or not _same(known.value, value)):
            problems.append(f"{name} is said to be {value:.6g}, and no constant gives that")
    if guarantee.mu is not None:
        epsilon = gaussian.epsilon_of(guarantee.mu, guarantee.delta)
    else:
        epsilon = guarantee.constants["epsilon"].value if "epsilon" in guarantee.constants else math.inf
    if not guarantee.epsilon >= epsilon * (1 - 1e-6):
        problems.append(f"epsilon is said to be {guarantee.epsilon:.6g}, and it is {epsilon:.6g}")
    return tuple(problems)


def _problems_of(
    name: str,
    constant: Constant,
    constants: Mapping[str, Constant],
    derivations: Mapping[str, Derivation],
    settings: Mapping[str, float] | None,
) -> list[str]:
    if constant.source != "proved":
        return []
    if constant.derivation.startswith(SETTING):
        where = constant.derivation.removeprefix(SETTING)
        if settings is None:
            return []
        if where not in settings or not _same(settings[where], constant.value):
            return [f"{name} is called the setting {where}, which is {settings.get(where, 'not there')}"]
        return []
    derivation = derivations.get(constant.derivation)
    if derivation is None:
        return [f'{name} is called proved by "{constant.derivation}", which is no known formula']
    try:
        again = derived(derivation, constants)
    except Misuse as error:
        return [f"{name}: {error}"]
    if again.source != "proved":
        return [f"{name} is called proved, and rests on constants that are {again.source}"]
    return (
        []
        if _same(again.value, constant.value)
        else [f"{name} is {constant.value:.6g}, and {derivation.name} gives {again.value:.6g}"]
    )


def _same(one: float, other: float) -> bool:
    return one == other or math.isclose(one, other, rel_tol=1e-9)
