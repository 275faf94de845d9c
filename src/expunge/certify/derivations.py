"""What whoever doubts a guarantee needs: all formulas by name, and settings by the names that constants give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType

from torch import nn

from expunge.certify import (
    clipped_models,
    descent,
    full_batch,
    guarantee,
    guo_bound,
    head,
    newton_bound,
    noisy_fine_tune,
    private,
    rewind_bound,
)
from expunge.certify.constants import Derivation
from expunge.core.errors import ExpungeError, Misuse
from expunge.core.events import Release
from expunge.core.recipe import Recipe
from expunge.learn.build import build
from expunge.learn.models import MODELS


def merged(tables: Iterable[Iterable[Derivation]]) -> Mapping[str, Derivation]:
    """One table of all, by name.

    Raises:
        Misuse: if two different formulas have the same name.
    """
    found: dict[str, Derivation] = {}
    for derivation in (one for table in tables for one in table):
        if found.setdefault(derivation.name, derivation) != derivation:
            raise Misuse(f'two formulas have the name "{derivation.name}"; a name means one formula, for ever')
    return MappingProxyType(found)


DERIVATIONS = merged(
    [
        (guarantee.GAUSSIAN_MU,),
        full_batch.DERIVATIONS,
        descent.DERIVATIONS,
        rewind_bound.DERIVATIONS,
        head.DERIVATIONS,
        newton_bound.DERIVATIONS,
        guo_bound.DERIVATIONS,
        noisy_fine_tune.DERIVATIONS,
        clipped_models.DERIVATIONS,
        private.DERIVATIONS,
    ]
)
"""Every formula that a constant of this package's guarantees may name."""


def settings_of(
    method: object | None,
    recipe: Recipe | None = None,
    *,
    module: nn.Module | None = None,
    release: Release | None = None,
    arguments: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """All numbers that a guarantee may name as settings, by those names; what is None or no number is left out.

    ``method.<field>`` and, of what a method holds, ``method.budget.epsilon``: fields and number-valued properties.
    ``recipe.<field>``, also ``recipe.lr`` and other arguments of the optimiser, ``recipe.features`` (numbers in a
    row), ``recipe.classes`` and ``recipe.outputs`` (both the model's outputs). ``model.parameters``: how many numbers
    the module trains; of this package's models counted on a module built from the recipe. ``release.<field>``.
    ``train_private.<argument>``.

    Args:
        method: None for `train_private`.
        recipe: that of the trained model, which knows its shape (`Trained.recipe`).
        module: needed for ``model.parameters`` of other modules than this package's.
        release: that of `train_private`.
        arguments: the arguments of `train_private`, such as ``clip`` and ``delta``.
    """
    found = _numbers("method", method)
    if recipe is not None:
        found |= _of_recipe(recipe)
        if module is None and recipe.model in MODELS and recipe.sharding is None and "shape" in recipe.model_args:
            module = build(recipe)
    if module is not None:
        found["model.parameters"] = float(sum(one.numel() for one in module.parameters() if one.requires_grad))
    given = {f"train_private.{name}": float(value) for name, value in (arguments or {}).items()}
    return found | _numbers("release", release) | given


def _of_recipe(recipe: Recipe) -> dict[str, float]:
    found = {f"recipe.{name}": float(value) for name, value in recipe.optimiser_args.items() if _is_number(value)}
    found |= _numbers("recipe", recipe)
    if "shape" in recipe.model_args:
        found["recipe.features"] = float(math.prod(recipe.model_args["shape"]))
    if "outputs" in recipe.model_args:
        found["recipe.classes"] = found["recipe.outputs"] = float(recipe.model_args["outputs"])
    return found


def _numbers(where: str, value: object) -> dict[str, float]:
    """Numbers of a dataclass's fields and properties, and of the dataclasses that it holds."""
    found: dict[str, float] = {}
    for name in _names(value):
        try:
            held = getattr(value, name)
        except (ExpungeError, ArithmeticError):  # a property of settings that nothing can be made of
            continue
        if _is_number(held):
            found[f"{where}.{name}"] = float(held)
        elif is_dataclass(held) and not isinstance(held, type):
            found |= _numbers(f"{where}.{name}", held)
    return found


def _names(value: object) -> Iterator[str]:
    if is_dataclass(value) and not isinstance(value, type):
        yield from (field.name for field in fields(value))
        yield from (
            name
            for kind in type(value).__mro__
            for name, what in vars(kind).items()
            if isinstance(what, property) and not name.startswith("_")
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
