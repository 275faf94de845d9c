"""Whether a method does anything for forgetting: a comparison with exact retraining and with doing nothing."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Generator, Tensor

from expunge.core.coins import child
from expunge.core.estimate import mean
from expunge.core.protocols import Verdict
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.predict import outputs
from expunge.testing.trial import NamedCheck, Trial


class NearerThanStandingStill(NamedCheck):
    """The result answers more like exact retraining than the untouched model does.

    Distance: mean over rows of the total variation between predictive distributions (regression: mean absolute
    difference). For each seed, a model, its exact retraining with the same coins and the method's result are made, and
    ``gain = distance before - distance after``. Passes if Student's 95 % intervals over the seeds lie above zero for
    the gain on the removed rows, and for the mean of that and the gain on test rows, so that nobody passes by
    destroying the model. Fails if either lies at or below zero; else it is inconclusive, which is not passed.

    What it does not say: that enough is forgotten, or that a per-example attack would not tell. One case, one model.
    """

    name: ClassVar[str] = "nearer-than-standing-still"

    def __call__(self, subject: Trial, *, rng: Generator) -> Verdict:
        """Repeat training, retraining and method over the seeds."""
        runs = [self._run(subject, seed, child(rng, seed)) for seed in subject.seeds]
        removed = [run[0] - run[1] for run in runs]
        test = [run[2] - run[3] for run in runs]
        gain = mean(removed)
        both = mean([(a + b) / 2 for a, b in zip(removed, test, strict=True)])
        names = ("before", "after", "test_before", "test_after")
        figures = {name: mean([run[place] for run in runs]).value for place, name in enumerate(names)}
        figures |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        figures |= {"both": both.value, "both_low": both.low, "both_high": both.high, "seeds": float(len(runs))}
        why = (
            f"distance to retraining {figures['before']:.3f} before, {figures['after']:.3f} after on removed rows; "
            f"gain {gain:.3f} there, {both:.3f} with test rows, {len(runs)} seeds"
        )
        if gain.low > 0 and both.low > 0:
            outcome = "pass"
        elif gain.high <= 0 or both.high <= 0 or not math.isfinite(both.value):
            outcome = "fail"
        else:
            outcome = "inconclusive"
        return Verdict(check=self.name, outcome=outcome, why=why, figures=figures)  # type: ignore[arg-type]

    @staticmethod
    def _run(subject: Trial, seed: int, coins: Generator) -> tuple[float, float, float, float]:
        recipe, case = subject.seeded(seed), subject.case
        trained = case.model(subject.train, recipe)
        retrained = case.model(subject.train, recipe, without_forgotten=True)
        before = [apart(trained, retrained, rows) for rows in (case.forget, case.test)]
        result = subject.call(trained, coins=coins).trained
        after = [apart(result, retrained, rows) for rows in (case.forget, case.test)]
        return before[0], after[0], before[1], after[1]


def apart(one: Trained, other: Trained, rows: Records) -> float:
    """Mean over rows of the total variation between the two models' predictive distributions, from 0 to 1.

    For regression: mean absolute difference of the predictions.
    """
    return float((_answers(one, rows) - _answers(other, rows)).abs().sum(1).mean()) / (
        2 if one.recipe.loss == "cross_entropy" else 1
    )


def _answers(trained: Trained, rows: Records) -> Tensor:
    answers = outputs(trained.module, rows).double()
    return answers.softmax(1) if trained.recipe.loss == "cross_entropy" else answers.reshape(len(rows), -1)


NEARER: tuple[NamedCheck, ...] = (NearerThanStandingStill(),)
