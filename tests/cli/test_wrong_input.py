# ruff: noqa: E501
"""Whatever is wrong, the answer is one line that says what to do, and nothing is left behind."""

import json
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.conftest import QUICK, TABLE, write_customers


@dataclass(frozen=True)
class Wrong:
    """A command that must fail: `words` may name {files} that `make` has made; `says` is searched in the message."""

    words: str
    says: str
    code: int = 2
    make: object = None


def arrays(folder, x, y, **more):
    folder.mkdir()
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    for name, values in more.items():
        (folder / f"{name}.txt").write_text("\n".join(values))


def image_with_nan(path):
    x = np.zeros((4, 8, 8), np.float32)
    x[2, 3, 3] = np.nan
    arrays(path / "d", x, np.array([0, 1, 0, 1]))


def recipe(path, **changes):
    (path / "r.json").write_text(json.dumps({"model": "mlp", "epochs": 2, **changes}))


def table(**cells):
    return lambda path: write_customers(path / "t.csv", **cells)


def narrower(path):
    """The table of customers without the column age."""
    lines = write_customers(path).read_text().splitlines()
    path.write_text("\n".join(",".join(line.split(",")[:2] + line.split(",")[3:]) for line in lines))


def text(name, content):
    return lambda path: (path / name).write_text(content)


TRAIN = "train --data {shop}/customers.csv {table} {quick} --out out"
TRAIN_T = "train --data t.csv {table} {quick} --out out"
TRAIN_D = "train --data d {quick} --out out"
FORGET = "forget {shop}/sharded --data {shop}/customers.csv {table} --out out"
FORGET_WHOLE = "forget {shop}/whole --data {shop}/customers.csv {table} --out out"
EVALUATE = "evaluate {shop}/lost --before {shop}/sharded --data {shop}/customers.csv {table}"

