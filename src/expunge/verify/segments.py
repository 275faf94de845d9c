"""Segments of a transcript made again from their checkpoints, and how far from what is told they end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.core.digest import digest_tensors
from expunge.core.errors import Corrupt, UnreadableFile
from expunge.core.trained import State
from expunge.learn.build import build, seeded
from expunge.learn.loop import exact_kernels
from expunge.verify.evidence import FOREIGN, FORGOTTEN, Evidence
from expunge.verify.states import GROUPS, Stepper, distance, misfit, model_digest, same_coins
from expunge.verify.tolerance import Tolerance, run


@dataclass(frozen=True, kw_only=True)
class Segment:
    """How far one replayed segment ended from what is told, and the mean L2 length of its own steps.

    Attributes:
        begin: step of the checkpoint that it began from.
        end: step of the checkpoint that it was compared with.
        error: L2 distance, by kind of state.
        length: mean L2 length of a step, by kind of state.
        coins: True if dropout's coins ended where they are told to.
        digests: True if, where the segment ended to the bit, so did every step in it.
    """

    begin: int
    end: int
    error: dict[str, float]
    length: dict[str, float]
    coins: bool = True
    digests: bool = True

    def faults(self, tolerance: Tolerance) -> list[str]:
        """What is beyond the tolerance."""
        where = f"steps {self.begin + 1:,} to {self.end:,}"
        found = []
        for group in GROUPS:
            limit = tolerance.limit(group, self.length[group])
            if not self.error[group] <= limit:
                found.append(
                    f"{where} end {self.error[group]:.2e} away from the told {group} state, allowed {limit:.2e}"
                )
        if not self.coins:
            found.append(f"{where} leave dropout's coins elsewhere than is told")
        if not self.digests:
            found.append(f"{where} pass by other models than are told")
        return found


UNKNOWN = "uses rows that nobody committed to, so that it cannot be made again"


def replay_segment(subject: Evidence, begin: int, end: int) -> Segment | str:
    """Make the steps between two checkpoints again; what keeps it from being done, as text.

    Raises:
        Corrupt: if making the steps changed the state that they began from: the evidence must stay as it was.
    """
    told, recipe, device = subject.transcript, subject.agreed, subject.records.device
    try:
        start, goal = told.checkpoint(begin), told.checkpoint(end)
    except UnreadableFile as error:
        return str(error)
    before, digests = digest_tensors(start), list[bytes]()
    with seeded("replay"), exact_kernels(device):
        stepper = Stepper(build(recipe).to(device), recipe)
        for step, state in ((begin, start), (end, goal)):
            problem = misfit(state, stepper.module, stepper.optimiser)
            if problem is not None:
                return f"the checkpoint of step {step:,} {problem}"
        if any((subject.told[told.places(step)] == FOREIGN).any() for step in range(begin + 1, end + 1)):
            return f"steps {begin + 1:,} to {end:,}: it {UNKNOWN}"
        try:
            ran = run(stepper, start, _batches(subject, begin, end), watch=lambda now: digests.append(_digest_of(now)))
        except (RuntimeError, TypeError) as error:  # such as momentum for some parameters but not for all
            return f"steps {begin + 1:,} to {end:,} cannot be made: {str(error).splitlines()[0]:.150}"
    if digest_tensors(start) != before:
        raise Corrupt(f"replaying changed the checkpoint of step {begin:,} that it began from; this is a fault of ours")
    off = {group: distance(ran.end, goal, group) for group in GROUPS}
    exact = not any(off.values())
    signs = not exact or _without_coins(ran.end) == _without_coins(goal)  # zeros of other sign are at no distance
    mine = [told.digests[step].tobytes() for step in range(begin + 1, end + 1)]
    return Segment(
        begin=begin,
        end=end,
        error=off,
        length=ran.length,
        coins=same_coins(goal, ran.end, stepper.module),
        digests=signs and (not exact or mine == digests),
    )


def _without_coins(state: State) -> str:
    return digest_tensors({name: tensor for name, tensor in state.items() if not name.startswith("coins/")})


def _digest_of(state: State) -> bytes:
    return bytes.fromhex(model_digest(state))


def _batches(subject: Evidence, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Rows, labels and epoch of each step, found by their commitments among the verifier's own rows."""
    places = subject.place_of
    for step in range(begin + 1, end + 1):
        names = subject.transcript.names(step)
        kinds = subject.told[subject.transcript.places(step)]
        if not (kinds == FORGOTTEN).any():
            index = torch.tensor([places[name] for name in names])
            x, y = next(iter(subject.records.batches([index])))
        else:
            x, y = _mixed(subject, places, names)
        yield x, y, subject.epoch_of(step)


def _mixed(subject: Evidence, places: dict[bytes, int], names: list[bytes]) -> tuple[Tensor, Tensor]:
    """A batch with rows to forget in it, which removal names; they are at hand, so the step can still be made again."""
    xs, ys = [], []
    for name in names:
        source, place = subject.records, places.get(name)
        if place is None and subject.forget is not None:
            source, place = subject.forget, subject.forgotten[name]
        x, y = next(iter(source.batches([torch.tensor([place])])))
        xs.append(x)
        ys.append(y)
    return torch.cat(xs), torch.cat(ys)
