"""A trained model, with all that must be known to remove rows from it. Holds no rows."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from expunge.core.claim import Claim, Exactness
from expunge.core.digest import canonical_json, digest_tensors, sha256_hex
from expunge.core.errors import BadRecords, Misuse, UnreadableFile
from expunge.core.events import Release, release_from_json
from expunge.core.recipe import Recipe

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingLog:
    """What training left behind. Derived from rows, so it goes when one of them goes.

    Attributes:
        steps: optimiser steps made.
        rows_read: rows read, each time counted.
        threads: CPU threads used; another number may give other last bits.
        build: what computed it (version of torch, instruction set, device); another may give other last bits.
        losses: mean loss of each epoch, as seen while training.
        batches: ids of each step's rows in order, if asked for.
        checkpoints: parameters and buffers after step k, if asked for.
        slices: parameters and buffers after each slice of a SISA shard.
    """

    steps: int
    rows_read: int
    threads: int
    build: str = ""
    losses: tuple[float, ...] = ()
    batches: tuple[tuple[str, ...], ...] = ()
    checkpoints: Mapping[int, State] = field(default_factory=dict)
    slices: tuple[State, ...] = ()


class Builder(Protocol):
    """Makes the untrained module of a recipe; for a sharded one, the aggregate of its parts' modules."""

    def __call__(self, recipe: Recipe, parts: tuple[nn.Module, ...] = ()) -> nn.Module:
        """The module of this recipe, in the recipe's dtype."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trained model. Holds no rows.

    Attributes:
        module: the model; for a sharded one the aggregate of the parts.
        recipe: how it was trained.
        ids: the records that it is trained on.
        gone: all records ever removed; cumulative, never overlapping `ids`.
        log: what training left behind, if kept.
        parts: the shards, in order; empty for a single model.
        seal: a salted commitment to the rows trained on, so that other rows or owners under the same ids are refused;
            None if not known.
        exactness: in which sense EXACT may be said of it: once its coins were drawn anew, never pathwise again.
        standing: EXACT while the bytes are those of a training on `ids` alone; what the weakest method since then
            could claim otherwise. An exact method that reuses old bytes refuses to start from less than EXACT.
        secret: un-noised parameters of a certified result, by their names in the module, and what its method keeps to
            be quick, by names that begin with a dot: never served, saved or exported. Without it a certified method
            computes the same anew, more slowly.
        releases: every release of noise so far, in order; cumulative, as the transcript of all of them is what a
            budget is spent on.
    """

    module: nn.Module
    recipe: Recipe
    ids: frozenset[str]
    gone: frozenset[str] = frozenset()
    log: TrainingLog | None = None
    parts: tuple[Trained, ...] = ()
    standing: Claim = Claim.EXACT
    seal: str | None = None
    exactness: Exactness = "pathwise"
    secret: State = field(default_factory=dict)
    releases: tuple[Release, ...] = ()

    def __post_init__(self) -> None:
        both = self.ids & self.gone
        if both:
            raise BadRecords(f'record "{min(both)}" cannot be both trained on and gone; gone stays gone')

    def __repr__(self) -> str:
        made = f"{len(self.parts)} shards" if self.parts else "one model"
        return (
            f"Trained({self.recipe.model}, {made}, {len(self.ids):,} records, {len(self.gone):,} gone, "
            f"standing {self.standing.value})"
        )

    def digest(self) -> str:
        """SHA-256 of the canonical manifest of all parameters and buffers, those of the parts for a sharded model."""
        return digest_tensors(self.module.state_dict())

    def renamed(self, name: Callable[[str], str]) -> Trained:
        """The same model with every record called `name(id)`: with pseudonyms, it can be kept where ids must not be."""
        log = self.log
        if log is not None:
            log = replace(log, batches=tuple(tuple(map(name, batch)) for batch in log.batches))
        return replace(
            self,
            ids=frozenset(map(name, self.ids)),
            gone=frozenset(map(name, self.gone)),
            log=log,
            parts=tuple(part.renamed(name) for part in self.parts),
        )

    def save(self, folder: str | Path) -> Path:
        """Write the model as safetensors and JSON into a new folder, which appears whole or not at all.

        Un-noised secret state is not saved. Raises Misuse if the folder is there already.
        """
        folder = Path(folder)
        if folder.exists():
            raise Misuse(f"{folder} is there already; name a new folder, or remove it first")
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.part"
        try:
            self._write(temporary)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def _write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        about: dict[str, Any] = {
            "format": "expunge-trained/1",
            "recipe": self.recipe.to_json(),
            "ids": sorted(self.ids),
            "gone": sorted(self.gone),
            "standing": self.standing.value,
            "seal": self.seal,
            "exactness": self.exactness,
            "releases": [release.to_json() for release in self.releases],
            "parts": len(self.parts),
            "digest": self.digest(),
        }
        if self.log is not None:
            about["log"] = {
                "steps": self.log.steps,
                "rows_read": self.log.rows_read,
                "threads": self.log.threads,
                "build": self.log.build,
                "losses": list(self.log.losses),
                "batches": [list(batch) for batch in self.log.batches],
                "checkpoints": sorted(self.log.checkpoints),
                "slices": len(self.log.slices),
            }
            for step, state in self.log.checkpoints.items():
                write_state(folder / f"checkpoint-{step}.safetensors", state)
            for index, state in enumerate(self.log.slices):
                write_state(folder / f"slice-{index}.safetensors", state)
        if not self.parts:
            write_state(folder / "model.safetensors", self.module.state_dict())
        for index, part in enumerate(self.parts):
            part._write(folder / f"part-{index:04d}")
        about["files"] = {name: sha256_hex((folder / name).read_bytes()) for name in _beside(folder)}
        about["check"] = sha256_hex(canonical_json(about))
        (folder / "trained.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, build: Builder) -> Trained:
        """Read what `save` wrote; `build` makes the empty module of a recipe.

        Raises:
            UnreadableFile: if a file is missing, is no safetensors (pickles are never opened), or has other bytes than
                were written.
        """
        folder = Path(folder)
        about = _read_about(folder)
        _refuse_changed(folder, about)
        recipe = Recipe.from_json(about["recipe"])
        parts = tuple(cls.load(folder / f"part-{index:04d}", build) for index in range(about["parts"]))
        module = build(recipe, tuple(part.module for part in parts if part.ids))
        if not parts:
            _fill(module, read_state(folder / "model.safetensors"), folder)
        module.eval()
        trained = cls(
            module=module,
            recipe=recipe,
            ids=frozenset(about["ids"]),
            gone=frozenset(about["gone"]),
            log=_read_log(folder, about.get("log")),
            parts=parts,
            standing=Claim(about["standing"]),
            seal=about["seal"],
            exactness=about["exactness"],
            releases=tuple(release_from_json(one) for one in about.get("releases", ())),
        )
        if trained.digest() != about["digest"]:
            raise UnreadableFile(f"{folder} holds other parameters than were saved there; fetch it again")
        return trained


def write_state(path: Path, state: State, note: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors; tied tensors are written once each."""
    safetensors.torch.save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()},
        path,
        metadata=dict(note or {}),
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file.

    Raises:
        UnreadableFile: if it is missing or anything else; a pickle is recognised and never opened.
    """
    if not path.is_file():
        raise UnreadableFile(f"{path} is missing; point to a folder that `expunge train` wrote")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise UnreadableFile(
                f"{path} is a pickle, which can run code and is never opened; save it with safetensors.torch.save_file"
            ) from None
        raise UnreadableFile(f"{path} is not a whole safetensors file ({error}); fetch it again") from None


def _fill(module: nn.Module, state: State, folder: Path) -> None:
    try:
        module.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise UnreadableFile(f"{folder}/model.safetensors does not fit its recipe: {reason}") from None


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / "trained.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableFile(f"{folder} is no trained model ({error}); make one with: expunge train") from None
    if not isinstance(about, dict) or about.get("format") != "expunge-trained/1":
        raise UnreadableFile(f"{path} is not of format expunge-trained/1; make one with: expunge train")
    check = about.pop("check", None)
    missing = {"recipe", "ids", "gone", "standing", "seal", "exactness", "parts", "digest", "files"} - set(about)
    if missing:
        raise UnreadableFile(f'{path} lacks "{min(missing)}"; it was not written by expunge')
    if check != sha256_hex(canonical_json(about)):
        raise UnreadableFile(f"{path} is not as it was written; fetch it again")
    return about


def _beside(folder: Path) -> list[str]:
    """The files that `trained.json` vouches for: the states beside it, and what its parts vouch for themselves."""
    paths = [*folder.glob("*.safetensors"), *folder.glob("part-*/trained.json")]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _refuse_changed(folder: Path, about: Mapping[str, Any]) -> None:
    for name, digest in about["files"].items():
        path = folder / name
        if not path.is_file():
            raise UnreadableFile(f"{path} is missing; fetch the whole folder again")
        if sha256_hex(path.read_bytes()) != digest:
            if path.suffix == ".safetensors":
                read_state(path)  # says more precisely what is wrong with a file that is none
            raise UnreadableFile(f"{path} holds other bytes than were saved there; fetch it again")


def _read_log(folder: Path, data: Mapping[str, Any] | None) -> TrainingLog | None:
    if data is None:
        return None
    return TrainingLog(
        steps=data["steps"],
        rows_read=data["rows_read"],
        threads=data["threads"],
        build=data["build"],
        losses=tuple(data["losses"]),
        batches=tuple(tuple(batch) for batch in data["batches"]),
        checkpoints={step: read_state(folder / f"checkpoint-{step}.safetensors") for step in data["checkpoints"]},
        slices=tuple(read_state(folder / f"slice-{index}.safetensors") for index in range(data["slices"])),
    )


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now, copied."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters lie (CPU if it has none)."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
