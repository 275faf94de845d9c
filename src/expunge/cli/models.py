"""`expunge train`, `expunge forget` and `expunge evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from expunge.audit import accuracy
from expunge.cli.inputs import (
    METHODS,
    allow_named_code,
    load_model,
    make_method,
    make_recipe,
    make_request,
    read_held_out,
    read_records,
    refuse_existing,
)
from expunge.cli.options import (
    AllowCode,
    BatchSize,
    Classes,
    Columns,
    Data,
    Epochs,
    IdColumn,
    Json,
    LabelColumn,
    Model,
    OwnerColumn,
    Owners,
    Quiet,
    RecipeFile,
    Seed,
)
from expunge.cli.output import console, progress, say
from expunge.cli.verify_files import read_coin
from expunge.core.claim import Claim
from expunge.core.coins import generator
from expunge.core.errors import Misuse
from expunge.core.protocols import Unlearned
from expunge.core.records import Records
from expunge.core.trained import Trained
from expunge.learn import training
from expunge.learn.loop import NOTHING, Keep
from expunge.report import Grid, print_grid
from expunge.study import Comparison, compare
from expunge.verify import record as record_training

_LOOKED_AT = 2_000
_RUIN = 0.1


def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the trained model.")],
    recipe: RecipeFile = None,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="L2 penalty on all weights; certified heads need it, 1e-3 say.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness.")] = None,
    shards: Annotated[int | None, typer.Option(help="Train this many shards (SISA) instead of one model.")] = None,
    slices: Annotated[int | None, typer.Option(help="Slices of each shard (1).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder to save into and to go on from after a break.")] = None,
    keep_steps: Annotated[
        bool, typer.Option("--keep-steps", help="Keep the model after every step: large; amnesiac-unlearning needs it.")
    ] = False,
    transcript: Annotated[
        Path | None, typer.Option(help="New folder for a transcript that auditors can replay.")
    ] = None,
    coin: Annotated[Path | None, typer.Option(help="Public coin of expunge verify draw; needs --transcript.")] = None,
    without_owner: Annotated[str | None, typer.Option(help="Leave this owner's rows out.")] = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model that can forget later.

    With --shards: as many models that vote, of which only those that held a removed record are trained again (SISA).

    \b
    A recipe of a model that is pruned as it is trained, and keeps its zeros when it forgets:
      {"model": "mlp", "epochs": 10, "pruning": {"sparsity": 0.9, "by": "magnitude", "rewind": 1}}

    \b
    Examples:
      expunge train --data mnist --model lenet --epochs 2 --shards 20 --out models/digits
      expunge train --data customers.csv --id-column id --label-column churned --model mlp --out models/churn
    """
    refuse_existing(out)
    if (coin if transcript is None else resume) is not None or (transcript is not None and keep_steps):
        raise Misuse("--coin needs --transcript, which goes with neither --resume nor --keep-steps; leave these out")
    drawn = None if coin is None else read_coin(coin)
    records = read_records(data, id_column, owner_column, label_column, classes, columns, owners)[0]
    if without_owner is not None:
        records = records.without(records.of_owner(without_owner).ids)
    asked = {"model": model, "epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay, "seed": seed}
    chosen = make_recipe(recipe, asked, lr, shards, slices, records)
    allow_named_code(chosen, allow_code)
    with progress(quiet or as_json) as show:
        kept = Keep(batches=True, every=1) if keep_steps else NOTHING
        if transcript is None:
            trained = training.train(chosen, records, resume=resume, report=show, keep=kept)
        else:
            trained = record_training(chosen, records, transcript, coin=drawn, report=show)
    trained.save(out)
    say(
        as_json,
        {"model": str(out), "digest": trained.digest(), "records": len(trained.ids), "shards": len(trained.parts)},
        f"trained on {len(trained.ids):,} records, {_made_of(trained)}; saved in {out}",
    )


def forget(
    model: Annotated[Path, typer.Argument(help="Folder of the trained model.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="New folder for the model after.")],
    record: Annotated[list[str] | None, typer.Option("--id", help="A record to remove; may be repeated.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="File with one record id a line.")] = None,
    owner: Annotated[str | None, typer.Option(help="Remove all that this owner holds.")] = None,
    label: Annotated[int | None, typer.Option("--class", help="Remove a whole class.")] = None,
    method: Annotated[str, typer.Option(help=", ".join(METHODS) + "; auto: sisa for shards, else retrain.")] = "auto",
    setting: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, as lr=0.01.")] = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove records from a trained model.

    Writes a new model and says what may be claimed of it. The model given stays as it is: delete it yourself.

    \b
    Examples:
      expunge forget models/digits --data mnist --owner owner-017 --out models/digits-2
      expunge forget models/digits --data mnist --class 3 --method fine-tune --set lr=0.05 --out models/no-threes
    """
    refuse_existing(out)
    request = make_request(record, ids_file, owner, label)
    trained = load_model(model, allow_code)
    chosen = make_method(method, setting or [], trained)
    records = read_records(data, id_column, owner_column, label_column, classes, columns, owners)[0]
    with progress(quiet or as_json) as show:
        show(f"{chosen.name}", 0, 1)
        answer = chosen(trained, records, request, rng=generator(seed))
    _warn_of_ruin(trained, answer, records)
    answer.trained.save(out)
    removed = len(answer.trained.gone) - len(trained.gone)
    certified = answer.claim is Claim.CERTIFIED
    about = {
        "model": str(out),
        "method": chosen.name,
        "claim": answer.claim.value,
        "exactness": answer.exactness,
        "not_covered": answer.claim.caveat(answer.exactness),
        "removed": removed,
        "gone": len(answer.trained.gone),
        # What a certified removal cost depends on the removed rows, and is for the operator alone.
        "seconds": None if certified else answer.cost.seconds,
        "row_gradients": None if certified else answer.cost.gradients,
        "guarantee": answer.guarantee.to_json() if certified and answer.guarantee is not None else None,
        "digest": answer.trained.digest(),
        "events": [event.to_json() for event in answer.events],
    }
    what = f"removed {removed:,} records" if removed else "nothing left to remove: all of these were removed before"
    say(as_json, about, f"{what}; {chosen.name}; saved in {out}\n{answer}")


def _warn_of_ruin(before: Trained, answer: Unlearned, records: Records) -> None:
    """A word where a method without a claim took from what stays: steps too long still end in finite weights."""
    if answer.claim is not Claim.NONE or before.recipe.loss != "cross_entropy" or answer.trained is before:
        return
    stays = records.where(lambda one, _: one in answer.trained.ids)
    some = stays.split(_LOOKED_AT / len(stays), generator(0))[0] if len(stays) > _LOOKED_AT else stays
    was, is_now = accuracy(before, some).value, accuracy(answer.trained, some).value
    if is_now < was - _RUIN:
        print(
            f"warning: of the records that stay, the model now gets {is_now:.0%} right, and before {was:.0%}; smaller "
            "steps (--set lr=...) take less from them",
            file=sys.stderr,
        )


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of the model after forgetting.")],
    before: Annotated[Path, typer.Option(help="Folder of the model before.")],
    data: Data,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the exact reference too, and give gaps to it.")
    ] = False,
    test: Annotated[str | None, typer.Option(help="Held-out data; a built-in set brings its own.")] = None,
    id_column: IdColumn = None,
    owner_column: OwnerColumn = None,
    label_column: LabelColumn = None,
    classes: Classes = None,
    columns: Columns = None,
    owners: Owners = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Compare a model before and after forgetting.

    With --retrain also with training again on what remains; exit code 1 if a model said to be exact differs from it.

    \b
    Examples:
      expunge evaluate models/digits-2 --before models/digits --data mnist
      expunge evaluate models/no-threes --before models/digits --data mnist --retrain --json
    """
    first, second = load_model(before, allow_code), load_model(model, allow_code)
    columns_of = (id_column, owner_column, label_column, classes, columns, owners)
    records, held_out = read_records(data, *columns_of)
    if test is not None:
        held_out = read_held_out(test, *columns_of)
    with progress(quiet or as_json) as show:
        answer = compare(first, second, records, held_out, retrain=retrain, report=show)
    if as_json:
        print(json.dumps(answer.to_json()))
    else:
        print_grid(_grid(answer), console())
    refuted = second.standing is Claim.EXACT and answer.equals_retraining is False
    return 1 if refuted else 0


def _grid(answer: Comparison) -> Grid:
    reference = answer.table["retrain"] if answer.table is not None else None
    lines = []
    for row in answer.rows:
        test = "not measured" if row.test is None else f"{row.test:.1%}"
        attack = "not measured" if row.attack is None else f"{row.attack:.2f}"
        gap = "not measured" if reference is None else f"{100 * row.mean_gap(reference):.2f}"
        gap = "(ref.)" if row is reference else gap
        lines.append((row.method, row.claim, f"{row.forget:.1%}", f"{row.retain:.1%}", test, attack, gap))
    notes = (
        "Accuracy in percent with 95 % intervals over rows of one training. attack: AUC of a loss-threshold membership "
        "attack on the removed rows, 0.5 is chance. gap: mean absolute difference to retraining, in points."
    )
    if answer.equals_retraining is not None:
        said = "equals" if answer.equals_retraining else "does not equal"
        notes += f"\nThe model after {said} retraining byte for byte."
    return Grid(
        caption=f"{answer.removed:,} records removed",
        headers=("model", "standing", "forget", "retain", "test", "attack", "gap"),
        rows=tuple(lines),
        notes=notes,
    )


def _made_of(trained: Trained) -> str:
    return f"{len(trained.parts)} shards" if trained.parts else "one model"
