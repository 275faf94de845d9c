"""A stream of certified removals from a head, beside retraining, each checked against an optimum found otherwise."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from expunge import Recipe, Records, Request, Trained, datasets, generator, train
from expunge.calculus.head import HeadObjective
from expunge.certify.accountant import Budget
from expunge.certify.chord import gradient_bound, kantorovich_bound, newton_step, solve
from expunge.certify.head import NewtonHead
from expunge.certify.leak import pair_leak
from expunge.core.coins import order

Report = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One data set, and what is fixed before its first request."""

    data: str
    weight_decay: float = 1e-3
    sigma: float = 0.02
    rows: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A first model, given out with noise."""

    one: Setting
    records: Records
    test: Records
    method: NewtonHead
    first: Trained
    begin_s: float


def prepare(one: Setting, budget: Budget) -> Prepared:
    """Train, and bring the head to its minimum."""
    found = datasets.get(one.data)
    assert found.test is not None
    records = found.train
    if one.rows is not None:
        records = records.select(order(records.keys, 0, "subset")[: one.rows])
    trained = train(Recipe(model="softmax", epochs=1, batch_size=256, weight_decay=one.weight_decay), records)
    method = NewtonHead(sigma=one.sigma, budget=budget)
    started = time.perf_counter()
    first = method.begin(trained, records)
    return Prepared(one, records, found.test, method, first, time.perf_counter() - started)


def stream(
    ready: Prepared,
    removals: int,
    *,
    compare: int,
    solvers: tuple[str, ...],
    ladder: tuple[float, ...],
    solve_every: int,
    report: Report,
) -> dict[str, Any]:
    """Remove rows one after the other, in the order of a keyed hash; compare with retraining after some of them.

    Args:
        ready: what to remove from.
        removals: how many.
        compare: retrain after so many of them, evenly spread, cold and warm.
        solvers: of scikit-learn's; the quicker counts.
        ladder: tolerances to try, in units of the gradient that is asked for; the first that reaches it counts.
        solve_every: find the optimum after so many removals.
        report: told where it stands.
    """
    one, records, method, now = ready.one, ready.records, ready.method, ready.first
    report(f"{one.data}: first model {ready.begin_s:.1f} s, cap {method.cap:.3g}")
    checked = Checked(ready, ladder, solve_every)
    names = [records.ids[i] for i in order(records.keys, 0, "requests")[:removals]]
    when = {round((i + 1) * removals / compare) for i in range(compare)}
    seconds = []
    for number, name in enumerate(names, 1):
        before = now
        started = time.perf_counter()
        answer = method(before, records, Request.remove([name]), rng=generator(0))
        seconds.append(time.perf_counter() - started)
        now = answer.trained
        assert answer.guarantee is not None
        checked.request(before, now, method, answer.guarantee.to_json())
        if number in when:
            checked.retraining(solvers)
            report(f"{one.data}: {number} of {removals}, {seconds[-1]:.2f} s, {checked.line()}")
    return {
        "data": one.data,
        "rows": len(records),
        "parameters": now.secret["head.weight"].numel() + now.secret["head.bias"].numel(),
        "weight_decay": one.weight_decay,
        "sigma": one.sigma,
        "cap": method.cap,
        "removals": removals,
        "begin_s": ready.begin_s,
        "request_s": statistics.median(seconds),
        "slowest_request_s": max(seconds),
        **checked.summary(statistics.median(seconds)),
    }


class Checked:
    """What is measured beside a stream, by means that are not the stream's own."""

    def __init__(self, ready: Prepared, ladder: tuple[float, ...], solve_every: int) -> None:
        self.one, self.records, self.ladder, self.every = ready.one, ready.records, ladder, solve_every
        self.x, self.y = _plain(ready.records)
        self.test_x, self.test_y = _plain(ready.test)
        self.keep = torch.ones(len(self.x), dtype=torch.bool)
        self.cap = ready.method.cap
        self.w = self.previous = _matrix(ready.first.secret)
        self.outputs = len(self.w)
        self.valid: list[bool] = []
        self.distances: list[float] = []
        self.bounds: list[float] = []
        self.sharp: list[float] = []
        self.leaks: list[float] = []
        self.spent: list[float] = []
        self.cold: dict[str, list[float]] = {}
        self.warm: dict[str, list[float]] = {}
        self.accuracy: list[float] = []
        self.retrained: list[float] = []

    def request(self, before: Trained, after: Trained, method: NewtonHead, guarantee: Mapping[str, Any]) -> None:
        """After every request: is it within the cap, and what has been spent and leaked?

        Every so many times the optimum is found. In between autograd's gradient over the weight decay, which the
        distance cannot exceed, is within the cap, or the optimum is found as well.
        """
        self.keep[self.records.positions(before.ids - after.ids)] = False
        objective = HeadObjective(
            self.x, self.y, outputs=self.outputs, weight_decay=self.one.weight_decay, keep=self.keep.clone()
        )
        self.previous, self.w = self.w, _matrix(after.secret)
        most = float(independent_gradient(objective, self.w).norm()) / self.one.weight_decay
        self.valid.append(most <= self.cap)
        if len(self.spent) % self.every == 0 or most > self.cap:
            self._solve(objective, after.secret[".factor"])
        leak = pair_leak(_head(before.secret), _head(after.secret), sigma_old=method.sigma, sigma_new=method.sigma)
        self.leaks.append(leak.mu)
        self.spent.append(guarantee["transcript"]["epsilon"])

    def _solve(self, objective: HeadObjective, factor: Tensor) -> None:
        """The true distance, and what the bounds say of it."""
        w, gradient = self.w, objective.gradient(self.w)
        self.optimum = independent_optimum(objective, w, factor)
        self.distances.append(float((w - self.optimum).norm()))
        self.valid[-1] = self.distances[-1] <= self.cap
        step = newton_step(objective, w, gradient, factor)
        self.sharp.append(kantorovich_bound(objective, w, gradient, step, factor))
        self.bounds.append(gradient_bound(objective, w, gradient))

    def retraining(self, solvers: tuple[str, ...]) -> None:
        """Retraining by scikit-learn to as small a gradient, from zero and from the weights before this request."""
        keep = self.keep.numpy()
        x, y = self.x.numpy()[keep], self.y.numpy()[keep]
        for solver in solvers:
            for start, kept in ((None, self.cold), (self.previous.numpy(), self.warm)):
                best = min((min(times) for times in kept.values()), default=math.inf)
                seconds = self._retrained(solver, x, y, start, best)
                kept.setdefault(solver, []).append(seconds)
        self.accuracy += [self._accuracy(self.w + self.one.sigma * noise) for noise in _noises(self, 20)]
        self.retrained.append(self._accuracy(self.optimum))

    def _retrained(self, solver: str, x: np.ndarray, y: np.ndarray, start: np.ndarray | None, best: float) -> float:
        """Seconds until the gradient is as small as the cap asks for, by the loosest tolerance of a ladder that does.

        Infinite for a solver whose first step alone takes longer than the best so far. Of two classes scikit-learn
        fits the difference of their weights, with half the decay: the same problem.
        """
        two = self.outputs == 2
        decay = self.one.weight_decay / 2 if two else self.one.weight_decay
        inverse, goal = 1 / (len(x) * decay), self.cap * self.one.weight_decay / (math.sqrt(2) if two else 1)
        steps = [(goal, 1)] * math.isfinite(best) + [(goal * part, 20_000) for part in self.ladder]
        for tolerance, most in steps:
            model = LogisticRegression(
                C=inverse, fit_intercept=False, tol=tolerance, max_iter=most, solver=solver, warm_start=True
            )
            if start is not None:
                model.coef_ = start[1:] - start[:1] if two else start.copy()
                model.classes_, model.intercept_ = np.arange(self.outputs), np.zeros(len(model.coef_))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                started = time.perf_counter()
                model.fit(x, y)
                seconds = time.perf_counter() - started
            if _their_gradient(model.coef_, x, y, decay) <= goal:
                return seconds
            if most == 1 and seconds > best:
                return math.inf
        return math.nan

    def _accuracy(self, w: Tensor) -> float:
        return float(((self.test_x @ w.T).argmax(1) == self.test_y).double().mean())

    def line(self) -> str:
        """Where the stream stands."""
        return f"farthest {max(self.distances):.2e} of {self.cap:.2e}, epsilon {self.spent[-1]:.3f}"

    def summary(self, request_s: float) -> dict[str, Any]:
        """All figures."""
        cold = {solver: statistics.median(times) for solver, times in self.cold.items()}
        warm = {solver: statistics.median(times) for solver, times in self.warm.items()}
        return {
            "valid_share": statistics.fmean(self.valid),
            "optima_found": len(self.distances),
            "bound_over_distance": statistics.median(a / b for a, b in zip(self.sharp, self.distances, strict=True)),
            "plain_bound_over_distance": statistics.median(
                a / b for a, b in zip(self.bounds, self.distances, strict=True)
            ),
            "farthest_over_cap": max(self.distances) / self.cap,
            "epsilon_of_transcript": self.spent[-1],
            "epsilon_after": {str(i): self.spent[i - 1] for i in (1, 10, 100, 500) if i <= len(self.spent)},
            "pair_leak_mu": {
                "median": statistics.median(self.leaks),
                "largest": max(self.leaks),
                "first": self.leaks[0],
                "last": self.leaks[-1],
            },
            "accuracy": 100 * statistics.fmean(self.accuracy),
            "accuracy_retrained": 100 * statistics.fmean(self.retrained),
            "accuracy_gap_points": 100 * (statistics.fmean(self.retrained) - statistics.fmean(self.accuracy)),
            "cold_s": cold,
            "warm_s": warm,
            "request_speedup_cold": float(np.nanmin(list(cold.values()))) / request_s,
            "request_speedup_warm": float(np.nanmin(list(warm.values()))) / request_s,
        }


