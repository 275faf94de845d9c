"""Transcripts of training: what was promised, each step's rows and result in a hash chain, and states to replay from.

A folder of JSON and safetensors, read as a stranger's: nothing in it is ever unpickled, and sizes, names, dtypes and
shapes are checked before use. Its layout: ``transcript.json`` (contract and digests), ``steps.safetensors`` (rows,
batches, digests, links) and ``checkpoint-<step>.safetensors``.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from expunge.core.digest import array_of, canonical_json, digest_tensors, sha256_hex
from expunge.core.errors import Misuse, UnreadableFile
from expunge.core.recipe import Recipe
from expunge.core.trained import read_state
from expunge.verify.rows import salt_bytes

FORMAT = "expunge-transcript/1"
MANIFEST, STEPS = "transcript.json", "steps.safetensors"
_MOST_JSON_BYTES = 64 << 20
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a transcript says of its training, before the first step. A verifier compares it and never obeys it.

    Attributes:
        recipe: the completed recipe, of the shard for a shard.
        stage: name of the training among those of the recipe: ``whole``, or ``slice-0`` for a shard.
        build: what computed it; see `expunge.learn.build.build_name`.
        torch: version of torch.
        threads: CPU threads used.
        rows: rows trained on.
        data_root: ``count:root`` over the commitments to these rows.
        salt: what keys the rows' commitments. Whoever holds it can test a row and an owner that it can guess.
        every: steps between checkpoints.
        coin: digest of the commitments and nonce that all coins were drawn from; None without a public coin.
    """

    recipe: Recipe
    stage: str
    build: str
    torch: str
    threads: int
    rows: int
    data_root: str
    salt: str
    every: int
    coin: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        texts = (self.stage, self.build, self.torch, self.data_root, self.salt)
        wholes = (self.threads, self.rows, self.every)
        fine = all(isinstance(text, str) and len(text) <= 500 for text in texts) and all(
            type(number) is int and 0 < number < 1 << 62 for number in wholes
        )
        coin = self.coin is None or (
            set(self.coin) == {"commitments", "nonce"} and all(map(_is_text, self.coin.values()))
        )
        if not fine or not coin:
            raise Misuse("a contract names stage, build, torch, data root and salt, and threads, rows and every >= 1")
        salt_bytes(self.salt)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**data, "recipe": self.recipe.to_json(), "coin": None if self.coin is None else dict(self.coin)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Contract:
        """The contract that `to_json` wrote; Misuse for anything else."""
        if not isinstance(data, dict) or set(data) != {field.name for field in fields(cls)}:
            raise Misuse("a contract has other fields than were found; it was not written by expunge")
        if not isinstance(data["recipe"], dict) or not isinstance(data["coin"], dict | None):
            raise Misuse("a contract holds a recipe, and a coin or none; it was not written by expunge")
        return cls(**{**data, "recipe": Recipe.from_json(data["recipe"])})

    def digest(self) -> str:
        """SHA-256 of the canonical JSON; the chain begins with it."""
        return sha256_hex(canonical_json(self.to_json()))


def first_link(contract: Contract, digest: bytes, checkpoint: bytes) -> bytes:
    """The chain's beginning: contract, model and whole state before the first step."""
    return hashlib.sha256(b"\x00" + FORMAT.encode() + bytes.fromhex(contract.digest()) + digest + checkpoint).digest()


