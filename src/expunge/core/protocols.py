"""What rooms expect of one another, from methods to stages, and the values that they hand over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from expunge.core.claim import Claim, Exactness, Guarantee
from expunge.core.errors import Misuse, Unsupported
from expunge.core.estimate import Estimate
from expunge.core.events import Event
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained


class Need(Enum):
    """What a method must be given, beside the model."""

    FORGET = "the rows to remove"
    RETAIN = "the rows that stay"
    LOG = "the log of training batches"
    CHECKPOINTS = "checkpoints of training"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a removal took.

    Attributes:
        seconds: wall time.
        gradients: gradients of single rows' losses that were computed.
        rows_read: rows read, each time counted.
    """

    seconds: float
    gradients: int = 0
    rows_read: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.gradients:,} row gradients"


@dataclass(frozen=True, kw_only=True, eq=False)
class Unlearned:
    """A model from which rows were removed, and what may be said about it.

    Attributes:
        trained: the model after; `trained.gone` is cumulative.
        claim: what is claimed of this removal; never more than the method's class declares.
        exactness: for EXACT: ``pathwise`` (same program, coins, build and threads on what remains give the same
            bytes) or ``in law`` (same distribution, for requests that do not depend on the model).
        guarantee: what backs CERTIFIED; present with a basis if and only if that is the claim.
        cost: what it took.
        events: what happened, in order.
    """

    trained: Trained
    claim: Claim
    exactness: Exactness | None
    guarantee: Guarantee | None
    cost: Cost
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        backed = self.guarantee is not None and self.guarantee.basis != "none"
        if (self.claim is Claim.CERTIFIED) != backed:
            raise Misuse(f"CERTIFIED needs a guarantee with a basis and nothing else has one, got {self.claim}")
        if (self.claim is Claim.EXACT) != (self.exactness is not None):
            raise Misuse(
                f'EXACT says "pathwise" or "in law" and no other claim does, got {self.claim}, {self.exactness}'
            )

    def __str__(self) -> str:
        claim = f"{self.claim.value} ({self.exactness})" if self.exactness else self.claim.value
        guarantee = self.guarantee
        if self.claim is Claim.CERTIFIED and guarantee is not None:  # what it cost depends on the removed rows
            epsilon = math.ceil(guarantee.epsilon * 1000) / 1000  # a bound is never rounded down
            figures = f"epsilon {epsilon:g}, delta {guarantee.delta:g}, basis {guarantee.basis}"
            return f"{claim} · {figures} · {self.claim.caveat()}"
        return f"{claim} · {self.cost} · {self.claim.caveat(self.exactness)}"


@runtime_checkable
class Method(Protocol):
    """An unlearning method: a small frozen object that is called."""

    claim: ClassVar[Claim]
    needs: ClassVar[frozenset[Need]]

    def supports(self, trained: Trained) -> Unsupported | None:
        """None if the method can work on this model, else the error that says why not and what to use."""

    def __call__(self, trained: Trained, records: Records, request: Request, *, rng: Generator) -> Unlearned:
        """Carry out the request on a copy of the model."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a screen thinks of one row of a request. `score` grows with suspicion; `reason` is for people."""

    record: str
    score: float
    flagged: bool
    reason: str


@runtime_checkable
class Screen(Protocol):
    """Judges the rows of a request; what follows from it is decided elsewhere."""

    def __call__(
        self, trained: Trained, records: Records, request: Request, *, rng: Generator
    ) -> tuple[Judgement, ...]:
        """One judgement for each requested row, in the order of the records."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """What an attack is after: these rows (n, ...) predicted as `wanted` (n,); with None, any loss of accuracy."""

    x: Tensor
    y: Tensor
    wanted: Tensor | None = None


class Attack(Protocol):
    """Somebody who files requests in bad faith. Never grades itself."""

    def contribute(self, records: Records, target: Target, *, rng: Generator) -> Records | None:
        """Rows that the attacker brings into training; None if it brings none."""

    def requests(
        self, trained: Trained, records: Records, target: Target, *, through: Method, rng: Generator
    ) -> tuple[Request, ...]:
        """The requests that it files, in order, expecting them to be carried out by `through`."""


class Provider(Protocol):
    """Whoever holds the model, honest or cheating."""

    def unlearn(self, request: Request, *, rng: Generator) -> Trained:
        """Answer a request; the model that it says it serves from now on."""

    def predict(self, x: Tensor) -> Tensor:
        """(n, classes) what it really serves."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a named check found. `figures` holds the numbers that decided; `why` is one line for people."""

    check: str
    outcome: Literal["pass", "fail", "inconclusive"]
    why: str
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True only if the check passed; inconclusive is not passed."""
        return self.outcome == "pass"

    def __str__(self) -> str:
        return f"{self.outcome:<12} {self.check}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {"check": self.check, "outcome": self.outcome, "why": self.why, "figures": dict(self.figures)}


class Check(Protocol):
    """One named check of something."""

    name: ClassVar[str]

    def __call__(self, subject: Any, *, rng: Generator) -> Verdict:
        """Look at the subject, without changing it."""


class Role(Enum):
    """How an example stands to a model in `Scores`."""

    OUT = 0
    IN = 1
    UNLEARNED = 2
    RETRAINED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Per model, per example statistics: what every audit works on.

    Attributes:
        values: (models, examples, queries) float64.
        statistic: what they are, e.g. ``logit-scaled confidence``.
        role: (models, examples) int8, values of `Role`.
        ids: the examples' ids.
        method: name of the unlearning method.
        digest: digest of all that went into them.
    """

    values: Tensor
    statistic: str
    role: Tensor
    ids: tuple[str, ...]
    method: str
    digest: str

    def __post_init__(self) -> None:
        models, examples = self.values.shape[:2]
        if self.values.dtype is not torch.float64 or self.role.shape != (models, examples) or len(self.ids) != examples:
            raise Misuse(
                f"scores need float64 (models, examples, queries) with a role each, got {tuple(self.values.shape)}"
            )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an audit concludes. Equivalence needs a margin set beforehand; not rejecting is `undecided`."""

    verdict: Literal["under-forgotten", "equivalent", "over-forgotten", "undecided"]
    estimate: Estimate
    margin: float
    attack: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What a stage of the journey works on: requests, the model before and (later on) after, and the records."""

    requests: tuple[Request, ...]
    before: Trained
    after: Trained | None
    records: Records


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A stage let the job go on."""

    why: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Held:
    """A stage wants a person to look before the job goes on."""

    why: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A stage could not do its work; it may be tried again."""

    why: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NotDone:
    """A stage was not configured or not installed; never to be shown as passed."""

    why: str


class Stage(Protocol):
    """One stage of the journey of a request."""

    name: ClassVar[str]

    def __call__(self, job: Job, *, rng: Generator) -> Passed | Held | Failed | NotDone:
        """Do the stage's work on the job."""