CASES = {
    # what to forget
    "unknown id": Wrong(f"{FORGET} --id r-999", 'record "r-999" is not among the 60 records; list them with: expunge'),
    "unknown owner": Wrong(f"{FORGET} --owner nobody", 'owner "nobody" holds no record here; list owners with'),
    "class that does not exist": Wrong(f"{FORGET} --class 7", "class 7 holds no record here; classes run from 0 to 1"),
    "class that is no number": Wrong(f"{FORGET} --class yes", "'--class'.*expunge forget --help"),
    "id twice in the request": Wrong(f"{FORGET} --id r-1 --id r-1", 'id "r-1" stands more than once in the request'),
    "two ways": Wrong(f"{FORGET} --owner c-1 --class 0", "in one way: --id"),
    "no way": Wrong(FORGET, "in one way: --id"),
    "ids file is missing": Wrong(f"{FORGET} --ids-file nothing.txt", "nothing.txt cannot be read"),
    "ids file is empty": Wrong(f"{FORGET} --ids-file e.txt", "names no record; write one id a line", make=text("e.txt", "\n")),
    "nothing would be left": Wrong(f"{FORGET} --ids-file all.txt", "none to train on; retire the model", make=text("all.txt", "\n".join(f"r-{i}" for i in range(60)))),
    # how
    "unknown method": Wrong(f"{FORGET} --owner c-1 --method magic", 'unknown method "magic"; known: amnesiac-unlearning'),
    "unknown setting": Wrong(f"{FORGET_WHOLE} --owner c-1 --method fine-tune --set speed=9", 'has no setting "speed"; it has'),
    "setting without value": Wrong(f"{FORGET_WHOLE} --owner c-1 --method fine-tune --set lr", "lacks its value; give it as lr=value"),
    "setting of another type": Wrong(f"{FORGET_WHOLE} --owner c-1 --method fine-tune --set lr=fast", 'lr must be a number, got "fast"'),
    "setting not whole": Wrong(f"{FORGET_WHOLE} --owner c-1 --method fine-tune --set epochs=1.5", "epochs must be a whole number"),
    "setting of no such word": Wrong(f"{FORGET_WHOLE} --owner c-1 --set coins=old", "coins must be one of same, fresh"),
    "setting twice": Wrong(f"{FORGET_WHOLE} --owner c-1 --method fine-tune --set lr=1 --set lr=2", "given twice"),
    "setting out of range": Wrong(f"{FORGET_WHOLE} --owner c-1 --method fine-tune --set lr=-1", "lr must be > 0"),
    "sisa on a whole model": Wrong(f"{FORGET_WHOLE} --owner c-1 --method sisa", "needs a model trained in shards.*use retrain", 3),
    "fine-tune on shards": Wrong(f"{FORGET} --owner c-1 --method fine-tune", "has 4 shards; use sisa or retrain", 3),
    "method that diverges": Wrong(f"{FORGET_WHOLE} --owner c-1 --method fine-tune --set lr=1e30", "lower its lr"),
    # the data
    "unknown data set": Wrong("train --data minst --out out", '"minst" is no file, folder or data set; data sets are adult'),
    "columns of a built-in set": Wrong("train --data optdigits --id-column id --out out", "built-in set and has no columns"),
    "repeated id": Wrong(TRAIN_T, 'id "r-0" stands more than once', make=table(id="r-0")),
    "NaN in an image": Wrong(TRAIN_D, r'record "2" \(row 2\) holds NaN or infinity; drop or fill', make=image_with_nan),
    "empty feature": Wrong(TRAIN_T, 'row 1 of t.csv has no value in column "age"; fill it or drop', make=table(age="")),
    "infinite feature": Wrong(TRAIN_T, "NaN or infinity; drop or fill it first", make=table(age="inf")),
    "text in a column of numbers": Wrong(TRAIN_T, 'column "age" of t.csv holds text .*leave it out', make=table(age="young")),
    "unknown label": Wrong(TRAIN_T, '"maybe" in column "left", not one of no, yes', make=table(left="maybe")),
    "label out of range": Wrong(f"{TRAIN_D} --classes 2", "label 5 of row 3 is out of range; labels run from 0 to 1", make=lambda p: arrays(p / "d", np.zeros((4, 3), np.float32), np.array([0, 1, 0, 5]))),
    "negative label": Wrong(TRAIN_D, "label -1 of row 1 is out of range", make=lambda p: arrays(p / "d", np.zeros((2, 3), np.float32), np.array([0, -1]))),
    "wrong shape": Wrong("train --data d --model lenet --out out", "needs rows of shape .*use softmax or mlp", make=lambda p: arrays(p / "d", np.zeros((4, 3), np.float32), np.array([0, 1, 0, 1]))),
    "one row too few": Wrong(TRAIN_D, "x has 4 rows but there are 3 labels", make=lambda p: arrays(p / "d", np.zeros((4, 3), np.float32), np.array([0, 1, 0]))),
    "missing column": Wrong("train --data {shop}/customers.csv --id-column name --label-column left --out out", 'no column "name"; its columns are id'),
    "no label column": Wrong("train --data {shop}/customers.csv --out out", "which column of .*customers.csv is to be predicted. name it: --label-column"),
    "columns file is no JSON": Wrong(f"{TRAIN} --columns c.json", "cannot be read as JSON", make=text("c.json", "{")),
    "columns file with another key": Wrong(f"{TRAIN} --columns c.json", "any of columns, scale, categories", make=text("c.json", '{"colour": 1}')),
    "a pickle for a table": Wrong("train --data d.pkl --out out", "may hold pickles and is never opened", make=lambda p: (p / "d.pkl").write_bytes(pickle.dumps([1]))),
    "a table that is none": Wrong(TRAIN_T, "t.csv is no CSV table in UTF-8", make=lambda p: (p / "t.csv").write_bytes(bytes(range(256)))),
    "a table without rows": Wrong(TRAIN_T, "holds no rows", make=text("t.csv", "id,owner,age,spent,left\n")),
    "no data at all": Wrong("train --out out", "Missing option '--data'; see: expunge train --help"),
    "negative limit": Wrong("records --data optdigits --limit -1", "--limit must be >= 0"),
    # the recipe
    "recipe is missing": Wrong(f"{TRAIN} --recipe nothing.json", "nothing.json cannot be read as a JSON recipe"),
    "recipe is no JSON": Wrong(f"{TRAIN} --recipe r.json", "cannot be read as a JSON recipe", make=text("r.json", "{model: mlp}")),
    "recipe is a list": Wrong(f"{TRAIN} --recipe r.json", "holds list where a recipe is a JSON object", make=text("r.json", "[1]")),
    "recipe with an unknown key": Wrong(f"{TRAIN} --recipe r.json", 'a recipe has no "epoch"; it has', make=lambda p: recipe(p, epoch=3)),
    "recipe that names code": Wrong("train --data {shop}/customers.csv {table} --recipe r.json --out out", "names code, mynet:make; if you trust it: --allow-code", make=lambda p: recipe(p, model="mynet:make")),
    "recipe that names a module that is not there": Wrong("train --data {shop}/customers.csv {table} --recipe r.json --allow-code --out out", "nowhere:make cannot be imported", make=lambda p: recipe(p, model="nowhere:make")),
    "unknown model": Wrong("train --data {shop}/customers.csv {table} --model gpt --out out", 'unknown model "gpt"; known: '),
    "negative epochs": Wrong("train --data {shop}/customers.csv {table} --epochs -1 --out out", "epochs must be an integer >= 0, got -1"),
    "epochs that are no number": Wrong("train --data {shop}/customers.csv {table} --epochs many --out out", "'--epochs'.*expunge train --help"),
    "no batch": Wrong(f"{TRAIN} --batch-size 0", "batch_size must be >= 1"),
    "negative learning rate": Wrong(f"{TRAIN} --lr -1", "needs lr > 0, got -1"),
    "learning rate too high": Wrong(f"{TRAIN} --lr 1e30", "training diverged.*lower optimiser_args lr"),
    "no shards": Wrong(f"{TRAIN} --shards 0", "integers >= 1, got 0"),
    "slices without shards": Wrong(f"{TRAIN} --slices 2", "--slices cuts shards; give --shards too"),
    # the folders
    "out is there": Wrong("train --data {shop}/customers.csv {table} --out here", "here is there already; name a new folder", make=lambda p: (p / "here").mkdir()),
    "out lies in a file": Wrong("train --data {shop}/customers.csv {table} --out f/out", "cannot be made, for .* is not a folder", make=text("f", "")),
    "resume holds something else": Wrong(f"{TRAIN} --resume state", "is no training's", make=lambda p: ((p / "state").mkdir(), text("state/mine.txt", "")(p))),
    "model is missing": Wrong("forget nothing --data {shop}/customers.csv {table} --owner c-1 --out out", "nothing is no trained model"),
    "model is missing, code allowed": Wrong("forget nothing --allow-code --data optdigits --owner c-1 --out out", "nothing is no trained model"),
    "another set's records": Wrong("forget {shop}/sharded --data optdigits --owner owner-001 --out out", "never trained on record .optdigits"),
    "evaluate in the wrong order": Wrong("evaluate {shop}/sharded --before {shop}/lost --data {shop}/customers.csv {table}", "is the order before, after"),
    "evaluate of two lineages": Wrong("evaluate {shop}/few --before {shop}/sharded --data {shop}/customers.csv {table}", "not of one lineage"),
    "evaluate of one model": Wrong("evaluate {shop}/lost --before {shop}/lost --data {shop}/customers.csv {table}", "is the order before, after"),
    "evaluate on half of the records": Wrong("evaluate {shop}/lost --before {shop}/sharded --data t.csv {table}", "is not among the 30 records", make=lambda p: write_customers(p / "t.csv", rows=30)),
    "test rows of another shape": Wrong(f"{EVALUATE} --test t.csv", "do not fit the records", make=lambda p: narrower(p / "t.csv")),
    "evaluate on rows of another shape": Wrong("evaluate {shop}/lost --before {shop}/sharded --data t.csv {table}", "has shape .*train anew", make=lambda p: narrower(p / "t.csv")),
    # words
    "unknown command": Wrong("frget", "No such command 'frget'.*expunge --help"),
    "unknown option": Wrong("records --dota optdigits", "No such option: --dota"),
    "demo: unknown chapter": Wrong("demo nothing", 'there is no chapter "nothing"; there are train, requests, screen, unlearn'),
    "demo: no seeds": Wrong("demo --seeds 0", "--seeds must be >= 1, got 0"),
    "demo: pictures inside": Wrong("demo --workspace w --show-removed w/../w/p", "lies inside the workspace"),
    "demo: pictures of another chapter": Wrong("demo train --show-removed p", "belongs to the chapter requests"),
}  # fmt: skip


