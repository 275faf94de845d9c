"""Verification of unlearning, and what its cheats cost, measured.

    python benchmarks/verify.py --quick              # under a minute on two cores
    python benchmarks/verify.py                      # every part, in full; the last one takes the best part of an hour
    python benchmarks/verify.py --only selectors     # one part

The parts, all on MNIST with an MLP 784-128-10, the last one 784-64-10:

    selectors   stand-ins for the forgotten rows of a batch (10,000 of 60,000 rows forgotten, batches of 128): the
                last-layer selector against random sets of which the best of M = 50 is taken, in time and in mismatch of
                the full gradient
    table       nearest neighbours of all 60,000 rows within their classes: time and memory
    detection   a forger that tells logged states as they are wherever it can: how many segments a replay at the
                calibrated tolerance finds, and the chance to find one, against the spacing of checkpoints
    storage     megabytes of a transcript, against the spacing of checkpoints
    retention   what the retraining adversary retains of random and of atypical rows, against an honest retraining of
                as many steps, over seeds; not with --quick; begun again, it goes on where it was left

With ``--quick`` the last line is one JSON:

    selector_speedup               CPU time of M = 50 backward passes / that of the last-layer selector, median
    mismatch_ratio                 mean full-gradient mismatch, last-layer selector / best of 50
    nn_table_mb                    memory that the table of 60,000 rows needs beside the rows
    detection_at_5_percent_replay  chance to find the forger with 5 % of its segments replayed, least over spacings
    transcript_mb                  transcript of one epoch of 60,000 rows, a checkpoint every 100 steps
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import _retention
import _verify

from expunge.core.store import write_atomically

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "verify"
Part = Callable[[bool], dict[str, Any]]
"""Measures one part, as a sample if asked to; names and figures."""
PARTS: Mapping[str, Part] = {
    "selectors": _verify.selectors,
    "table": _verify.table,
    "detection": _verify.detection,
    "storage": _verify.storage,
    "retention": lambda _: _retention.measured(),
}
SLOW = ("retention",)
LAST_LINE = (
    "selector_speedup",
    "mismatch_ratio",
    "nn_table_mb",
    "detection_at_5_percent_replay",
    "transcript_mb",
)
EXAMPLES = """examples:
  python benchmarks/verify.py --quick
  python benchmarks/verify.py --quick --only selectors
  OMP_NUM_THREADS=1 python benchmarks/verify.py --only detection
  OMP_NUM_THREADS=1 python benchmarks/verify.py --only retention
"""


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a sample, in under a minute; the last line is one JSON")
    parser.add_argument("--only", choices=list(PARTS), help="one part")
    words = parser.parse_args()
    if words.quick and words.only in SLOW:
        parser.error(f"{words.only} has no sample; leave out --quick")
    figures: dict[str, Any] = {}
    for name in [words.only] if words.only else [one for one in PARTS if not (words.quick and one in SLOW)]:
        found = PARTS[name](words.quick)
        figures |= found
        if not words.quick:
            RESULTS.mkdir(parents=True, exist_ok=True)
            write_atomically(RESULTS / f"{name}.json", json.dumps(found, indent=1).encode("utf-8"))
    print(json.dumps({name: figures[name] for name in LAST_LINE if name in figures}))


if __name__ == "__main__":
    main()
