"""Certified removal, measured: is it valid, what does it cost in accuracy, and is it quicker than retraining?

    python benchmarks/certify.py --quick             # under a minute on two cores
    python benchmarks/certify.py                     # an hour or so: 500 removals from each of three data sets
    python benchmarks/certify.py --only mnist        # one part: mnist, fashion-mnist, adult, hessian or methods
    python benchmarks/certify.py --page              # measure nothing, write docs/certified.md from what was measured

Streams: softmax regression on all pixels or columns; rows leave one by one, all 500 releases together at epsilon 1,
delta 1e-5. After each removal its distance is checked by autograd: `valid_share` is the share within the cap.
Retraining is by scikit-learn, cold and from the weights before, until its gradient is as small as the cap asks for; the
quicker of its solvers counts. A provider with a wrong constant runs beside (`planted_valid_share`).

With ``--quick``: 10,000 rows of MNIST, 20 removals, lbfgs alone (newton-cholesky is slower by far there), 200
columns of Hessian products scaled to 7,850. Its last line is one JSON:

    accuracy_gap_points      test accuracy of exact retraining less that of the noised release, mean of 20 draws
    request_speedup_cold     scikit-learn from zero / one removal, booking and noise included
    request_speedup_warm     scikit-learn from the weights before / one removal
    valid_share              share of removals within the cap; planted_valid_share: with the wrong constant
    hessian_speedup_single   Hessian-vector products one at a time / blocked Hessian, softmax, d 7,850, 10,000 rows
    hessian_speedup_batched  the same products, many at a time / blocked Hessian
    bound_over_distance      Newton-Kantorovich bound / true distance, median
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _certified_page import write_page
from _methods import methods
from _stream import Setting, planted, prepare, stream
from _timing import seconds

from expunge import datasets
from expunge.calculus.head import HeadObjective
from expunge.certify.accountant import Budget
from expunge.core.store import write_atomically

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "certify"
STREAMS = ("mnist", "fashion-mnist", "adult")
LADDER = (0.25, 0.1, 0.05, 0.025, 0.012, 0.006, 0.003, 0.001)
BUDGET = Budget(epsilon=1.0, delta=1e-5, requests=500)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a sample, in under a minute")
    parser.add_argument("--only", choices=[*STREAMS, "hessian", "methods"], help="one part")
    parser.add_argument("--page", action="store_true", help="write docs/certified.md from what was measured before")
    words = parser.parse_args()
    if words.quick:
        print(json.dumps(quick()))
        return
    if not words.page:
        for name in [words.only] if words.only else [*STREAMS, "hessian", "methods"]:
            found = part(name)
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_atomically(RESULTS / f"{name}.json", json.dumps(found, indent=1).encode("utf-8"))
    write_page(RESULTS, HERE.parent / "docs" / "certified.md")


def part(name: str) -> Any:
    """One part, in full."""
    if name == "hessian":
        return hessian(columns=None)
    if name == "methods":
        return methods(STREAMS, BUDGET, print)
    solvers = ("lbfgs", "newton-cholesky")
    ready = prepare(Setting(name), BUDGET)
    found = stream(ready, 500, compare=1, solvers=solvers, ladder=LADDER, solve_every=10, report=print)
    return {**found, "planted_valid_share": planted(ready, 20)}


def quick() -> dict[str, float]:
    """A sample of everything."""
    ready = prepare(Setting("mnist", rows=10_000), BUDGET)
    found = stream(ready, 20, compare=1, solvers=("lbfgs",), ladder=(0.03, 0.01), solve_every=1, report=print)
    products = hessian(columns=200)
    keys = ("accuracy_gap_points", "request_speedup_cold", "request_speedup_warm", "valid_share", "bound_over_distance")
    return {
        **{key: round(found[key], 3) for key in keys},
        "planted_valid_share": planted(ready, 3),
        "hessian_speedup_single": round(products["single_s"] / products["blocked_s"], 2),
        "hessian_speedup_batched": round(products["batched_s"] / products["blocked_s"], 2),
        "hessian_columns_timed": products["columns"],
    }


def hessian(columns: int | None) -> dict[str, float]:
    """Seconds of the exact Hessian of a softmax head on 10,000 images, by blocks and by products with unit vectors.

    Products of some columns are scaled to all of them; None makes all.
    """
    rows = datasets.get("mnist").train
    x = torch.cat([rows.x[:10_000].flatten(1).double() / 255, torch.ones(10_000, 1, dtype=torch.float64)], dim=1)
    objective = HeadObjective(x, rows.y[:10_000], outputs=10, weight_decay=1e-3)
    w = torch.randn(10, x.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 30
    every = w.numel()
    chosen = torch.arange(0, every, every // columns)[:columns] if columns else torch.arange(every)
    unit = torch.eye(every, dtype=torch.float64)[chosen].view(-1, *w.shape)
    blocked: list[torch.Tensor] = []
    blocked_s = seconds(lambda: blocked.append(objective.hessian(w)))
    batched: list[torch.Tensor] = []
    batched_s = seconds(lambda: batched.extend(objective.product(w, part) for part in unit.split(64)))
    single: list[torch.Tensor] = []
    single_s = seconds(lambda: single.extend(objective.product(w, one) for one in unit))
    for made in (torch.cat(batched), torch.stack(single)):
        torch.testing.assert_close(made.flatten(1), blocked[0][chosen], rtol=1e-9, atol=1e-12)
    scale = every / len(chosen)
    return {
        "blocked_s": blocked_s,
        "batched_s": batched_s * scale,
        "single_s": single_s * scale,
        "columns": len(chosen),
    }


if __name__ == "__main__":
    main()
