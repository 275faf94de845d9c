"""Randomness that is named, never drawn twice by accident, and never a function of a row's position.

Every order in which rows are read is a sort by a keyed hash of the row's owner and content. So removing a row leaves
the order of all others as it was, and no code anywhere can leak the number or the position of removed rows.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from expunge.core.digest import canonical_json

Keys = np.ndarray[Any, np.dtype[np.uint64]]


def generator(seed: int = 0) -> torch.Generator:
    """A CPU generator started at `seed`."""
    return torch.Generator().manual_seed(seed)


def seed_of(*names: int | str) -> int:
    """A seed below 2**63 that is a hash of its names."""
    return int.from_bytes(hashlib.sha256(canonical_json(list(names))).digest()[:8], "little") >> 1


def child(rng: torch.Generator, *names: int | str) -> torch.Generator:
    """The generator called `names` below `rng`: a hash of `rng`'s initial seed and the names; draws nothing."""
    return generator(seed_of(rng.initial_seed(), *names))


def row_keys(owners: Sequence[str], digests: np.ndarray[Any, np.dtype[np.uint8]]) -> Keys:
    """One 64-bit key a row, a hash of (owner, content digest); rows alike in both share their key."""
    content = digests.tobytes()
    out = bytearray()
    for position, owner in enumerate(owners):
        out += hashlib.sha256(content[32 * position : 32 * position + 32] + owner.encode("utf-8")).digest()[:8]
    return np.frombuffer(bytes(out), dtype="<u8").astype(np.uint64)


def order(keys: Keys, *names: int | str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The pseudo-random order called `names` of rows with these keys: positions sorted by a keyed mix of the key.

    Rows with equal keys are equal in content, so that their mutual order changes no result.
    Cost: one sort, about 5 ms for 60,000 rows.
    """
    return np.argsort(draw(keys, *names), kind="stable").astype(np.int64)


def draw(keys: Keys, *names: int | str) -> Keys:
    """One pseudo-random 64-bit number called `names` for each row, a function of its key alone."""
    with np.errstate(over="ignore"):
        mixed = keys ^ np.uint64(seed_of(*names))
        # splitmix64's finaliser (Steele, Lea and Flood, 2014): a bijection, so distinct keys stay distinct.
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def bucket(salt: str, name: str, buckets: int) -> int:
    """Which of `buckets` the name falls into: HMAC-SHA256 under the salt, modulo `buckets`."""
    code = hmac.digest(salt.encode("utf-8"), name.encode("utf-8"), "sha256")
    return int.from_bytes(code, "big") % buckets
