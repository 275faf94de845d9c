"""What a head sees of each row, remembered for as long as somebody holds the rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import RLock

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from expunge.core.digest import digest_tensors
from expunge.core.errors import Unsupported
from expunge.core.records import Records
from expunge.learn.loop import prepare
from expunge.learn.models import Network, features_of, head_of

_CHUNK = 2048


@dataclass(eq=False)
class _Known:
    """Features of rows of one tensor.

    `place` holds, for each row of the tensor, its place in `x`, or -1.
    """

    extractor: str
    place: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Features of rows, and which of them a set holds.

    Attributes:
        x: (n, width + 1) float64, each row ending with a 1.
        y: (n,) labels.
        keep: (n,) true for the rows of the set that was asked for.
    """

    x: Float[Tensor, "n width"]
    y: Tensor
    keep: Tensor
    _known: _Known | None = field(default=None, repr=False)

    def places(self, records: Records) -> Tensor | None:
        """Where these rows, which may be others than were asked for, lie in `x`; None if they are not there."""
        if self._known is None or records.streamed:
            return None
        rows, chosen = records.shared()
        if _known.get(rows) is not self._known or bool((self._known.place[chosen] < 0).any()):
            return None
        found: Tensor = self._known.place[chosen]
        return found


# Keyed by the tensor that holds the rows, and gone with it. Nothing derived from a row outlives the row in memory.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()

in_use = RLock()
"""Held by whoever computes with features: `forget` wipes rows where they lie, under the hands of other threads."""


def features(module: nn.Module, records: Records) -> Features:
    """Features of these rows; of expunge's own networks computed once for all sets that read the same tensor.

    Computed in the module's dtype, in evaluation mode, and held in float64: 8 (width + 1) bytes a row. Those of other
    modules are computed at each call: what they depend on beside their state cannot be seen from outside.

    Raises:
        Unsupported: for a head without bias, as its last column would not be a parameter.
    """
    name, head = head_of(module)
    if head.bias is None:
        raise Unsupported(f'the head "{name or type(module).__name__}" has no bias; give it one')
    if records.streamed or not isinstance(module, Network):
        x, y = _computed(module, records)
        return Features(x=x, y=y, keep=torch.ones(len(x), dtype=torch.bool, device=x.device))
    rows, chosen = records.shared()
    extractor = _extractor(module)
    known = _known.get(rows)
    if known is None or known.extractor != extractor or bool((known.place[chosen] < 0).any()):
        x, y = _computed(module, records)
        place = torch.full((len(rows),), -1)
        place[chosen] = torch.arange(len(chosen))
        known = _known[rows] = _Known(extractor, place, x, y)
    keep = torch.zeros(len(known.x), dtype=torch.bool, device=known.x.device)
    keep[known.place[chosen].to(keep.device)] = True
    return Features(x=known.x, y=known.y, keep=keep, _known=known)


def forget(records: Records) -> None:
    """Have no features of these rows from now on."""
    if records.streamed:
        return
    rows, chosen = records.shared()
    known = _known.get(rows)
    if known is not None:
        there = chosen[known.place[chosen] >= 0]
        known.x[known.place[there]] = 0
        known.place[there] = -1


def _computed(module: nn.Module, records: Records) -> tuple[Tensor, Tensor]:
    dtype = next(module.parameters()).dtype
    width = head_of(module)[1].in_features
    answer = torch.ones(len(records), width + 1, dtype=torch.float64, device=records.device)
    labels, start = [], 0
    with torch.no_grad():
        for x, y in records.batches(torch.arange(len(records)).split(_CHUNK)):
            answer[start : start + len(x), :-1] = features_of(module, prepare(x, dtype))
            labels.append(y)
            start += len(x)
    return answer, torch.cat(labels)


def _extractor(module: Network) -> str:
    """All that features depend on: the architecture, the dtype, and all of the state but the head's."""
    state = {key: tensor for key, tensor in module.state_dict().items() if key not in ("head.weight", "head.bias")}
    return f"{type(module).__name__} {module.body!r} {module.view} {module.head.weight.dtype} {digest_tensors(state)}"
