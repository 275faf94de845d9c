"""What an attacker wants of its targets, as numbers: a margin that says whether it has it, and a loss to bring down."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.coins import child
from expunge.core.errors import Misuse
from expunge.core.protocols import Target
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn.predict import outputs


def margin(out: Float[Tensor, "n classes"], target: Target) -> Float[Tensor, " n"]:
    """How far the attacker has what it wants of each row, in units of the outputs: above 0 it has it.

    Targeted: the wanted class's output less the largest other one. Untargeted: the largest other output less the true
    class's. A tie counts as not having it, whatever way the model breaks it.
    """
    own = target.y if target.wanted is None else target.wanted
    mine = out.gather(1, own[:, None])[:, 0]
    others = out.masked_fill(nn.functional.one_hot(own, out.shape[1]).bool(), -torch.inf).amax(1)
    return others - mine if target.wanted is None else mine - others


def adversarial_loss(out: Float[Tensor, "n classes"], target: Target) -> Float[Tensor, ""]:
    """What the attacker brings down, a mean over the target's rows.

    Targeted: cross-entropy towards the wanted class. Untargeted: ``log p`` of the true class, which falls without bound
    as the model becomes surely wrong; it has a gradient everywhere, unlike the margin.
    """
    if target.wanted is None:
        return -nn.functional.cross_entropy(out, target.y)
    return nn.functional.cross_entropy(out, target.wanted)


def check_target(target: Target, records: Records) -> None:
    """Misuse for a target that no model of these records can be asked about, or that wants the true class.

    Rows must be stored as the records are, for pixels are scaled when they are read and floats are not; floats of
    another width pass.
    """
    if records.classes is None:
        raise Misuse("attacks aim at classes, and these records have float targets; there is no class to turn them to")
    if tuple(target.x.shape[1:]) != records.shape:
        raise Misuse(
            f"the target's rows have shape {tuple(target.x.shape[1:])}, the records {records.shape}; give rows as the "
            "records hold them"
        )
    kind = records.select([0]).x.dtype
    if target.x.dtype != kind and not (kind.is_floating_point and target.x.is_floating_point()):
        raise Misuse(
            f"the target's rows are stored as {target.x.dtype}, the records as {kind}; give them as records do"
        )
    if target.x.is_floating_point() and not bool(target.x.isfinite().all()):
        raise Misuse("the target's rows hold numbers that are not finite; no model can be asked about them")
    labels = [target.y] if target.wanted is None else [target.y, target.wanted]
    for one in labels:
        if len(one) != len(target.x) or not len(one):
            raise Misuse(f"a target needs one label a row, got {len(one)} for {len(target.x)} rows")
        if one.dtype is not torch.int64:
            raise Misuse(f"a target's labels must be int64, got {one.dtype}")
        if int(one.min()) < 0 or int(one.max()) >= records.classes:
            raise Misuse(f"a target's classes run from 0 to {records.classes - 1}, got {one.tolist()}")
    if target.wanted is not None and bool((target.wanted == target.y).any()):
        raise Misuse("the wanted class is the true one; name another, or None for any other")


def pick_targets(
    trained: Trained, strangers: Records, count: int, *, rng: torch.Generator, targeted: bool = False
) -> tuple[Target, ...]:
    """Random rows that the model answers rightly, each a target of its own.

    Args:
        trained: the model.
        strangers: rows that it was not trained on.
        count: how many targets.
        rng: names the coins; nothing is drawn from it.
        targeted: want the class that the model holds for second best; else any class but the true one.

    Raises:
        Misuse: if the model answers fewer rows rightly.
    """
    out = outputs(trained.module, strangers)
    right = (out.argmax(1).cpu() == strangers.y.cpu()).nonzero().flatten()
    if count < 1:
        raise Misuse(f"the number of targets must be >= 1, got {count}")
    if count > len(right):
        raise Misuse(f"asked for {count} targets, of {len(strangers):,} rows the model answers {len(right):,} rightly")
    drawn = right[torch.randperm(len(right), generator=child(rng, "targets"))[:count]]
    x, y = strangers.select(drawn).x, strangers.y[drawn]
    second = out[drawn].topk(2, dim=1).indices[:, 1].cpu()
    return tuple(
        Target(x=x[i : i + 1], y=y[i : i + 1], wanted=second[i : i + 1] if targeted else None) for i in range(count)
    )
