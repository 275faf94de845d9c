"""Requests that are meant to do harm, measured.

    python benchmarks/requests.py --quick            # under a minute on two cores
    python benchmarks/requests.py                    # every part, in full
    python benchmarks/requests.py --only scores      # one part
    python benchmarks/requests.py --only attacks --front adult   # one front of a part; goes on after a break

The parts:

    scores   influence scores of 10,000 images (an MLP 784-128-10 on MNIST): layer by layer, against gradients made row
             by row, against gradients of blocks by vmap, and against forward mode; in time and in memory
    attacks  requests in bad faith against models of MNIST and Adult: 30 targets, 3 trainings, beside controls, and
             what screens leave of them; hours, so never with --quick
    camouflage  200 recorded trials of settings under which camouflage may wake on Adult, and the best of them on
             targets that the search never saw; an hour, so never with --quick

With ``--quick`` the last line is one JSON:

    score_speedup_one    one vector: gradients row by row, each times the vector / ours
    score_speedup_50     50 vectors: gradients row by row, block by block times the matrix / ours
    peak_mb              memory that ours needs for 50 vectors beside the rows, the vectors and the model
    max_relative_error   largest difference between ours and float64 gradients row by row over the largest score
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import _attacks
import _camouflage
import _scores

from expunge.core.store import write_atomically

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "requests"
TRIALS = HERE.parent / "build" / "requests"
"""Every trial of `attacks`, kept so that a broken-off run goes on."""
Part = Callable[[bool], dict[str, float]]
"""Measures one part, as a sample if asked to; names and figures, all of them for the last line of ``--quick``."""
PARTS: Mapping[str, Part] = {"scores": _scores.measure}
"""Those that have a quick sample; `attacks` and `camouflage` have none."""
EXAMPLES = """examples:
  python benchmarks/requests.py --quick
  python benchmarks/requests.py --quick --only scores
  OMP_NUM_THREADS=1 python benchmarks/requests.py --only scores
  python benchmarks/requests.py --only attacks --front mnist
"""


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a sample, in under a minute; the last line is one JSON")
    parser.add_argument("--only", choices=[*PARTS, "attacks", "camouflage"], help="one part")
    parser.add_argument(
        "--front", choices=list(_attacks.FRONTS), help="of the part attacks: one front; all if left out"
    )
    words = parser.parse_args()
    if words.only in ("attacks", "camouflage") and words.quick:
        parser.error(f"{words.only} has no quick sample; leave out --quick")
    figures: dict[str, float] = {}
    for name in PARTS if words.only is None else {words.only} & set(PARTS):
        found = PARTS[name](words.quick)
        figures |= found
        if not words.quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_atomically(RESULTS / f"{name}.json", json.dumps(found, indent=1).encode("utf-8"))
    if words.only == "attacks" or not (words.only or words.quick):
        for front in [words.front] if words.front else _attacks.FRONTS:
            told = _attacks.measure(front, TRIALS / front, RESULTS)
            print(json.dumps({front: told}, indent=1))
    if words.only == "camouflage" or not (words.only or words.quick):
        found = _camouflage.search(
            _attacks.FRONTS["adult"].recipe,
            TRIALS / "adult-camouflage-search.jsonl",
            RESULTS / "adult-camouflage-search.json",
        )
        print(json.dumps({"camouflage": found["on fresh targets"]}, indent=1))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
