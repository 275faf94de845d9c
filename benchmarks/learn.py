"""How quick training is: many models at once, our loop against others, SISA against retraining.

    python benchmarks/learn.py --quick     # under a minute on two cores
    python benchmarks/learn.py             # more rounds, full MNIST everywhere

Every figure is a ratio of two timings of this run, taken in turn; medians over rounds. The last line is one JSON:

    many_small_speedup   64 MLPs 64-32-10 of 1,000 optdigits each, batch 32: loop of `train` / `train_many`
    many_mnist_speedup   64 MLPs 784-128-10 on MNIST, batch 64, plain SGD: loop of `train` / `train_many`
    many_gemm_share      multiply-adds that the latter needs, per second, over the best matrix product of this run
    loop_overhead        `train` on full MNIST over a bare tensor loop, minus one
    loader_speedup       the same training by a DataLoader loop / `train`; items are float images in 0..1 with an int
                         label, as torchvision's ToTensor gives them. The leanest loader there is (uint8 tensors in
                         a TensorDataset, converted by the batch) is printed beside it.
    sisa_speedup         20 shards: retraining all of them / forgetting one owner, median over owners
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace

import torch
from _timing import paired, seconds
from torch import nn

from expunge import Recipe, Records, Request, Retrain, Sharding, Sisa, datasets, generator, train, train_many
from expunge.learn import models

MODELS = 64
SGD = {"lr": 0.05, "momentum": 0.9}


def main() -> None:
    """Run all, print each figure with what it means, and the JSON last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and fewer rows a model")
    quick = parser.parse_args().quick
    mnist = datasets.mnist(owners=200).train
    train(Recipe(model="mlp", epochs=1), mnist.select(range(640)))  # imports and caches, before any clock runs
    figures = {
        **many_small(rounds=3 if quick else 7),
        **many_mnist(mnist, rows=12_000 if quick else 60_000, rounds=3 if quick else 5),
        **loops(mnist, rounds=3 if quick else 9),
        **sisa(mnist, owners=5 if quick else 21),
    }
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def many_small(rounds: int) -> dict[str, float]:
    """64 small MLPs at once against one after the other."""
    digits = datasets.optdigits().train
    recipe = Recipe(model="mlp", model_args={"hidden": [32]}, epochs=3, batch_size=32, optimiser_args=SGD)
    rng = generator(0)
    subsets = [digits.select(torch.randperm(len(digits), generator=rng)[:1000]) for _ in range(MODELS)]
    result = _many_against_loop(recipe, subsets, rounds)
    print(f"64 MLPs 64-32-10: loop {result[0]:.2f} s, many {result[1]:.2f} s, {result[2]:.1f} times")
    return {"many_small_speedup": result[2]}


def many_mnist(mnist: Records, rows: int, rounds: int) -> dict[str, float]:
    """64 MNIST MLPs at once against one after the other, and against the machine's matrix product."""
    recipe = Recipe(model="mlp", epochs=1, batch_size=64, optimiser_args={"lr": 0.05})
    subsets = [mnist.select(torch.arange(rows))] * MODELS
    loop_s, many_s, ratio = _many_against_loop(recipe, subsets, rounds)
    # Forward and weight gradient of both layers, and the hidden layer's gradient; the input needs none.
    operations = 2 * rows * MODELS * (2 * 784 * 128 + 3 * 128 * 10)
    peak = _matrix_product()
    share = operations / many_s / peak
    print(
        f"64 MLPs 784-128-10, {rows:,} rows: loop {loop_s:.2f} s, many {many_s:.2f} s, {ratio:.2f} times; "
        f"{operations / many_s / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s"
    )
    return {"many_mnist_speedup": ratio, "many_gemm_share": share}


