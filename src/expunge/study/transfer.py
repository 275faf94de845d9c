"""Transfer: forget classes of a source task, then learn another task from there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from expunge.audit.metrics import accuracy
from expunge.core.coins import child, generator
from expunge.core.errors import BadRecords, Misuse, Unsupported
from expunge.core.estimate import Estimate, mean
from expunge.core.mask import Mask
from expunge.core.protocols import Method
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.request import Request
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import fit
from expunge.learn.models import head_of
from expunge.learn.pruning import mask_of_zeros
from expunge.learn.training import train

Tune = Literal["all", "head"]
ORIGINAL, RETRAIN, SCRATCH = "original", "retrain", "scratch"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where learning the target task started from, and where it came to.

    Attributes:
        model: ``original``, ``retrain``, ``scratch`` or a method's name.
        test: accuracy on the target task's test rows; the interval is over rows of this one model.
        seconds: of wall time to make the source model from the original one (for ``original`` and ``retrain`` their
            training); learning the target task is not in it.
    """

    model: str
    test: Estimate
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Target accuracy from each start, for each seed.

    Attributes:
        forgotten: the source classes that were removed.
        tune: what was trained on the target task: ``all`` parameters or the ``head`` alone.
        seeds: one a replica.
        replicas: the starts of each seed.
    """

    forgotten: tuple[int, ...]
    tune: Tune
    seeds: tuple[int, ...]
    replicas: tuple[tuple[Start, ...], ...]

    def summary(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One line a start: means over seeds with Student's t intervals.

        `gap` is the difference to exact retraining of the same seed, `gain` to training from scratch: above zero, the
        source helped.
        """
        lines = []
        for place, start in enumerate(self.replicas[0]):
            rows = [({one.model: one for one in replica}, replica[place]) for replica in self.replicas]
            values = {
                "test": [one.test.value for _, one in rows],
                "gap": [one.test.value - known[RETRAIN].test.value for known, one in rows],
                "gain": [one.test.value - known[SCRATCH].test.value for known, one in rows],
                "seconds": [one.seconds for _, one in rows],
            }
            figures = {name: mean(numbers, level) for name, numbers in values.items()}
            lines.append({"model": start.model, "seeds": len(rows), **figures})
        return lines

    def to_json(self) -> dict[str, Any]:
        """All fields and the summary as plain JSON values."""
        summary = [
            {name: value.to_json() if isinstance(value, Estimate) else value for name, value in line.items()}
            for line in self.summary()
        ]
        return {**asdict(self), "summary": summary}


def transfer(
    recipe: Recipe,
    source: Records,
    target: Records,
    target_test: Records,
    methods: Mapping[str, Method],
    *,
    forget: Sequence[int],
    epochs: int = 1,
    lr: float | None = None,
    tune: Tune = "all",
    seeds: Sequence[int] = (0, 1, 2),
    report: Callable[[int, Start], None] | None = None,
) -> Transfer:
    """Train on the source, forget some of its classes, learn the target task from there, and measure that.

    Args:
        recipe: of the source model; learning the target task follows it too but for what is given below.
        source: training rows of the source task.
        target: training rows of the target task, of the same shape; its classes may be others.
        target_test: test rows of the target task.
        methods: by the names that the table shall have.
        forget: the source classes to remove, in one request.
        epochs: passes over the target rows.
        lr: of learning the target task; None: the recipe's.
        tune: train all parameters there, or the head alone (a linear probe: what the body has kept).
        seeds: at least two, as the spread over seeds is what the intervals are of.
        report: told (seed, start) of each that is finished.

    Returns:
        Target accuracy from the original model, from exact retraining, from each method's result and from scratch. All
        four have a new head, drawn by the same coins. That a model transfers well says nothing of what it remembers.

    Raises:
        BadRecords: if target rows are of another shape.
        Misuse: for fewer than two seeds, no class to forget, or a method's name that is another line's.

    Cost: two source trainings a seed, the methods, and ``3 + methods`` trainings on the target rows.
    """
    if len(set(seeds)) != len(seeds) or len(seeds) < 2 or not forget:
        raise Misuse(f"give at least two different seeds and a class, got {list(seeds)} and {list(forget)}")
    if target.shape != source.shape or target_test.shape != source.shape:
        raise BadRecords(f"source rows are {source.shape}, target rows {target.shape} and {target_test.shape}; resize")
    taken = {ORIGINAL, RETRAIN, SCRATCH} & set(methods)
    if taken:
        raise Misuse(f'a method may not be called "{min(taken)}": that is another line of the table; rename it')
    replicas = []
    for seed in seeds:
        starts = []
        goal = _goal(replace(recipe, seed=seed), target, epochs, lr)
        for name, (module, seconds) in _sources(replace(recipe, seed=seed), source, methods, forget).items():
            learnt = learn_target(module, goal, target, tune=tune)
            starts.append(Start(model=name, test=accuracy(learnt, target_test), seconds=seconds))
            if report is not None:
                report(seed, starts[-1])
        replicas.append(tuple(starts))
    return Transfer(forgotten=tuple(forget), tune=tune, seeds=tuple(seeds), replicas=tuple(replicas))


