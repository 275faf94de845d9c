"""The losses of single rows as a function of a module's parameters, and their derivatives."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, cached_property
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.core.errors import Misuse, Unsupported
from expunge.core.mask import Mask

RowLosses = Callable[[Tensor, Tensor], Tensor]


class Objective:
    """A module seen as a function of its parameters, laid end to end in one vector.

    Losses are summed over rows, never averaged, and hold no weight decay: divide and add where a mean or a penalty is
    meant. Parameters keep the order of `module.named_parameters()`.

    Attributes:
        module: in evaluation mode, never written to.
        row_losses: losses (n,) of outputs (n, ...) and labels.
        names: the parameters that the vector holds; the others are constants.
        places: of each of them, the flat places of the entries that the vector holds; None: all. The other entries
            are constants too, as the module has them when this is made.
    """

    def __init__(
        self,
        module: nn.Module,
        row_losses: RowLosses,
        *,
        names: Iterable[str] | None = None,
        moves: Mask | None = None,
    ) -> None:
        """See the class.

        Args:
            module: in evaluation mode.
            row_losses: losses (n,) of outputs and labels.
            names: the parameters that the vector is to hold; all that require a gradient if None.
            moves: of these, the entries that it is to hold. What is kept of n gradients of a model that is pruned to
                5 % is 5 % of their numbers; the others exist for a chunk of rows at a time.

        Raises:
            Unsupported: for a module in training mode: batch norm would make a row's loss depend on the other rows of
                its batch, and dropout on coins, so that neither has a gradient of a single row.
            Misuse: for names that are no parameters, a mask of another model, or if no entry is left.
        """
        if any(part.training for part in module.modules()):
            raise Unsupported(
                "derivatives of single rows need evaluation mode: in training mode batch norm mixes rows and dropout "
                "draws coins; call module.eval()"
            )
        held = dict(module.named_parameters())
        chosen = [name for name, one in held.items() if one.requires_grad] if names is None else list(names)
        unknown = [name for name in chosen if name not in held]
        if unknown or not chosen:
            raise Misuse(f"there is no parameter {unknown[0] if unknown else ''!r}; it has {', '.join(held) or 'none'}")
        self.module, self.row_losses = module, row_losses
        self.names = tuple(name for name in held if name in set(chosen))
        self._shapes = {name: held[name].shape for name in self.names}
        entries = {} if moves is None else {id(one): which for one, which in moves.parameters(module)}
        self.places: dict[str, Tensor | None] = {name: _places(entries.get(id(held[name]))) for name in self.names}
        self._held = {name: held[name].detach().clone() for name, which in self.places.items() if which is not None}
        self._sizes = [held[name].numel() if which is None else len(which) for name, which in self.places.items()]
        if not self.size:
            raise Misuse("the mask holds every entry, so that there is nothing to differentiate by")

    @property
    def size(self) -> int:
        """How many numbers the vector holds."""
        return sum(self._sizes)

    def vector(self) -> Float[Tensor, " p"]:
        """The parameters' entries as they are now."""
        held = dict(self.module.named_parameters())
        flat = {name: held[name].detach().reshape(-1) for name in self.names}
        return torch.cat([flat[name] if which is None else flat[name][which] for name, which in self.places.items()])

    def pieces(self, vector: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """A vector cut into one flat piece a parameter, of the entries that it holds."""
        return dict(zip(self.names, torch.split(vector, self._sizes), strict=True))

    def split(self, vector: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """The parameters that a vector stands for, in their shapes, entries that it does not hold included."""
        answer = {}
        for name, piece in self.pieces(vector).items():
            which = self.places[name]
            whole = piece if which is None else self._held[name].reshape(-1).index_put((which,), piece)
            answer[name] = whole.view(self._shapes[name])
        return answer

    def put(self, vector: Float[Tensor, " p"]) -> None:
        """Write a vector into the module's parameters, in place."""
        held = dict(self.module.named_parameters())
        with torch.no_grad():
            for name, value in self.split(vector).items():
                held[name].copy_(value)

    @cached_property
    def _constants(self) -> Mapping[str, Tensor]:
        state = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: tensor.detach() for name, tensor in state.items() if name not in set(self.names)}

    def outputs(self, vector: Tensor, x: Tensor) -> Tensor:
        """Outputs (n, ...) of the rows at these parameters."""
        answer: Tensor = functional_call(self.module, {**self._constants, **self.split(vector)}, (x,))
        return answer

    def losses(self, x: Tensor, y: Tensor, at: Tensor | None = None) -> Float[Tensor, " n"]:
        """The loss of each row. Cost: one forward pass."""
        return self.row_losses(self.outputs(self.vector() if at is None else at, x), y)

    def gradient(
        self, x: Tensor, y: Tensor, at: Tensor | None = None, *, weights: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, " p"]:
        """Gradient of the summed losses, each times its weight if there are any. Cost: one forward, one backward pass.

        With weights c it is ``G' c``, G the rows' gradients, without any of them.
        """

        def total(vector: Tensor) -> Tensor:
            losses = self.losses(x, y, vector)
            return losses.sum() if weights is None else torch.dot(losses, weights)

        gradient: Tensor = grad(total)(self.vector() if at is None else at)
        return gradient

    def gradients(self, x: Tensor, y: Tensor, *, chunk: int | None = 32) -> Float[Tensor, "n p"]:
        """The gradient of each row's loss. Cost: n p numbers of memory; rows go through `chunk` at a time."""

        def of_row(vector: Tensor, row: Tensor, label: Tensor) -> Tensor:
            return self.losses(row[None], label[None], vector).sum()

        with second_derivatives():
            answer: Tensor = vmap(grad(of_row), in_dims=(None, 0, 0), chunk_size=chunk)(self.vector(), x, y)
        return answer

    def scores(self, x: Tensor, y: Tensor, v: Float[Tensor, " p"]) -> Float[Tensor, " n"]:
        """The inner product of each row's gradient with `v`: how fast its loss grows along `v`.

        Cost: one forward pass in forward mode for all rows together, whatever their number.
        """
        with second_derivatives():
            answer: Tensor = jvp(lambda vector: self.losses(x, y, vector), (self.vector(),), (v,))[1]
        return answer

    def hessian_product(self, x: Tensor, y: Tensor, v: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
        """The Hessian of the summed losses times `v`. Cost: about four forward passes."""
        with second_derivatives():
            answer: Tensor = jvp(lambda vector: self.gradient(x, y, vector), (self.vector(),), (v,))[1]
        return answer

    def gauss_newton_product(
        self, x: Tensor, y: Tensor, v: Float[Tensor, " p"], *, weights: Float[Tensor, " n"] | None = None
    ) -> Float[Tensor, " p"]:
        """``sum_i w_i J_i' H_i J_i v``: J_i outputs by the parameters, H_i the loss by outputs (Schraudolph, 2002).

        Positive semi-definite where the loss is convex in the outputs. For cross-entropy and squared error it is the
        Fisher matrix of the model's own distribution, not the empirical one.
        """
        here = self.vector()

        def outputs(vector: Tensor) -> Tensor:
            return self.outputs(vector, x)

        def loss(out: Tensor) -> Tensor:
            losses = self.row_losses(out, y)
            return losses.sum() if weights is None else torch.dot(losses, weights)

        with second_derivatives():
            out, forward = jvp(outputs, (here,), (v,))[:2]
            curved = jvp(grad(loss), (out,), (forward,))[1]
            back: Callable[[Tensor], tuple[Tensor]] = vjp(outputs, here)[1]
            return back(curved)[0]


def _places(moves: Tensor | None) -> Tensor | None:
    return None if moves is None or bool(moves.all()) else moves.reshape(-1).nonzero().flatten()


class _SlowAttention:
    """Torch's two switches for fused attention, which are the whole process's: off while anybody is inside."""

    def __init__(self) -> None:
        self._lock, self._inside, self._undo = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                fast = torch.backends.mha.get_fastpath_enabled()
                self._undo.callback(torch.backends.mha.set_fastpath_enabled, fast)
                torch.backends.mha.set_fastpath_enabled(False)
                self._undo.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


_slow_attention = _SlowAttention()


@contextmanager
def second_derivatives() -> Any:
    """Within: attention by a kernel that has derivatives of derivatives; the fused ones have none.

    Threads may overlap: the switches are put back as they were before the first by the last that leaves.
    """
    _quiet_forward_mode()
    with _slow_attention:
        yield


@cache
def _quiet_forward_mode() -> None:
    """Load what forward mode needs, once: torch warns then of what it itself should no longer use."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
