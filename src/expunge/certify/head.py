"""Certified removal from a strongly convex head: Newton steps, a proved distance, noise fixed beforehand."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from expunge.calculus.head import HeadObjective
from expunge.certify.accountant import Budget, charge
from expunge.certify.before_head import Said, vouched
from expunge.certify.chord import Solved, solve
from expunge.certify.constants import Derivation, derived, setting
from expunge.certify.disjoint import DisjointExtractor
from expunge.certify.features import Features, features, forget, in_use
from expunge.certify.guarantee import GAUSSIAN_MU, gaussian_mu, guarantee_of
from expunge.certify.noise import put_with_noise
from expunge.core.claim import Claim, Constant
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import GaussianNoise, SecretKept
from expunge.core.protocols import Need
from expunge.core.records import Records
from expunge.core.trained import State, Trained
from expunge.learn.models import has_batch_norm, head_of
from expunge.unlearn.method import Done, Method, Task

CAP = Derivation(
    name="cap-of-budget",
    formula="sensitivity = sigma mu(epsilon, delta) / sqrt(requests): what one release's share of the budget hides",
    of=("sigma", "budget_epsilon", "budget_delta", "budget_requests"),
    compute=lambda sigma, epsilon, delta, requests: Budget(epsilon=epsilon, delta=delta, requests=round(requests)).cap(
        sigma
    ),
    gives=("sensitivity",),
)
DERIVATIONS = (CAP, GAUSSIAN_MU)

_FACTOR, _MADE, _GRADIENT = ".factor", ".made", ".gradient"


@dataclass(frozen=True, kw_only=True)
class NewtonHead(Method):
    r"""Minimise the head's objective on what remains, to within a cap on the distance, and add Gaussian noise.

    The objective is :math:`f(W) = \frac1n \sum_i \ell(W x_i, y_i) + \frac\lambda2 \|W\|^2` over the remaining rows: W
    the head's weight and bias, x_i what the head sees of a row, :math:`\lambda` the recipe's weight decay. Chord-Newton
    steps (an old factor, a new gradient) go on until the minimiser is provably within ``budget.cap(sigma)``, by
    :math:`\|\nabla f\| / \lambda` or by a Newton-Kantorovich bound, each with its rounding. Released is
    ``W + N(0, sigma^2)``. Sigma, cap and number of releases are fixed before any request; the bound only decides
    when to stop, so that it is no part of the guarantee, and neither are steps or times.

    The distance is absolute: it says the same whatever the model was before, for one row or many, and after any number
    of requests; the transcript of all releases spends the budget.

    Cost: a request, one or two passes over the rows' features and two triangular solves: with the booking .4 s for
    60,000 rows of 785 on one thread. The first, and one in `refactor_after`, a Hessian and its factor.
    Source: noise fixed beforehand as in Guo, Goldstein, Hannun and van der Maaten (2020); releases composed as in Dong,
    Roth and Su (2022); the bounds are derived in `chord.py`.

    Attributes:
        sigma: standard deviation of the noise on each entry of the head.
        budget: what all releases may tell together.
        refactor_after: requests for which a factor, which removed rows had a part in, is used before it is made anew.
        refactor_within_s: seconds after which it is never used again, and made anew at the next request.
        public_extractor: you vouch that all that comes before the head was made without these rows.
        extractor: what comes before the head, with the rows that it was trained on: that they are others is found at
            each request (see `DisjointExtractor`), and nobody needs to vouch for it.
    """

    claim: ClassVar[Claim] = Claim.CERTIFIED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN})
    source: ClassVar[str] = "a-posteriori bounds; Guo et al., 2020; Dong, Roth and Su, 2022"
    not_guaranteed: ClassVar[str] = (
        "anything about what comes before the head, nor that comparing the old with the new model tells nothing"
    )
    sigma: float = 0.01
    budget: Budget = field(default_factory=Budget)
    refactor_after: int = 1000
    refactor_within_s: float = 30 * 86_400.0
    public_extractor: bool = False
    extractor: DisjointExtractor | None = None

    def __post_init__(self) -> None:
        checks = [
            (0 < self.sigma < math.inf, f"sigma must be > 0 and finite, got {self.sigma}"),
            (isinstance(self.budget, Budget), f"budget must be a Budget, got {self.budget!r}"),
            (self.refactor_after >= 0, f"refactor_after must be >= 0, got {self.refactor_after}"),
            (self.refactor_within_s >= 0, f"refactor_within_s must be >= 0, got {self.refactor_within_s}"),
            (
                self.extractor is None or isinstance(self.extractor, DisjointExtractor),
                f"extractor must be a DisjointExtractor, got {self.extractor!r}",
            ),
            (
                self.extractor is None or not self.public_extractor,
                "an extractor whose rows are compared needs nobody to vouch for it; leave public_extractor out",
            ),
        ]
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    @property
    def cap(self) -> float:
        """The L2 distance from the minimiser that each release keeps to."""
        return self.budget.cap(self.sigma)

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs one model that ends with a linear layer with bias, weight decay, and no batch statistics."""
        problem = super().supports(trained)
        if problem is not None:
            return problem
        layer = has_batch_norm(trained.module)
        if layer is not None:
            return Unsupported(
                f'"{layer}" keeps sums over removed rows, which no noise covers; use group norm, or retrain'
            )
        if not trained.recipe.weight_decay > 0:
            return Unsupported(
                f"{self.name} needs weight_decay > 0 in the recipe, which makes the head strongly convex; "
                "train with weight_decay 1e-3, say, or use retrain"
            )
        if trained.recipe.pruning is not None:
            return Unsupported(f"{self.name} adds noise to every weight, and this model is pruned; use retrain")
        return _problem_of_head(trained.module)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        trained, names = task.trained, _names(task.trained.module)
        release = GaussianNoise(parameters=names, sensitivity=self.cap, sigma=self.sigma)
        spent = charge(trained.releases, release, self.budget)
        said = self._examined(trained, task.retain, task.forget)
        with in_use:
            try:
                seen = features(trained.module, task.retain)
                objective = _objective(trained, seen)
                solved = self._solved(trained, objective, seen.places(task.forget), len(task.forget))
            finally:
                forget(task.forget)
        task.tally.rows_read += objective.count
        secret, event = self._kept(solved, trained.secret, names)
        if self.extractor is not None:
            secret |= self.extractor.marked(trained, trained.gone | frozenset(task.forget.ids))
        _put(trained.module, solved.w, self.sigma)
        guarantee = guarantee_of(
            trained.module,
            parameters=names,
            constants={**self._constants(trained), **said.constants},
            delta=self.budget.delta,
            mechanism="Gaussian noise on the head, from a cryptographic generator",
            reference="the head that minimises the same objective on the remaining rows, with the same noise",
            transcript=spent,
            remarks=said.remarks,
        )
        after = replace(trained, secret=secret, releases=(*trained.releases, release))
        return Done(trained=after, guarantee=guarantee, events=(release, event))

    def begin(self, trained: Trained, records: Records) -> Trained:
        """The same model with its head at the minimiser and noise on it: the first model to give out.

        Not needed for the guarantee, which compares every later release with a provider that gave out the same first
        model. But a first model without noise tells more when it is compared with the second.

        Raises:
            Unsupported: as `supports` says, or if the cap is out of reach.
            Misuse: if the records are not those that the model stands on, or rows were removed from it before: a
                second release of the same head would have to be paid for.
        """
        problem = self.supports(trained)
        if problem is not None:
            raise problem
        if trained.gone or trained.releases or trained.secret:
            raise Misuse("begin is for a model that nothing was removed from yet; give it as it was trained")
        if frozenset(records.ids) != trained.ids:
            raise Misuse("give exactly the records that the model is trained on; select them with records.take(ids)")
        self._examined(trained, records)
        names, module = _names(trained.module), copy.deepcopy(trained.module)
        with in_use:
            objective = _objective(trained, features(module, records))
            start = _matrix(module.state_dict(), names).to(objective.x.device)
            solved = solve(objective, start, self.cap)
        _put(module, solved.w, self.sigma)
        standing = Claim.weaker(Claim.CERTIFIED, trained.standing)
        secret, _ = self._kept(solved, {}, names)
        return replace(trained, module=module, secret=secret, log=None, standing=standing)

    def _solved(self, trained: Trained, objective: HeadObjective, lost: Tensor | None, removed: int) -> Solved:
        """The new minimiser, from the old one where that is known."""
        secret, names = trained.secret, _names(trained.module)
        if not {*names, _GRADIENT, _MADE} <= set(secret):
            return solve(objective, _matrix(trained.module.state_dict(), names).to(objective.x.device), self.cap)
        start, decay = _matrix(secret, names), objective.weight_decay
        factor, guess = self._factor(secret), None
        if lost is not None and factor is not None:
            # The gradient without the removed rows, from the one with them: it only chooses the first step.
            before = (secret[_GRADIENT] - decay * start) * (objective.count + removed)
            guess = (before - objective.rows_gradient(start, lost)) / objective.count + decay * start
        return solve(objective, start, self.cap, factor=factor, guess=guess)

    def _factor(self, secret: State) -> Tensor | None:
        """The factor of an earlier Hessian, unless it is past its time."""
        made, requests = secret[_MADE].tolist()
        fresh = requests < self.refactor_after and 0 <= time.time() - made < self.refactor_within_s
        return secret.get(_FACTOR) if fresh else None

    def _kept(self, solved: Solved, before: State, names: tuple[str, str]) -> tuple[dict[str, Tensor], SecretKept]:
        made, requests = (time.time(), 0.0) if solved.refactored or _MADE not in before else before[_MADE].tolist()
        kept = {
            names[0]: solved.w[:, :-1],
            names[1]: solved.w[:, -1],
            _GRADIENT: solved.gradient,
            _MADE: torch.tensor([made, requests + 1], dtype=torch.float64),
        }
        if solved.factor is not None:
            kept[_FACTOR] = solved.factor
        # What the event says is the same whatever the rows: when a factor was really made depends on them.
        event = SecretKept(
            what="the head without noise, and a factor of its Hessian, which removed rows may have had a part in",
            requests_left=self.refactor_after,
            until=time.time() + self.refactor_within_s,
        )
        return kept, event

    def _examined(self, trained: Trained, *parts: Records) -> Said:
        """What is said of what comes before the head: found by comparing, or told."""
        if self.extractor is None:
            return vouched(trained.module, self.public_extractor)
        return self.extractor.examine(trained, *parts)

    def _constants(self, trained: Trained) -> dict[str, Constant]:
        constants = {
            "sigma": setting(self.sigma, "method.sigma"),
            "budget_epsilon": setting(self.budget.epsilon, "method.budget.epsilon"),
            "budget_delta": setting(self.budget.delta, "method.budget.delta"),
            "budget_requests": setting(self.budget.requests, "method.budget.requests"),
            "weight_decay": setting(trained.recipe.weight_decay, "recipe.weight_decay"),
        }
        constants["sensitivity"] = derived(CAP, constants)
        constants["mu"] = gaussian_mu(constants)
        return constants


def _objective(trained: Trained, seen: Features) -> HeadObjective:
    return HeadObjective(
        seen.x,
        seen.y,
        outputs=head_of(trained.module)[1].out_features,
        weight_decay=trained.recipe.weight_decay,
        loss=trained.recipe.loss,
        keep=seen.keep,
    )


def _names(module: nn.Module) -> tuple[str, str]:
    """Names of the head's weight and bias in the module's state."""
    name = head_of(module)[0]
    return (f"{name}.weight", f"{name}.bias") if name else ("weight", "bias")


def _matrix(state: State, names: tuple[str, str]) -> Tensor:
    """Weight and bias side by side, float64."""
    return torch.cat([state[names[0]].double(), state[names[1]].double()[:, None]], dim=1)


def _put(module: nn.Module, w: Tensor, sigma: float) -> None:
    """Write W with noise into the head, in place."""
    weight, bias = _names(module)
    put_with_noise(module, {weight: w[:, :-1], bias: w[:, -1]}, sigma)


def _problem_of_head(module: nn.Module) -> Unsupported | None:
    name, head = head_of(module)
    if head.bias is None:
        return Unsupported(f'the head "{name or type(module).__name__}" has no bias, which is needed; give it one')
    return None
