import gzip
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from expunge.core.errors import BadRecords, Misuse, UnreadableFile, Unsupported
from expunge.datasets import load_records

TABLE = """customer,household,age,plan,balance,left
007,h1,40,basic,1.5,no
008,h1,25,pro,-2,yes
NA,h2,70,NA,0.25,no
"""
PLAN = {
    "id": "customer",
    "owner": "household",
    "label": "left",
    "classes": ["no", "yes"],
    "categories": {"plan": ["basic", "pro", "NA"]},
}


@pytest.fixture
def table(tmp_path):
    def write(content=TABLE, name="t.csv"):
        path = tmp_path / name
        path.write_text(content)
        return path

    return write


def test_csv(table):
    records = load_records(table(), **PLAN, scale={"age": (40, 15)})
    assert records.ids == ("007", "008", "NA")
    assert records.owners == ("h1", "h1", "h2")
    assert records.y.tolist() == [0, 1, 0]
    assert records.classes == 2
    assert records.x.dtype is torch.float32
    assert records.x.tolist() == [[0, 1, 0, 0, 1.5], [-1, 0, 1, 0, -2], [2, 0, 0, 1, 0.25]]


def test_csv_compressed_with_byte_order_mark(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + TABLE.encode()))
    assert load_records(path, **PLAN).ids == ("007", "008", "NA")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UnreadableFile, match="is no CSV table in UTF-8"):
        load_records(path, **PLAN)


def test_parquet_reads_the_same(table, tmp_path):
    source = table()
    frame = pd.read_csv(source, dtype={"customer": str}, keep_default_na=False)
    frame.to_parquet(tmp_path / "t.parquet")
    one, other = load_records(source, **PLAN), load_records(tmp_path / "t.parquet", **PLAN)
    assert torch.equal(one.x, other.x)
    assert (one.ids, one.owners, one.y.tolist()) == (other.ids, other.owners, other.y.tolist())


def test_parquet_whole_number_ids_missing_values_and_times(tmp_path):
    path = tmp_path / "t.parquet"
    frame = pd.DataFrame({"id": [5, 6], "a": pd.array([1, None], dtype="Int64"), "y": [True, False]})
    frame.to_parquet(path)
    with pytest.raises(BadRecords, match=r'row 1 of t\.parquet has no value in column "a"; fill it or drop the row'):
        load_records(path, id="id", label="y")
    frame.assign(a=[1, 2]).to_parquet(path)
    records = load_records(path, id="id", label="y")
    assert (records.ids, records.y.tolist(), records.classes) == (("5", "6"), [1, 0], 2)
    frame.assign(a=pd.to_datetime(["2020-01-01", "2020-01-02"])).to_parquet(path)
    with pytest.raises(BadRecords, match=r'column "a" of t\.parquet holds datetime64.*make it a number first'):
        load_records(path, id="id", label="y")
    frame.assign(id=[0.5, 1.5], a=[1, 2]).to_parquet(path)
    with pytest.raises(BadRecords, match=r'column "id" of .* holds decimal numbers; save ids as text'):
        load_records(path, id="id", label="y")


def test_parquet_that_is_none_and_without_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 not")
    with pytest.raises(UnreadableFile, match="is no Parquet table"):
        load_records(path, label="y")
    monkeypatch.setattr(pd, "read_parquet", lambda _: (_ for _ in ()).throw(ImportError()))
    with pytest.raises(Unsupported, match=r"run: pip install 'expunge\[parquet\]'$"):
        load_records(path, label="y")


def test_features_do_not_depend_on_the_other_rows(table):
    options = {**PLAN, "scale": {"age": (40, 15), "balance": (1, 3)}}
    whole = load_records(table(), **options)
    lines = TABLE.splitlines(keepends=True)
    part = load_records(table(lines[0] + lines[2]), **options)
    assert torch.equal(part.x, whole.x[1:2])
    assert torch.equal(part.y, whole.y[1:2])
    assert part.classes == 2


def test_without_ids_and_owners(table):
    records = load_records(table("a,y\n1,0\n2,2\n"), label="y")
    assert records.ids == records.owners == ("0", "1")
    assert records.classes == 3
    assert load_records(table("a,y\n1,0\n2,2\n"), label="y", classes=5).classes == 5
    owned = load_records(table("a,y,o\n1,0,x\n2,2,x\n"), label="y", owner="o")
    assert (owned.ids, owned.owners) == (("0", "1"), ("x", "x"))


def test_columns_choose_and_order(table):
    assert load_records(table("a,b,c,y\n1,2,3,0\n"), label="y", columns=["c", "a"]).x.tolist() == [[3, 1]]


