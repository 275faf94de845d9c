"""Real data: loaders of published sets that travel inside packages, and one door for your own files.

No loader uses the network, imports the package that carries its data, or computes anything over the rows: what a row
becomes depends on that row alone, so that a removed row leaves no trace in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from expunge.core.errors import Misuse
from expunge.datasets.arrays import save_npy
from expunge.datasets.dataset import DataSet
from expunge.datasets.files import load_records
from expunge.datasets.images import fashion_mnist, mnist, optdigits, orl_faces
from expunge.datasets.tabular import adult, framingham
from expunge.datasets.text import default_cache, embed, reuters8

__all__ = [
    "DataSet",
    "adult",
    "default_cache",
    "embed",
    "fashion_mnist",
    "framingham",
    "get",
    "load_records",
    "mnist",
    "names",
    "optdigits",
    "orl_faces",
    "reuters8",
    "save_npy",
]

_LOADERS: Mapping[str, Callable[..., DataSet]] = MappingProxyType(
    {
        "adult": adult,
        "fashion-mnist": fashion_mnist,
        "framingham": framingham,
        "mnist": mnist,
        "optdigits": optdigits,
        "orl-faces": orl_faces,
        "reuters8": reuters8,
    }
)


def names() -> tuple[str, ...]:
    """The words that `get` knows, sorted.

    Example:
        >>> names()
        ('adult', 'fashion-mnist', 'framingham', 'mnist', 'optdigits', 'orl-faces', 'reuters8')
    """
    return tuple(_LOADERS)


def get(name: str, **options: Any) -> DataSet:
    """A data set by name; `options` are those of its loader, e.g. ``get("mnist", owners=50)``.

    Raises:
        Misuse: for a name that is not known.

    Example:
        >>> get("optdigits").train
        Records(3,823 rows of 200 owners, shape (8, 8), 10 classes)
    """
    if name not in _LOADERS:
        raise Misuse(f'unknown data set "{name}"; known: {", ".join(_LOADERS)}')
    return _LOADERS[name](**options)
