"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Seed = Annotated[int, typer.Option(help="Seed of all randomness.")]
Data = Annotated[str, typer.Option(help="A data set's name, a .csv or .parquet file, or a folder (.npy, IDX, CIFAR).")]
IdColumn = Annotated[str | None, typer.Option("--id-column", help="Tables: the column that names each record.")]
OwnerColumn = Annotated[str | None, typer.Option("--owner-column", help="Tables: the column that names each owner.")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Tables: the column to predict.")]
Classes = Annotated[str | None, typer.Option(help="Labels in order, as no,yes, or their number.")]
Columns = Annotated[Path | None, typer.Option(help="Tables: JSON with any of columns, scale, categories, regression.")]
Owners = Annotated[int | None, typer.Option(help="Image and text sets: number of artificial owners.")]
RecipeFile = Annotated[Path | None, typer.Option(help="Recipe as JSON; the options below replace its fields.")]
Model = Annotated[str | None, typer.Option(help="softmax, mlp, lenet, convnet3, allcnn, resnet20, ...")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the records.")]
BatchSize = Annotated[int | None, typer.Option(help="Records a step.")]
Models = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Models; all if none is named.")]
Folder = Annotated[
    Path | None,
    typer.Option("--workspace", help="The workspace; default: the nearest folder upward with expunge.toml."),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run code that the recipe names (package.module:callable).")
]