def next_link(before: bytes, step: int, batch: Sequence[bytes], digest: bytes, checkpoint: bytes = b"") -> bytes:
    """The link of a step (from 1): the link before, its number, rows in order, the model after, the state if kept."""
    count = len(batch).to_bytes(8, "big")
    parts = (b"\x01", before, step.to_bytes(8, "big"), count, *batch, digest, checkpoint)
    return hashlib.sha256(b"".join(parts)).digest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Transcript:
    """One training, as its provider tells it. Reading it believes nothing; `expunge.verify.Replay` checks it.

    Attributes:
        folder: where it lies; checkpoints are read from there when they are needed.
        contract: what it says that it is.
        rows: (n, 32) the distinct row commitments that its steps name.
        batch: places in `rows` of all steps' rows, one step after the other, in order.
        ends: (steps + 1,) where each step's rows end in `batch`; 0 first.
        digests: (steps + 1, 32) SHA-256 of parameters and buffers before the first step and after each.
        links: (steps + 1, 32) the chain.
        kept: digest of the whole state kept after each of these steps; 0 and the last among them.
    """

    folder: Path
    contract: Contract
    rows: Bytes
    batch: Numbers
    ends: Numbers
    digests: Bytes
    links: Bytes
    kept: Mapping[int, bytes]

    @classmethod
    def open(cls, folder: str | Path) -> Transcript:
        """Read a transcript, from whomever. Cost: reads no checkpoint.

        Raises:
            UnreadableFile: if a file is missing, too many, no safetensors (pickles are never opened), or holds what
                no transcript holds.
        """
        folder = Path(folder)
        contract, kept = _read_manifest(folder)
        _refuse_spacing(folder, contract, kept)
        _refuse_strangers(folder, kept)
        tensors = read_state(folder / STEPS)
        _refuse_shapes(folder, tensors)
        rows = array_of(tensors["rows"])
        ends = np.concatenate([[0], array_of(tensors["sizes"]).astype(np.int64).cumsum()])
        batch = array_of(tensors["batch"]).astype(np.int64)
        steps = len(ends) - 1
        if len(batch) != ends[-1] or (len(batch) and not 0 <= batch.min() <= batch.max() < len(rows)):
            raise UnreadableFile(f"{folder / STEPS} names rows that it does not list; ask for the transcript again")
        if len(tensors["digests"]) != steps + 1 or len(tensors["links"]) != steps + 1 or max(kept) != steps:
            raise UnreadableFile(f"{folder} tells of {steps} steps but not of each one's result; ask for it again")
        return cls(
            folder=folder,
            contract=contract,
            rows=rows,
            batch=batch,
            ends=ends,
            digests=array_of(tensors["digests"]),
            links=array_of(tensors["links"]),
            kept=kept,
        )

    def __len__(self) -> int:
        """Steps made."""
        return len(self.ends) - 1

    def places(self, step: int) -> Numbers:
        """Places in `rows` of the rows of this step (from 1), in order."""
        return self.batch[self.ends[step - 1] : self.ends[step]]

    def names(self, step: int) -> list[bytes]:
        """Commitments to the rows of this step (from 1), in order."""
        return [self._names[place] for place in self.places(step).tolist()]

    @cached_property
    def _names(self) -> list[bytes]:
        return [row.tobytes() for row in self.rows]

    @property
    def commitment(self) -> str:
        """The last link: binds all of the transcript. Publish it before anybody draws what to check."""
        return bytes(self.links[-1]).hex()

    @property
    def final(self) -> str:
        """Digest of the model after the last step, comparable to `Trained.digest`."""
        return bytes(self.digests[-1]).hex()

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Pairs (step of a checkpoint, step of the next): what can be replayed one without the other."""
        return tuple(pairwise(sorted(self.kept)))

    def checkpoint(self, step: int) -> dict[str, Tensor]:
        """The whole state kept after this step, read anew from its file; its tensors share nothing with anybody's.

        Raises:
            UnreadableFile: if the file is missing or no safetensors.
            Misuse: if no checkpoint is kept of this step.
        """
        if step not in self.kept:
            raise Misuse(f"no checkpoint is kept after step {step}; there are {len(self.kept)}, see Transcript.kept")
        path = self.folder / checkpoint_name(step)
        state = read_state(path)
        strange = [tensor.dtype for tensor in state.values() if tensor.dtype.is_floating_point and tensor.itemsize < 2]
        if strange:
            raise UnreadableFile(f"{path} holds numbers of {strange[0]}, which no training keeps; ask for another")
        return {name: tensor.clone() for name, tensor in state.items()}

    def digest(self) -> str:
        """SHA-256 over all that was read, checkpoints excepted: verifying must not change it."""
        arrays = {name: getattr(self, name) for name in ("rows", "batch", "ends", "digests", "links")}
        told = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        kept = {str(step): digest.hex() for step, digest in self.kept.items()}
        return sha256_hex(canonical_json([self.contract.to_json(), digest_tensors(told), kept]))

    def size_mb(self) -> dict[str, float]:
        """Megabytes (10^6 bytes) on disk of the steps, the checkpoints, and in all."""
        checkpoints = sum((self.folder / checkpoint_name(step)).stat().st_size for step in self.kept)
        steps = sum((self.folder / name).stat().st_size for name in (MANIFEST, STEPS))
        return {"steps": steps / 1e6, "checkpoints": checkpoints / 1e6, "all": (steps + checkpoints) / 1e6}


def checkpoint_name(step: int) -> str:
    """Name of the file of the state kept after this step."""
    return f"checkpoint-{step:09d}.safetensors"


def manifest(contract: Contract, kept: Mapping[int, bytes]) -> bytes:
    """The bytes of ``transcript.json``."""
    told = {str(step): digest.hex() for step, digest in sorted(kept.items())}
    return canonical_json({"format": FORMAT, "contract": contract.to_json(), "checkpoints": told})


def _read_manifest(folder: Path) -> tuple[Contract, dict[int, bytes]]:
    path = folder / MANIFEST
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > _MOST_JSON_BYTES:  # links and pipes may never end
            raise UnreadableFile(f"{path} is no plain file, or larger than any transcript's; ask for another")
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT or set(data) != {"format", "contract", "checkpoints"}:
            raise ValueError(f"it is not of format {FORMAT}")
        contract = Contract.from_json(data["contract"])
        kept = {int(step): bytes.fromhex(digest) for step, digest in data["checkpoints"].items()}
    except OSError as error:
        raise UnreadableFile(f"{folder} is no transcript ({error.strerror}); point to a folder with one") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, UnreadableFile):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UnreadableFile(f"{path} tells of no training ({reason}); ask for the transcript again") from None
    if 0 not in kept or min(kept) < 0 or any(len(digest) != 32 for digest in kept.values()):
        raise UnreadableFile(f"{path} lists no checkpoint before the first step; ask for the transcript again")
    return contract, kept


def _refuse_spacing(folder: Path, contract: Contract, kept: Mapping[int, bytes]) -> None:
    """Segments must be as long as the contract says, or a share of them is not that share of the steps."""
    steps = max(kept)
    if len(kept) != 1 + -(-steps // contract.every) or any(step % contract.every for step in kept if step != steps):
        raise UnreadableFile(f"{folder} keeps other checkpoints than one each {contract.every:,} steps; ask for those")


def _refuse_strangers(folder: Path, kept: Mapping[int, bytes]) -> None:
    expected = {MANIFEST, STEPS, *map(checkpoint_name, kept)}
    for path in sorted(folder.iterdir()):
        if path.name not in expected or path.is_symlink() or not path.is_file():
            raise UnreadableFile(f"{folder} holds {path.name!r:.80}, which is no transcript's; nothing was opened")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, "pt"):
                pass  # its header alone is read
        except safetensors.SafetensorError:
            read_state(path)  # says what it is instead
    missing = sorted(expected - {path.name for path in folder.iterdir()})
    if missing:
        raise UnreadableFile(f"{folder} lacks {missing[0]}; ask for the whole transcript")


def _refuse_shapes(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    expected = {
        "rows": (torch.uint8, 2),
        "batch": (torch.int32, 1),
        "sizes": (torch.int32, 1),
        "digests": (torch.uint8, 2),
        "links": (torch.uint8, 2),
    }
    found = {name: (tensor.dtype, tensor.dim()) for name, tensor in tensors.items()}
    wide = found == expected and all(tensors[name].shape[1] == 32 for name in ("rows", "digests", "links"))
    if not wide or bool((tensors["sizes"] < 1).any()):
        raise UnreadableFile(f"{folder / STEPS} holds other arrays than a transcript's; ask for the transcript again")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 500