def _their_gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray, decay: float) -> float:
    """Norm of the gradient of scikit-learn's own objective, over the rows."""
    z = x @ w.T
    if len(w) == 1:
        slopes = 1 / (1 + np.exp(-z)) - y[:, None]
    else:
        slopes = torch.softmax(torch.from_numpy(z), 1).numpy()
        slopes[np.arange(len(y)), y] -= 1
    return float(np.linalg.norm(slopes.T @ x / len(x) + decay * w))


def planted(ready: Prepared, removals: int) -> float:
    """The share of valid removals of a provider that takes its head for a thousand times as convex as it is.

    It stops where the gradient over that wrong constant is within the cap: the check of validity must notice.
    """
    cap, decay = ready.method.cap, ready.one.weight_decay
    x, y = _plain(ready.records)
    w, factor, valid = _matrix(ready.first.secret), ready.first.secret[".factor"], []
    keep = torch.ones(len(x), dtype=torch.bool)
    for position in order(ready.records.keys, 0, "requests")[:removals]:
        keep[position] = False
        now = HeadObjective(x, y, outputs=len(w), weight_decay=decay, keep=keep.clone())
        if float(now.gradient(w).norm()) / (1000 * decay) > cap:
            w = solve(now, w, cap, factor=factor).w
        valid.append(float((w - independent_optimum(now, w, factor)).norm()) <= cap)
    return statistics.fmean(valid)


