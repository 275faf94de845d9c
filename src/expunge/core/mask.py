"""Which entries of a module's parameters may move; the others stay as they are, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.core.errors import Misuse


@dataclass(frozen=True, eq=False)
class Mask:
    """For some parameters by name, True where an entry may move. Parameters that are not named may move whole.

    A pruned model is one whose held entries are zero. Names are plain: no wrapper, no hidden second copy of a weight,
    so that a masked module is copied, saved and differentiated like any other.
    """

    moves: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, one in self.moves.items():
            if one.dtype is not torch.bool:
                raise Misuse(f'a mask holds True and False, got {one.dtype} for "{name}"; compare first')

    @property
    def size(self) -> int:
        """Entries of all parameters that are named."""
        return sum(one.numel() for one in self.moves.values())

    @property
    def held(self) -> int:
        """Entries that may not move."""
        return self.size - sum(int(one.sum()) for one in self.moves.values())

    @property
    def sparsity(self) -> float:
        """Share of the named parameters' entries that may not move."""
        return self.held / self.size if self.size else 0.0

    def __and__(self, other: Mask) -> Mask:
        """Where both let an entry move.

        Raises:
            Misuse: if they are of different models.
        """
        both = {**other.moves, **self.moves}
        for name, one in both.items():
            theirs = other.moves.get(name, one)
            if theirs.shape != one.shape:
                raise Misuse(
                    f'the masks are of two models: "{name}" is {tuple(one.shape)} in one and {tuple(theirs.shape)} in '
                    "the other; make both of one model"
                )
            both[name] = one & theirs.to(one.device)
        return Mask(both)

    def parameters(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The module's parameters that are named, each with its entries that may move.

        Raises:
            Misuse: if the mask is another architecture's.
        """
        known = dict(module.named_parameters(remove_duplicate=False))
        for name, moves in self.moves.items():
            if name not in known or known[name].shape != moves.shape:
                theirs = tuple(known[name].shape) if name in known else "none"
                raise Misuse(
                    f'the mask is of another model: it has "{name}" of shape {tuple(moves.shape)}, the model {theirs}; '
                    "make it of this one"
                )
        for name, moves in self.moves.items():
            yield known[name], moves.to(known[name].device)

    @torch.no_grad()
    def prune_(self, module: nn.Module) -> None:
        """Set the entries that may not move to zero (never minus zero), in place; nothing if the mask does not fit."""
        for parameter, moves in self.parameters(module):
            torch.where(moves, parameter, torch.zeros_like(parameter), out=parameter)


class Held:
    """The values that a mask holds in one module, to be put back after each step.

    Zeroing gradients would not do: weight decay and momentum move what has no gradient.
    """

    def __init__(self, mask: Mask, module: nn.Module) -> None:
        """Remember the values as they are now."""
        self._held = [(parameter, moves, parameter.detach().clone()) for parameter, moves in mask.parameters(module)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Every held entry as it was when this was made. Cost: one pass over the masked parameters."""
        for parameter, moves, values in self._held:
            torch.where(moves, parameter, values, out=parameter)
