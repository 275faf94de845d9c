"""Training that leaves a transcript: the folder appears whole when training is done, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from expunge.core.digest import digest_tensors
from expunge.core.errors import Impossible, Misuse, Unsupported
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.trained import State, Trained, write_state
from expunge.learn.build import build_name
from expunge.verify.coin import Coin
from expunge.verify.rows import data_root, row_commitments
from expunge.verify.states import coins_now, model_digest, snapshot
from expunge.verify.transcript import STEPS, Contract, Numbers, checkpoint_name, first_link, manifest, next_link

WHOLE, SHARD = "whole", "slice-0"


class Recorder:
    """Writes a transcript beside a training: `begin`, then `step` after every step, then `finish`.

    Believes whatever it is told, as it stands on the provider's side. Holds 4 bytes for each row of each step, and 64
    for each step, until the end. Cost: a SHA-256 of the model each step, a copy of the whole state each checkpoint.
    """

    def __init__(
        self,
        folder: str | Path,
        recipe: Recipe,
        records: Records,
        *,
        stage: str = WHOLE,
        every: int = 100,
        salt: str | None = None,
        coin: Coin | None = None,
    ) -> None:
        """Begin a transcript of training a completed recipe on these records.

        Args:
            folder: must not be there yet; nothing is there until `finish`.
            recipe: completed, and drawn from the coin if there is one.
            records: what the contract says is trained on.
            stage: name of the training; ``slice-0`` for a shard.
            every: steps between checkpoints.
            salt: keys the rows' commitments; the coin's if there is one, else fresh and random.
            coin: the public coin.

        Raises:
            Misuse: if the folder is there, or `every` is no number of steps.
            Unsupported: for recipes whose training is more than one run of the plain loop.
        """
        _refuse_recipe(recipe)
        self.folder = Path(folder)
        if self.folder.exists():
            raise Misuse(f"{self.folder} is there already; name a new folder for the transcript")
        if coin is not None and salt not in (None, coin.commitments.salt):
            raise Misuse("under a public coin the salt is the one that was committed to; leave it out")
        self.salt = coin.commitments.salt if coin is not None else salt or secrets.token_hex(16)
        self.contract = Contract(
            recipe=recipe,
            stage=stage,
            build=build_name(records.device),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            rows=len(records),
            data_root=data_root(records, self.salt),
            salt=self.salt,
            every=every,
            coin=None if coin is None else coin.to_json(),
        )
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._part = self.folder.parent / f".{self.folder.name}.{uuid.uuid4().hex[:8]}.part"
        self._part.mkdir()
        self._known: dict[bytes, int] = {}
        self._places: dict[int, tuple[Records, Numbers]] = {}
        self._batches: list[np.ndarray[tuple[int], np.dtype[np.int32]]] = []
        self._digests: list[bytes] = []
        self._links: list[bytes] = []
        self._kept: dict[int, bytes] = {}

    def begin(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Training is about to begin in this state; torch's generators stand where dropout will draw from them."""
        if self._digests:
            raise Misuse("this recorder has begun already; make a new one for another training")
        checkpoint = self._keep(0, module, optimiser)
        self._links.append(first_link(self.contract, self._digests[0], checkpoint))

    def step(self, records: Records, positions: Tensor, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """A step was made on the rows at these positions of these records, in this order."""
        if not self._digests:
            raise Misuse("a step was made before begin(); call it with the untrained model first")
        places = self._of(records)[positions.cpu().numpy()]
        batch = [self._names[place] for place in places.tolist()]
        self._batches.append(places.astype(np.int32))
        number = len(self._batches)
        if number % self.contract.every == 0:
            checkpoint = self._keep(number, module, optimiser)
        else:
            checkpoint = b""
            self._digests.append(bytes.fromhex(digest_tensors(module.state_dict())))
        self._links.append(next_link(self._links[-1], number, batch, self._digests[-1], checkpoint))
        self._last = (batch, module, optimiser, coins_now())

    def finish(self, trained: Trained | None = None) -> Path:
        """Write the rest and let the folder appear.

        Args:
            trained: the model that came of it, to refuse what must never be replayed.

        Raises:
            Impossible: for a certified model.
        """
        if not self._digests:
            raise Misuse("there is nothing to finish; call begin() and step() first")
        if trained is not None:
            refuse_certified(trained)
        number = len(self._batches)
        if number not in self._kept:
            batch, module, optimiser, coins = self._last
            self._digests.pop()
            checkpoint = self._keep(number, module, optimiser, coins)
            self._links[-1] = next_link(self._links[-2], number, batch, self._digests[-1], checkpoint)
        write_state(self._part / STEPS, self._arrays())
        (self._part / "transcript.json").write_bytes(manifest(self.contract, self._kept))
        os.replace(self._part, self.folder)
        return self.folder

    def abandon(self) -> None:
        """Leave nothing behind; does nothing after `finish`."""
        shutil.rmtree(self._part, ignore_errors=True)

    def _keep(
        self, number: int, module: nn.Module, optimiser: torch.optim.Optimizer, coins: State | None = None
    ) -> bytes:
        state = snapshot(module, optimiser, coins)
        write_state(self._part / checkpoint_name(number), state)
        self._digests.append(bytes.fromhex(model_digest(state)))
        self._kept[number] = bytes.fromhex(digest_tensors(state))
        return self._kept[number]

    def _of(self, records: Records) -> Numbers:
        """Places in the list of distinct commitments of all rows of these records."""
        if id(records) not in self._places:
            names = row_commitments(records, self.salt)
            for name in names:
                self._known.setdefault(name, len(self._known))
            self._places[id(records)] = (records, np.array([self._known[name] for name in names], dtype=np.int64))
            self._names = list(self._known)
        return self._places[id(records)][1]

    def _arrays(self) -> dict[str, Tensor]:
        empty = np.zeros(0, np.int32)
        return {
            "rows": _hashes(list(self._known)),
            "batch": torch.from_numpy(np.concatenate([empty, *self._batches])),
            "sizes": torch.tensor([len(batch) for batch in self._batches], dtype=torch.int32),
            "digests": _hashes(self._digests),
            "links": _hashes(self._links),
        }


@contextmanager
def recording(recorder: Recorder) -> Iterator[Recorder]:
    """Within: training. After: nothing is left of a transcript that was not finished."""
    try:
        yield recorder
    finally:
        recorder.abandon()


def refuse_certified(trained: Trained) -> None:
    """Refuse a model whose noise must stay secret.

    Raises:
        Impossible: if noise was released for it or one of its parts, or un-noised state is kept. A transcript that can
            be replayed gives the noise away, and without secret noise the guarantee is void.
    """
    if trained.releases or trained.secret:
        raise Impossible(
            "a certified model has no transcript: replayable noise would void its guarantee; verify exact methods only"
        )
    for part in trained.parts:
        refuse_certified(part)


def _refuse_recipe(recipe: Recipe) -> None:
    if recipe.pruning is not None:
        raise Unsupported("pruned recipes train several times and leave no transcript; record the dense recipe")
    if recipe.sharding is not None:
        raise Unsupported("each shard has a transcript of its own; use record(), or recipe.part(shard)")


def _hashes(ones: list[bytes]) -> Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(ones), dtype=np.uint8).reshape(-1, 32).copy())
