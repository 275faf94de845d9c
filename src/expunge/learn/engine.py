"""Where work that is many independent trainings runs. The only place that knows about an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Shared = TypeVar("Shared")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs a pure function over items. The engine changes nothing but the time."""

    def map(
        self, function: Callable[[Item, Shared], Result], items: Iterable[Item], shared: Shared
    ) -> Iterator[tuple[int, Result]]:
        """Pairs (index of the item, ``function(item, shared)``), in any order, each item exactly once.

        The function must be pure and seeded by its item, as an engine may run it again after a lost worker. Its own
        errors are raised as they are and never retried. `shared` is what all items need, sent once.
        """


class LocalEngine:
    """Runs everything in this process, one item after the other."""

    def map(
        self, function: Callable[[Item, Shared], Result], items: Iterable[Item], shared: Shared
    ) -> Iterator[tuple[int, Result]]:
        """Pairs (index, result) in the items' order, each computed when it is asked for."""
        for index, item in enumerate(items):
            yield index, function(item, shared)


LOCAL = LocalEngine()
