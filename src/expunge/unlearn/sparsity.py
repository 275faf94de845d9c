"""Unlearning in sparse models: prune first and then unlearn, keep zeros at zero, and retrain with the same mask.

A model whose recipe has pruning needs none of this: every method keeps its zeros, and `Retrain` finds its mask anew.
This is for models that are dense by their recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Protocol

from torch import Generator

from expunge.core.claim import Claim
from expunge.core.coins import child
from expunge.core.errors import Misuse, Unsupported
from expunge.core.mask import Mask
from expunge.core.protocols import Need
from expunge.core.trained import Trained
from expunge.learn.build import EXTERNAL, build
from expunge.learn.loop import fit
from expunge.learn.pruning import magnitude_mask, mask_of_zeros, prunable, random_mask, synflow_mask
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.method import Done, Method, Task


class Criterion(Protocol):
    """Which weights of a trained model to take out."""

    def mask(self, trained: Trained, sparsity: float, *, within: Mask, rng: Generator) -> Mask:
        """Take out this share of the prunable weights, first those that `within` takes out; `rng` names the coins."""


@dataclass(frozen=True)
class Magnitude:
    """The smallest weights go, over all layers together (Han et al., 2015)."""

    def mask(self, trained: Trained, sparsity: float, *, within: Mask, rng: Generator) -> Mask:
        """See `Criterion`."""
        return magnitude_mask(trained.module, sparsity, within=within)


@dataclass(frozen=True)
class SynFlow:
    """The weights through which least flows go, in some rounds; no path is cut through (Tanaka et al., 2020).

    Attributes:
        iterations: rounds of scoring.
    """

    iterations: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise Misuse(f"iterations must be an integer >= 1, got {self.iterations}")

    def mask(self, trained: Trained, sparsity: float, *, within: Mask, rng: Generator) -> Mask:
        """See `Criterion`."""
        shape = tuple(trained.recipe.model_args["shape"])
        return synflow_mask(trained.module, shape, sparsity, self.iterations, within=within)


@dataclass(frozen=True)
class RandomScores:
    """Weights drawn uniformly go: the baseline that a criterion must beat."""

    def mask(self, trained: Trained, sparsity: float, *, within: Mask, rng: Generator) -> Mask:
        """See `Criterion`."""
        return random_mask(trained.module, sparsity, child(rng, "pruning"), within=within)


CRITERIA: Mapping[str, type[Magnitude] | type[SynFlow] | type[RandomScores]] = MappingProxyType(
    {"magnitude": Magnitude, "synflow": SynFlow, "random": RandomScores}
)


@dataclass(frozen=True, kw_only=True)
class Pruned(Method):
    r"""Prune the trained model, then unlearn with the pruned weights held at zero (Jia et al., 2023).

    ``theta <- mask * theta`` with the mask found at the trained theta, then `then` on what is left. Unlike a recipe's
    pruning nothing is rewound and nothing trained again but by `then`, and the mask comes of weights that the rows to
    forget had a part in. Of n prunable weights (`expunge.learn.pruning.prunable`) ``round(sparsity * n)`` are exactly
    zero afterwards, or more if more were before: weights that are zero already go first and none comes back, so that
    the same method keeps the same mask at the next request. The recipe stays dense: other methods let the zeros grow
    again, unless wrapped in `Masked`.

    Cost: that of `then`; by magnitude nothing to speak of, by synflow `iterations` passes of one row in float64.
    """

    source: ClassVar[str] = "Jia et al., 2023"
    not_guaranteed: ClassVar[str] = "that the mask knows nothing of the removed rows, nor anything of `then`"
    sparsity: float = 0.95
    by: Criterion = field(default_factory=Magnitude)
    then: Method = field(default_factory=FineTune)

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not 0 < self.sparsity < 1:
            raise Misuse(f"sparsity must be > 0 and < 1, got {self.sparsity}")
        if not callable(getattr(self.by, "mask", None)) or isinstance(self.by, type):
            raise Misuse(f"by must be Magnitude(), SynFlow() or RandomScores(), got {self.by!r}")
        _take_over(self, "for exactness give the recipe pruning, and use retrain")

    @property
    def name(self) -> str:
        """``pruned-`` and what comes then."""
        return f"pruned-{self.then.name}"

    @property
    def learns_new(self) -> bool:
        """As `then`."""
        return self.then.learns_new

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs what `then` needs, and weights to prune."""
        return super().supports(trained) or self.then.supports(trained) or _nothing_to_prune(trained)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        zeros = mask_of_zeros(task.trained.module)
        mask = self.by.mask(task.trained, self.sparsity, within=zeros, rng=rng)
        mask.prune_(task.trained.module)
        return _held(self.then, task, mask, rng)


