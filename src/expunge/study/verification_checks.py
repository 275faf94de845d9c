"""Two checks beside the protocols: is everybody served what the verifier was shown, and were copies of rows kept?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy import stats
from torch import Generator, Tensor

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Verdict
from expunge.core.records import Records
from expunge.screen.nearest import flat, nearest, spread
from expunge.verify.binomial import lower
from expunge.verify.served import Predict, Subject, predict_of


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedAlike:
    """Asks as a stranger, and compares the labels with those of the model that the verifier was shown.

    Finds who serves strangers another model than its verifier, whatever the two are; says nothing of whether the one
    shown has forgotten. It must come from where the provider does not expect a verifier, or it is told what one is.

    Attributes:
        queries: rows to ask about; labels play no part.
        before: the model before the removal; without it no verdict is a pass.
        asked: queries at most.
        beta: at most so many passes of who serves everybody the model before.

    Cost: an answer of each model for each query.
    """

    name: ClassVar[str] = "served alike"
    queries: Records
    before: Subject | None = None
    asked: int = 1000
    beta: float = 1e-3

    def __call__(self, stranger: Subject, shown: Subject, *, rng: Generator) -> Verdict:
        """Compare what a stranger is told with the model shown; one label that differs is a fail.

        Of models that compute in another precision than the one shown, labels near ties may differ honestly.

        Raises:
            Misuse: if there are no queries.
        """
        if not len(self.queries):
            raise Misuse("there is nothing to ask about; give queries")
        chosen = torch.randperm(len(self.queries), generator=child(rng, "stranger"))
        half = len(chosen) // 2
        # How often the two models differ is measured on rows other than those that are asked.
        first, second = (self.queries.select(part).x for part in (chosen[:half], chosen[half:][: self.asked]))
        truth = _labels(predict_of(shown), second)
        told = _labels(predict_of(stranger), second)
        differ = int((truth != told).sum())
        figures = {"queries": float(len(second)), "differ": float(differ)}
        rate, missed = 0.0, 1.0
        if self.before is not None:
            apart = int((_labels(predict_of(self.before), first) != _labels(predict_of(shown), first)).sum())
            rate = lower(apart, len(first), self.beta / 2) if len(first) else 0.0
            missed = self.beta / 2 + (1 - rate) ** len(second)
            figures |= {"differs_from_before": apart / max(len(first), 1), "power": max(0.0, 1 - missed)}
        if differ:
            why = f"{differ:,} of {len(second):,} answers to a stranger are not those of the model shown"
            return Verdict(check=self.name, outcome="fail", why=why, figures=figures)
        good = f"{len(second):,} answers to a stranger are those of the model shown"
        if self.before is None:
            why = f"{good}; how much the model before differs is not known"
            return Verdict(check=self.name, outcome="inconclusive", why=why, figures=figures)
        if missed > self.beta:
            need = "more queries" if not rate else f"about {math.ceil(math.log(self.beta / 2) / math.log1p(-rate)):,}"
            why = f"{good}, but the model before answers nearly alike; ask {need}"
            return Verdict(check=self.name, outcome="inconclusive", why=why, figures=figures)
        why = f"{good}; the model before would be found with power {figures['power']:.4f}"
        return Verdict(check=self.name, outcome="pass", why=why, figures=figures)


def _labels(predict: Predict, x: Tensor) -> Tensor:
    answers = torch.cat([predict(part).detach().cpu() for part in x.split(4096)]) if len(x) else torch.zeros(0)
    return answers.argmax(1) if answers.dim() == 2 else answers


@dataclass(frozen=True, kw_only=True, eq=False)
class NearCopies:
    """Looks among the rows that a provider says stay for near copies of forgotten ones, by content alone.

    Near is what only one row in a hundred is to rows of other owners. More such rows among the forgotten ones than
    chance allows are a fail: somebody must look at them. Assumes that forgotten rows are like others in how near they
    come to strangers' rows, and independent; a class that was forgotten as a whole, or a burst of one picture, is not.

    What a pass does not show: that nothing derived from the rows is there. Imitations farther off than `reach` (drawn
    anew, blurred, of a generator trained on them) are not seen, and of few forgotten rows one alone is not enough.

    Attributes:
        share: of rows of others that count as near by chance.
        alpha: false accusations at most, under the assumption above.
        controls: retained rows that tell what is usual.

    Cost: (forgotten + controls) x retained distances of whole rows, in blocks.
    """

    name: ClassVar[str] = "near copies"
    share: float = 0.01
    alpha: float = 1e-3
    controls: int = 1000

    def __call__(self, stays: Records, forgotten: Records, *, rng: Generator) -> Verdict:
        """Compare distances. Rows of one owner are never neighbours of each other.

        Raises:
            Misuse: if there are no rows to compare.
        """
        if not len(stays) or not len(forgotten):
            raise Misuse("an audit of the data needs rows that stay and rows that were forgotten; give both")
        rows, asked = flat(stays), flat(forgotten)
        some = torch.randperm(len(stays), generator=child(rng, "controls"))[: self.controls]
        owners = _numbers(stays.owners, forgotten.owners)
        kept, gone = owners[: len(stays)], owners[len(stays) :]
        usual = _distances(rows[some], kept[some], rows, kept)
        own = _distances(asked, gone, rows, kept)
        reach = float(usual.sort().values[max(0, math.ceil(self.share * len(usual)) - 1)])
        within = int((usual <= reach).sum())
        near = int((own <= reach).sum())
        p = chance_of_near(near, len(own), within, len(usual))
        unit = spread(rows)
        figures = {
            "near": float(near),
            "forgotten": float(len(own)),
            "reach": reach / unit,
            "chance": (1 + within) / (1 + len(usual)),
            "p_value": p,
        }
        found = f"{near:,} of {len(own):,} forgotten rows have a near copy among {len(stays):,} that stay, p = {p:.2g}"
        if p <= self.alpha:
            return Verdict(check=self.name, outcome="fail", why=found, figures=figures)
        if chance_of_near(len(own), len(own), within, len(usual)) > self.alpha:
            why = f"{found}; so few rows cannot be told from chance, look at them by hand"
            return Verdict(check=self.name, outcome="inconclusive", why=why, figures=figures)
        return Verdict(check=self.name, outcome="pass", why=found, figures=figures)


def chance_of_near(near: int, asked: int, within: int, controls: int) -> float:
    """Chance that so many or more of the rows asked lie nearer than the control after the `within` nearest ones.

    All orders of rows and controls are equally likely: `near` of the first ``near + within`` are rows, or more. Rows as
    near as the last of those controls count too, so that it is somewhat above the true chance. (A binomial law would
    take the share of controls for the true rate; at 1,000 controls and 1,000 rows that accuses ten times too often at
    0.1 %.)
    """
    return float(stats.hypergeom.sf(near - 1, asked + controls, asked, min(near + within, asked + controls)))


def _numbers(*names: tuple[str, ...]) -> Tensor:
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(owner, len(known)) for part in names for owner in part])


def _distances(asked: Tensor, mine: Tensor, rows: Tensor, theirs: Tensor) -> Tensor:
    found = []
    for part, owners in zip(asked.split(1024), mine.split(1024), strict=True):
        found.append(nearest(part, rows, owners[:, None] == theirs[None]).distance)
    return torch.cat(found)
