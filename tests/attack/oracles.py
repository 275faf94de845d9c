"""Exact retraining of small softmax regressions in NumPy, which knows nothing of the code under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from expunge import Recipe, train
from expunge.core.coins import generator
from expunge.core.protocols import Target
from expunge.core.records import Records
from expunge.core.trained import Trained

Array = np.ndarray[Any, np.dtype[np.float64]]


def problem(seed: int, *, n: int = 14, d: int = 4, classes: int = 2) -> tuple[Records, Target]:
    """Rows of a noisy linear rule, and a target whose label is what the rule's side gives it."""
    g = generator(seed)
    w = torch.randn(d, classes, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = (x @ w + torch.randn(n, classes, generator=g, dtype=torch.float64)).argmax(1)
    at = torch.randn(1, d, generator=g, dtype=torch.float64)
    return Records(x, y, classes=classes), Target(x=at, y=(at @ w).argmax(1))


def softmax_model(records: Records, *, weight_decay: float = 5e-2, **about: Any) -> Trained:
    """A softmax regression in float64, trained a little: planning takes it to the minimum."""
    return train(Recipe(model="softmax", epochs=5, weight_decay=weight_decay, dtype="float64", **about), records)


def with_bias(x: torch.Tensor) -> Array:
    """Rows with a 1 behind."""
    return np.c_[x.double().flatten(1).numpy(), np.ones(len(x))]


def probabilities(t: Array, x: Array) -> Array:
    """(sets, n, classes) of parameters (sets, classes, width)."""
    z = np.einsum("scd,nd->snc", t, x)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def retrained(x: Array, y: Array, weights: Array, *, classes: int, decay: float, n: int | None = None) -> Array:
    """(sets, classes, width) minima of ``sum_i w_i l_i / n + decay / 2 |t|^2``, one for each (sets, n) of weights."""
    n, size = n or len(x), classes * x.shape[1]
    t = np.zeros((len(weights), classes, x.shape[1]))
    for _ in range(60):
        p = probabilities(t, x)
        r = p - np.eye(classes)[y]
        g = np.einsum("sn,snc,nd->scd", weights, r, x) / n + decay * t
        if np.abs(g).max() < 1e-13:
            return t
        s = p[..., None] * (np.eye(classes) - p[..., None, :]) * weights[..., None, None]
        h = np.einsum("snab,ni,nj->saibj", s, x, x, optimize=True).reshape(-1, size, size) / n
        step = np.linalg.solve(h + decay * np.eye(size), g.reshape(-1, size, 1))
        t = t - step.reshape(t.shape)
    raise AssertionError("the oracle did not converge")


def adversary(t: Array, target: Target) -> Array:
    """(sets,) the adversary's loss of these parameters."""
    at = with_bias(target.x)
    p = probabilities(t, at)
    own = (target.y if target.wanted is None else target.wanted).numpy()
    likely = np.log(p[:, np.arange(len(at)), own]).mean(1)
    return likely if target.wanted is None else -likely


def slope(f: Callable[[float], float], h: float) -> float:
    """The derivative at 0, by differences of fourth order."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)
