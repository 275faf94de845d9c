"""What the tests of transcripts share: a small real training, forgers of its folder, and cheats that really train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from expunge.core.digest import digest_tensors
from expunge.core.protocols import Verdict
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.build import build, seeded
from expunge.learn.loop import reading_order
from expunge.testing.case import digits
from expunge.verify.coin import Coin
from expunge.verify.recorder import Recorder, recording
from expunge.verify.states import Stepper, model_digest
from expunge.verify.tolerance import Tolerance
from expunge.verify.transcript import Contract, checkpoint_name, first_link, next_link

CASE = digits()
RETAIN, FORGET = CASE.retain, CASE.forget
RECIPE = Recipe(
    model="mlp",
    model_args={"hidden": [16], "norm": "batch"},
    optimiser_args={"lr": 0.05, "momentum": 0.9},
    schedule={"kind": "cosine"},
    epochs=2,
    batch_size=32,
    seed=7,
).completed(RETAIN)
SALT, EVERY = "5a" * 16, 7
TIGHT = Tolerance(parameter=1e-5, buffer=1e-5, optimiser=1e-5)
Batch = tuple[Records, Tensor]
Arrays = dict[str, Tensor]


def failed(verdicts: Sequence[Verdict]) -> list[str]:
    return [verdict.check for verdict in verdicts if verdict.outcome == "fail"]


def outcomes(verdicts: Sequence[Verdict]) -> dict[str, str]:
    return {verdict.check: verdict.outcome for verdict in verdicts}


def plan(recipe: Recipe, records: Records) -> list[list[Batch]]:
    """The batches of an honest training, epoch by epoch."""
    return [
        [(records, batch) for batch in reading_order(recipe, records, "whole", epoch).split(recipe.batch_size)]
        for epoch in range(recipe.epochs)
    ]


def cheat(
    folder: Path,
    batches: list[list[Batch]],
    *,
    trained: Recipe = RECIPE,
    said: Recipe = RECIPE,
    records: Records = RETAIN,
    coin: Coin | None = None,
) -> Trained:
    """Really train on these batches under one recipe, and leave a transcript that says another."""
    recorder = Recorder(folder, said, records, every=EVERY, salt=None if coin else SALT, coin=coin)
    with recording(recorder), seeded(said.seed, "dropout", "whole"):
        stepper = Stepper(build(trained), trained)
        recorder.begin(stepper.module, stepper.optimiser)
        for epoch, steps in enumerate(batches):
            for source, positions in steps:
                x, y = next(iter(source.batches([positions])))
                stepper.step(x, y, epoch)
                recorder.step(source, positions, stepper.module, stepper.optimiser)
        recorder.finish()
    return Trained(module=stepper.module.eval(), recipe=said, ids=frozenset(records.ids))


class Pages:
    """A transcript's folder as a forger sees it: read, changed, and written again with or without a new chain."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "transcript.json").read_bytes())
        self.steps: Arrays = safetensors.torch.load_file(folder / "steps.safetensors")
        self.states: dict[int, Arrays] = {
            int(step): safetensors.torch.load_file(folder / checkpoint_name(int(step)))
            for step in self.manifest["checkpoints"]
        }

    def rechain(self) -> None:
        """Make every digest and link fit what is told now: what a forger with all the time in the world does."""
        steps, names = self.steps, [bytes(row.tolist()) for row in self.steps["rows"]]
        for step, state in self.states.items():
            self.manifest["checkpoints"][str(step)] = digest_tensors(state)
            steps["digests"][step] = row_of(bytes.fromhex(model_digest(state)))
        kept = {int(step): bytes.fromhex(told) for step, told in self.manifest["checkpoints"].items()}
        digests = [bytes(row.tolist()) for row in steps["digests"]]
        links = [first_link(Contract.from_json(self.manifest["contract"]), digests[0], kept[0])]
        for step, batch in enumerate(steps["batch"].split(steps["sizes"].tolist()), 1):
            rows = [names[place] for place in batch.tolist()]
            links.append(next_link(links[-1], step, rows, digests[step], kept.get(step, b"")))
        steps["links"] = torch.stack([row_of(link) for link in links])

    def write(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "transcript.json").write_text(json.dumps(self.manifest))
        safetensors.torch.save_file(self.steps, folder / "steps.safetensors")
        for step, state in self.states.items():
            safetensors.torch.save_file(state, folder / checkpoint_name(step))
        return folder


def row_of(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def forged(folder: Path, change: Callable[[Pages], None], into: Path, *, rechain: bool) -> Path:
    pages = Pages(folder)
    change(pages)
    if rechain:
        pages.rechain()
    return pages.write(into)


def flip(tensor: Tensor, bit: int) -> None:
    """Flip one bit of a tensor's first float, in place."""
    view = tensor.view(-1)[:1].view(torch.int32)
    view ^= -(2**31) if bit == 31 else 1 << bit
