"""Training that is differentially private from the start, so that a few removals need no unlearning at all."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

from scipy.optimize import brentq
from torch import nn

from expunge.certify import gaussian
from expunge.certify.composition import LossAccountant
from expunge.certify.constants import Derivation, derived, setting
from expunge.certify.guarantee import guarantee_of
from expunge.certify.private_steps import COINS, PrivateDescent
from expunge.core.claim import Claim, Guarantee, Spent
from expunge.core.errors import BudgetExhausted, Misuse, Unsupported
from expunge.core.events import AlreadyRemoved, PrivateSteps, Removed
from expunge.core.protocols import Cost, Unlearned
from expunge.core.recipe import Recipe
from expunge.core.records import Records, seal
from expunge.core.request import Request, Split
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import Tally
from expunge.learn.models import has_batch_norm, has_dropout


def train_private(
    recipe: Recipe,
    records: Records,
    *,
    epsilon: float,
    delta: float,
    group: int = 1,
    clip: float = 1.0,
    tally: Tally | None = None,
) -> tuple[Trained, Guarantee]:
    r"""Train by DP-SGD (Abadi et al., 2016) so that up to `group` rows may go, over all requests, without any work.

    Each step draws every row with chance ``rate = batch_size / rows``, apart from the others (Poisson sampling), clips
    each row's gradient to L2 norm `clip`, and hands ``(sum + N(0, (noise clip)^2)) / batch_size`` to the recipe's
    optimiser, with its schedule and weight decay. Batches and noise come from the operating system's cryptographic
    generator and are never kept: no seed repeats this training. Modules that are not this package's own are
    differentiated one row at a time (`torch.func`), so that nothing can mix rows; a row's gradient that is not finite
    counts as zero.

    `noise` is the smallest found (to about .5 %) with which `group` rows, present or not, are (epsilon, delta): of a
    group of k each step sees Binomial(k, rate) rows, and their clipped gradients point the same way at worst. That is
    the mixture of Gaussians of Ganesh (2024), composed as privacy loss distributions and rounded up. It is tighter than
    multiplying a row's epsilon by k, and has no ``k e^(k epsilon) delta``.

    Not proved: anything for rows that are named after looking at the model (a fixed group is meant), for more than
    `group` rows, or beyond floating point (see `secret_normal`). The number of rows, which sets rate and steps, is not
    hidden: the reference keeps both.

    Args:
        recipe: as for `train`; its seed gives the initial weights only.
        records: on what.
        epsilon: for the whole group.
        delta: for the whole group; usual is less than 1 / rows.
        group: rows that may be removed in total, over all requests.
        clip: L2 norm that each row's gradient is clipped to.
        tally: counts the work.

    Returns:
        The model, whose standing is CERTIFIED and which keeps no log, and what may be said of every removal from it;
        `covered` books one.

    Raises:
        Misuse: for settings that cannot be meant.
        Unsupported: for batch norm, dropout, shards or pruning, or without the package dp-accounting.

    Cost: a gradient of each row an epoch on average, each held in memory for a moment; before that, seconds to a minute
    for finding `noise`, longer for small noise and large groups.
    """
    recipe = recipe.completed(records)
    _check(recipe, records, epsilon, delta, group, clip)
    module = build(recipe).to(records.device).eval()
    _refuse_layers(module)
    steps = recipe.epochs * math.ceil(len(records) / recipe.batch_size)
    rate = round(COINS * recipe.batch_size / len(records)) / COINS
    chosen = steps_noise(rate, steps, group, epsilon, delta)
    names = tuple(dict(module.named_parameters(remove_duplicate=False)))
    release = PrivateSteps(parameters=names, rate=rate, noise=chosen, steps=steps, group=group)
    PrivateDescent(module, recipe, records, release, clip, tally or Tally()).go()
    trained = Trained(
        module=module,
        recipe=recipe,
        ids=frozenset(records.ids),
        standing=Claim.CERTIFIED,
        exactness="in law",
        seal=seal(records),
        releases=(release,),
    )
    return trained, _guarantee(trained, release, clip, epsilon, delta)


def covered(trained: Trained, guarantee: Guarantee, records: Records, request: Request) -> Unlearned:
    """Book a removal that needs no work: the model is as good as trained without these rows already.

    Parameters are as they were, which only differential privacy can make right.

    Args:
        trained: from `train_private`, and changed by nothing since but this function.
        guarantee: what came with it.
        records: the whole data set as registered.
        request: what to remove.

    Raises:
        BudgetExhausted: if more rows than the group would be gone in total.
        Unsupported: for a model that is not, or no longer, from private training, and for replacements.
        Misuse: if guarantee or records are another model's.
        UnknownRecord, NeverTrained, EmptyRetain: see `Request.split`.
    """
    release = _release_of(trained)
    if _settings_of(release) != {name: guarantee.constants[name].value for name in _SETTINGS}:
        raise Misuse("the guarantee is not that of this model; give the one that train_private returned with it")
    split = request.split(records, ids=trained.ids, gone=trained.gone)
    _refuse_rows(trained, split)
    noted = (AlreadyRemoved(rows=split.already),) if split.already else ()
    leaving = frozenset(split.forget.ids)
    if not leaving:
        return Unlearned(
            trained=trained, claim=Claim.NONE, exactness=None, guarantee=None, cost=Cost(seconds=0.0), events=noted
        )
    gone = trained.gone | leaving
    if len(gone) > release.group:
        raise BudgetExhausted(
            f"private training covers {release.group} rows in total, {len(trained.gone)} are gone and {len(leaving)} "
            "more were named; retrain"
        )
    after = replace(trained, ids=trained.ids - leaving, gone=gone, seal=seal(split.retain))
    removed = Removed(method="private-training", claim=Claim.CERTIFIED.value, rows=len(leaving))
    return Unlearned(
        trained=after,
        claim=Claim.CERTIFIED,
        exactness=None,
        guarantee=guarantee,
        cost=Cost(seconds=0.0),
        events=(*noted, removed),
    )


def steps_epsilon(rate: float, noise: float, steps: int, group: int, delta: float) -> float:
    """Epsilon, at this delta, of DP-SGD for `group` rows that may be there or not; see `LossAccountant`."""
    release = PrivateSteps(parameters=(), rate=rate, noise=noise, steps=steps, group=group)
    return LossAccountant().epsilon([release], delta)


@cache
def steps_noise(rate: float, steps: int, group: int, epsilon: float, delta: float) -> float:
    """Noise over clipping norm with which DP-SGD is (epsilon, delta) for the group: about .5 % more than needed.

    Cost: some eight figures of `steps_epsilon`, each of which takes longer the less noise there is.
    """

    def over(log: float) -> float:
        found = steps_epsilon(rate, math.exp(log), steps, group, delta)
        return math.log(max(found, 1e-12) / epsilon)

    # Where to look first: the central limit of many steps (Bu et al., 2020), a group's rows as if always together.
    wanted = gaussian.mu_of(epsilon, delta) / (group * rate * math.sqrt(steps))
    high = low = -math.log(math.log1p(wanted**2)) / 2
    while over(high) > 0:
        low, high = high, high + 0.3
    while over(low) <= 0:
        high, low = low, low - 0.3
    found = brentq(over, low, high, xtol=1e-3)
    while over(found) > 0:
        found += 1e-3
    return math.exp(found)


PRIVATE_STEPS_EPSILON = Derivation(
    name="private-steps-epsilon",
    formula="steps of Poisson-sampled Gaussians, shifted by Binomial(group, rate) clipping norms (Ganesh, 2024), "
    "composed as privacy loss distributions",
    of=("rate", "noise", "steps", "group", "delta"),
    compute=lambda rate, noise, steps, group, delta: steps_epsilon(rate, noise, int(steps), int(group), delta),
)
PRIVATE_STEPS_SIGMA = Derivation(
    name="private-steps-sigma",
    formula="noise clip: standard deviation of the noise on the sum of clipped gradients, of each step",
    of=("noise", "clip"),
    compute=lambda noise, clip: noise * clip,
)
PRIVATE_STEPS_SENSITIVITY = Derivation(
    name="private-steps-sensitivity",
    formula="group clip: how much the rows of a group can change the sum of clipped gradients of a step",
    of=("group", "clip"),
    compute=lambda group, clip: group * clip,
)
DERIVATIONS = (PRIVATE_STEPS_EPSILON, PRIVATE_STEPS_SIGMA, PRIVATE_STEPS_SENSITIVITY)

_SETTINGS = ("rate", "noise", "steps", "group")


def _check(recipe: Recipe, records: Records, epsilon: float, delta: float, group: int, clip: float) -> None:
    checks = [
        (0 < epsilon < math.inf, f"epsilon must be > 0 and finite, got {epsilon}"),
        (0 < delta < 1, f"delta must be > 0 and < 1, got {delta}; usual is less than 1 / rows"),
        (isinstance(group, int) and group >= 1, f"group must be an integer >= 1, got {group}"),
        (0 < clip < math.inf, f"clip must be > 0 and finite, got {clip}"),
        (recipe.epochs >= 1, f"private training needs epochs >= 1, got {recipe.epochs}"),
        (
            group < len(records) and recipe.batch_size <= len(records),
            f"group {group} and batch_size {recipe.batch_size} must fit into {len(records)} rows",
        ),
    ]
    for fine, message in checks:
        if not fine:
            raise Misuse(message)
    if recipe.sharding is not None or recipe.pruning is not None:
        raise Unsupported("private training is of one dense model; leave sharding and pruning out of the recipe")


def _refuse_layers(module: nn.Module) -> None:
    layer = has_batch_norm(module)
    if layer is not None:
        raise Unsupported(f'layer "{layer}" mixes rows, so that no row\'s part can be clipped; use group norm')
    layer = has_dropout(module)
    if layer is not None:
        raise Unsupported(f'layer "{layer}" drops values, which private training does not; set its rate to 0')


def _guarantee(trained: Trained, release: PrivateSteps, clip: float, epsilon: float, delta: float) -> Guarantee:
    constants = {name: setting(value, f"release.{name}") for name, value in _settings_of(release).items()}
    constants |= {"clip": setting(clip, "train_private.clip"), "delta": setting(delta, "train_private.delta")}
    for name, derivation in zip(("epsilon", "sigma", "sensitivity"), DERIVATIONS, strict=True):
        constants[name] = derived(derivation, constants)
    spent = Spent(
        epsilon=constants["epsilon"].value,
        delta=delta,
        mu=None,
        releases=1,
        budget_epsilon=epsilon,
        budget_releases=1,
    )
    return guarantee_of(
        trained.module,
        parameters=release.parameters,
        constants=constants,
        delta=delta,
        mechanism=f"DP-SGD, {release.steps} steps; sigma is the noise on each step's sum of clipped gradients",
        reference="the same private training, with the same rate and number of steps, without the removed rows",
        transcript=spent,
        remarks=(
            f"Covers {release.group} rows in total, over all requests, if they are named without looking at the model.",
        ),
    )


def _settings_of(release: PrivateSteps) -> dict[str, float]:
    return {name: float(getattr(release, name)) for name in _SETTINGS}


def _release_of(trained: Trained) -> PrivateSteps:
    only = trained.releases[0] if len(trained.releases) == 1 else None
    if not isinstance(only, PrivateSteps) or trained.standing is not Claim.CERTIFIED:
        raise Unsupported("this model is not, or no longer, as train_private made it; use retrain")
    return only


def _refuse_rows(trained: Trained, split: Split) -> None:
    if split.added:
        raise Unsupported("a covered removal trains on no replacements; remove the rows, or use retrain")
    if (
        trained.seal is not None
        and seal(split.retain, split.forget, salt=trained.seal.partition(":")[0]) != trained.seal
    ):
        raise Misuse("the records are not those that the model was trained on; give the same data")
