"""How the shards of a SISA model answer together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ShardEnsemble(nn.Module):
    """Aggregate of the shards' models (Bourtoule et al., 2021, section IV).

    ``vote``: each shard casts one equal vote for its best class; outputs are log vote shares, so that `argmax` is the
    winner and ties go to the lowest class. ``mean``: log of the mean probability. For regression: the mean output.
    Weights are equal by rule: a weight that grew with a shard's rows would remember how many there were. A shard with
    no rows left is not among `parts`: it abstains.

    Cost: one forward pass of each part.
    """

    def __init__(self, parts: Sequence[nn.Module], outputs: int, loss: str, aggregate: Literal["vote", "mean"]) -> None:
        """Aggregate these modules; `outputs` is the number of classes or targets."""
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.outputs, self.loss, self.aggregate = outputs, loss, aggregate

    def forward(self, x: Tensor) -> Float[Tensor, "batch outputs"]:
        """Log vote shares, log mean probabilities or mean outputs."""
        return self.combine(torch.stack([part(x) for part in self.parts]))

    def combine(self, answers: Float[Tensor, "parts batch outputs"]) -> Float[Tensor, "batch outputs"]:
        """What the ensemble answers when its parts have answered this, in their order."""
        if self.loss == "mse":
            return answers.mean(0)
        if self.aggregate == "mean":
            return torch.logsumexp(answers.log_softmax(-1), 0) - math.log(len(self.parts))
        return self.tally(answers).to(answers.dtype).div(len(self.parts)).clamp_min(1e-6).log()

    def votes(self, x: Tensor) -> Tensor:
        """(batch, outputs) int64: how many shards vote for each class."""
        return self.tally(torch.stack([part(x) for part in self.parts]))

    def tally(self, answers: Float[Tensor, "parts batch outputs"]) -> Tensor:
        """(batch, outputs) int64 vote counts from the shards' outputs."""
        return nn.functional.one_hot(answers.argmax(-1), self.outputs).sum(0)
