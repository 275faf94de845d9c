"""The linear system of one damped Newton step on the retained objective, and what its constants look like on data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import Protocol

import torch
from torch import Generator, Tensor, nn

from expunge.calculus import Objective, conjugate_gradients, dense, lissa, solve_dense
from expunge.calculus.solvers import Product
from expunge.certify.newton_bound import Smoothness, Solver
from expunge.core import coins
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.ball import project
from expunge.learn.loop import Tally, prepare, row_losses
from expunge.unlearn.method import Task

_BATCH = 1024


class Settings(Protocol):
    """How to solve; see `NewtonUnlearning`."""

    @property
    def damping(self) -> float:
        """Added to each eigenvalue."""

    @property
    def solver(self) -> Solver:
        """Which."""

    @property
    def tolerance(self) -> float:
        """Relative residual of conjugate gradients."""

    @property
    def iterations(self) -> int:
        """Their products at most."""

    @property
    def samples(self) -> int:
        """Series of LiSSA."""

    @property
    def steps(self) -> int:
        """Terms of each."""

    @property
    def scale(self) -> float:
        """Its scale."""

    @property
    def batch_size(self) -> int | None:
        """Rows of each of its products."""


class System:
    """Gradient and Hessian of mean loss plus weight decay over some rows, at a module's parameters, in float64."""

    def __init__(self, module: nn.Module, trained: Trained, records: Records, rng: Generator, tally: Tally) -> None:
        """`module` is float64, in evaluation mode, and read as it is now."""
        self.records, self.rng, self.tally = records, rng, tally
        self.decay = trained.recipe.weight_decay
        self.objective = Objective(module, row_losses(trained.recipe))

    def gradient(self) -> Tensor:
        """Of the whole objective. Cost: one gradient a row."""
        total = torch.zeros_like(self.objective.vector())
        for x, y in self.batches(_BATCH, "newton", 0):
            total += self.objective.gradient(x, y)
        return total / len(self.records) + self.decay * self.objective.vector()

    def product(self, v: Tensor) -> Tensor:
        """The Hessian of the whole objective times `v`. Cost: one product a row."""
        total = torch.zeros_like(v)
        for x, y in self.batches(_BATCH, "newton", 0):
            total += self.objective.hessian_product(x, y, v)
        return total / len(self.records) + self.decay * v

    def batch_products(self, size: int, name: str) -> Iterator[Product]:
        """The Hessian's products over one batch after another, for ever: each pass in an order of its own."""
        for epoch in count():
            for x, y in self.batches(size, name, epoch):
                yield partial(self._of_batch, x, y)

    def _of_batch(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self.objective.hessian_product(x, y, v) / len(y) + self.decay * v

    def batches(self, size: int, name: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows in an order that their keys make, so that sums are the same to the bit wherever the rows lie."""
        order = torch.from_numpy(coins.order(self.records.keys, self.rng.initial_seed(), name, epoch))
        split = order.split(size)
        for positions, (x, y) in zip(split, self.records.batches(split), strict=True):
            self.tally.saw(self.records, positions, x, y)
            yield prepare(x, torch.float64), y if not y.is_floating_point() else y.double()


class NewtonStep(System):
    """One step on the retained rows' objective."""

    def __init__(self, settings: Settings, task: Task, module: nn.Module, rng: Generator) -> None:
        """A step of `module`, float64, from where it is."""
        super().__init__(module, task.trained, task.retain, rng, task.tally)
        self.settings = settings
        self.batch_size = settings.batch_size or task.trained.recipe.batch_size

    def take(self) -> None:
        """Write ``w - (H + damping)^-1 g`` into the module."""
        here = self.objective.vector()
        self.objective.put(here - self.solve(self.gradient()))

    def solve(self, b: Tensor) -> Tensor:
        """``(H + damping)^-1 b``, or what the solver makes of it.

        Raises:
            Misuse: if the damped Hessian is not positive definite, or the solver does not get there. The message holds
                no number that the rows decide.
        """
        wanted = self.settings
        if wanted.solver == "lissa":
            return self._by_series(b)
        try:
            if wanted.solver == "exact":
                matrix = dense(self.product, len(b), b)
                return solve_dense(matrix + wanted.damping * torch.eye(len(b), dtype=b.dtype, device=b.device), b).x
            found = conjugate_gradients(
                self.product, b, ridge=wanted.damping, tolerance=wanted.tolerance, most=wanted.iterations
            )
        except Misuse:
            raise Misuse(
                f"the Hessian plus damping {wanted.damping:g} is not positive definite; raise damping"
            ) from None
        if not found.converged:
            raise Misuse(
                f"{wanted.iterations} products did not reach the tolerance {wanted.tolerance:g}; raise iterations, "
                "damping or tolerance"
            )
        return found.x

    def _by_series(self, b: Tensor) -> Tensor:
        wanted, total = self.settings, torch.zeros_like(b)
        for sample in range(wanted.samples):
            products = islice(self.batch_products(self.batch_size, f"lissa-{sample}"), wanted.steps)
            try:
                total += lissa(products, b, scale=wanted.scale, damping=wanted.damping, unit=1.0).x
            except Misuse:
                raise Misuse(f"LiSSA diverged: raise its scale, now {wanted.scale:g}") from None
        return total / wanted.samples


def estimate_smoothness(
    trained: Trained, records: Records, *, rng: Generator, steps: int = 40, pairs: int = 4, distance: float = 0.1
) -> Smoothness:
    """What the constants of the bound look like near a model, which proves nothing of the ball.

    Each errs on the hopeful side: the smallest eigenvalue that Lanczos finds is never below the true one, here and
    nowhere else; the largest not above; and the Hessian is compared along a few random directions only.

    Args:
        trained: the model.
        records: rows that the objective is a mean over; some thousand do.
        rng: names the directions.
        steps: of Lanczos' method (1950), reorthogonalised: products for the eigenvalues.
        pairs: directions along which Hessians are compared, ten products each.
        distance: how far apart the two are, as a share of the weights' norm.

    Returns:
        The constants with source ``estimated``; the gradient's norm is that here.
    """
    module = copy.deepcopy(trained.module).double().eval()
    system = System(module, trained, records, rng, Tally())
    here = system.objective.vector()
    low, high = lanczos(system.product, here, coins.child(rng, "lanczos"), steps)
    gap = distance * max(float(here.norm()), 1e-12)
    steepest = 0.0
    for pair in range(pairs):
        direction = _unit(here, coins.child(rng, "pair", pair))
        steepest = max(steepest, _change(system, here, gap * direction, coins.child(rng, "change", pair)) / gap)
    return Smoothness(
        hessian_lipschitz=steepest,
        lambda_min=low,
        gradient_norm=float(system.gradient().norm()),
        gradient_lipschitz=max(abs(low), abs(high)),
        source="estimated",
    )


def lanczos(product: Product, like: Tensor, rng: Generator, steps: int) -> tuple[float, float]:
    """Smallest and largest Ritz value of a symmetric product: within the spectrum, so no bounds of it."""
    basis, diagonal, beside = [_unit(like, rng)], list[float](), list[float]()
    for _ in range(min(steps, len(like))):
        image = product(basis[-1])
        diagonal.append(float(torch.dot(image, basis[-1])))
        for _ in range(2):  # once is not enough in floating point
            for vector in basis:
                image = image - torch.dot(vector, image) * vector
        rest = float(image.norm())
        if rest <= 1e-10 * max(map(abs, diagonal)) or len(diagonal) == min(steps, len(like)):
            break
        beside.append(rest)
        basis.append(image / rest)
    middle, side = torch.tensor(diagonal, dtype=torch.float64), torch.tensor(beside, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.diag(middle) + torch.diag(side, 1) + torch.diag(side, -1))
    return float(values[0]), float(values[-1])


def _change(system: System, here: Tensor, shift: Tensor, rng: Generator) -> float:
    """Norm of the difference of the Hessians at two points, by five steps of the power method: from below."""
    vector, norm = _unit(here, rng), 0.0
    for _ in range(5):
        system.objective.put(here + shift)
        image = system.product(vector)
        system.objective.put(here)
        image = image - system.product(vector)
        norm = float(image.norm())
        if not norm > 0 or not math.isfinite(norm):
            break
        vector = image / norm
    return norm


def _unit(like: Tensor, rng: Generator) -> Tensor:
    vector = torch.randn(len(like), generator=rng, dtype=torch.float64).to(like.device)
    answer: Tensor = vector / vector.norm()
    return answer


def started(trained: Trained, radius: float) -> nn.Module:
    """The un-noised model before in float64, in the ball: bounds ask nothing else of a start."""
    work = copy.deepcopy(trained.module).double().eval()
    with torch.no_grad():
        for name, parameter in work.named_parameters():
            if name in trained.secret:
                parameter.copy_(trained.secret[name])
    project(work, radius)
    return work


def refuse_longer(records: Records, radius: float) -> None:
    """Misuse for a row that is longer than the constants allow."""
    for x, _ in records.batches(torch.arange(len(records)).split(4096)):
        norms = torch.linalg.vector_norm(prepare(x, torch.float64).flatten(1), dim=1)
        if bool((norms > radius).any()):
            raise Misuse(f"a row is longer than feature_radius {radius:g}; scale the rows before training, or raise it")
