"""The page of what was measured of certified removal, written from the figures alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]
STREAMS = ("mnist", "fashion-mnist", "adult")


def write_page(results: Path, page: Path) -> None:
    """Write the page; what has no figures is said to be not measured."""
    known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")}
    parts = [_HEAD, *_streams(known), *_hessian(known.get("hessian")), *_methods(known.get("methods"))]
    page.write_text("\n".join(parts) + "\n", encoding="utf-8")


_HEAD = """# Certified removal, measured

Written by `python benchmarks/certify.py --page` from what the same script measured (`benchmarks/results/certify`), on
two cores without a GPU. What the figures mean and what the methods are: [certify.md](certify.md).
"""


def _streams(known: Mapping[str, Found]) -> Iterable[str]:
    yield (
        """## A stream of requests

Softmax regression on all features. Rows leave one at a time; all releases together keep to epsilon 1, delta 1e-5 for
500 requests. After every removal the distance is checked against the cap: by autograd's gradient over the weight decay,
which the distance cannot exceed, and where that says too little, and every tenth time, by finding the optimum. Factors
over distances are medians over those. Retraining is by scikit-learn (the quicker of lbfgs and newton-cholesky) until
its gradient certifies the same cap, from zero (cold) and from the weights before the request (warm); ours counts
booking and noise too. Seconds are medians; both sides ran on one thread, beside other work.

| | """
        + " | ".join(STREAMS)
        + """ |
|---|---|---|---|"""
    )
    rows: Mapping[str, Any] = {
        "rows": lambda f: f"{f['rows']:,}",
        "parameters": lambda f: f"{f['parameters']:,}",
        "removals": lambda f: f"{f['removals']}",
        "optima found": lambda f: f"{f['optima_found']}",
        "within the cap": lambda f: f"{f['valid_share']:.1%}",
        "farthest, of the cap": lambda f: f"{f['farthest_over_cap']:.2f}",
        "within the cap, wrong constant planted": lambda f: f"{f['planted_valid_share']:.1%}",
        "Kantorovich bound over distance": lambda f: f"{f['bound_over_distance']:.2f}",
        "gradient bound over distance": lambda f: f"{f['plain_bound_over_distance']:.2f}",
        "accuracy, noised release (%)": lambda f: f"{f['accuracy']:.2f}",
        "accuracy, exact retraining (%)": lambda f: f"{f['accuracy_retrained']:.2f}",
        "epsilon after 1, 10, 100, 500": lambda f: ", ".join(f"{e:.3f}" for e in f["epsilon_after"].values()),
        "pair leak mu, median (largest)": lambda f: (
            f"{f['pair_leak_mu']['median']:.2f} ({f['pair_leak_mu']['largest']:.1f})"
        ),
        "a request (s), median (slowest)": lambda f: f"{f['request_s']:.2f} ({f['slowest_request_s']:.1f})",
        "the first model (s)": lambda f: f"{f['begin_s']:.0f}",
        "cold retraining over a request": lambda f: f"{f['request_speedup_cold']:.1f}",
        "warm retraining over a request": lambda f: f"{f['request_speedup_warm']:.1f}",
    }
    for name, say in rows.items():
        cells = [say(known[data]) if data in known else "not measured" for data in STREAMS]
        yield f"| {name} | " + " | ".join(cells) + " |"
    yield ""


def _hessian(found: Found | None) -> Iterable[str]:
    yield "## The exact Hessian of a softmax head\n\n10,000 rows, 7,850 parameters, float64.\n"
    if found is None:
        yield "Not measured.\n"
        return
    yield "| | seconds | over ours |\n|---|---|---|"
    for name in ("blocked", "batched", "single"):
        seconds = found[f"{name}_s"]
        yield f"| {_MADE[name]} | {seconds:.1f} | {seconds / found['blocked_s']:.1f} |"
    yield ""


_MADE = {
    "blocked": "ours: symmetric blocks",
    "batched": "Hessian products, 64 at a time",
    "single": "Hessian products, one at a time",
}


def _methods(plans: Iterable[Found] | None) -> Iterable[str]:
    yield "## Every method at the same budget\n\nSoftmax regression, 500 requests of one row, epsilon 1, delta 1e-5.\n"
    if plans is None:
        yield "Not measured.\n"
        return
    for plan in plans:
        yield f"### {plan['data']}: {plan['records']:,} rows, {plan['rows']}, weight decay {plan['weight_decay']:g}\n"
        yield (
            f"Retraining by the recipe: {100 * plan['retrained']['value']:.1f} % in {plan['seconds_retrain']:.1f} s.\n"
        )
        yield "| method | honours it | basis | accuracy (%) | first request (s) | later (s) |"
        yield "|---|---|---|---|---|---|"
        for line in plan["lines"]:
            yield _line(line)
        yield ""


def _line(line: Found) -> str:
    figures = line["figures"]
    can = line["can"] + (", but vacuous: doing nothing would say the same" if line["vacuous"] else "")
    name = line["method"] + (f", sigma {line['sigma']:g} chosen on the test rows" if line["chosen"] else "")
    if figures is None:
        return f"| {name} | {can}: {line['why']} | {line['basis'] or ''} | | | |"
    accuracy, later = figures["accuracy"], figures["seconds_later"]
    shown = f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})"
    why = f": {line['why']}" if line["why"] else ""
    after = "" if later is None else f"{later:.2f}"
    return f"| {name} | {can}{why} | {line['basis'] or ''} | {shown} | {figures['seconds_first']:.1f} | {after} |"
