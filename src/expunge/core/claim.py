"""What a result may say about the removal, and what stands behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from expunge.core.errors import Misuse

Exactness = Literal["pathwise", "in law"]
Basis = Literal["proved", "conditional", "none"]


class Claim(Enum):
    """The most that may be said of a removal, weakest first."""

    NONE = "none"
    CERTIFIED = "certified"
    EXACT = "exact"

    @staticmethod
    def weaker(first: Claim, second: Claim) -> Claim:
        """The one of the two that says less."""
        return min(first, second, key=list(Claim).index)

    def caveat(self, exactness: Exactness | None = None) -> str:
        """What this claim does not cover, in one sentence for people; printed wherever the claim is."""
        if self is Claim.EXACT and exactness == "in law":
            return "Not covered: requests chosen after seeing the model, and copies kept elsewhere."
        return _CAVEATS[self]


_CAVEATS = {
    Claim.NONE: "No claim: the model was changed, and nothing is proved about what it still remembers.",
    Claim.CERTIFIED: "Not covered: anything outside the guarantee's scope, and copies kept elsewhere.",
    Claim.EXACT: "Not covered: copies kept elsewhere, and other builds of the same program.",
}


@dataclass(frozen=True)
class Constant:
    """A number that a guarantee rests on, and where it came from."""

    value: float
    source: Literal["proved", "supplied", "estimated"]


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """An (epsilon, delta) guarantee of indistinguishability from a reference mechanism.

    Attributes:
        epsilon: multiplicative bound, at this `delta`.
        delta: additive bound.
        mu: the same guarantee as a Gaussian differential privacy parameter (Dong, Roth and Su, 2022).
        sigma: standard deviation of the noise on each released parameter.
        sensitivity: cap on the L2 distance between result and reference before noise.
        mechanism: what added the noise.
        reference: what the result is compared with.
        parameters: names of the parameters that the guarantee covers; the others are outside it.
        releases: ``current`` if it speaks of the latest model only, ``transcript`` if of all releases together.
        constants: every number that the proof needs, with its source.
    """

    epsilon: float
    delta: float
    mu: float
    sigma: float
    sensitivity: float
    mechanism: str
    reference: str
    parameters: tuple[str, ...]
    releases: Literal["current", "transcript"]
    constants: Mapping[str, Constant]

    def __post_init__(self) -> None:
        if self.epsilon < 0 or not 0 <= self.delta < 1 or self.sigma < 0:
            raise Misuse(
                f"need epsilon >= 0, 0 <= delta < 1, sigma >= 0, got {self.epsilon}, {self.delta}, {self.sigma}"
            )

    @property
    def basis(self) -> Basis:
        """Computed from the constants: an estimated one proves nothing, a supplied one makes it conditional."""
        sources = {constant.source for constant in self.constants.values()}
        if not sources or "estimated" in sources:
            return "none"
        return "conditional" if "supplied" in sources else "proved"

    def to_json(self) -> dict[str, Any]:
        """All fields and the computed basis as plain JSON values."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        constants = {name: {"value": c.value, "source": c.source} for name, c in self.constants.items()}
        return {**fields, "parameters": list(self.parameters), "constants": constants, "basis": self.basis}