def independent_gradient(of: HeadObjective, w: Tensor) -> Tensor:
    """The objective's gradient by autograd, in float64."""
    leaf = w.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(of.x @ leaf.T, of.y, reduction="none")
    loss = torch.dot(losses, of.keep.double()) / of.count + of.weight_decay / 2 * leaf.square().sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def independent_optimum(of: HeadObjective, near: Tensor, factor: Tensor) -> Tensor:
    """The minimiser on the kept rows, vouched for by autograd's gradient and strong convexity alone.

    Where the steps come from does not matter: it ends when that gradient says that the minimiser is within 1e-8.
    """
    w = near
    for _ in range(60):
        gradient = independent_gradient(of, w)
        if float(gradient.norm()) / of.weight_decay < 1e-8:
            return w
        w = w - newton_step(of, w, gradient, factor)
    raise RuntimeError(f"no independent optimum within 1e-8, only {float(gradient.norm()) / of.weight_decay:.2e}")


def _plain(records: Records) -> tuple[Tensor, Tensor]:
    x = records.x.flatten(1)
    x = (x.float() / 255 if x.dtype is torch.uint8 else x.float()).double()
    return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1), records.y


def _matrix(state: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([state["head.weight"].double(), state["head.bias"].double()[:, None]], dim=1)


def _head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(".")}


def _noises(of: Checked, draws: int) -> list[Tensor]:
    rng = generator(1)
    return [torch.randn(of.w.shape, generator=rng, dtype=torch.float64) for _ in range(draws)]
