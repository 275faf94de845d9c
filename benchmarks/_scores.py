"""Influence scores of 10,000 images: how long each way takes, in how much memory, and whether all say the same."""

from __future__ import annotations

import copy
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _timing import Paired, paired, seconds
from torch import Tensor, nn

from expunge import Recipe, datasets, generator, train
from expunge.calculus import Objective, influence_scores
from expunge.learn import models
from expunge.learn.loop import prepare, row_losses

ROWS = 10_000
PROBES = 50
BATCH = 2000
HERE = Path(__file__).resolve()
RECIPE = Recipe(
    model="mlp",
    model_args={"hidden": [128]},
    epochs=1,
    batch_size=64,
    optimiser_args={"lr": 0.05, "momentum": 0.9},
)
STATUS = Path("/proc/self/status")
FORGET_PEAK = Path("/proc/self/clear_refs")

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Ready:
    """A network, the rows as it reads them, and directions to score them along, one a column."""

    objective: Objective
    x: Tensor
    y: Tensor
    vectors: Tensor

    @property
    def batches(self) -> Batches:
        """The rows, `BATCH` at a time."""
        return list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))

    def exact(self, every: int) -> Ready:
        """The same in float64, of each so many-th row."""
        module = copy.deepcopy(self.objective.module).double()
        objective = Objective(module, self.objective.row_losses)
        return Ready(objective, self.x[::every].double(), self.y[::every], self.vectors.double())


def ready_rows(*, trained: bool) -> Ready:
    """The first rows of MNIST, and a network briefly trained on them or fresh; speed and memory ask for neither."""
    records = datasets.mnist().train.select(range(ROWS))
    fresh = models.build("mlp", shape=(28, 28), outputs=10, hidden=[128])
    module = train(RECIPE, records).module if trained else fresh
    objective = Objective(module.eval(), row_losses(RECIPE))
    vectors = torch.randn(objective.size, PROBES, generator=generator(0))
    return Ready(objective, prepare(records.x, torch.float32), records.y, vectors)


def measure(quick: bool) -> dict[str, float]:
    """All ways in turn, round by round; prints every one, and gives the figures that count."""
    ready = ready_rows(trained=True)
    v, first = ready.vectors, ready.vectors[:, 0].contiguous()
    ours_one, ours_many = partial(layer_wise, ready, first), partial(layer_wise, ready, v)
    wrong = worst_error(ready, ours_many(), every=20 if quick else 1)
    for way in (ours_one, ours_many, partial(in_forward_mode, ready, first[:, None])):
        way()
    rounds = 3 if quick else 9
    one = paired(partial(loop_and_dot, ready, first), partial(repeated, 5, ours_one), rounds)
    print(f"{ROWS:,} rows, {ready.objective.size:,} entries, {torch.get_num_threads()} threads, {load()}")
    report("one vector", "gradients row by row, each times the vector", one, 5)
    many = paired(partial(loop_and_product, ready, v), ours_many, rounds)
    report(f"{PROBES} vectors", "gradients row by row, blocks times the matrix", many, 1)
    for name, way in others(ready, v).items():
        took = [(seconds(way), seconds(ours_many)) for _ in range(1 if quick else rounds)]
        slow, ours = min(took)
        print(f"{PROBES} vectors: {name} {slow:.3f} s beside ours {ours:.3f} s, {slow / ours:.1f} times")
    print(f"one vector: forward mode {seconds(partial(in_forward_mode, ready, first[:, None])):.4f} s")
    memory = peak_in_new_process()
    whole = ROWS * ready.objective.size * 4 / 1e6
    print(f"memory for {PROBES} vectors: {memory:.0f} MB; all gradients at once are {whole:,.0f} MB; {load()}")
    return {
        "score_speedup_one": round(one.ratio * 5, 1),
        "score_speedup_50": round(many.ratio, 2),
        "peak_mb": round(memory, 1),
        "max_relative_error": float(f"{wrong:.2e}"),
    }


def report(what: str, against: str, found: Paired, repeats: int) -> None:
    """One comparison in words."""
    ours = found.quick_s / repeats
    print(f"{what}: {against} {found.slow_s:.3f} s, ours {ours:.4f} s, {found.ratio * repeats:.2f} times")


