"""Where rows lie: in one tensor, in memory or memory-mapped, or behind a map-style data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

CHUNK = 4096


class MapDataset(Protocol):
    """A map-style data set as torch's DataLoader knows it: item `i` is a pair (row tensor, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, Any]: ...


class Rows(Protocol):
    """Where the rows of a set and of all its selections lie."""

    shape: tuple[int, ...]
    device: torch.device

    def __len__(self) -> int: ...

    def gather(self, rows: Tensor, *, whole: bool = False) -> Tensor:
        """The named rows at once; all of them, uncopied, if `whole`."""

    def read_with(self, positions: Iterable[Tensor], rows: Tensor | None, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of positions in a selection: its rows and labels; `rows` maps positions to places here."""


class TensorRows:
    """Rows that lie in one tensor, in memory or memory-mapped."""

    def __init__(self, x: Tensor) -> None:
        """Keep the tensor."""
        self.tensor, self.shape, self.device = x, tuple(x.shape[1:]), x.device

    def __len__(self) -> int:
        return len(self.tensor)

    def gather(self, rows: Tensor, *, whole: bool = False) -> Tensor:
        """The named rows at once; all of them, uncopied, if `whole`."""
        return self.tensor if whole else self.tensor.index_select(0, rows.to(self.device))

    def read_with(self, positions: Iterable[Tensor], rows: Tensor | None, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of positions in a selection: its rows and labels; `rows` maps positions to places here."""
        for index in positions:
            place = index.to(self.device)
            chosen = place if rows is None else rows[index].to(self.device)
            yield self.tensor.index_select(0, chosen), y.index_select(0, place)


class DatasetRows:
    """Rows that a map-style data set hands out one by one, batched by torch's DataLoader."""

    def __init__(self, dataset: MapDataset, workers: int) -> None:
        """Keep the data set; `workers` processes read it."""
        self.dataset, self.workers = dataset, workers
        self.shape = tuple(torch.as_tensor(dataset[0][0]).shape)
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and labels of each batch of places."""
        sampler = [index.tolist() for index in batches]
        loader: Iterable[Any] = torch.utils.data.DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            num_workers=self.workers,
            generator=torch.Generator(),  # its own: the loader draws a seed from it, which must not come from dropout's
        )
        for x, y in loader:
            yield x, torch.as_tensor(y)

    def gather(self, rows: Tensor, *, whole: bool = False) -> Tensor:
        """The named rows at once; all of them, uncopied, if `whole`."""
        return torch.cat([x for x, _ in self.read(rows.split(CHUNK))])

    def read_with(self, positions: Iterable[Tensor], rows: Tensor | None, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """For each tensor of positions in a selection: its rows and labels; `rows` maps positions to places here."""
        places = list(positions)
        chosen = places if rows is None else [rows[index] for index in places]
        for (x, _), place in zip(self.read(chosen), places, strict=True):
            yield x, y[place]
