"""What comes before a head, and what a guarantee says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import nn

from expunge.certify.constants import CHECKED, Check, supplied
from expunge.core.claim import Constant, Guarantee
from expunge.core.digest import digest_tensors, sha256_hex
from expunge.learn.models import Network, head_of

Body: TypeAlias = tuple[tuple[str, str], ...]

ROWS_SHARED = Check(
    name="extractor-rows-shared",
    says="rows under the head that are, by content, rows that the extractor was trained on",
    gives="extractor_rows_shared",
)
TENSORS_CHANGED = Check(
    name="extractor-tensors-changed",
    says="tensors before the head that are not as training the extractor anew on its own rows gives them",
    gives="extractor_tensors_changed",
)
CHECKS: tuple[Check, ...] = (ROWS_SHARED, TENSORS_CHANGED)
"""All that is counted on rows when a guarantee is made; each must be zero."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a guarantee says of what comes before the head."""

    constants: Mapping[str, Constant] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def vouched(module: nn.Module, public: bool) -> Said:
    """What is said where nothing was compared: that somebody vouches for it, or that it is taken as it is."""
    if not outside(module):
        return Said()
    before = named(outside(module))
    if public:
        remark = f"Whoever runs this vouches that what comes before the head ({before}) was made without these rows."
        return Said(constants={"extractor_made_without_these_rows": supplied(1.0)}, remarks=(remark,))
    remark = (
        f"What comes before the head ({before}) is outside: if removed rows had a part in its training, it still holds "
        "what it learnt of them."
    )
    return Said(constants={"extractor_taken_as_given": supplied(1.0)}, remarks=(remark,))


def outside(module: nn.Module) -> tuple[str, ...]:
    """What of the module's state is not its head's weight and bias."""
    name = head_of(module)[0]
    head = (f"{name}.weight", f"{name}.bias") if name else ("weight", "bias")
    return tuple(key for key in module.state_dict() if key not in head)


def named(names: tuple[str, ...]) -> str:
    """The first of these names, and how many more there are."""
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def body_of(module: nn.Module) -> Body:
    """All that features depend on: name and digest of each tensor before the head, and first the structure."""
    if not isinstance(module, Network):
        return (("structure", type(module).__name__),)
    kind = f"{type(module).__module__}.{type(module).__qualname__}{_meddled(module)}"
    structure = f"{kind} {module.body!r} {module.shape} {module.view} {module.head.weight.dtype}"
    state = module.state_dict()
    return (
        ("structure", sha256_hex(structure.encode())),
        *((name, digest_tensors({name: state[name]})) for name in outside(module)),
    )


def _meddled(module: nn.Module) -> list[str]:
    """Layers that compute something else than their class says: by hooks, or by functions of their own."""
    return [
        name
        for name, layer in module.named_modules()
        if layer._forward_hooks or layer._forward_pre_hooks or {"forward", "features"} & set(vars(layer))
    ]


def differing(one: Body, other: Body) -> list[str]:
    """Names of what differs between two bodies."""
    return sorted({name for name, _ in set(one) ^ set(other)})


def counts(guarantee: Guarantee) -> list[str]:
    """Names of the constants of a guarantee that were counted on rows."""
    return [name for name, one in guarantee.constants.items() if one.derivation.startswith(CHECKED)]


def of_other_rows(guarantee: Guarantee) -> bool:
    """Whether all was counted that shows that what is given out without noise was made of other rows."""
    return guarantee.basis == "proved" and {check.gives for check in CHECKS} <= set(counts(guarantee))
