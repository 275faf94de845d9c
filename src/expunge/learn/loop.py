"""The inner training loop: deterministic, quick, resumable at any step.

Rows are read in an order that is a function of the recipe's seed and of each row's own owner and content, so that the
order of the rows in the set, and the rows that are not in it, change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core import coins
from expunge.core.errors import BadRecipe, EmptyRetain, Stopped
from expunge.core.mask import Held, Mask
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import State, TrainingLog, copy_state
from expunge.learn.ball import Ball
from expunge.learn.build import build_name, seeded
from expunge.learn.resume import Progress, Saver

Report = Callable[[str, int, int], None]


@dataclass
class Tally:
    """Counts work as it is done."""

    gradients: int = 0
    rows_read: int = 0

    def saw(self, records: Records, positions: Tensor, x: Tensor, y: Tensor) -> None:
        """A step is about to be made on the rows at these positions, which were read as `x` and `y`, as stored."""
        self.gradients += len(y)
        self.rows_read += len(y)


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What training should leave behind beside the model.

    Attributes:
        batches: the ids of each step's rows.
        every: parameters and buffers after every so many steps; 0 keeps none.
    """

    batches: bool = False
    every: int = 0


NOTHING = Keep()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within: torch computes with so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepare(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as a model reads them: pixels (uint8) divided by 255, floats cast, other integers (tokens) as they are.

    Uses fixed constants only: scaling by statistics of the data would carry removed rows into every later model.
    """
    if x.dtype is torch.uint8:
        return x.to(dtype).mul_(1 / 255)
    return x.to(dtype) if x.is_floating_point() else x


def mean_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Float[Tensor, ""]]:
    """Mean over rows of the recipe's loss, of outputs (n, outputs) and labels; mse sums over the targets of a row."""
    if recipe.loss == "cross_entropy":
        return nn.functional.cross_entropy
    return lambda outputs, y: (outputs - y.view_as(outputs)).square().sum(-1).mean()


def row_losses(recipe: Recipe) -> Callable[[Tensor, Tensor], Float[Tensor, " n"]]:
    """The recipe's loss of each row."""
    if recipe.loss == "cross_entropy":
        return lambda outputs, y: nn.functional.cross_entropy(outputs, y, reduction="none")
    return lambda outputs, y: (outputs - y.view_as(outputs)).square().sum(-1)


def optimiser_of(recipe: Recipe, module: nn.Module) -> torch.optim.Optimizer:
    """torch's optimiser for the recipe; weight decay is the gradient of ``weight_decay / 2 * ||w||^2``."""
    args = dict(recipe.optimiser_args)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD(parameters, weight_decay=recipe.weight_decay, fused=True, **args)
    return torch.optim.Adam(parameters, weight_decay=recipe.weight_decay, fused=True, **args)


@cache
def warm_up() -> None:
    """Have torch load now what it loads when the first optimiser is made: seconds, and nobody's work."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def reading_order(recipe: Recipe, records: Records, stage: str, epoch: int) -> Tensor:
    """(n,) positions in the order in which this epoch of this stage reads the rows."""
    return torch.from_numpy(coins.order(records.keys, recipe.seed, "order", stage, epoch))


def fit(
    module: nn.Module,
    recipe: Recipe,
    records: Records,
    *,
    stage: str = "whole",
    begin: int = 0,
    epochs: int | None = None,
    steps: int | None = None,
    mask: Mask | None = None,
    mark: int = 0,
    keep: Keep = NOTHING,
    saver: Saver | None = None,
    report: Report | None = None,
    tally: Tally | None = None,
) -> TrainingLog:
    """Train the module in place.

    Args:
        module: on the device and of the dtype that it will be trained with.
        recipe: the coins, the objective and the optimiser.
        records: at least one row.
        stage: name of this training among those of the same recipe; part of the name of its coins.
        begin: the epoch of the recipe's schedule that the first one is.
        epochs: passes over the rows; the recipe's if None.
        steps: stop after so many steps, perhaps within an epoch; None makes all of them.
        mask: the entries that may move; the others keep the value that they have now.
        mark: keep a checkpoint after this step too; 0: of no step.
        keep: what to leave behind beside the model.
        saver: where to save, and to resume from.
        report: told (stage, steps done, steps in all) now and then.
        tally: counts the work.

    Returns:
        What training left behind.

    Raises:
        EmptyRetain: without rows.
        BadRecipe: if the loss becomes NaN or infinite, or the mask holds what the recipe's `max_norm` would move.
        Stopped: at a keyboard interrupt, if there is a saver; training goes on from the last saved step.
    """
    if not len(records):
        raise EmptyRetain("there are no rows to train on; give at least one")
    epochs = recipe.epochs if epochs is None else epochs
    if steps is not None:
        epochs = min(epochs, math.ceil(steps / math.ceil(len(records) / recipe.batch_size)))
    run = _Run(module, recipe, records, stage, begin, epochs, steps, mask, mark, keep, saver, report, tally or Tally())
    with seeded(recipe.seed, "dropout", stage), exact_kernels(records.device):
        return run.go()


class _Run:
    """One call of `fit`: what it knows, so that saving and resuming see all of it."""

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        records: Records,
        stage: str,
        begin: int,
        epochs: int,
        steps: int | None,
        mask: Mask | None,
        mark: int,
        keep: Keep,
        saver: Saver | None,
        report: Report | None,
        tally: Tally,
    ) -> None:
        self.module, self.recipe, self.records, self.stage, self.epochs = module, recipe, records, stage, epochs
        self.begin, self.mark, self.keep = begin, mark, keep
        self.saver, self.report, self.tally = saver, report, tally
        self.held = None if mask is None else Held(mask, module)
        self.ball = Ball(module, recipe.max_norm, mask)
        self.optimiser = optimiser_of(recipe, module)
        self.loss = mean_loss(recipe)
        self.dtype = getattr(torch, recipe.dtype)
        self.steps_in_epoch = math.ceil(len(records) / recipe.batch_size)
        self.steps = epochs * self.steps_in_epoch if steps is None else min(steps, epochs * self.steps_in_epoch)
        self.losses: list[float] = []
        self.checkpoints: dict[int, State] = {}
        self.at = Progress()

    def go(self) -> TrainingLog:
        """Train from wherever the saver stands."""
        self.module.train()
        if self.saver is not None:
            self.at = self.saver.restore(self.stage, self.module, self.optimiser)
            self.losses = list(self.at.losses)
            self.checkpoints = self.saver.checkpoints(self.stage, self.at.step)
        self.ball.project()
        try:
            for epoch in range(len(self.losses), self.epochs):
                self._epoch(epoch)
        except KeyboardInterrupt:  # a step may be half done, so nothing is saved here: the last saved state stands
            if self.saver is None:
                raise
            raise Stopped(
                f"interrupted at step {self.at.step:,}; go on with the same command and --resume {self.saver.root}"
            ) from None
        self.module.eval()
        return TrainingLog(
            steps=self.at.step,
            rows_read=self._rows_read(),
            threads=torch.get_num_threads(),
            build=build_name(self.records.device),
            losses=tuple(self.losses),
            batches=tuple(self._batch_ids()) if self.keep.batches else (),
            checkpoints=self.checkpoints,
        )

    def _epoch(self, epoch: int) -> None:
        recipe, module, optimiser = self.recipe, self.module, self.optimiser
        for group in optimiser.param_groups:
            group["lr"] = recipe.optimiser_args["lr"] * recipe.lr_factor(self.begin + epoch)
        batches = reading_order(recipe, self.records, self.stage, epoch).split(recipe.batch_size)
        first = self.at.step - epoch * self.steps_in_epoch
        total = torch.zeros((), dtype=torch.float64, device=self.records.device) + self.at.partial_loss
        last = min(self.steps - epoch * self.steps_in_epoch, len(batches))
        chosen = batches[first:last]
        for positions, (x, y) in zip(chosen, self.records.batches(chosen), strict=True):
            self.tally.saw(self.records, positions, x, y)
            optimiser.zero_grad()
            loss = self.loss(module(prepare(x, self.dtype)), y)
            loss.backward()
            optimiser.step()
            if self.held is not None:
                self.held.put_back()
            self.ball.project()
            total += loss.detach() * len(y)
            self.at.step += 1
            self._after_step(total)
        rows = min(last * recipe.batch_size, len(self.records))
        self._after_epoch(epoch, float(total) / rows)

    def _after_step(self, total: Tensor) -> None:
        step = self.at.step
        if step == self.mark or (self.keep.every and step % self.keep.every == 0):
            self.checkpoints[step] = copy_state(self.module)
            if self.saver is not None:
                self.saver.keep_checkpoint(self.stage, step, self.checkpoints[step])
        if self.saver is not None and self.saver.due(step) and step % self.steps_in_epoch:
            self.at.partial_loss = float(total)
            self.saver.save(self.stage, self.module, self.optimiser, self.at)
        if self.report is not None and step % 16 == 0:
            self.report(self.stage, step, self.steps)

    def _after_epoch(self, epoch: int, loss: float) -> None:
        if not math.isfinite(loss):
            lr = self.recipe.optimiser_args["lr"]
            raise BadRecipe(f"training diverged in epoch {epoch + 1} (loss {loss}); lower optimiser_args lr, now {lr}")
        self.losses.append(loss)
        self.at.losses, self.at.partial_loss = tuple(self.losses), 0.0
        if self.saver is not None and (epoch + 1 == self.epochs or self.saver.due(self.at.step)):
            self.saver.save(self.stage, self.module, self.optimiser, self.at)

    def _rows_read(self) -> int:
        whole, rest = divmod(self.steps, self.steps_in_epoch)
        return whole * len(self.records) + rest * self.recipe.batch_size

    def _batch_ids(self) -> Iterator[tuple[str, ...]]:
        for step in range(self.steps):
            epoch, place = divmod(step, self.steps_in_epoch)
            if not place:
                batches = reading_order(self.recipe, self.records, self.stage, epoch).split(self.recipe.batch_size)
            yield tuple(self.records.ids[i] for i in batches[place].tolist())


class exact_kernels:
    """Within: only kernels that give the same bits each time. Kernels of the CPU do so at a fixed thread count."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def __enter__(self) -> None:
        self.before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
        if self.on_gpu:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False

    def __exit__(self, *_: object) -> None:
        if self.on_gpu:
            torch.use_deterministic_algorithms(self.before[0])
            torch.backends.cudnn.benchmark = self.before[1]