def learn_target(source: nn.Module | None, goal: Recipe, target: Records, *, tune: Tune = "all") -> Trained:
    """A model of the target task that starts from the source's body, with a fresh head; from scratch if None.

    If the recipe prunes, weights that are zero in the source stay so; other zeros (l1-sparse leaves some) may move.
    From scratch, it prunes by its own rule; with ``tune="head"`` the body is left as it was drawn, dense.

    Args:
        source: read, never written to.
        goal: the recipe of the target task, completed with its shape and classes.
        target: training rows.
        tune: what is trained. With ``head`` the body stays as it is, batch-norm statistics too, and drops no units.

    Raises:
        Misuse: if the source is of another architecture.
        Unsupported: if it has no body.
    """
    if source is None and tune == "all":
        return train(goal, target)
    module = build(goal).to(target.device)
    mask = Mask({})
    if source is not None:
        _carry(source, module)
        mask = mask if goal.pruning is None else mask_of_zeros(module)
    if tune == "head":
        head = head_of(module)[0]
        mask = Mask(
            {
                name: torch.zeros_like(parameter, dtype=torch.bool)
                for name, parameter in module.named_parameters()
                if not _in(name, head)
            }
        )
    # The head is a linear layer, the same in both modes: all else must neither drop units nor count rows.
    still = module.register_forward_pre_hook(lambda body, _: _evaluate(body)) if tune == "head" else None
    log = fit(module, goal, target, stage="transfer", mask=mask)
    if still is not None:
        still.remove()
    return Trained(module=module, recipe=goal, ids=frozenset(target.ids), log=log)


def _evaluate(module: nn.Module) -> None:
    module.eval()


def _carry(source: nn.Module, module: nn.Module) -> None:
    """Copy all but the head from the source into the module."""
    head = head_of(module)[0]
    kept = {name: tensor for name, tensor in module.state_dict().items() if _in(name, head)}
    body = {name: tensor for name, tensor in source.state_dict().items() if not _in(name, head)}
    if not body:
        raise Unsupported("there is nothing to carry over: the model is its head alone; use a deeper one, such as mlp")
    try:
        module.load_state_dict({**body, **kept})
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise Misuse(f"the source is of another architecture than the recipe's model: {reason}") from None


def _in(name: str, head: str) -> bool:
    return name.startswith(f"{head}." if head else "")


def _goal(recipe: Recipe, target: Records, epochs: int, lr: float | None) -> Recipe:
    args = {**recipe.optimiser_args, **({} if lr is None else {"lr": lr})}
    known = {name: value for name, value in recipe.model_args.items() if name not in ("shape", "outputs")}
    pruning = recipe.pruning
    if pruning is not None:
        recipe = replace(recipe, pruning=replace(pruning, rewind=min(pruning.rewind, epochs)))
    return replace(recipe.staged(epochs), model_args=known, optimiser_args=args).completed(target)


def _sources(
    recipe: Recipe, source: Records, methods: Mapping[str, Method], forget: Sequence[int]
) -> dict[str, tuple[nn.Module | None, float]]:
    """The bodies to start from, each with the seconds that it took."""
    ids = [record_id for label in forget for record_id in source.of_class(label).ids]
    original, seconds = _timed(lambda: train(recipe, source))
    found: dict[str, tuple[nn.Module | None, float]] = {ORIGINAL: (original.module, seconds)}
    for name, method in methods.items():
        rng = child(generator(recipe.seed), "transfer", name)
        after, seconds = _timed(
            lambda method=method, rng=rng: method(original, source, Request.remove(ids), rng=rng).trained  # type: ignore[misc]
        )
        found[name] = (after.module, seconds)
    retrained, seconds = _timed(lambda: train(recipe, source.without(ids)))
    return {**found, RETRAIN: (retrained.module, seconds), SCRATCH: (None, 0.0)}


def _timed(work: Callable[[], Trained]) -> tuple[Trained, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started