def words_of(wrong, shop):
    filled = wrong.words.replace("{shop}", str(shop)).replace("{quick}", " ".join(QUICK))
    return [word for part in filled.split(" ") for word in (TABLE if part == "{table}" else (part,))]


def one_line(said, code):
    assert said.code == code, said
    assert said.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", said.err), said.err
    return said.err


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_line_and_leaves_nothing(expunge, shop, tmp_path, name):
    wrong = CASES[name]
    if wrong.make is not None:
        wrong.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    said = expunge(*words_of(wrong, shop))
    assert re.search(wrong.says, one_line(said, wrong.code)), said.err
    assert len(said.err) < 520
    assert sorted(tmp_path.rglob("*")) == before


def spoilt(shop, tmp_path, name, content):
    model = shutil.copytree(shop / "whole", tmp_path / "model")
    (model / name).write_bytes(content)
    return model


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", pickle.dumps({"a": 1}), "is a pickle, which can run code and is never opened"),
        ("model.safetensors", b"", "not a whole safetensors file"),
        ("model.safetensors", b"\x08" + bytes(7) + b"garbage!", "not a whole safetensors file"),
        ("trained.json", b"{", "is no trained model"),
        ("trained.json", b"[]", "is not of format"),
        ("trained.json", b'{"format": "expunge-trained/1"}', "lacks"),
    ],
)
@pytest.mark.parametrize("leave", [(), ("--allow-code",)])
def test_a_spoilt_model_is_one_line(expunge, shop, tmp_path, name, content, says, leave):
    model = spoilt(shop, tmp_path, name, content)
    words = ("forget", model, "--data", shop / "customers.csv", *TABLE, "--owner", "c-1", "--out", "out", *leave)
    assert says in one_line(expunge(*words), 2)
    assert not (tmp_path / "out").exists()


