"""The front door of training: a recipe and records in, a `Trained` out."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from expunge.core.claim import Claim
from expunge.core.errors import BadRecipe, EmptyRetain, Misuse
from expunge.core.recipe import Recipe, Sharding
from expunge.core.records import Records, seal
from expunge.core.trained import Trained
from expunge.learn.build import EXTERNAL, build
from expunge.learn.engine import LOCAL, Engine
from expunge.learn.loop import NOTHING, Keep, Report, Tally, fit
from expunge.learn.predict import outputs
from expunge.learn.pruning import fit_pruned
from expunge.learn.resume import Saver
from expunge.learn.shards import train_shards


def train(
    recipe: Recipe,
    records: Records,
    *,
    shards: int | None = None,
    keep: Keep = NOTHING,
    resume: str | Path | None = None,
    save_every: int = 200,
    report: Report | None = None,
    engine: Engine = LOCAL,
    tally: Tally | None = None,
) -> Trained:
    """Train a model, deterministically: the same recipe, rows and thread count give the same bytes.

    The order of the rows in `records` does not matter, nor do their ids, unless they are the owners: rows without an
    owner are owned by their id, so that ids which are positions make positions matter. Give ids that do not shift.

    Args:
        recipe: how; `shape`, `outputs` and the shards' salt are filled in from the records.
        records: on what; uint8 pixels are divided by 255, floats taken as they are.
        shards: train that many shards instead (as ``Sharding(shards=...)`` in the recipe).
        keep: what to leave behind beside the model; kept slices of shards need not be asked for. Of pruning by
            magnitude, which trains several times: of the last training.
        resume: new or empty folder to save into, and to go on from after an interruption; removed when training is
            done.
        save_every: steps between saves.
        report: told (stage, steps done, steps in all) now and then.
        engine: where shards are trained.
        tally: counts the work.

    Returns:
        The trained model, in evaluation mode, on the device of the records.

    Raises:
        BadRecipe, BadRecords, EmptyRetain: before any work, or at divergence.
        Misuse: if `resume` holds another training, or files that are no training's.

    Example:
        >>> rows = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        >>> records = Records(rows, (rows[:, 0] > 0).long())
        >>> trained = train(Recipe(model="softmax", epochs=3), records)
        >>> trained.digest() == train(Recipe(model="softmax", epochs=3), records).digest()
        True
    """
    if not len(records):
        raise EmptyRetain("there are no records to train on; give at least one")
    if shards is not None:
        if recipe.sharding is not None and recipe.sharding.shards != shards:
            raise Misuse(
                f"the recipe has {recipe.sharding.shards} shards, but shards={shards} was asked; give one of them"
            )
        recipe = replace(recipe, sharding=recipe.sharding or Sharding(shards=shards))
    recipe = recipe.completed(records)
    saver = None if resume is None else Saver(resume, recipe, records, every=save_every, checkpoints=keep.every)
    if recipe.sharding is not None:
        trained = train_shards(recipe, records, keep=keep, saver=saver, report=report, engine=engine, tally=tally)
    else:
        module = build(recipe).to(records.device)
        if ":" in recipe.model:
            _try(module, recipe, records)
        if recipe.pruning is None:
            log = fit(module, recipe, records, keep=keep, saver=saver, report=report, tally=tally)
        else:
            log = fit_pruned(module, recipe, records, keep=keep, saver=saver, report=report, tally=tally)
        trained = Trained(module=module, recipe=recipe, ids=frozenset(records.ids), log=log)
    trained = replace(trained, seal=seal(records))
    if saver is not None:
        saver.clear()
    return trained


def adopt(module: nn.Module, recipe: Recipe, records: Records) -> Trained:
    """A model that was trained elsewhere, on these records.

    It can be changed by every method that starts from the model. Methods that train from the beginning need a recipe
    whose model can be made anew, and say so otherwise; nothing is claimed of how the module came to be.

    Args:
        module: any `torch.nn.Module`; copied later, never written to.
        recipe: its objective, optimiser and batch size; its `model` is replaced by ``external``. If it says that the
            model is pruned, methods keep the prunable weights that are zero at zero.
        records: what it was trained on.
    """
    recipe = replace(recipe, model=EXTERNAL, sharding=None, dtype=_dtype_of(module)).completed(records)
    return Trained(module=module, recipe=recipe, ids=frozenset(records.ids), standing=Claim.NONE, seal=seal(records))


def _try(module: nn.Module, recipe: Recipe, records: Records) -> None:
    """BadRecipe if somebody's own module cannot read these rows, or gives other than the outputs that they need."""
    try:
        answer = outputs(module, records.select(range(min(2, len(records)))))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadRecipe(f"{recipe.model} cannot read rows of shape {records.shape}: {reason}") from None
    if answer.dim() != 2 or answer.shape[1] != recipe.model_args["outputs"]:
        raise BadRecipe(
            f"{recipe.model} must give (rows, {recipe.model_args['outputs']}) outputs, got {tuple(answer.shape)}"
        )


def load(folder: str | Path, *, module: nn.Module | None = None) -> Trained:
    """Read a model that `Trained.save` wrote; see `Trained.load` for errors.

    Args:
        folder: where it was saved.
        module: for a model that was adopted: a module of its architecture, to be copied and filled.
    """

    def made(recipe: Recipe, parts: tuple[nn.Module, ...] = ()) -> nn.Module:
        return build(recipe, parts) if module is None else copy.deepcopy(module)

    return Trained.load(folder, made)


def _dtype_of(module: nn.Module) -> str:
    parameter = next(iter(module.parameters()), torch.zeros(()))
    return str(parameter.dtype).removeprefix("torch.")