def test_regression(table):
    records = load_records(table("a,y\n1,0.5\n2,2\n"), label="y", regression=True)
    assert records.y.tolist() == [0.5, 2.0]
    assert records.classes is None


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        (TABLE, {}, BadRecords, "which column of t.csv is the label"),
        (TABLE, {"label": "lef"}, BadRecords, 't.csv has no column "lef"; its columns are customer, household, age'),
        (
            TABLE,
            {"label": "left", "columns": ["household"]},
            BadRecords,
            'column "household" of t.csv holds text \\("h1" in row 0\\); fix its',
        ),
        (
            "a,y\n1,0\n,1\n",
            {"label": "y"},
            BadRecords,
            'row 1 of t.csv has no value in column "a"; fill it or drop the row',
        ),
        (
            "a,y\n1,no\n",
            {"label": "y"},
            BadRecords,
            r'label column "y" of t.csv holds text \("no" in row 0\); give every label in order, as --classes no,yes',
        ),
        (
            "a,y\n1,no\n2,maybe\n",
            {"label": "y", "classes": ["no", "yes"]},
            BadRecords,
            'row 1 of t.csv has "maybe" in column "y", not one of no, yes',
        ),
        ("a,y\n1,0\n2,\n", {"label": "y"}, BadRecords, 'row 1 of t.csv has no label in column "y"'),
        ("a,y\n1,0.5\n", {"label": "y"}, BadRecords, "holds decimal numbers; give regression=True"),
        ("a,y\n1,3\n", {"label": "y", "classes": 2}, BadRecords, "label 3 of row 0 is out of range"),
        ("i,a,y\nx,1,0\nx,2,0\n", {"label": "y", "id": "i"}, BadRecords, 'id "x" stands more than once'),
        (
            "i,a,y\nx,1,0\n,2,0\n",
            {"label": "y", "id": "i"},
            BadRecords,
            'row 1 of t.csv has nothing in column "i"; each',
        ),
        ("a,a,y\n1,2,0\n", {"label": "y"}, BadRecords, 'two columns "a"'),
        ("y\n0\n", {"label": "y"}, BadRecords, "no column left for features"),
        (
            "a,y\n1,0\n",
            {"label": "y", "columns": ["a", "y"]},
            BadRecords,
            'columns names "y", which is id, owner, label',
        ),
        ("a,y\n1,0\n", {"label": "y", "scale": {"b": (0, 1)}}, BadRecords, 'scale names "b", which is no feature'),
        ("a,y\n1,0\n", {"label": "y", "scale": {"a": (0, 0)}}, Misuse, "with std > 0, got \\(0, 0\\)"),
        (
            "a,y\n1,0\n",
            {"label": "y", "scale": {"a": (0, 1)}, "categories": {"a": ["1"]}},
            Misuse,
            "both scale and categories",
        ),
        ("a,y\n1,0\n", {"label": "y", "categories": {"a": "1"}}, Misuse, "must be a list of all values"),
        ("a,y\n1,0\n", {"label": "y", "categories": {"a": ["1", "1"]}}, BadRecords, "names one of them twice"),
        (
            "a,y\n,0\n",
            {"label": "y", "categories": {"a": ["1"]}},
            BadRecords,
            'has nothing in column "a", not one of 1',
        ),
        ("a,y\n1,0\n", {"label": "y", "classes": 2, "regression": True}, Misuse, "so no classes"),
        ("a,y\n1,0\n", {"label": "y", "part": "train"}, Misuse, "part= does not go with a table"),
        ("a,y\n1,0\n1,2,3,4\n", {"label": "y"}, UnreadableFile, "is no CSV table in UTF-8"),
        ("a,y\n1,0,9\n2,1,9\n", {"label": "y"}, UnreadableFile, "is no CSV table in UTF-8"),
        ("a,y\n1e300,0\n", {"label": "y"}, BadRecords, "holds NaN or infinity"),
        ("a,y\n", {"label": "y"}, UnreadableFile, "holds no rows"),
        ("", {"label": "y"}, UnreadableFile, "is no CSV table in UTF-8"),
    ],
)
def test_errors_say_what_to_do(table, content, options, error, message):
    with pytest.raises(error, match=message) as caught:
        load_records(table(content), **options)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,y\n\xff\xfe,0\n")
    with pytest.raises(UnreadableFile, match="is no CSV table in UTF-8"):
        load_records(path, label="y")


def test_pandas_is_not_imported_before_it_is_needed():
    code = "import sys, expunge.datasets; sys.exit(bool({'pandas', 'transformers', 'rich'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nan_in_a_folder_of_arrays_is_refused_with_its_row(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1.0], [np.nan]]))
    np.save(tmp_path / "y.npy", np.array([0, 1]))
    with pytest.raises(BadRecords, match=r'record "1" \(row 1\) holds NaN'):
        load_records(tmp_path)
