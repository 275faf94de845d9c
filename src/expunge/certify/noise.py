"""Noise that nobody can compute again: from the operating system's cryptographic generator, never from a seed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor, nn

from expunge.core.errors import Misuse


def secret_normal(shape: Iterable[int]) -> Tensor:
    """Independent standard normal numbers, float64: the inverse distribution function of 52 random bits and a sign.

    Not guaranteed: what floating point takes away. The values lie on a grid and end at 8.3 standard deviations; an
    adversary who sees the last bits of released parameters is outside every Gaussian guarantee (Mironov, 2012).
    """
    shape = tuple(shape)
    bits = np.frombuffer(os.urandom(8 * math.prod(shape)), dtype=np.uint64)
    # An odd numerator, so that neither 0 nor 1/2 occurs; the lowest bit, which is left over, is the sign.
    tail = ((bits >> np.uint64(12)).astype(np.float64) * 2 + 1) * 2.0**-54
    values = ndtri(tail) * np.where(bits & np.uint64(1), 1.0, -1.0)
    return torch.from_numpy(values).reshape(shape)


def put_with_noise(module: nn.Module, values: Mapping[str, Tensor], sigma: float) -> None:
    """Write values plus N(0, sigma^2) into these parameters or buffers, in place.

    Summed in float64 and rounded once, after the noise, so that rounding is post-processing and moves no centre.

    Raises:
        Misuse: without noise to add, for values of less than float64, or for a name that the module's state does not
            have or that is no float.
    """
    if not 0 < sigma < math.inf:
        raise Misuse(f"sigma must be > 0 and finite, got {sigma}")
    state = module.state_dict()
    for name, value in values.items():
        if name not in state or not state[name].is_floating_point():
            raise Misuse(f'"{name}" takes no noise: the model has {", ".join(state)}')
        if value.dtype is not torch.float64:
            raise Misuse(f'"{name}" must be given in float64, so that it is rounded after the noise, got {value.dtype}')
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value + sigma * secret_normal(value.shape).to(value.device))


def add_noise(module: nn.Module, names: Iterable[str], sigma: float) -> None:
    """Add N(0, sigma^2) to each entry of these parameters or buffers as they are, in place; see `put_with_noise`."""
    state = module.state_dict()
    put_with_noise(module, {name: state[name].double() if name in state else _NOTHING for name in names}, sigma)


_NOTHING = torch.zeros(0, dtype=torch.float64)
