"""Rows, a recipe and a removal that the oracles of several methods share."""

import numpy as np
import torch
from torch import nn

from expunge.core.recipe import Recipe
from expunge.core.records import Records


def rows(n=96, classes=4, pixels=False):
    rng = np.random.default_rng(5)
    y = torch.from_numpy(rng.integers(0, classes, n))
    x = torch.from_numpy(rng.normal(size=(n, 6))) + nn.functional.one_hot(y, 10)[:, :6]
    if pixels:
        x = (x.clamp(-1, 2) * 85 + 85).to(torch.uint8)
    return Records(x, y, [f"r{i}" for i in range(n)], [f"o{i % 12}" for i in range(n)], classes=classes)


RECORDS = rows()
RECIPE = Recipe(
    model="mlp", model_args={"hidden": (8,)}, epochs=4, batch_size=16, weight_decay=1e-3, dtype="float64", seed=3
)
FORGET = [f"r{i}" for i in range(0, 40, 4)]


def vector(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