def _many_against_loop(recipe: Recipe, subsets: list[Records], rounds: int) -> tuple[float, float, float]:
    seeds = range(len(subsets))
    for records in subsets:
        _ = records.keys  # both sides need them; neither is timed for them
    train_many(recipe, subsets[:8], seeds[:8])

    def loop() -> None:
        for seed, records in zip(seeds, subsets, strict=True):
            train(replace(recipe, seed=seed), records)

    result = paired(loop, lambda: train_many(recipe, subsets, seeds), rounds)
    return result.slow_s, result.quick_s, result.ratio


def _matrix_product() -> float:
    """Floating-point operations a second of the best float32 product among a large one and those of this training."""
    best = 0.0
    for batch, n, k, m in ((1, 1024, 1024, 1024), (8, 64, 784, 128), (8, 128, 64, 784)):
        a, b = torch.randn(batch, n, k), torch.randn(batch, k, m)
        out, operations = a @ b, 2 * batch * n * k * m
        repeats = max(1, int(1e10 / operations))

        def work(a=a, b=b, out=out, repeats=repeats) -> None:
            for _ in range(repeats):
                torch.matmul(a, b, out=out)

        work()
        best = max(best, operations * repeats / statistics.median(seconds(work) for _ in range(5)))
    return best


def loops(mnist: Records, rounds: int) -> dict[str, float]:
    """One epoch of full MNIST: `train`, a bare loop over tensors, and a DataLoader loop."""
    recipe = Recipe(model="mlp", epochs=1, batch_size=64, optimiser_args=SGD)
    _ = mnist.keys
    x, y = mnist.shared()[0], mnist.y
    usual = torch.utils.data.DataLoader(Items(x, y), batch_size=64, shuffle=True)
    lean = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)

    def bare_batches():
        order = torch.randperm(len(y))
        for start in range(0, len(y), 64):
            chosen = order[start : start + 64]
            yield x[chosen], y[chosen]

    def plain(batches) -> None:
        module = models.build("mlp", shape=(28, 28), outputs=10)
        optimiser = torch.optim.SGD(module.parameters(), fused=True, **SGD)
        for rows, labels in batches:
            optimiser.zero_grad()
            pixels = rows if rows.is_floating_point() else rows.float() / 255
            nn.functional.cross_entropy(module(pixels), labels).backward()
            optimiser.step()

    plain(bare_batches())
    against_bare = paired(lambda: train(recipe, mnist), lambda: plain(bare_batches()), rounds)
    against_loader = paired(lambda: plain(usual), lambda: train(recipe, mnist), rounds)
    against_lean = paired(lambda: plain(lean), lambda: train(recipe, mnist), rounds)
    print(
        f"one epoch of MNIST: train {against_bare.slow_s:.3f} s, bare loop {against_bare.quick_s:.3f} s, "
        f"DataLoader {against_loader.slow_s:.3f} s "
        f"(leanest {against_lean.slow_s:.3f} s, {against_lean.ratio:.2f} times)"
    )
    return {"loop_overhead": against_bare.ratio - 1, "loader_speedup": against_loader.ratio}


class Items(torch.utils.data.Dataset):
    """A map-style data set as most people write it."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y.tolist()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index].float() / 255, self.y[index]


def sisa(mnist: Records, owners: int) -> dict[str, float]:
    """Forgetting single owners in a model of 20 shards against training all shards anew."""
    recipe = Recipe(model="mlp", epochs=2, optimiser_args=SGD, sharding=Sharding(shards=20))
    trained = train(recipe, mnist)
    names = sorted(set(mnist.owners))
    ratios = []
    for index in torch.randperm(len(names), generator=generator(1))[:owners].tolist():
        request = Request.remove_owner(names[index])
        full = Retrain()(trained, mnist, request, rng=generator(0))
        answer = Sisa()(trained, mnist, request, rng=generator(0))
        if full.trained.digest() != answer.trained.digest():
            raise SystemExit("SISA and retraining differ: no speed is worth that")
        ratios.append(full.cost.seconds / answer.cost.seconds)
    print(f"forgetting one owner in 20 shards: {min(ratios):.1f} to {max(ratios):.1f} times quicker than retraining")
    return {"sisa_speedup": statistics.median(ratios)}


if __name__ == "__main__":
    main()
