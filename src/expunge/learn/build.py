"""From a recipe to an untrained module. Code that a recipe names runs only with leave."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from expunge.core.coins import seed_of
from expunge.core.errors import BadRecipe, CodeNotAllowed, Unsupported
from expunge.core.recipe import Recipe
from expunge.learn import models
from expunge.learn.ensemble import ShardEnsemble

EXTERNAL = "external"
_allowed: dict[str, Callable[..., nn.Module] | None] = {}


def allow_code(name: str | Callable[..., nn.Module]) -> str:
    """Give leave to run code that recipes may name as their model, in this process.

    Args:
        name: ``package.module:callable``, or the callable itself. It is called with the recipe's `model_args` and must
            return a new `torch.nn.Module`, with its weights drawn from torch's global generator.

    Returns:
        The name to put into `Recipe.model`.
    """
    if isinstance(name, str):
        _allowed.setdefault(name, None)
        return name
    if isinstance(name, nn.Module) or not hasattr(name, "__qualname__"):
        raise BadRecipe(
            "allow_code takes the function or class that makes the module, not a module; see adopt for those"
        )
    full = f"{name.__module__}:{name.__qualname__}"
    _allowed[full] = name
    return full


def build(recipe: Recipe, parts: tuple[nn.Module, ...] = ()) -> nn.Module:
    """The untrained module of a recipe, its initial weights a function of the recipe's seed alone.

    For a sharded recipe: the aggregate of the given parts.

    Raises:
        BadRecipe: for a model that cannot be made.
        CodeNotAllowed: for a recipe that names code nobody has allowed.
        Unsupported: for a module that came from elsewhere and has no known beginning.
    """
    if recipe.sharding is not None:
        return ShardEnsemble(parts, int(recipe.model_args["outputs"]), recipe.loss, recipe.sharding.aggregate)
    dtype = getattr(torch, recipe.dtype)
    with seeded(recipe.seed, "init"):
        try:
            return _whole(_make(recipe)).to(dtype)
        except (CodeNotAllowed, BadRecipe):
            raise
        except (TypeError, ValueError) as error:
            raise BadRecipe(f'model "{recipe.model}" cannot be made: {error}') from None


def _make(recipe: Recipe) -> nn.Module:
    args = dict(recipe.model_args)
    if recipe.model == EXTERNAL:
        raise Unsupported("a model trained elsewhere cannot be made anew; when loading it, give load(..., module=...)")
    if ":" not in recipe.model:
        shape, outputs = tuple(args.pop("shape")), int(args.pop("outputs"))
        return models.build(recipe.model, shape=shape, outputs=outputs, **args)
    if recipe.model not in _allowed:
        raise CodeNotAllowed(
            f"the recipe names code, {recipe.model}; if you trust it: --allow-code, or expunge.allow_code(...)"
        )
    factory = _allowed[recipe.model] or _imported(recipe.model)
    module = factory(**args)
    if not isinstance(module, nn.Module):
        raise BadRecipe(f"{recipe.model} must return a torch.nn.Module, got {type(module).__name__}")
    return module


def _whole(module: nn.Module) -> nn.Module:
    """Refuse state that no checkpoint would hold: exact results would silently lose it."""
    for name, part in module.named_modules():
        if part._non_persistent_buffers_set:
            raise Unsupported(
                f'"{name or type(part).__name__}" has a buffer outside its state_dict; register it with persistent=True'
            )
    return module


def _imported(name: str) -> Callable[..., nn.Module]:
    place, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(place)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError) as error:
        raise BadRecipe(f"{name} cannot be imported ({error}); is it on the Python path?") from None
    if not callable(found):
        raise BadRecipe(f"{name} is not callable; name a function or class that makes the module")
    return found


def build_name(device: torch.device) -> str:
    """What computes: trainings are the same bytes only on the same version of torch, instruction set and device."""
    kernels = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} {platform.machine()} {kernels}"


@contextmanager
def seeded(*names: int | str) -> Iterator[None]:
    """Within: torch's global generators are started at the seed called `names`. After: they are as they were."""
    # Not torch.manual_seed: where CUDA was never used, it queues a formatted stack trace for each call, for ever.
    on_gpu = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if on_gpu else ()):
        torch.default_generator.manual_seed(seed_of(*names))
        if on_gpu:
            torch.cuda.manual_seed_all(seed_of(*names))
        yield
