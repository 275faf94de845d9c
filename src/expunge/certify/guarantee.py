"""Guarantees: computed from constants, and computed again by whoever doubts them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from expunge.certify import gaussian
from expunge.certify.constants import Derivation, derived, supplied
from expunge.certify.doubt import recheck
from expunge.core.claim import Constant, Guarantee, Spent
from expunge.core.errors import Misuse
from expunge.learn.models import Network

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
    mu, constants, remarks = constants["mu"].value if "mu" in constants else None, dict(constants), tuple(remarks)
    if not isinstance(module, Network):
        constants["module_keeps_rows_nowhere_else"] = supplied(1.0)
        remarks += (_FOREIGN,)
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
        constants=constants,
        transcript=transcript,
        outside=tuple(name for name in state if name not in set(covered)),
        remarks=remarks,
    )


_FOREIGN = (
    "This is not one of expunge's own networks: whoever runs this vouches that it keeps nothing of rows outside its "
    "parameters and buffers, in attributes for instance."
)


def gaussian_mu(constants: Mapping[str, Constant]) -> Constant:
    """The mu of one addition of noise, from `sensitivity` and `sigma`."""
    return derived(GAUSSIAN_MU, constants)