def test_a_torch_zip_is_known_as_a_pickle(expunge, shop, tmp_path):
    model = spoilt(shop, tmp_path, "model.safetensors", b"")
    torch.save({"a": torch.ones(1)}, model / "model.safetensors")
    words = ("forget", model, "--data", shop / "customers.csv", *TABLE, "--owner", "c-1", "--out", "out")
    assert "is a pickle" in one_line(expunge(*words), 2)


def test_a_pickle_in_a_model_is_never_opened(expunge, shop, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    model = spoilt(shop, tmp_path, "model.safetensors", pickle.dumps(Bomb()))
    expunge("forget", model, "--data", shop / "customers.csv", *TABLE, "--owner", "c-1", "--out", "out")
    assert not (tmp_path / "exploded").exists()


def test_a_recipe_is_not_run_without_leave(expunge, shop, tmp_path):
    (tmp_path / "mynet.py").write_text("open('exploded', 'w')")
    recipe(tmp_path, model="mynet:make")
    expunge("train", "--data", shop / "customers.csv", *TABLE, "--recipe", "r.json", "--out", "out")
    assert not (tmp_path / "exploded").exists()


def test_a_model_of_another_table_is_refused_by_shape(expunge, shop, tmp_path):
    """The same ids with one column less: the rows cannot be those that the model was trained on."""
    narrower(tmp_path / "t.csv")
    said = expunge("forget", shop / "sharded", "--data", "t.csv", *TABLE, "--owner", "c-1", "--out", "out")
    one_line(said, 2)
    assert not (tmp_path / "out").exists()
