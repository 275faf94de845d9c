"""A damped Newton step towards retraining, and noise: the certified unlearning of Zhang, Dong, Wang and Li (2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, get_args

from torch import Generator

from expunge.certify.accountant import Budget, charge
from expunge.certify.constants import derived, setting, supplied
from expunge.certify.guarantee import gaussian_mu, guarantee_of
from expunge.certify.newton_bound import (
    BOUNDS,
    DERIVATIONS,
    EPSILON_BUT_RHO,
    SIGMA,
    Smoothness,
    Solver,
    problem_of_lissa,
    softmax_constants,
)
from expunge.certify.newton_step import NewtonStep, refuse_longer, started
from expunge.certify.noise import put_with_noise
from expunge.core.claim import Claim, Constant, Guarantee, Spent
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import GaussianNoise
from expunge.core.protocols import Need
from expunge.core.recipe import Recipe
from expunge.core.trained import Trained
from expunge.learn.ball import project
from expunge.learn.models import has_batch_norm
from expunge.unlearn.method import Done, Method, Task

__all__ = ["DERIVATIONS", "NewtonUnlearning"]

_REFERENCE = (
    "the retained objective's stationary point (gradient at most gradient_norm) in the ball of radius max_norm, with "
    "equal noise (Zhang, Dong, Wang and Li, 2024); the model before is not noised by training"
)
_INTERIOR = (
    "The bound needs the retrained weights to be a point where the retained objective's gradient is at most "
    "gradient_norm: a minimum on the sphere, where the constraint is active, is none."
)


@dataclass(frozen=True, kw_only=True)
class NewtonUnlearning(Method):
    r"""One damped Newton step on the retained objective from weights in a ball, clipped to it again, and noise.

    :math:`\tilde w = w - (H + \lambda I)^{-1} g`, g and H the gradient and Hessian at w of what retraining minimises:
    the mean loss of the retained rows plus ``recipe.weight_decay / 2 |w|^2`` over all trained parameters, which so adds
    ``weight_decay`` to each eigenvalue of H. Then :math:`\tilde w + N(0, \sigma^2 I)` is given out. Training must have
    kept the weights in the ball (`Recipe.max_norm`). Requests in sequence start from the un-noised weights before, if
    they are at hand, else from those given out, clipped to the ball; the bound is the same each time, as all that it
    asks of the start is to lie in the ball. Clipping the result too is what makes that so; it is not in the authors'
    code, and cannot take it farther from retraining, which lies in the ball.

    **Mostly vacuous.** The bound (see `zhang_bound`) is at least the diameter of the ball, 2 C, wherever
    ``M C >= lambda_min``, for every damping: always of a network, whose lambda_min is not positive. Noise for that
    hides whatever lies in the ball, without any step. The guarantee says so in its remarks.

    Without constants (`smoothness`, or of a softmax model `feature_radius`), with estimated ones, or where the bound is
    infinite, nothing is claimed: the guarantee is of basis none and the claim NONE. That is what a Newton step on a
    deep network is, whatever noise is added.

    Attributes:
        damping: lambda, added to each eigenvalue of the Hessian, in the objective's own units.
        solver: ``exact`` (dense Hessian, Cholesky: p products and p^2 numbers of memory, small models), ``cg``
            (conjugate gradients) or ``lissa`` (proposition 3.5: the truncated series of Agarwal et al., 2017; of steps
            s and scale H it applies ``(1 - (1 - x / H)^(s + 1)) / x`` to an eigenvalue x of H + lambda, which is the
            inverse only where ``s x >> H``; with s = H = 1000, x = .01 gives .996, not 100).
        tolerance: relative residual of ``cg``.
        iterations: products at most of ``cg``; it raises if they do not suffice.
        samples: series of ``lissa`` that are averaged.
        steps: terms of each.
        scale: H of ``lissa``; must be at least the largest eigenvalue of every batch's Hessian plus damping.
        batch_size: rows of each of its products; None: the recipe's.
        rho: chance that LiSSA misses its bound, taken on trust (so that its guarantee is conditional at best).
        smoothness: the constants of the bound, vouched for or estimated.
        feature_radius: of a softmax model: the norm that no row exceeds, so that all constants are derived; rows are
            checked, never scaled.
        sigma: the noise; None: what the bound needs for a release's share of the budget.
        budget: of all releases.

    Cost: two gradients of every retained row; then p Hessian products with all of them, or tens to hundreds, or
    ``samples * steps`` with a batch. Everything in float64; rounding is not in the bound.
    """

    claim: ClassVar[Claim] = Claim.CERTIFIED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.RETAIN})
    source: ClassVar[str] = "Zhang, Dong, Wang and Li, 2024"
    not_guaranteed: ClassVar[str] = "anything of a deep network, whose constants nobody can prove"
    damping: float = 1.0
    solver: Solver = "cg"
    tolerance: float = 1e-6
    iterations: int = 1000
    samples: int = 1
    steps: int = 1000
    scale: float = 1000.0
    batch_size: int | None = None
    rho: float = 1e-9
    smoothness: Smoothness | None = None
    feature_radius: float | None = None
    sigma: float | None = None
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        counts = {"iterations": self.iterations, "samples": self.samples, "steps": self.steps}
        if self.batch_size is not None:
            counts["batch_size"] = self.batch_size
        checks = [
            (0 <= self.damping < math.inf, f"damping must be >= 0, got {self.damping}"),
            (self.solver in get_args(Solver), f'solver must be exact, cg or lissa, got "{self.solver}"'),
            (0 < self.tolerance < 1, f"tolerance must be > 0 and < 1, got {self.tolerance}"),
            (0 < self.scale < math.inf, f"scale must be > 0, got {self.scale}"),
            (0 < self.rho < 1, f"rho must be > 0 and < 1, got {self.rho}"),
            (self.sigma is None or 0 < self.sigma < math.inf, f"sigma must be > 0, got {self.sigma}"),
            (self.feature_radius is None or 0 < self.feature_radius < math.inf, "feature_radius must be > 0"),
            (self.smoothness is None or self.feature_radius is None, "give smoothness or feature_radius, not both"),
        ]
        for name, count in counts.items():
            fine = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            checks.append((fine, f"{name} must be an integer >= 1, got {count}"))
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    @property
    def share(self) -> float:
        """The mu of one release, with room for each release's chance to miss the bound if LiSSA makes it."""
        return self._budget().mu_each

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs one dense model without batch norm that was trained in a ball, and a way to size the noise."""
        norm, recipe = has_batch_norm(trained.module), trained.recipe
        softmax = recipe.model == "softmax" and recipe.loss == "cross_entropy"
        problems = {
            "projects on the ball that training kept the weights in, and the recipe has no max_norm; train with one": (
                recipe.max_norm is None
            ),
            f'adds noise to parameters, and the running statistics of "{norm}" would keep the rows; use norm="group"': (
                norm is not None
            ),
            "cannot vouch for the mask of a pruned model, which may come of the rows; use retrain": (
                recipe.pruning is not None
            ),
            "derives constants from feature_radius for the model softmax only; give smoothness instead": (
                self.feature_radius is not None and not softmax
            ),
            "cannot size the noise: give smoothness (of a softmax model feature_radius), or sigma, proving nothing": (
                self.sigma is None and self.smoothness is None and self.feature_radius is None
            ),
        }
        found = [text for text, wrong in problems.items() if wrong]
        return super().supports(trained) or (Unsupported(f"{self.name} {found[0]}") if found else None)

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        trained = task.trained
        names = tuple(name for name, one in trained.module.named_parameters() if one.requires_grad)
        guarantee = self.guarantee_for(trained)
        radius = guarantee.constants["max_norm"].value
        backed = guarantee.basis != "none"
        release = GaussianNoise(
            parameters=names,
            sensitivity=guarantee.sensitivity if backed else 2 * radius,  # that much the clipping alone gives
            sigma=guarantee.sigma,
        )
        if backed:
            guarantee = replace(guarantee, transcript=self._charged(trained, release))
        if self.feature_radius is not None:
            for records in (task.forget, task.retain):
                refuse_longer(records, self.feature_radius)
        work = started(trained, radius)
        NewtonStep(self, task, work, rng).take()
        project(work, radius)
        state = work.state_dict()
        secret = {name: state[name].clone() for name in names}
        module = trained.module
        put_with_noise(module, {name: value.double() for name, value in secret.items()}, guarantee.sigma)
        releases = (*trained.releases, release)
        done = replace(trained, module=module, secret=secret, releases=releases)
        return Done(trained=done, guarantee=guarantee, events=(release,))

    def guarantee_for(self, trained: Trained) -> Guarantee:
        """The guarantee of the next release, from settings alone; its transcript is left open.

        Raises:
            Misuse: without any way to size the noise, or if rho leaves no budget.
        """
        constants, remark = self._constants(trained)
        if self.sigma is not None:
            constants["sigma"] = setting(self.sigma, "method.sigma")
        else:
            constants["share"] = setting(self.share, "method.share")
            constants["sigma"] = derived(SIGMA, constants)
        if self.solver == "lissa" and "rho" in constants:
            constants["delta"] = setting(self.budget.delta, "method.budget.delta")
            constants["epsilon"] = derived(EPSILON_BUT_RHO, constants)
        else:
            constants["mu"] = gaussian_mu(constants)
        radius, distance = constants["max_norm"].value, constants["sensitivity"].value
        remarks = [_INTERIOR, *([remark] if remark else [])]
        if distance >= 2 * radius:
            remarks.append(
                f"Vacuous: the noise is for a distance of {distance:.6g}, and any two points of the ball are within "
                f"{2 * radius:.6g}: clipping to the ball and adding this noise gives as much without any computation."
            )
        return guarantee_of(
            trained.module,
            parameters=[name for name, one in trained.module.named_parameters() if one.requires_grad],
            constants=constants,
            delta=self.budget.delta,
            mechanism="Gaussian noise, once, on the step's result clipped to the ball",
            reference=_REFERENCE,
            transcript=None,
            remarks=remarks,
        )

    def _constants(self, trained: Trained) -> tuple[dict[str, Constant], str]:
        """The constants of the bound up to `sensitivity`, and why they prove nothing if they do not."""
        recipe = trained.recipe
        if recipe.max_norm is None:
            raise Misuse("the recipe has no max_norm; train with one")
        radius = setting(recipe.max_norm, "recipe.max_norm")
        given, why = self._given(recipe, radius), ""
        constants = {"damping": setting(self.damping, "method.damping"), **given, "max_norm": radius}
        if not given:
            why = "no constants of the objective were given"
        elif self.solver != "exact" and "gradient_lipschitz" not in given:
            why = f"{self.solver} needs gradient_lipschitz too"
        elif self.solver == "lissa":
            why = problem_of_lissa(given, self.damping, self.scale, self.steps)
        if self.solver == "cg":
            constants["tolerance"] = setting(self.tolerance, "method.tolerance")
        if not why and self.solver == "lissa":
            size = sum(one.numel() for one in trained.module.parameters() if one.requires_grad)
            constants |= {"dimension": setting(size, "model.parameters"), "rho": supplied(self.rho)}
        if not why:
            constants["sensitivity"] = derived(BOUNDS[self.solver], constants)
            if math.isfinite(constants["sensitivity"].value):
                return constants, ""
            why = "the bound is infinite: damping + lambda_min must be > 0, and the minimum must lie inside the ball"
        kept = {name: one for name, one in constants.items() if math.isfinite(one.value)}
        ball = Constant(2 * recipe.max_norm, "estimated")
        remark = (
            f"Nothing is proved of the step: {why}. The figures are those of clipping to the ball, in which the step "
            f"has no part."
        )
        return {**kept, "sensitivity": ball}, remark

    def _given(self, recipe: Recipe, radius: Constant) -> dict[str, Constant]:
        if self.feature_radius is not None:
            return softmax_constants(
                max_norm=radius,
                feature_radius=self.feature_radius,
                weight_decay=recipe.weight_decay,
                classes=recipe.model_args["outputs"],
            )
        return {} if self.smoothness is None else self.smoothness.constants()

    def _budget(self) -> Budget:
        """What is left for the noise when each release may miss its bound with probability rho."""
        if self.solver != "lissa":
            return self.budget
        requests = self.budget.requests
        epsilon, delta = self.budget.epsilon + requests * math.log1p(-self.rho), self.budget.delta - requests * self.rho
        if not (epsilon > 0 and delta > 0):
            raise Misuse(f"rho {self.rho:g} for {requests} releases leaves no budget; it must be < delta / requests")
        return replace(self.budget, epsilon=epsilon, delta=delta)

    def _charged(self, trained: Trained, release: GaussianNoise) -> Spent:
        spent = charge(trained.releases, release, self._budget())
        if self.solver != "lissa":
            return spent
        missed = -self.budget.requests * math.log1p(-self.rho)
        return replace(
            spent,
            epsilon=spent.epsilon + missed,
            delta=self.budget.delta,
            mu=None,
            budget_epsilon=self.budget.epsilon,
        )
