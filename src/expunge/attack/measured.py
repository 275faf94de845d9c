"""What a judge measured of an attack, and what follows: is it the data, or the approximation?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from expunge.core.errors import Misuse
from expunge.core.estimate import Estimate, mean, share

Answer = Literal["my data", "my approximation", "both", "neither shown"]
CONTROLS = ("random", "neighbours", "noise", "nothing", "clean")
"""In the order in which they are told."""
AIMED = ("neighbours",)
"""Controls that know where the target is, and harm it too; but they know no model."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One target after one arm's requests in one world.

    Attributes:
        world: ``through``, ``retrain``, another unlearner's name, or ``purge`` (exact retraining without the replaced
            rows and without their replacements), or ``naive`` (a provider that takes strangers for members).
        arm: ``attack`` or a control.
        seed: of the training; 0 is the model given.
        hit: share of the target's rows of which the attacker has what it wants (margin above 0).
        margin: mean of `aim.margin`, in units of the outputs.
        loss: `aim.adversarial_loss`.
        accuracy: share of the test rows other than the target that are answered rightly.
        said: probabilities of the classes, of the target's first row.
        rows: how many rows were asked for.
        seconds: that carrying out took.
        gradients: row gradients that it took.
        refused: of each request that the method would not carry out, its error's class and text; such a request
            changed nothing, and the figures are those of the model that is left.
    """

    world: str
    arm: str
    seed: int
    hit: float
    margin: float
    loss: float
    accuracy: float
    said: tuple[float, ...] = ()
    rows: int = 0
    seconds: float = 0.0
    gradients: int = 0
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One attack on one target at one budget.

    Attributes:
        attack: its name.
        target: the target's number.
        budget: rows that it was given.
        rows: rows that its requests ask for.
        requests: how many it filed.
        brought: rows that it brought into training.
        seconds: that the attacker took.
        outcomes: of every arm in every world.
        error: why there are none: what the attack raised.
    """

    attack: str
    target: int
    budget: int
    rows: int = 0
    requests: int = 0
    brought: int = 0
    seconds: float = 0.0
    outcomes: tuple[Outcome, ...] = ()
    error: str = ""

    def of(self, world: str, arm: str) -> tuple[Outcome, ...]:
        """By seed."""
        found = [one for one in self.outcomes if (one.world, one.arm) == (world, arm)]
        return tuple(sorted(found, key=lambda one: one.seed))

    def margin(self, world: str, arm: str) -> float:
        """Mean over seeds; NaN if this was not measured."""
        found = self.of(world, arm)
        return math.fsum(one.margin for one in found) / len(found) if found else math.nan

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tried:
        """What `to_json` wrote."""
        names = {one.name for one in fields(Outcome)}
        outcomes = tuple(Outcome(**_tuples({k: v for k, v in one.items() if k in names})) for one in data["outcomes"])
        plain = {one.name: data[one.name] for one in fields(cls) if one.name != "outcomes"}
        return cls(outcomes=outcomes, **plain)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One attack on several targets at one budget.

    Attributes:
        tried: one a target; those that raised are left out of every figure, and counted in `untried`.
        exact: True if the unlearner under attack is itself exact, so that there is no approximation to blame.
    """

    tried: tuple[Tried, ...]
    exact: bool = False

    @property
    def done(self) -> tuple[Tried, ...]:
        """Those with outcomes."""
        return tuple(one for one in self.tried if one.outcomes)

    @property
    def untried(self) -> tuple[str, ...]:
        """Why attempts came to nothing, each once."""
        return tuple(dict.fromkeys(one.error for one in self.tried if one.error))

    @property
    def worlds(self) -> tuple[str, ...]:
        """Worlds measured with controls."""
        found = dict.fromkeys(out.world for one in self.done for out in one.outcomes if out.arm == "random")
        return tuple(found)

    def controls(self, world: str) -> tuple[str, ...]:
        """Controls measured in this world."""
        arms = {out.arm for one in self.done for out in one.outcomes if out.world == world}
        return tuple(one for one in CONTROLS if one in arms)

    def difference(self, world: str, control: str) -> Estimate:
        """Attack minus control of the margin, paired by target: mean over targets, seeds averaged within each.

        Targets are the units: they are taken as independent draws, which those of one model are only given that model.
        """
        pairs = [(one.margin(world, "attack"), one.margin(world, control)) for one in self.done]
        values = [ours - theirs for ours, theirs in pairs if not math.isnan(ours + theirs)]
        return mean(values, unit="targets, seeds averaged within each")

    def hits(self, world: str, arm: str) -> Estimate:
        """Share of targets of which every row is hit, seeds averaged within each.

        The interval is Clopper and Pearson's over targets. At several seeds the number of hits may be broken; averages
        over seeds vary less than single hits do, so that the interval is then too wide rather than too narrow.
        """
        shares = []
        for one in self.done:
            found = [out.hit == 1.0 for out in one.of(world, arm)]
            shares += [sum(found) / len(found)] if found else []
        if not shares:
            raise Misuse(f'arm "{arm}" was not measured in world "{world}"; see `controls`')
        return share(math.fsum(shares), len(shares))

    def mean(self, world: str, arm: str, what: str) -> Estimate:
        """Mean over targets of a field of `Outcome`, seeds averaged within each."""
        values = []
        for one in self.done:
            found = [float(getattr(out, what)) for out in one.of(world, arm)]
            values += [math.fsum(found) / len(found)] if found else []
        return mean(values, unit="targets, seeds averaged within each")

    def least(self, world: str) -> Estimate:
        """The smallest of the differences to the controls, by the lower ends of their intervals."""
        return min((self.difference(world, one) for one in self.controls(world)), key=lambda one: one.low)

    def work(self, world: str) -> Estimate | None:
        """Row gradients that the attack's requests take over those of random rows: mean over targets of the ratio.

        None where the method counts none.
        """
        pairs = [(one.of(world, "attack"), one.of(world, "random")) for one in self.done]
        totals = [(sum(o.gradients for o in ours), sum(o.gradients for o in theirs)) for ours, theirs in pairs]
        ratios = [ours / theirs for ours, theirs in totals if theirs]
        return mean(ratios, unit="targets") if ratios else None

    def works(self, world: str) -> bool:
        """True if the attack's margin lies above that of every control there, each interval wholly above 0."""
        arms = self.controls(world)
        return bool(arms) and all(self.difference(world, control).low > 0 for control in arms)

    def harms(self, world: str) -> bool:
        """The same of the controls that do not know the target: it is harmed, though perhaps as by its neighbours."""
        arms = [one for one in self.controls(world) if one not in AIMED]
        return bool(arms) and all(self.difference(world, control).low > 0 for control in arms)

    @property
    def answer(self) -> Answer:
        """Is it my data or my approximation?

        ``my data``: the attack works under exact retraining: whoever removes these rows exactly is hit as well.
        ``my approximation``: it works on the unlearner and is not shown to work under retraining. ``both``: it works in
        both, so that retraining alone does not mend it. ``neither shown``: no more than was shown; see the intervals.
        """
        data, through = self.works("retrain"), self.works("through")
        if self.exact:
            return "my data" if data or through else "neither shown"
        if data and through:
            return "both"
        return "my data" if data else "my approximation" if through else "neither shown"

    @property
    def sentence(self) -> str:
        """The answer with its figures, for people."""
        return f"{self._told()} {self._figures()}"

    def _told(self) -> str:
        places = {"through": "through the unlearner", "retrain": "under exact retraining"}
        harmed = [name for world, name in places.items() if self.done and self.harms(world)]
        if self.answer == "neither shown" and harmed:
            return (
                "Neither is shown beyond all controls: it moves the target "
                f"{' and '.join(harmed)} further than random rows do, but a request for the target's nearest "
                "neighbours, which needs no model, is not shown to do less."
            )
        return {
            "my data": "It is the data: exact retraining without these rows moves the target as the attacker wants.",
            "my approximation": "It is the approximation: the attack works on the unlearner, and is not shown to work "
            "under exact retraining.",
            "both": "It is both: the attack works on the unlearner and under exact retraining.",
            "neither shown": "Neither is shown: on these targets the attack is not told from its controls.",
        }[self.answer]

    def _figures(self) -> str:
        told = []
        for world, name in (("through", "through the unlearner"), ("retrain", "under exact retraining")):
            if world in self.worlds:
                hit, least = 100 * self.hits(world, "attack").value, self.least(world)
                told.append(f"{name} {hit:.0f} % hit, margin {least:+.2f} over its nearest control")
        said = "; ".join(told).capitalize() + "." if told else "Nothing was measured."
        work = self.work("through") if self.done else None
        if work is not None and work.low > 1:
            said += f" It makes the unlearner work {work:.2f} times as much as random rows do."
        if any(one.of("naive", "attack") for one in self.done):
            hit = self.hits("naive", "attack").value
            said += f" A provider that takes strangers for members would be hit on {100 * hit:.0f} % of targets."
        return said


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def grouped(tried: Sequence[Tried], *, exact: bool) -> dict[tuple[str, int], Measured]:
    """By attack and budget, in the order in which they come."""
    found: dict[tuple[str, int], list[Tried]] = {}
    for one in tried:
        found.setdefault((one.attack, one.budget), []).append(one)
    return {key: Measured(tried=tuple(some), exact=exact) for key, some in found.items()}
