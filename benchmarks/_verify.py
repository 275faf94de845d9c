"""What the parts of the benchmark of verification measure."""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _scores import FORGET_PEAK, load, resident
from _timing import seconds
from torch import Tensor

from expunge import Recipe, Records, Request, datasets, generator, train
from expunge.attack.forging import ForgingAdversary
from expunge.attack.providers_retraining import mismatch
from expunge.attack.selectors import Gap, GreedyMatching, LastLayerNeighbour, RandomOfM, Selector
from expunge.attack.selectors_nearest import NearestNeighbour, nearest_table
from expunge.core.coins import child
from expunge.core.trained import Trained
from expunge.learn.build import build
from expunge.learn.loop import Keep, reading_order, threads
from expunge.verify import Transcript, calibrate_tolerance, chance_of_missing, record
from expunge.verify.evidence import Evidence
from expunge.verify.segments import Segment, replay_segment
from expunge.verify.states import Stepper

HERE = Path(__file__).resolve()
FORGOTTEN = 10_000
RECIPE = Recipe(
    model="mlp", model_args={"hidden": [128]}, optimiser_args={"lr": 0.05}, epochs=1, batch_size=128, seed=1
)
BASELINE, OURS = "best of 50", "last layer"


def mnist() -> Records:
    """The 60,000 training rows."""
    return datasets.mnist().train


def selectors(quick: bool) -> dict[str, float]:
    """All selectors on the same batches of one training, in turn; prints time and mismatch of each."""
    rows = mnist()
    recipe = RECIPE.completed(rows)
    gone = torch.randperm(len(rows), generator=child(generator(0), "forgotten"))[:FORGOTTEN]
    forgotten = torch.zeros(len(rows), dtype=torch.bool)
    forgotten[gone] = True
    pool = (~forgotten).nonzero().flatten()
    ways: dict[str, Selector] = {
        BASELINE: RandomOfM(50),
        OURS: LastLayerNeighbour(),
        "last layer, 512 candidates": LastLayerNeighbour(candidates=512),
        "last layer, 4,096 candidates": LastLayerNeighbour(candidates=4096),
        "greedy": GreedyMatching(),
    }
    if not quick:
        ways["nearest by pixels"] = NearestNeighbour().prepared(rows, gone, pool)
    with threads(1):
        found = _compared(ways, recipe, rows, forgotten, pool, tries=4 if quick else 40)
    print(f"CPU time of one thread; {load()}")
    figures = {}
    for name, (took, off) in found.items():
        ratio = statistics.median(a / b for a, b in zip(found[BASELINE][0], took, strict=True))
        print(f"{name}: {1e3 * statistics.median(took):.2f} ms, relative mismatch {statistics.mean(off):.3f}")
        figures |= {f"{name}: ms": 1e3 * statistics.median(took), f"{name}: mismatch": statistics.mean(off)}
        figures[f"{name}: speedup"] = ratio
    least, ours = statistics.mean(found[BASELINE][1]), statistics.mean(found[OURS][1])
    return figures | {
        "selector_speedup": round(figures[f"{OURS}: speedup"], 1),
        "mismatch_ratio": round(ours / least, 3),
    }


def _compared(
    ways: dict[str, Selector], recipe: Recipe, rows: Records, forgotten: Tensor, pool: Tensor, tries: int
) -> dict[str, tuple[list[float], list[float]]]:
    """CPU seconds and relative mismatch of each way on batches spread over an epoch; the step itself is honest."""
    stepper = Stepper(build(recipe), recipe)
    batches = reading_order(recipe, rows, "whole", 0).split(recipe.batch_size)
    every = (len(batches) - 2) // tries
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in ways}
    for number, batch in enumerate(batches):
        if number % every == 0 and number // every <= tries:
            _try(ways, stepper, rows, batch, forgotten, pool, found if number else None)
        (x, y) = next(iter(rows.batches([batch])))
        stepper.step(x, y, 0)
    return found


def _try(
    ways: dict[str, Selector],
    stepper: Stepper,
    rows: Records,
    batch: Tensor,
    forgotten: Tensor,
    pool: Tensor,
    found: dict[str, tuple[list[float], list[float]]] | None,
) -> None:
    """One batch; the first one only warms up."""
    gap = Gap(
        module=stepper.module,
        recipe=stepper.recipe,
        records=rows,
        batch=batch,
        spots=forgotten[batch].nonzero().flatten(),
        pool=pool,
        reuse=True,
    )
    for name, way in ways.items():
        answer: list[Tensor] = []
        took = min(_cpu_seconds(lambda w=way, a=answer: a.append(w(gap, rng=generator(5)))) for _ in range(3))
        if found is not None:
            error, length = mismatch(stepper, rows, batch, gap.filled(answer[0]))
            found[name][0].append(took)
            found[name][1].append(error / length)


