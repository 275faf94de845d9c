"""Backdoor verification: owners plant secret triggers in their rows, and look for them in the model after deletion.

The decision is that of the rank test (`expunge.verify.rank`). A "fail" comes to an honest provider with probability
alpha at most. A "pass" comes with probability beta at most to one whose served model obeys the triggers as well as the
model before: let kappa be the number of hits that such a trigger misses with probability beta / 2 at most, computed
from Clopper-Pearson bounds that fail with beta / 2 at most. Only if the rank test's critical number of hits k* is at
most kappa may the verdict be a pass, so that P(pass) <= P(K < k* <= kappa) <= P(K < kappa) <= beta / 2, however K and
k* hang together: they share a model and queries, and the queries may even be those of the calibration.

What a pass does not show. That the rows are gone: a provider that takes out the triggers alone, or retrains on batches
chosen to mimic the forgotten rows, passes. That others are served the same model: what answers the verifier may be
another one. That a trigger which has become weaker, but not gone, would be noticed: that is promised for the success
measured before only. And the provider holds the rows with the trigger on them, so that it may find out what it is;
"secret" is what it takes for fresh draws to be like it, and for no other row to carry it by accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from expunge.core import coins
from expunge.core.errors import Misuse
from expunge.core.protocols import Verdict
from expunge.core.records import Records
from expunge.learn.secret_triggers import TriggerKey
from expunge.learn.trigger_families import SecretTrigger, Stream
from expunge.verify.binomial import hits_of_several
from expunge.verify.rank import critical_hits, least_draws, lowest, noticed_for_sure, rank_p_value, rank_queries_needed
from expunge.verify.served import Subject, hits_of, predict_of


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How the model before deletion obeys the owners' triggers.

    Attributes:
        owners: in order.
        hits: of each owner's trigger.
        asked: queries of each.
        p_value: of the rank test on this model: large if the triggers were never learnt.
        needed: queries of each owner, in calibration and after, with which a verdict would likely be decisive, whether
            the trigger is kept or gone (an estimate, by simulation); None if 5,000 are too few. Where draws hit because
            they resemble the trigger, fewer are needed to see that it is gone.
    """

    owners: tuple[str, ...]
    hits: tuple[int, ...]
    asked: tuple[int, ...]
    p_value: float
    needed: int | None

    def rates(self, error: float) -> tuple[float, ...]:
        """Lower bounds of all owners' rates of success; that one is too high has probability `error` at most."""
        return lowest(self.hits, self.asked, error)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration that `to_json` wrote. Raises Misuse for anything else."""
        try:
            parts = {name: tuple(data[name]) for name in ("owners", "hits", "asked")}
            return cls(p_value=data["p_value"], needed=data["needed"], **parts)
        except (KeyError, TypeError) as error:
            raise Misuse(f"this is no calibration as to_json writes it ({error!r})") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class _Answers:
    """For each owner: which queries its own trigger hits, and each fresh one; these less what a reference says."""

    own: tuple[Bool[Tensor, " queries"], ...]
    fresh: tuple[Int[Tensor, "draws queries"], ...]
    drawn_hits: int
    unusable: int

    @property
    def hits(self) -> int:
        return sum(int(one.sum()) for one in self.own)

    @property
    def drawn(self) -> Tensor:
        return torch.stack([one.sum(1) for one in self.fresh]).sum(0)

    @property
    def asked(self) -> tuple[int, ...]:
        return tuple(len(one) for one in self.own)


@dataclass(frozen=True, kw_only=True, eq=False)
class BackdoorVerifier:
    """Looks for planted triggers in a served model, as their owners would: with queries only.

    Attributes:
        keys: what each owner keeps. Of several owners the hits are pooled: "fail" says that some trigger still works.
        queries: a random sample of rows that nobody trains on, with true labels, made without the triggers: never those
            on which a trigger works. Each owner is given rows of its own, of other classes than its target.
        before: from `calibrated`; without it no verdict is a pass.
        reference: a model of the same task never shown the owners' triggers, say of public rows; ranked is then
            by how many hits more a trigger has than on it. Worth having on tables, where every change of a row is
            evidence for some class, so that many draws hit without having been learnt.
        asked: queries of each owner at most.
        draws: fresh triggers of each owner; 1 / alpha - 1 or more.
        alpha: false accusations at most.
        beta: at most so many passes of a model that obeys the triggers as well as the one before.

    Cost: (draws + 1) * asked answers for each owner, in blocks of 4,096 rows; twice that with a reference.
    """

    name: ClassVar[str] = "backdoor"
    keys: tuple[TriggerKey, ...]
    queries: Records
    before: Calibration | None = None
    reference: Subject | None = None
    asked: int = 30
    draws: int = 999
    alpha: float = 1e-3
    beta: float = 1e-3

    def __post_init__(self) -> None:
        owners = tuple(key.owner for key in self.keys)
        if not owners or len(set(owners)) < len(owners):
            raise Misuse(f"needs keys of one owner or more, each once, got {owners}")
        if self.before is not None and self.before.owners != owners:
            raise Misuse(f"calibrated for {self.before.owners}, got keys of {owners}; calibrate for the same owners")
        if self.asked < 1 or not 0 < self.beta < 1:
            raise Misuse(f"needs asked >= 1 and beta between 0 and 1, got {self.asked} and {self.beta}")
        if self.draws < least_draws(self.alpha):
            raise Misuse(f"alpha = {self.alpha:g} takes {least_draws(self.alpha):,} draws or more, got {self.draws:,}")

    def calibrated(self, subject: Subject, *, rng: Generator) -> BackdoorVerifier:
        """The same, knowing how the model before deletion obeys the triggers; to be asked for while it is served.

        Raises:
            Misuse: if the model's answers are not finite, or are none to as many rows as were asked.
        """
        answers = self._ask(subject, "before", rng)
        if answers.unusable:
            raise Misuse(
                f"{answers.unusable:,} answers are not finite; a model that gives none cannot be calibrated on"
            )
        hits = tuple(int(one.sum()) for one in answers.own)
        success = [k / n for k, n in zip(hits, answers.asked, strict=True)]
        tries = coins.child(rng, "backdoor", "needed")
        needed = rank_queries_needed(answers.fresh, success, alpha=self.alpha, beta=self.beta, rng=tries)
        before = Calibration(
            owners=tuple(key.owner for key in self.keys),
            hits=hits,
            asked=answers.asked,
            p_value=rank_p_value(answers.hits, answers.drawn),
            needed=needed,
        )
        return replace(self, before=before)

    def __call__(self, subject: Subject, *, rng: Generator) -> Verdict:
        """Ask the model that is said to have forgotten.

        Args:
            subject: the model, whoever serves it, or a function from rows (n, ...) as stored to scores (n, classes) or
                labels (n,).
            rng: names the queries and, with the owners' secrets, the draws. Give other coins each time: what was asked
                once is known to the provider.

        Returns:
            pass, fail or inconclusive; the figures say on how many queries and draws, and with what power.

        Raises:
            Misuse: for answers that are no scores or labels of the rows asked, or no query of another class.
        """
        answers = self._ask(subject, "after", rng)
        p = rank_p_value(answers.hits, answers.drawn)
        needed = int(critical_hits(answers.drawn, self.alpha))
        figures = self._figures(answers, p, needed)
        found = f"{answers.hits} of {sum(answers.asked)} queries hit, p = {p:.2g} among {self.draws:,} draws"
        if answers.unusable:
            return self._verdict("inconclusive", f"{answers.unusable:,} answers were not finite", figures)
        if p <= self.alpha:
            return self._verdict("fail", f"the trigger still works: {found}", figures)
        if self.before is None:
            why = f"not found ({found}), but how well it worked before was not measured; calibrate first"
            return self._verdict("inconclusive", why, figures)
        if needed <= figures["sure_hits"]:
            return self._verdict("pass", f"not found: {found}; power {figures['power']:.4f}", figures)
        ask = self.before.needed
        todo = f"calibrate and ask on about {ask} queries" if ask is not None else "plant more or stronger triggers"
        why = f"not found ({found}), but power {figures['power']:.3f} is too low; {todo}"
        return self._verdict("inconclusive", why, figures)

    def _verdict(self, outcome: Any, why: str, figures: Mapping[str, float]) -> Verdict:
        return Verdict(check=self.name, outcome=outcome, why=why, figures=figures)

    def _figures(self, answers: _Answers, p: float, needed: int) -> dict[str, float]:
        total = sum(answers.asked)
        figures = {
            "p_value": p,
            "success": answers.hits / total,
            "success_of_draws": answers.drawn_hits / (self.draws * total),
            "queries": total,
            "draws": self.draws,
            "owners": len(self.keys),
            "critical_hits": needed,
            "alpha": self.alpha,
            "beta": self.beta,
            "unusable": answers.unusable,
        }
        if self.before is None:
            return figures
        rates = self.before.rates(self.beta / 2)
        missed = float(hits_of_several(answers.asked, rates)[: max(0, needed)].sum())
        return figures | {
            "success_before": sum(self.before.hits) / sum(self.before.asked),
            "success_before_at_least": min(rates),
            "sure_hits": noticed_for_sure(answers.asked, rates, self.beta / 2),
            "power": max(0.0, 1 - self.beta / 2 - missed),
        }

    def _ask(self, subject: Subject, when: str, rng: Generator) -> _Answers:
        predict = predict_of(subject)
        names = (when, rng.initial_seed())
        order = coins.order(self.queries.keys, *names, "queries")
        own, fresh, drawn_hits, unusable = [], [], 0, 0
        for place, key in enumerate(self.keys):
            x = self._rows_for(key, order[place :: len(self.keys)])
            triggers = list(key.draw(self.draws, *names))
            # Amid the draws, or whoever answers would know which one matters by when it is asked.
            at = Stream(key.secret, "place", key.owner, *names).below(self.draws + 1)
            triggers.insert(at, key.trigger)
            hits, lost = hits_of(predict, triggers, x)
            known = self._known(triggers, x)
            more = hits.to(torch.int8) - known + known[at]
            own.append(hits[at])
            fresh.append(torch.cat([more[:at], more[at + 1 :]]))
            drawn_hits += int(hits.sum()) - int(hits[at].sum())
            unusable += lost
        return _Answers(own=tuple(own), fresh=tuple(fresh), drawn_hits=drawn_hits, unusable=unusable)

    def _rows_for(self, key: TriggerKey, positions: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
        rows = self.queries.select(positions)
        other = (rows.y != key.trigger.target).nonzero().flatten().cpu()[: self.asked]
        if not len(other):
            raise Misuse(f"no query of another class than owner {key.owner}'s target; give more rows")
        return rows.select(other).x

    def _known(self, triggers: Sequence[SecretTrigger], x: Tensor) -> Int[Tensor, "triggers queries"]:
        if self.reference is None:
            return torch.zeros(len(triggers), len(x), dtype=torch.int8)
        hits, lost = hits_of(predict_of(self.reference), triggers, x)
        if lost:
            raise Misuse(f"{lost:,} answers of the reference are not finite; give one that works")
        return hits.to(torch.int8)


def verify_backdoor(
    after: Subject,
    keys: TriggerKey | Sequence[TriggerKey],
    queries: Records,
    *,
    before: Subject | None = None,
    rng: Generator,
    **settings: Any,
) -> Verdict:
    """Did the provider delete? `BackdoorVerifier` in one call, for whoever has both models at hand.

    Args:
        after: the model that is said to have forgotten.
        keys: what each owner keeps.
        queries: rows with their true labels that nobody trains on.
        before: the model before deletion; without it no verdict is a pass.
        rng: names queries and draws.
        settings: `reference`, `asked`, `draws`, `alpha` and `beta` of `BackdoorVerifier`.
    """
    verifier = BackdoorVerifier(
        keys=(keys,) if isinstance(keys, TriggerKey) else tuple(keys), queries=queries, **settings
    )
    if before is not None:
        verifier = verifier.calibrated(before, rng=rng)
    return verifier(after, rng=rng)
