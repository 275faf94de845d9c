"""What methods share that teach a model other answers: teachers, the divergence from them, and who needs classes."""

from __future__ import annotations

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expunge.core.errors import Misuse, Unsupported
from expunge.core.trained import Trained


def divergence(
    teacher: Float[Tensor, "n classes"], student: Float[Tensor, "n classes"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    r"""How far the student's answers are from the teacher's; both are given as logits.

    :math:`T^2 \cdot \frac1n \sum_i KL(softmax(t_i / T) \,\|\, softmax(s_i / T))`, teacher first: summed over classes,
    mean over rows. The factor T^2 keeps the gradient's size when T grows (Hinton, Vinyals and Dean, 2015).
    """
    goal, answer = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * nn.functional.kl_div(answer, goal, reduction="batchmean", log_target=True)


class Teacher:
    """A module's answers (logits) as it is now: those of a copy in evaluation mode, which is never written to."""

    def __init__(self, module: nn.Module) -> None:
        """Copy the module."""
        self.module = copy.deepcopy(module).eval()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits of the rows, without gradients."""
        with torch.no_grad():
            logits: Tensor = self.module(x)
        return logits


def check_temperature(temperature: float) -> None:
    """Misuse for a temperature by which nothing can be divided."""
    if not 0 < temperature < math.inf:
        raise Misuse(f"temperature must be > 0, got {temperature}")


def without_classes(name: str, trained: Trained) -> Unsupported | None:
    """The error of a method called `name` that needs classes, for a model that has none or a single one."""
    if trained.recipe.loss == "cross_entropy" and int(trained.recipe.model_args["outputs"]) >= 2:
        return None
    return Unsupported(f"{name} needs at least two classes, and this model has none to choose from; use fine-tune")