@dataclass(frozen=True, kw_only=True)
class Masked(Method):
    """Unlearn with every prunable weight that is exactly zero held at zero, whatever the recipe says.

    For models that were pruned without their recipe knowing: trained elsewhere, by `Pruned`, or by an l1 penalty. A
    weight that is zero by chance is held too.

    Cost: that of `then`.
    """

    source: ClassVar[str] = "that of `then`, under a mask"
    not_guaranteed: ClassVar[str] = "that the mask knows nothing of the removed rows, nor anything of `then`"
    then: Method = field(default_factory=FineTune)

    def __post_init__(self) -> None:
        _take_over(self, "an exact method keeps a recipe's pruning by itself")

    @property
    def name(self) -> str:
        """``masked-`` and what comes then."""
        return f"masked-{self.then.name}"

    @property
    def learns_new(self) -> bool:
        """As `then`."""
        return self.then.learns_new

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs what `then` needs, and weights that are zero."""
        problem = super().supports(trained) or self.then.supports(trained) or _nothing_to_prune(trained)
        return problem or _nothing_zero(self, trained, self.then.name)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        return _held(self.then, task, mask_of_zeros(task.trained.module), rng)


@dataclass(frozen=True, kw_only=True)
class RetrainSameMask(Method):
    """Train from scratch on what remains, with the mask that the given model has: what papers call sparse retraining.

    The initial weights of the recipe, pruned where the given model is zero, are trained on the retained rows by the
    whole of the recipe's schedule. The weights never saw the removed rows; the mask did, unless it was found without
    data: it remembers them, so that nothing is claimed. `Retrain` finds a recipe's mask anew and is exact.

    Cost: a full training; that of a dense model of the recipe, without its rounds of pruning.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "Jia et al., 2023 (their Retrain)"
    not_guaranteed: ClassVar[str] = "that the removed rows leave no trace: the mask was found with them"

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs a single model with weights that are zero, that can be made anew."""
        problem = super().supports(trained)
        if problem is None and trained.recipe.model == EXTERNAL:
            return Unsupported(
                f"{self.name} trains from the beginning, and this model was trained elsewhere; "
                "give a recipe whose model can be made anew, or use masked-fine-tune"
            )
        return problem or _nothing_to_prune(trained) or _nothing_zero(self, trained, "retrain")

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        mask, recipe = mask_of_zeros(task.trained.module), task.trained.recipe
        module = build(recipe).to(task.retain.device)
        mask.prune_(module)
        fit(module, recipe, task.retain, mask=mask, tally=task.tally)
        return Done(trained=replace(task.trained, module=module))


def _take_over(method: Pruned | Masked, instead: str) -> None:
    """Say of the method what is to be said of the one that it wraps."""
    then = method.then
    if not isinstance(then, Method):
        raise Misuse(f"then must be a method, such as FineTune(), got {then!r}")
    if then.claim is not Claim.NONE:
        raise Misuse(
            f"then must be a method that claims nothing, got {then.name}, whose {then.claim.value} claim does not "
            f"outlive a mask; {instead}"
        )
    source = f"{type(method).source}; {then.source}" if isinstance(method, Pruned) else then.source
    for name, value in (
        ("needs", then.needs),
        ("source", source),
        ("not_guaranteed", f"that the mask knows nothing of the removed rows, nor {then.not_guaranteed}"),
    ):
        object.__setattr__(method, name, value)


def _held(then: Method, task: Task, mask: Mask, rng: Generator) -> Done:
    """What `then` does under the mask; zeros that it has moved all the same are put back."""
    moves, zeros = (mask if other is None else mask & other for other in (task.moves, task.zeros))
    done = then._apply(replace(task, moves=moves, zeros=zeros), rng=rng)
    mask.prune_(done.trained.module)
    return done


def _nothing_to_prune(trained: Trained) -> Unsupported | None:
    try:
        prunable(trained.module)
    except Unsupported as problem:
        return problem
    return None


def _nothing_zero(method: Method, trained: Trained, instead: str) -> Unsupported | None:
    if mask_of_zeros(trained.module).held:
        return None
    return Unsupported(f"{method.name} is for pruned models, and no prunable weight of this one is zero; use {instead}")
