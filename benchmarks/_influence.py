"""An influence step by the Fisher matrix against the loop of single-row backward passes that public code has for it.

Both compute ``F^-1 v`` of the same rows by the same formula (the dual form, one Cholesky factor) in float32 and must
agree to rounding; `v` is given. The loop makes one row's gradient at a time, keeps them as one matrix and multiplies it
out, as one would write it; ours is `row_gradients` and `FisherDual`. On the MLP no gradient is ever made.
"""

from __future__ import annotations

import torch
from _timing import paired
from torch import Tensor, nn

from expunge.calculus import FisherDual, Objective, row_gradients
from expunge.learn import models

DAMPING = 10.0


def speedups(quick: bool) -> dict[str, float]:
    """How many times quicker: an MLP 784-128-10, and ResNet-20 with group norm, both on rows of 28 x 28."""
    rounds = 9 if quick else 21
    return {
        "influence_speedup_mlp": _speedup("mlp", (28, 28), 512 if quick else 1024, rounds, most_apart=1e-3),
        "influence_speedup_resnet": _speedup("resnet20", (28, 28), 96 if quick else 128, rounds, most_apart=1e-2),
    }


def _speedup(name: str, shape: tuple[int, ...], rows: int, rounds: int, *, most_apart: float) -> float:
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = models.build(name, shape=shape, outputs=10).eval()
    x, y = torch.randn(rows, *shape, generator=rng), torch.randint(0, 10, (rows,), generator=rng)
    objective = Objective(module, _losses)
    v = objective.gradient(x[: rows // 10], y[: rows // 10]) / rows

    def ours() -> Tensor:
        return FisherDual(row_gradients(objective, x, y), DAMPING).solve(v)

    def loop() -> Tensor:
        return _by_loop(module, x, y, v)

    right = loop()
    apart = float((ours() - right).norm() / right.norm())
    if not apart <= most_apart:
        raise SystemExit(f"influence on {name}: the two differ by {apart:.2g} of the norm, which is no rounding")
    found = paired(loop, ours, rounds)
    print(
        f"influence step, {name}, {rows} rows: loop {found.slow_s:.3f} s, ours {found.quick_s:.3f} s, "
        f"{found.ratio:.1f} times; apart by {apart:.1g}"
    )
    return found.ratio


def _losses(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def _by_loop(module: nn.Module, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """``(lambda I + G'G / n)^-1 v`` with one backward pass a row."""
    parameters = list(module.parameters())
    gradients = torch.empty(len(x), len(v))
    for row in range(len(x)):
        loss = nn.functional.cross_entropy(module(x[row : row + 1]), y[row : row + 1])
        parts = torch.autograd.grad(loss, parameters)
        gradients[row] = torch.cat([part.reshape(-1) for part in parts])
    gram = (gradients @ gradients.T).double()
    shift = DAMPING * float(gram.trace()) / len(x) / len(v)
    gram.diagonal().add_(len(x) * shift)
    inner = (gradients @ v).double()[:, None]
    dual = torch.cholesky_solve(inner, torch.linalg.cholesky(gram))[:, 0].float()
    return (v - gradients.T @ dual) / shift