def load() -> str:
    """What else the machine does."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def others(ready: Ready, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The other ways to score along many vectors."""
    return {
        "gradients of blocks by vmap, times the matrix,": partial(vmap_and_product, ready, v),
        f"{v.shape[1]} passes in forward mode": partial(in_forward_mode, ready, v),
    }


def layer_wise(ready: Ready, v: Tensor) -> Tensor:
    """Ours."""
    return influence_scores(ready.objective, ready.batches, v)


def row_gradient(module: nn.Module, held: list[nn.Parameter], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The gradient of one row's loss, as anybody would write it."""
    return torch.autograd.grad(nn.functional.cross_entropy(module(x), y), held)


def loop_and_dot(ready: Ready, v: Tensor) -> Tensor:
    """Row by row: the gradient, and its product with one vector, parameter by parameter without a copy."""
    module = ready.objective.module
    held = list(module.parameters())
    parts = v.split([one.numel() for one in held])
    answer = torch.empty(len(ready.x))
    for i in range(len(ready.x)):
        made = row_gradient(module, held, ready.x[i : i + 1], ready.y[i : i + 1])
        answer[i] = sum(torch.dot(g.view(-1), part) for g, part in zip(made, parts, strict=True))
    return answer


def loop_and_product(ready: Ready, v: Tensor, block: int = 500) -> Tensor:
    """Row by row the gradient, written into a block that is kept for all blocks; block by block times the matrix."""
    module = ready.objective.module
    held = list(module.parameters())
    made = torch.empty(block, len(v), dtype=v.dtype)
    answer = []
    for start in range(0, len(ready.x), block):
        count = min(block, len(ready.x) - start)
        for row in range(count):
            i = start + row
            parts = row_gradient(module, held, ready.x[i : i + 1], ready.y[i : i + 1])
            torch.cat([g.view(-1) for g in parts], out=made[row])
        answer.append(made[:count] @ v)
    return torch.cat(answer)


def vmap_and_product(ready: Ready, v: Tensor, block: int = 250) -> Tensor:
    """The gradients of a block by ``vmap(grad)``, times the matrix."""
    parts = zip(ready.x.split(block), ready.y.split(block), strict=True)
    return torch.cat([ready.objective.gradients(x, y, chunk=None) @ v for x, y in parts])


def in_forward_mode(ready: Ready, v: Tensor) -> Tensor:
    """One forward-mode pass a column."""
    columns = [torch.cat([ready.objective.scores(x, y, one) for x, y in ready.batches]) for one in v.T.contiguous()]
    return torch.stack(columns, dim=1)


def repeated(repeats: int, way: Callable[[], Tensor]) -> None:
    """The same work so often that one clock reading is not what is measured."""
    for _ in range(repeats):
        way()


def worst_error(ready: Ready, found: Tensor, every: int) -> float:
    """``max |ours - right| / max |right|``, right: row by row in float64, of each so many-th row and all vectors."""
    exact = ready.exact(every)
    right = loop_and_product(exact, exact.vectors)
    return float((found[::every] - right).abs().max() / right.abs().max())


def peak_in_new_process() -> float:
    """Megabytes of `own_peak`, in a process that has done nothing else."""
    done = subprocess.run([sys.executable, str(HERE)], stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


def own_peak() -> float:
    """Megabytes by which this process grows at most while it scores: all that is resident, from all libraries.

    Counted from what is resident once rows, vectors and model lie in memory and what was freed has been given back, so
    that nothing is hidden in memory that loading has left; what the first call loads counts.
    """
    ready = ready_rows(trained=False)
    batches = ready.batches
    ctypes.CDLL(None).malloc_trim(0)
    FORGET_PEAK.write_text("5")
    before = resident("VmRSS")
    influence_scores(ready.objective, batches, ready.vectors)
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Megabytes of this process, now (VmRSS) or at most (VmHWM)."""
    line = next(line for line in STATUS.read_text("ascii").splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024 / 1e6


if __name__ == "__main__":
    print(json.dumps({"peak_mb": own_peak()}))
