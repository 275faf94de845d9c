"""The L2 ball about zero that a training keeps all its parameters in, as one vector."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.errors import BadRecipe
from expunge.core.mask import Mask


class Ball:
    """The ball that a recipe's `max_norm` asks for; of a recipe without one, all of space."""

    def __init__(self, module: nn.Module, radius: float | None, mask: Mask | None = None) -> None:
        """The ball for the module's trained parameters.

        Raises:
            BadRecipe: if the mask holds entries other than zero, which scaling would move.
        """
        self.module, self.radius = module, radius
        pairs = [] if mask is None or radius is None else list(mask.parameters(module))
        if any(bool((parameter.detach()[~moves] != 0).any()) for parameter, moves in pairs):
            raise BadRecipe(
                "max_norm scales all entries alike, and the mask holds some that are not zero; leave it out"
            )

    def project(self) -> None:
        """Move the parameters into the ball."""
        if self.radius is not None:
            project(self.module, self.radius)


def norm_of(module: nn.Module) -> Float[Tensor, ""]:
    """The L2 norm of all trained parameters as one vector, summed in float64. Tied parameters count once."""
    norms = [torch.linalg.vector_norm(one.detach(), dtype=torch.float64) for one in _trained(module)]
    return torch.stack(norms).square().sum().sqrt()


@torch.no_grad()
def project(module: nn.Module, radius: float) -> None:
    """Move all trained parameters, as one vector, to the nearest point of the ball of this radius, in place.

    What lies in the ball keeps its bytes. What lies outside is scaled to a norm that is smaller than the radius by
    some units of rounding, so that rounding never leaves it outside, and a second projection changes nothing.
    Cost: one pass over the parameters.
    """
    norm = norm_of(module)
    for parameter in _trained(module):
        slack = max(4 * torch.finfo(parameter.dtype).eps, 1e-12)
        factor = torch.where(norm > radius, radius * (1 - slack) / norm, torch.ones_like(norm))
        parameter.copy_(parameter.double() * factor)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
