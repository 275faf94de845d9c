"""The field's "MIA-efficacy": how many of the removed rows a membership attack takes for rows never trained on."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.audit.metrics import Ask, ask
from expunge.core.errors import Misuse, Unsupported
from expunge.core.estimate import Estimate, proportion
from expunge.core.records import Records
from expunge.core.trained import Trained


def mia_efficacy(
    trained: Trained,
    forget: Records,
    retain: Records,
    test: Records,
    level: float = 0.95,
    *,
    ask: Ask = ask,
) -> Estimate | None:
    """Share of the removed rows that a confidence threshold, fitted on retained against test rows, calls non-members.

    A row's confidence is the probability that the model gives to its label. The threshold is that of the highest
    balanced accuracy in telling retained rows (members) from test rows of their classes; see `best_threshold`.
    In Jia et al. (2023) a support vector machine takes its place, which fits the same kind of rule in more time.

    Higher is not better: what is right is the share that exact retraining has. It depends on how far the model
    overfits, and where members and strangers cannot be told apart the threshold, and this share with it, is arbitrary.

    Returns:
        The share, with an interval over removed rows that takes the threshold as given; None without test rows of a
        retained class.

    Raises:
        Unsupported: for regression.
        Misuse: without removed or retained rows.

    Cost: one forward pass of all rows, and a sort.
    """
    if trained.recipe.loss != "cross_entropy":
        raise Unsupported(
            "confidence is a class's probability, and the model has float targets; compare losses instead"
        )
    if not len(forget) or not len(retain):
        raise Misuse(f"removed and retained rows are needed, got {len(forget)} and {len(retain)}")
    seen = torch.isin(test.y, retain.y.unique())
    if not bool(seen.any()):
        return None
    told = ask(trained, test)
    inside, outside = confidence(ask(trained, retain), retain.y), confidence(told[seen], test.y[seen])
    threshold = best_threshold(inside, outside)
    missed = int((confidence(ask(trained, forget), forget.y) < threshold).sum())
    return replace(
        proportion(missed, len(forget), level), interval="clopper-pearson over removed rows, threshold as given"
    )


def confidence(outputs: Float[Tensor, "n classes"], y: Tensor) -> Float[Tensor, " n"]:
    """The label's probability p as ``log(p / (1 - p))``, in float64: of the same order, without ties near 1."""
    told = outputs.double()
    label = told.gather(1, y[:, None])
    others = told.scatter(1, y[:, None], -torch.inf)
    return label.squeeze(1) - others.logsumexp(1)


def best_threshold(members: Float[Tensor, " m"], strangers: Float[Tensor, " s"]) -> float:
    """The threshold t for which "member if score >= t" has the highest balanced accuracy; of several the lowest.

    Balanced accuracy is the mean of the share of members called so and the share of strangers called so: the sides
    weigh the same, however many rows each has. Thresholds are the scores themselves; the lowest calls everybody a
    member, which is as good as calling nobody one.
    Cost: one sort.
    """
    if not len(members) or not len(strangers):
        raise Misuse(f"a threshold needs rows on both sides, got {len(members)} and {len(strangers)}")
    scores = torch.cat([members, strangers]).unique()
    below_m = torch.searchsorted(members.sort().values, scores)
    below_s = torch.searchsorted(strangers.sort().values, scores)
    # Counts times counts are whole numbers: ties are ties, whatever the rounding.
    gain = below_s * len(members) - below_m * len(strangers)
    return float(scores[int((gain == gain.max()).nonzero()[0])])
