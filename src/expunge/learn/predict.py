"""What a model says of rows, in evaluation mode and in batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.records import Records
from expunge.learn.loop import prepare

_BATCH = 1024


def outputs(module: nn.Module, records: Records) -> Float[Tensor, "n outputs"]:
    """Outputs (logits or predicted targets) of all rows; the module's training flags are left as they were.

    Cost: one forward pass a row, without gradients.
    """
    parameter = next(module.parameters(), torch.zeros(()))
    positions = torch.arange(len(records)).split(_BATCH)
    with evaluating(module), torch.inference_mode():
        answers = [module(prepare(x.to(parameter.device), parameter.dtype)) for x, _ in records.batches(positions)]
        if not answers:
            return torch.empty(0, 0, dtype=parameter.dtype)
        return torch.cat(answers)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within: evaluation mode. After: each submodule's own flag, as it was."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag
