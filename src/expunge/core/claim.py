"""What a result may say about the removal, and what stands behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
    """A number that a guarantee rests on, and where it came from.

    Attributes:
        value: the number.
        source: ``proved`` (a setting fixed beforehand, derived from such by a known formula, or counted on the rows by
            the method itself, ``checked ...``), ``supplied`` (somebody vouches for it) or ``estimated`` (measured on
            data, which proves nothing).
        derivation: name of the formula that gives it, so that anyone can compute it again; ``proved`` needs one.
    """

    value: float
    source: Literal["proved", "supplied", "estimated"]
    derivation: str = ""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What all releases together have spent.

    Attributes:
        epsilon: at this `delta`.
        delta: additive bound.
        mu: as a Gaussian differential privacy parameter; None where there is none.
        releases: how many there were.
        budget_epsilon: what was agreed beforehand for all releases that may come, at the same delta.
        budget_releases: how many those are.
    """

    epsilon: float
    delta: float
    mu: float | None
    releases: int
    budget_epsilon: float
    budget_releases: int


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """An (epsilon, delta) guarantee of indistinguishability from a reference mechanism.

    Attributes:
        epsilon: multiplicative bound on what the current model alone tells, at this `delta`.
        delta: additive bound.
        mu: the same guarantee as a Gaussian differential privacy parameter (Dong, Roth and Su, 2022); None where the
            mechanism has none.
        sigma: standard deviation of the noise on each released parameter.
        sensitivity: cap on the L2 distance between result and reference before noise, fixed before the request.
        mechanism: what added the noise.
        reference: what the result is compared with.
        parameters: names of the parameters that the guarantee covers; the others are outside it.
        releases: ``current`` if it speaks of the latest model only, ``transcript`` if of all releases together.
        constants: every number that the proof needs, with its source.
        transcript: what all releases so far have spent together, for requests chosen adaptively; None if not known.
        outside: names of parameters and buffers that are released and not covered.
        remarks: what else the reader must know, one sentence each.
    """

    epsilon: float
    delta: float
    mu: float | None
    sigma: float
    sensitivity: float
    mechanism: str
    reference: str
    parameters: tuple[str, ...]
    releases: Literal["current", "transcript"]
    constants: Mapping[str, Constant]
    transcript: Spent | None = None
    outside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and 0 <= self.delta < 1 and self.sigma >= 0):
            raise Misuse(
                f"need epsilon >= 0, 0 <= delta < 1, sigma >= 0, got {self.epsilon}, {self.delta}, {self.sigma}"
            )

    @property
    def basis(self) -> Basis:
        """Computed from the constants: an estimated one proves nothing, a supplied one makes it conditional.

        None without constants, without noise, for an infinite epsilon, if a number is not finite, and if a constant is
        called proved without the name of the formula that gives it.
        """
        sources = {constant.source for constant in self.constants.values()}
        nameless = any(c.source == "proved" and not c.derivation for c in self.constants.values())
        numbers = (self.epsilon, self.sigma, self.sensitivity, *(c.value for c in self.constants.values()))
        finite = all(map(math.isfinite, numbers))
        if not sources or "estimated" in sources or nameless or not finite or not self.sigma > 0:
            return "none"
        return "conditional" if "supplied" in sources else "proved"

    def to_json(self) -> dict[str, Any]:
        """All fields and the computed basis as plain JSON values; `from_json` reads it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        lists = {name: list(fields[name]) for name in ("parameters", "outside", "remarks")}
        constants = {name: asdict(constant) for name, constant in self.constants.items()}
        transcript = None if self.transcript is None else asdict(self.transcript)
        return {**fields, **lists, "constants": constants, "transcript": transcript, "basis": self.basis}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Guarantee:
        """The guarantee that `to_json` wrote; its basis is computed anew, whatever the data say it is."""
        fields = {name: value for name, value in data.items() if name != "basis"}
        lists = {name: tuple(data.get(name, ())) for name in ("parameters", "outside", "remarks")}
        spent = data.get("transcript")
        constants = {name: Constant(**one) for name, one in data["constants"].items()}
        return cls(
            **{**fields, **lists, "constants": constants, "transcript": None if spent is None else Spent(**spent)}
        )
