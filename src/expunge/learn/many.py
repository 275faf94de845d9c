"""Many models of one architecture, trained at once: seeds, subsets, shadow models.

Each model gets the initial weights and the batches that it would have alone, so that the result is that of a loop over
single trainings up to rounding, in a fraction of the time. Models are stacked along a leading axis; the forward pass is
`vmap` over it, linear layers become one batched matrix product, and a chunk of models is small enough for the cache.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, vmap

from expunge.core.errors import EmptyRetain, Misuse, Unsupported
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained, TrainingLog
from expunge.learn.build import build
from expunge.learn.loop import Report, Tally, prepare, reading_order, row_losses
from expunge.learn.models import has_batch_norm, has_dropout

_CACHE_BYTES = 4 << 20
_WINDOW = 1 << 22


def train_many(
    recipe: Recipe,
    subsets: Sequence[Records],
    seeds: Sequence[int],
    *,
    chunk: int | None = None,
    report: Report | None = None,
    tally: Tally | None = None,
) -> list[Trained]:
    """Train one model for each (subset, seed), as ``train(replace(recipe, seed=seed), subset)`` would.

    Args:
        recipe: of a single model; its seed is not used.
        subsets: selections (`take`, `select`, ...) of one set of records, one for each model; they may differ in size.
        seeds: as many seeds.
        chunk: models trained together; None fits their parameters into the processor's cache.
        report: told (stage, model steps done, model steps in all) after each step of a chunk.
        tally: counts the work.

    Returns:
        The models, in order. Against single trainings: equal within 1e-9 in float64; in float32 rounding differs, and
        grows with the number of steps.

    Raises:
        Unsupported: for batch norm (its batch statistics cannot be kept apart under vmap), dropout (its coins would be
            shared between models), sharded recipes, streamed rows.
        Misuse: if subsets and seeds differ in number, or the subsets are not selections of one set.
    """
    if len(subsets) != len(seeds) or not subsets:
        raise Misuse(f"give as many seeds as subsets and at least one, got {len(seeds)} and {len(subsets)}")
    if recipe.sharding is not None:
        raise Unsupported("a sharded recipe is several trainings already; give recipe.part(i), or use train")
    recipe = recipe.completed(subsets[0])
    models = [build(replace(recipe, seed=seed)) for seed in seeds]
    _refuse_unstackable(models[0])
    if chunk is None:
        size_bytes = sum(p.numel() * p.element_size() for p in models[0].parameters())
        chunk = max(4, min(64, _CACHE_BYTES // max(size_bytes, 1)))
    # Models with as many steps stand together, so that few chunks have models that wait for others.
    ranked = sorted(range(len(seeds)), key=lambda k: -len(subsets[k]))
    pool = _Pool.of(subsets)
    answer: dict[int, Trained] = {}
    for start in range(0, len(ranked), chunk):
        members = ranked[start : start + chunk]
        plans = [_Plan(replace(recipe, seed=seeds[k]), subsets[k], pool) for k in members]
        _Chunk([models[k] for k in members], plans, pool, report, tally or Tally()).train()
        for k, plan in zip(members, plans, strict=True):
            log = TrainingLog(steps=plan.steps, rows_read=plan.rows_read, threads=torch.get_num_threads())
            ids = frozenset(subsets[k].ids)
            answer[k] = Trained(module=models[k].eval(), recipe=plan.recipe, ids=ids, log=log)
    return [answer[k] for k in range(len(seeds))]


def _refuse_unstackable(module: nn.Module) -> None:
    name = has_batch_norm(module)
    if name is not None:
        raise Unsupported(
            f'"{name}" is a batch norm, whose running statistics cannot be kept apart for many models at once; '
            'use norm="group", or train the models one by one'
        )
    name = has_dropout(module)
    if name is not None:
        raise Unsupported(f'"{name}" drops out at random, with coins that many models would share; train one by one')


@dataclass(frozen=True)
class _Pool:
    """The one tensor that all subsets read, with its labels."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, subsets: Sequence[Records]) -> _Pool:
        x, _ = subsets[0].shared()
        y = torch.zeros((len(x), *subsets[0].y.shape[1:]), dtype=subsets[0].y.dtype, device=subsets[0].y.device)
        for records in subsets:
            tensor, rows = records.shared()
            if tensor is not x:
                raise Misuse("subsets must be selections of one set of records; make them with take, select or without")
            if not len(records):
                raise EmptyRetain("a subset holds no rows; give each model at least one")
            y[rows.to(y.device)] = records.y
        return cls(x, y)


