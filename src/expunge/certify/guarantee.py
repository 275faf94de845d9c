"""Guarantees: computed from constants, and computed again by whoever doubts them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from expunge.certify import gaussian
from expunge.certify.constants import Derivation, derived
from expunge.certify.doubt import recheck
from expunge.core.claim import Constant, Guarantee, Spent
from expunge.core.errors import Misuse

__all__ = ["GAUSSIAN_MU", "gaussian_mu", "guarantee_of", "recheck"]

GAUSSIAN_MU = Derivation(
    name="gaussian-mu",
    formula="mu = sensitivity / sigma: one addition of Gaussian noise (Dong, Roth and Su, 2022, Th. 1)",
    of=("sensitivity", "sigma"),
    compute=lambda sensitivity, sigma: sensitivity / sigma if sigma > 0 else math.inf,
    gives=("mu",),
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
            that has none, `epsilon` (at this `delta`); never both.
        delta: additive bound of the current model's figure.
        mechanism: what added the noise.
        reference: what the result is compared with.
        transcript: what all releases have spent.
        remarks: what else the reader must know.

    Raises:
        Misuse: if one of the constants named above is missing, for both mu and epsilon, and for no parameters or such
            as the module does not have.
    """
    missing = [name for name in ("sigma", "sensitivity") if name not in constants]
    if missing or len({"mu", "epsilon"} & set(constants)) != 1:
        raise Misuse(
            f"a guarantee needs sigma, sensitivity, and one of mu and epsilon, got {', '.join(constants) or 'nothing'}"
        )
    covered, state = tuple(parameters), module.state_dict()
    strange = [name for name in covered if name not in state]
    if strange or not covered:
        raise Misuse(f"a guarantee covers parameters of {', '.join(state)}, got {', '.join(strange) or 'none'}")
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
        outside=tuple(name for name in state if name not in set(covered)),
        remarks=tuple(remarks),
    )


def gaussian_mu(constants: Mapping[str, Constant]) -> Constant:
    """The mu of one addition of noise, from `sensitivity` and `sigma`."""
    return derived(GAUSSIAN_MU, constants)