def _cpu_seconds(work: Callable[[], object]) -> float:
    """Seconds of this process's CPU time, which what else the machine does changes little."""
    start = time.process_time()
    work()
    return time.process_time() - start


def table(quick: bool) -> dict[str, float]:
    """The table of all rows, in a process that has done nothing else."""
    del quick
    done = subprocess.run([sys.executable, str(HERE)], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"nearest neighbours of 60,000 rows: {found['table_s']:.1f} s, {found['nn_table_mb']:.0f} MB; {load()}")
    return found


def own_table() -> dict[str, float]:
    """Seconds, and megabytes by which this process grows at most once the rows lie in memory."""
    rows = mnist()
    everything = torch.arange(len(rows))
    nearest_table(rows, everything[:64], everything[:64])
    ctypes.CDLL(None).malloc_trim(0)
    FORGET_PEAK.write_text("5")
    before = resident("VmRSS")
    took = seconds(lambda: nearest_table(rows, everything, everything))
    return {"nn_table_mb": round(resident("VmHWM") - before, 1), "table_s": round(took, 2)}


def detection(quick: bool) -> dict[str, float]:
    """A forger with few forgotten rows and no needless move, replayed whole for every spacing of checkpoints."""
    rows = mnist().select(range(2_000 if quick else 12_000))
    recipe = Recipe(
        model="mlp",
        model_args={"hidden": [128]},
        optimiser_args={"lr": 0.05},
        epochs=2,
        batch_size=32 if quick else 64,
        seed=1,
    )
    trained = train(recipe, rows, keep=Keep(every=1))
    request = Request.remove(rows.ids[:20])
    figures: dict[str, float] = {}
    chances = []
    for spacing in (5, 20) if quick else (1, 2, 5, 10, 20, 50):
        faulty, segments = _found(trained, rows, request, spacing)
        drawn = math.ceil(0.05 * segments)
        chance = 1 - chance_of_missing(segments, faulty, drawn)
        chances.append(chance)
        per_step = faulty / segments / spacing
        print(
            f"checkpoint every {spacing}: {faulty} of {segments} segments beyond the calibrated tolerance; replaying "
            f"{drawn} of them ({drawn * spacing} steps) finds one with {chance:.3f}; {per_step:.3f} a replayed step"
        )
        figures |= {
            f"every {spacing}: faulty share": round(faulty / segments, 4),
            f"every {spacing}: found at 5 %": round(chance, 4),
            f"every {spacing}: found a replayed step": round(per_step, 4),
        }
    return figures | {"detection_at_5_percent_replay": round(min(chances), 4)}


def _found(trained: Trained, rows: Records, request: Request, spacing: int) -> tuple[int, int]:
    """How many segments a replay finds beyond the tolerance calibrated for their length, and of how many."""
    with tempfile.TemporaryDirectory() as folder:
        forger = ForgingAdversary(
            trained=trained, records=rows, folder=Path(folder) / "told", every=spacing, perturb=0.0
        )
        forger.unlearn(request, rng=generator(2))
        told, recipe = Transcript.open(Path(folder) / "told"), forger.trained.recipe
        tolerance = calibrate_tolerance(recipe, forger.stays, every=spacing)
        evidence = Evidence(transcript=told, agreed=recipe, records=forger.stays, forget=forger.forgotten)
        replayed = [replay_segment(evidence, begin, end) for begin, end in told.segments]
        wrong = [not isinstance(one, Segment) or bool(one.faults(tolerance)) for one in replayed]
        return sum(wrong), len(wrong)


def storage(quick: bool) -> dict[str, float]:
    """Transcripts of one epoch of 60,000 rows."""
    rows = mnist()
    figures: dict[str, float] = {}
    for every in (100,) if quick else (10, 50, 100, 469):
        with tempfile.TemporaryDirectory() as folder:
            took = seconds(lambda e=every, f=folder: record(RECIPE, rows, Path(f) / "told", every=e))
            size = Transcript.open(Path(folder) / "told").size_mb()
        inside = size["checkpoints"]
        print(f"checkpoint every {every}: {size['all']:.1f} MB, {inside:.1f} of them in checkpoints; {took:.1f} s")
        figures |= {f"every {every}: MB": round(size["all"], 2), f"every {every}: s": round(took, 2)}
        if every == 100:
            figures["transcript_mb"] = round(size["all"], 2)
    return figures


if __name__ == "__main__":
    print(json.dumps(own_table()))