class _Plan:
    """Which rows one model reads at which step, and with which learning rate."""

    def __init__(self, recipe: Recipe, records: Records, pool: _Pool) -> None:
        self.recipe, self.records = recipe, records
        self.rows = records.shared()[1]
        self.steps_in_epoch = math.ceil(len(records) / recipe.batch_size)
        self.steps = self.steps_in_epoch * recipe.epochs
        self.rows_read = len(records) * recipe.epochs

    def window(self, start: int, count: int) -> tuple[Int[Tensor, " places"], list[float]]:
        """Rows of the pool for `count` steps from `start` on, -1 where there is none, and each step's learning rate."""
        size, per_epoch = self.recipe.batch_size, self.steps_in_epoch
        places = torch.full((count, size), -1)
        rates = [0.0] * count
        for epoch in range(start // per_epoch, min(math.ceil((start + count) / per_epoch), self.recipe.epochs)):
            order = self.rows[reading_order(self.recipe, self.records, "whole", epoch)]
            padded = torch.full((per_epoch * size,), -1)
            padded[: len(order)] = order
            first, last = max(start, epoch * per_epoch), min(start + count, (epoch + 1) * per_epoch)
            inside = slice(first - epoch * per_epoch, last - epoch * per_epoch)
            places[first - start : last - start] = padded.view(per_epoch, size)[inside]
            rate = self.recipe.optimiser_args["lr"] * self.recipe.lr_factor(epoch)
            rates[first - start : last - start] = [rate] * (last - first)
        return places, rates


class _Chunk:
    """Models that are trained together; the first ones make the most steps."""

    def __init__(
        self, models: list[nn.Module], plans: list[_Plan], pool: _Pool, report: Report | None, tally: Tally
    ) -> None:
        self.models, self.plans, self.pool, self.report, self.tally = models, plans, pool, report, tally
        self.recipe = plans[0].recipe
        self.dtype = getattr(torch, self.recipe.dtype)
        self.losses = row_losses(self.recipe)
        device = pool.x.device
        self.base = _with_stackable_layers(models[0]).to(device)
        named = [dict(model.named_parameters()) for model in models]
        self.stacked = {name: torch.stack([p[name].detach() for p in named]).to(device) for name in named[0]}
        self.update = _Adam(self.recipe) if self.recipe.optimiser == "adam" else _Sgd(self.recipe)

    def train(self) -> None:
        """Train all models of the chunk, and write the result back into them."""
        steps = self.plans[0].steps
        width = max(self.plans[0].steps_in_epoch, 1)
        width = max(1, min(width, _WINDOW // (len(self.plans) * self.recipe.batch_size)))
        for start in range(0, steps, width):
            self._window(start, min(width, steps - start))
            if self.report is not None:
                self.report("many", min(start + width, steps), steps)
        for index, model in enumerate(self.models):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(self.stacked[name][index])
        self.tally.gradients += sum(plan.rows_read for plan in self.plans)
        self.tally.rows_read += sum(plan.rows_read for plan in self.plans)

    def _window(self, start: int, count: int) -> None:
        active = [sum(plan.steps > step for plan in self.plans) for step in range(start, start + count)]
        windows = [plan.window(start, count) for plan in self.plans[: active[0]]]
        places = torch.stack([window[0] for window in windows], dim=1)
        full = (places >= 0).all(2)
        rates = torch.tensor([window[1] for window in windows], dtype=torch.float64).T
        leaves: dict[str, Tensor] = {}
        for step in range(count):
            models = active[step]
            if not leaves or models != active[step - 1]:
                leaves = {name: value[:models].detach().requires_grad_() for name, value in self.stacked.items()}
            weights = None if bool(full[step, :models].all()) else _weights(places[step, :models])
            grads = self._gradients(leaves, places[step, :models], weights)
            self.update(leaves, grads, rates[step, :models])

    def _gradients(
        self,
        leaves: dict[str, Tensor],
        places: Int[Tensor, "models batch"],
        weights: Float[Tensor, "models batch"] | None,
    ) -> list[Tensor]:
        flat = places.clamp_min(0).flatten().to(self.pool.x.device)
        x = prepare(self.pool.x.index_select(0, flat), self.dtype).unflatten(0, places.shape)
        y = self.pool.y.index_select(0, flat.to(self.pool.y.device))
        outputs = vmap(lambda parameters, rows: functional_call(self.base, parameters, (rows,)))(leaves, x)
        losses = self.losses(outputs.flatten(0, 1), y).view(places.shape)
        mean = losses.sum() / places.shape[1] if weights is None else (losses * weights.to(losses)).sum()
        return list(torch.autograd.grad(mean, list(leaves.values())))


def _weights(places: Int[Tensor, "models batch"]) -> Float[Tensor, "models batch"]:
    """One over the number of rows for each row that is there, zero for the padding of a last, smaller batch."""
    there = (places >= 0).to(torch.float64)
    return there / there.sum(1, keepdim=True)


class _Sgd:
    """``torch.optim.SGD`` on stacked parameters, with a learning rate for each model."""

    def __init__(self, recipe: Recipe) -> None:
        self.momentum = float(recipe.optimiser_args.get("momentum", 0.0))
        self.nesterov = bool(recipe.optimiser_args.get("nesterov", False))
        self.decay = recipe.weight_decay
        self.velocity: dict[str, Tensor] = {}

    def __call__(self, leaves: dict[str, Tensor], grads: list[Tensor], rates: Float[Tensor, " models"]) -> None:
        with torch.no_grad():
            for (name, value), grad in zip(leaves.items(), grads, strict=True):
                if self.decay:
                    grad = grad.add(value, alpha=self.decay)
                if self.momentum:
                    if name not in self.velocity:
                        self.velocity[name] = torch.zeros_like(value)
                    velocity = self.velocity[name][: len(value)].mul_(self.momentum).add_(grad)
                    grad = grad.add(velocity, alpha=self.momentum) if self.nesterov else velocity
                _descend(value, grad, rates)


class _Adam:
    """``torch.optim.Adam`` on stacked parameters, with a learning rate for each model."""

    def __init__(self, recipe: Recipe) -> None:
        self.betas: Any = recipe.optimiser_args.get("betas", (0.9, 0.999))
        self.eps = float(recipe.optimiser_args.get("eps", 1e-8))
        self.decay = recipe.weight_decay
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.step = 0

    def __call__(self, leaves: dict[str, Tensor], grads: list[Tensor], rates: Float[Tensor, " models"]) -> None:
        self.step += 1
        first, second = self.betas
        with torch.no_grad():
            for (name, value), grad in zip(leaves.items(), grads, strict=True):
                if self.decay:
                    grad = grad.add(value, alpha=self.decay)
                if name not in self.moments:
                    self.moments[name] = (torch.zeros_like(value), torch.zeros_like(value))
                mean, square = (moment[: len(value)] for moment in self.moments[name])
                mean.lerp_(grad, 1 - first)
                square.mul_(second).addcmul_(grad, grad, value=1 - second)
                scale = (square / (1 - second**self.step)).sqrt_().add_(self.eps)
                _descend(value, mean / (1 - first**self.step) / scale, rates)


def _descend(value: Tensor, direction: Tensor, rates: Float[Tensor, " models"]) -> None:
    if bool((rates == rates[0]).all()):
        value.sub_(direction, alpha=float(rates[0]))
    else:
        value.addcmul_(direction, rates.to(value).view(-1, *[1] * (value.dim() - 1)), value=-1)


def _with_stackable_layers(module: nn.Module) -> nn.Module:
    """A copy whose linear layers run as one batched product under vmap; vmap's own rule for them is half as fast."""
    base = copy.deepcopy(module).train()
    for layer in base.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = _StackableLinear
    return base


class _StackableLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return answer


class _Linear(torch.autograd.Function):
    """``x @ weight.T + bias`` of one model; under vmap, of stacked models."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to keep: it only runs under vmap, where autograd sees `_StackedLinear` instead."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        product: Tensor = _StackedLinear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
        return product.reshape(*x.shape[:-1], -1), 0


class _StackedLinear(torch.autograd.Function):
    """(models, rows, in) to (models, rows, out) as one batched product, its weight gradients laid out as the weights.

    torch's own derivative lays them out transposed, which makes the update four times slower.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None,
            torch.bmm(grad.transpose(1, 2), x),
            grad.sum(1) if ctx.needs_input_grad[2] else None,
        )
