"""What models say of the rows of a few fixed sets, asked once a model and remembered."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.ensemble import ShardEnsemble
from expunge.learn.predict import outputs


class Answers:
    """Outputs of models on whole sets and on their selections: each model is asked once for each whole set.

    The shards of an ensemble are asked one by one, so that those which two ensembles share, as those before and after
    a removal do, are asked once too. For models that nobody writes to. A model that is dropped is forgotten here.

    Cost: one forward pass of a whole set for each module not seen before, and its outputs in memory.
    """

    def __init__(self, *sets: Records) -> None:
        """Remember outputs on these sets, which may be selections themselves; none may overlap another."""
        self._sets = [(one, _places_in(one)) for one in sets]
        self._known: tuple[WeakKeyDictionary[nn.Module, Tensor], ...] = tuple(WeakKeyDictionary() for _ in sets)

    def __call__(self, trained: Trained, records: Records) -> Float[Tensor, "n outputs"]:
        """What the model says of these rows; asked anew if they are of none of the sets."""
        for (whole, places), known in zip(self._sets, self._known, strict=True):
            rows = _places(records, whole, places)
            if rows is not None:
                return _told(trained.module, whole, known, rows)
        return outputs(trained.module, records)


def _places_in(whole: Records) -> Tensor | None:
    """For each row of the tensor that the set reads, its position in the set; -1 if it is not there."""
    if whole.streamed:
        return None
    base, rows = whole.shared()
    places = torch.full((len(base),), -1)
    places[rows] = torch.arange(len(rows))
    return places


def _places(records: Records, whole: Records, places: Tensor | None) -> Tensor | None:
    """Positions of these rows in the whole set; None if not all of them are known to be there."""
    if places is None or records.streamed or records.shared()[0] is not whole.shared()[0]:
        return None
    found = places[records.shared()[1]]
    return None if bool((found < 0).any()) else found


def _told(module: nn.Module, whole: Records, known: WeakKeyDictionary[nn.Module, Tensor], rows: Tensor) -> Tensor:
    parts = list(module.parts) if isinstance(module, ShardEnsemble) else [module]
    new = [part for part in parts if part not in known]
    if new:
        told = outputs(_Together(new), whole).unflatten(1, (len(new), -1))
        known.update((part, told[:, place].clone()) for place, part in enumerate(new))
    answers = torch.stack([known[part][rows] for part in parts])
    return module.combine(answers) if isinstance(module, ShardEnsemble) else answers[0]


class _Together(nn.Module):
    """Several modules that read each batch one after the other; their outputs side by side."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Float[Tensor, "batch all_outputs"]:
        """(batch, modules * outputs)."""
        return torch.cat([part(x) for part in self.parts], 1)
