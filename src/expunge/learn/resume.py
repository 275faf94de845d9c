"""The state of an unfinished training on disk: saved whole every so many steps, restored bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from expunge.core.digest import canonical_json, sha256_hex
from expunge.core.errors import Misuse
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.core.store import write_atomically
from expunge.core.trained import State, read_state
from expunge.learn.build import build_name


@dataclass
class Progress:
    """How far a training has come: steps made, loss summed within the epoch, mean loss of each finished epoch."""

    step: int = 0
    partial_loss: float = 0.0
    losses: tuple[float, ...] = ()


class Saver:
    """Saves a training below a folder, and resumes it from there.

    The folder derives from every row trained on; `clear` it when training is done.
    """

    def __init__(
        self, root: str | Path, recipe: Recipe, records: Records, *, every: int = 200, checkpoints: int = 0
    ) -> None:
        """Save below `root`, every so many steps, a training that keeps a checkpoint every `checkpoints` steps.

        Raises:
            Misuse: if the folder holds another training (other recipe, rows, owners, checkpoints or thread count), or
                files that are no training's: clearing it would lose them.
        """
        if every < 1:
            raise Misuse(f"save_every must be >= 1, got {every}")
        self.root = self.folder = Path(root)
        self.every = every
        content = (row.tobytes() + owner.encode() for row, owner in zip(records.digests(), records.owners, strict=True))
        rows = sha256_hex(b"".join(sorted(hashlib.sha256(one).digest() for one in content)))
        self.identity = sha256_hex(
            canonical_json([recipe.to_json(), rows, checkpoints, build_name(records.device), torch.get_num_threads()])
        )
        self._claim_folder()

    def _claim_folder(self) -> None:
        mark = self.folder / "training.json"
        if mark.exists():
            if mark.read_bytes() != self._mark():
                raise Misuse(
                    f"{self.folder} holds the state of another training (other recipe, records or thread count); "
                    "resume into a new folder"
                )
            return
        for path in self.folder.glob("*"):
            if not path.name.endswith(".part"):  # what a crash at the very beginning leaves
                raise Misuse(f"{self.folder} holds {path.name}, which is no training's; resume into a new folder")
        write_atomically(mark, self._mark())

    def _mark(self) -> bytes:
        return canonical_json({"format": "expunge-resume/1", "identity": self.identity})

    def part(self, index: int) -> Saver:
        """The saver of one shard, in a folder below this one."""
        inner = Saver.__new__(Saver)
        inner.root, inner.folder = self.root, self.folder / f"part-{index:04d}"
        inner.every, inner.identity = self.every, f"{self.identity}/{index}"
        inner._claim_folder()
        return inner

    def due(self, step: int) -> bool:
        """True at the steps after which to save."""
        return step % self.every == 0

    def save(self, stage: str, module: nn.Module, optimiser: torch.optim.Optimizer, at: Progress) -> None:
        """Save all that the next step depends on, whole or not at all."""
        tensors = {f"module/{name}": tensor for name, tensor in module.state_dict().items()}
        for index, state in enumerate(_states(optimiser)):
            tensors.update({f"optimiser/{index}/{name}": value for name, value in state.items()})
        tensors["coins/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["coins/cuda"] = torch.cuda.get_rng_state()
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        data = safetensors.torch.save(whole, metadata={"progress": json.dumps(asdict(at))})
        write_atomically(self.folder / f"{stage}.safetensors", data)

    def restore(self, stage: str, module: nn.Module, optimiser: torch.optim.Optimizer) -> Progress:
        """Put module, optimiser and coins where they were saved; a fresh `Progress` if nothing was."""
        path = self.folder / f"{stage}.safetensors"
        if not path.exists():
            return Progress()
        tensors = read_state(path)
        with safetensors.safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        module.load_state_dict(_below("module/", tensors))
        parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            state = _below(f"optimiser/{index}/", tensors)
            if state:
                optimiser.state[parameter] = {name: value.to(parameter.device) for name, value in state.items()}
        torch.set_rng_state(tensors["coins/cpu"])
        if "coins/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["coins/cuda"])
        return Progress(progress["step"], progress["partial_loss"], tuple(progress["losses"]))

    def keep_checkpoint(self, stage: str, step: int, state: State) -> None:
        """Keep a checkpoint that the finished log will hold."""
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        write_atomically(self.folder / f"{stage}-checkpoint-{step}.safetensors", safetensors.torch.save(whole))

    def checkpoints(self, stage: str, until: int) -> dict[int, State]:
        """The checkpoints of steps up to `until`, by step in order."""
        paths = self.folder.glob(f"{stage}-checkpoint-*.safetensors")
        found = {int(path.stem.rpartition("-")[2]): path for path in paths}
        return {step: read_state(found[step]) for step in sorted(found) if step <= until}

    def clear(self) -> None:
        """Remove everything saved here."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _below(prefix: str, tensors: State) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _states(optimiser: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    return [
        {name: value for name, value in optimiser.state.get(parameter, {}).items() if isinstance(value, Tensor)}
        for parameter in parameters
    ]
