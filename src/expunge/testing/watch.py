"""Watching whether tensors are written to, even for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# These move running statistics without saying so in their schema; positions of the statistics and of `training`.
_SILENT = {"native_batch_norm": ((3, 4), 5), "cudnn_batch_norm": ((3, 4), 5), "miopen_batch_norm": ((3, 4), 5)}


class WriteWatch(TorchDispatchMode):
    """Within: notes every tensor operation that writes into a module's parameters or buffers, ``p.data`` included.

    Writes are told by the storage they go to, not by the tensor object, so that views and shallow copies are seen;
    pointing a parameter at other storage (``p.data = ...``) is seen at the next operation. Writes through numpy
    are not.

    Attributes:
        writes: name of the tensor and of the operation, for each write, in order.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Watch these modules' parameters and buffers."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.writes: list[str] = []
        self._names: dict[int, str] = {}
        self._watched: list[tuple[str, Tensor, int]] = []
        for module in modules:
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                place = _place(tensor)
                self._names.setdefault(place, name)
                self._watched.append((name, tensor, place))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note what this operation writes to, then run it."""
        kwargs = dict(kwargs or {})
        for tensor in _written(func, args, kwargs):
            name = self._names.get(_place(tensor))
            if name is not None:
                self.writes.append(f"{name} by {func.__name__}")
        self.writes += [f"{name} by data swap" for name, tensor, place in self._watched if _place(tensor) != place]
        return func(*args, **kwargs)


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    schema = func._schema  # type: ignore[attr-defined]
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from (item for item in (value if isinstance(value, (list, tuple)) else [value]) if _real(item))
    silent = _SILENT.get(schema.name.removeprefix("aten::"))
    if silent is not None and args[silent[1]]:
        yield from (args[position] for position in silent[0] if _real(args[position]))


def _real(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.untyped_storage().size() > 0


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
