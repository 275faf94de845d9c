"""Rewind-to-delete: back to a checkpoint of full-batch training, and on from there without the removed rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Generator, nn

from expunge.certify.accountant import Budget, charge
from expunge.certify.constants import derived, estimated, setting, supplied
from expunge.certify.full_batch import (
    MONTH_S,
    budget_constants,
    fresh_until,
    is_softmax,
    kept_event,
    number,
    refuse_outside,
    softmax_constants,
    until_of,
)
from expunge.certify.guarantee import gaussian_mu, guarantee_of
from expunge.certify.noise import add_noise
from expunge.certify.rewind_bound import ANY_DISTANCE, CONVEX_DISTANCE, DERIVATIONS, SIGMA, SMOOTH_DISTANCE
from expunge.core.claim import Claim, Constant
from expunge.core.errors import Misuse, Unsupported
from expunge.core.events import Event, GaussianNoise, Retrained
from expunge.core.protocols import Need
from expunge.core.trained import State, Trained, device_of
from expunge.learn.build import EXTERNAL, build
from expunge.learn.layers import PixelMax
from expunge.learn.loop import fit
from expunge.learn.models import has_batch_norm, has_dropout
from expunge.unlearn.method import Done, Method, Task

__all__ = ["DERIVATIONS", "RewindToDelete"]

_KINKED = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.Threshold,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    PixelMax,
)


@dataclass(frozen=True, kw_only=True)
class RewindToDelete(Method):
    r"""Take the weights of `steps` steps before the end of training, make those steps on the retained rows, add noise.

    For full-batch gradient descent: SGD without momentum, a constant rate and a batch size of all rows, in float64,
    trained with ``keep=Keep(every=epochs - steps)``. Sigma is not a setting: it follows from the budget and the bound.

    Proof of the bound. Let :math:`\bar g_D(w)` be the mean of the rows' gradients, :math:`\lambda` the weight decay,
    :math:`\eta` the rate, and compare T steps on D' with T - K on D and then K on D', from the same beginning. D has n
    rows; D' lacks m of them and has at most as many others, so that :math:`||\bar g_D(w) - \bar g_{D'}(w)|| \le 2 m G /
    n` at any w. Hence, z being the distance of the two,

    - while the sets differ, :math:`z' \le s z + 2 \eta G m / n`, s a Lipschitz constant of the step on D;
    - while they are the same, :math:`z' \le s z`;
    - always :math:`z' \le r z + 2 \eta G`, :math:`r = |1 - \eta \lambda|`, as no two mean gradients are further apart.

    s is :math:`r + \eta L` for losses with L-Lipschitz gradients, and for convex ones, whose steps have derivatives
    between :math:`1 - \eta (L + \lambda)` and :math:`1 - \eta \lambda`, the larger size of these two: softmax models
    do not stretch at all while :math:`\eta \le 2 / (L + 2 \lambda)`, and forget with weight decay.

    Differs: Mu and Klabjan have :math:`L n / (n - m)` for L in the first T - K steps, because they compare on D', no
    weight decay, only the nonconvex s, and no min. Their figure can exceed that of two trainings with nothing in
    common: with the constants of their eICU model they get 119, 98 and 35 after rewinding 10, 74 and 95 % where
    :math:`2 \eta G T` is 44; here it is 23, 22 and 16. The textbook's Gaussian formula is not used.

    A bound of half of :math:`2 \eta G \sum_{t<T} r^t` is vacuous: the untrained weights, decayed as often, are as near.
    All three of theirs are, and of those here the first two; `guarantee.remarks` tells.

    Several requests: all of them go back to the same checkpoint, and m counts the rows of all. That checkpoint was
    computed with removed rows. After the first request it is secret state, as `SecretKept` tells, for `keep_s` at
    most. Where it is missing (loaded model), out of time, or more than `share` is to be removed in all, training is run
    again from the beginning and a clean checkpoint kept: `Retrained` tells, and the guarantee is the same.

    For a softmax model all is derived. For other models `smoothness` and `gradient_bound` must be supplied, and what is
    claimed is conditional on them. ReLU and max pooling have no smoothness constant at all: with them nothing is
    claimed, whatever is supplied.

    Cost: `steps` gradients of all rows. Little is saved before the noise takes all: of a softmax model on 10,000 rows
    of MNIST (500 steps, radius 17, share .001, ten requests, epsilon 1, accuracy .856) going back 99 % of the steps
    left .832, and 90 % left .290. A ReLU network of 32 units, with constants measured: vacuous even after 99 %.

    Attributes:
        steps: K, steps to go back.
        share: of the rows trained on, the largest that all requests together remove before training anew.
        radius: of a softmax model's rows: bound on the norm of any of them, as prepared and with a 1 appended for the
            bias, chosen without looking at rows; None: features lie within [-1, 1], as pixels do.
        smoothness: Lipschitz constant of the gradient of any row's loss, weight decay not counted.
        gradient_bound: largest norm of the gradient of any row's loss, at any weights that training may come to.
        vouched: whether somebody vouches for those two; if they were measured, nothing is claimed.
        keep_s: seconds for which the checkpoint may be used after the first removal.
        budget: of all releases.
    """

    claim: ClassVar[Claim] = Claim.CERTIFIED
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FORGET, Need.RETAIN, Need.CHECKPOINTS})
    source: ClassVar[str] = "Mu and Klabjan, 2025"
    not_guaranteed: ClassVar[str] = (
        "anything of models given out without noise, or of who sees secret state; rounding is not in the proof"
    )
    steps: int = 100
    share: float = 0.01
    radius: float | None = None
    smoothness: float | None = None
    gradient_bound: float | None = None
    vouched: bool = True
    keep_s: float = MONTH_S
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        both = (self.smoothness, self.gradient_bound)
        checks = [
            (isinstance(self.steps, int) and self.steps >= 1, f"steps must be an integer >= 1, got {self.steps}"),
            (0 < self.share < 1, f"share must be > 0 and < 1, got {self.share}"),
            (self.radius is None or 1 < self.radius < math.inf, f"radius must be > 1, got {self.radius}"),
            (0 <= self.keep_s < math.inf, f"keep_s must be >= 0 and finite, got {self.keep_s}"),
            ((both[0] is None) == (both[1] is None), "give smoothness and gradient_bound, or neither"),
            (all(one is None or 0 < one < math.inf for one in both), f"constants must be > 0 and finite, got {both}"),
        ]
        for fine, message in checks:
            if not fine:
                raise Misuse(message)

    def supports(self, trained: Trained) -> Unsupported | None:
        """Needs full-batch gradient descent, known constants, and a checkpoint or leave to train anew."""
        return super().supports(trained) or self._no_training(trained) or self._no_checkpoint(trained)

    def _no_training(self, trained: Trained) -> Unsupported | None:
        recipe, module, name = trained.recipe, trained.module, self.name
        norm, drop = has_batch_norm(module), has_dropout(module)
        args = recipe.optimiser_args
        descent = recipe.optimiser == "sgd" and not args.get("momentum") and recipe.schedule["kind"] == "constant"
        floats = [what for what, buffer in module.named_buffers() if buffer.is_floating_point()]
        known = is_softmax(trained) or self.smoothness is not None
        checks = [
            (recipe.model != EXTERNAL, "makes steps of a training that is not known of a model trained elsewhere"),
            (recipe.pruning is None, "has no proof for a mask that the removed rows may have had a part in"),
            (norm is None, f'has no proof for "{norm}", whose buffers hold sums over removed rows'),
            (not floats or norm is not None, f'has no proof for the buffer "{next(iter(floats), "")}"'),
            (drop is None, f'has no proof for the coins of "{drop}", which depend on how many rows there are'),
            (descent, "needs gradient descent: sgd without momentum and a constant schedule"),
            (recipe.dtype == "float64", 'needs a training in dtype "float64"'),
            (recipe.batch_size >= len(trained.ids), f"needs a batch_size of all {len(trained.ids):,} rows"),
            (self.steps < recipe.epochs, f"cannot go back {self.steps} steps of {recipe.epochs}; lower its steps"),
            (known, "needs smoothness and gradient_bound, which only a softmax model's rows give"),
        ]
        problems = [f"{name} {why}; or use retrain" for fine, why in checks if not fine]
        return Unsupported(problems[0]) if problems else None

    def _no_checkpoint(self, trained: Trained) -> Unsupported | None:
        if trained.releases or self._logged(trained):
            return None
        place = trained.recipe.epochs - self.steps
        return Unsupported(
            f"{self.name} needs the weights after step {place} of a training on these rows; train with "
            f"keep=Keep(every={place}), or use retrain"
        )

    def _logged(self, trained: Trained) -> State:
        """The checkpoint in the log of a training on just these rows, if there is one."""
        log, epochs = trained.log, trained.recipe.epochs
        if log is None or trained.standing is not Claim.EXACT or log.steps != epochs:
            return {}
        return log.checkpoints.get(epochs - self.steps, {})

    def plan(self, trained: Trained) -> Mapping[str, Constant]:
        """Every number that the guarantee rests on, `sigma` among them, from settings alone."""
        recipe = trained.recipe
        known = self._constants_of_rows(trained)
        known |= {
            "weight_decay": setting(recipe.weight_decay, "recipe.weight_decay"),
            "lr": setting(recipe.optimiser_args["lr"], "recipe.lr"),
            "epochs": setting(recipe.epochs, "recipe.epochs"),
            "steps": setting(self.steps, "method.steps"),
            "share": setting(self.share, "method.share"),
            **budget_constants(self.budget),
        }
        known["any"] = derived(ANY_DISTANCE, known)
        known["sensitivity"] = derived(CONVEX_DISTANCE if is_softmax(trained) else SMOOTH_DISTANCE, known)
        known["sigma"] = derived(SIGMA, known)
        known["mu"] = gaussian_mu(known)
        return known

    def _constants_of_rows(self, trained: Trained) -> dict[str, Constant]:
        if self.smoothness is None or self.gradient_bound is None:
            return softmax_constants(trained.recipe, self.radius)
        source = supplied if self.vouched and _kink(trained.module) is None else estimated
        return {"smoothness": source(self.smoothness), "gradient": source(self.gradient_bound)}

    def _apply(self, task: Task, *, rng: Generator) -> Done:
        trained, known = task.trained, self.plan(task.trained)
        names = tuple(name for name, _ in trained.module.named_parameters())
        cap, sigma = known["sensitivity"].value, known["sigma"].value
        release = GaussianNoise(parameters=names, sensitivity=cap, sigma=sigma)
        spent = charge(trained.releases, release, self.budget)
        if "radius" in known:
            for rows in (task.forget, task.retain):
                refuse_outside(rows, known["radius"].value)
        releases = (*trained.releases, release)
        module, kept, events = self._trained_on(task, len(releases))
        secret = {**kept, **{name: one.detach().double().clone() for name, one in module.named_parameters()}}
        add_noise(module, names, sigma)
        guarantee = guarantee_of(
            module,
            parameters=names,
            constants=known,
            delta=self.budget.delta,
            mechanism="full-batch gradient descent from a checkpoint fixed beforehand, then Gaussian noise once",
            reference="the same training on the retained rows from the beginning, plus noise of the same size",
            transcript=spent,
            remarks=_remarks(trained.module, known),
        )
        return Done(
            trained=replace(trained, module=module, secret=secret, releases=releases, log=None),
            guarantee=guarantee,
            events=(release, *events),
        )

    def _trained_on(self, task: Task, releases: int) -> tuple[nn.Module, State, tuple[Event, ...]]:
        """The module before noise, what is kept for the next request, and what is to be told."""
        recipe, module = task.trained.recipe, task.trained.module
        place = recipe.epochs - self.steps
        kept = self._usable(task)
        if not kept:
            module = build(recipe).to(device_of(module))
            log = fit(module, recipe, task.retain, mark=place, tally=task.tally)
            fresh = _kept(log.checkpoints[place], place, rows=len(task.retain), removed=0, until=math.inf)
            return module, fresh, (Retrained(part=-1, rows=len(task.retain)),)
        checkpoint = {name.removeprefix(_AT): one for name, one in kept.items() if name.startswith(_AT)}
        module.load_state_dict(checkpoint)
        fit(module, recipe, task.retain, begin=place, epochs=self.steps, tally=task.tally)
        until = until_of(kept, "rewind", self.keep_s)
        removed = round(float(kept[".rewind.removed"])) + len(task.forget)
        tainted = _kept(checkpoint, place, rows=float(kept[".rewind.rows"]), removed=removed, until=until)
        what = f"weights after step {place} of {recipe.epochs}, computed with rows that were removed since"
        return module, tainted, (kept_event(what, self.budget, releases, until),)

    def _usable(self, task: Task) -> State:
        """The checkpoint with its books, if these settings may go back to it for this request; else nothing."""
        trained, place = task.trained, task.trained.recipe.epochs - self.steps
        logged = self._logged(trained)
        rows = len(trained.ids)
        kept = _kept(logged, place, rows=rows, removed=0, until=math.inf) if logged else trained.secret
        if not fresh_until(kept, "rewind") or float(kept[".rewind.place"]) != place:
            return {}
        removed = float(kept[".rewind.removed"]) + len(task.forget)
        few = removed <= self.share * float(kept[".rewind.rows"]) and len(task.retain) <= rows
        return kept if few else {}


_AT = ".rewind.at."


def _kept(checkpoint: State, place: int, *, rows: float, removed: float, until: float) -> State:
    books = {"place": place, "rows": rows, "removed": removed, "until": until}
    states = {f"{_AT}{name}": tensor for name, tensor in checkpoint.items()}
    return {**states, **{f".rewind.{name}": number(value) for name, value in books.items()}}


def _kink(module: nn.Module) -> str | None:
    """Name of the first layer whose gradient jumps; functional calls inside `forward` cannot be seen."""
    return next((name or type(one).__name__ for name, one in module.named_modules() if isinstance(one, _KINKED)), None)


def _remarks(module: nn.Module, known: Mapping[str, Constant]) -> tuple[str, ...]:
    remarks = ["steps are taken in float64, and their rounding is not in the proof"]
    kink = _kink(module)
    if kink is not None:
        remarks.append(f'"{kink}" has kinks, where gradients jump: no smoothness that anybody supplies can be true')
    if known["sensitivity"].value >= known["any"].value / 2:
        remarks.append(
            "vacuous: the untrained weights, decayed as often, with noise of the same size would have the same "
            "guarantee, as no gradients of so many such steps lead further from there than the sensitivity"
        )
    return tuple(remarks)
