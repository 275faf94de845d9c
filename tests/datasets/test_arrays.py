import pickle

import numpy as np
import pytest
import torch

from expunge.core.errors import BadRecords, Misuse, UnreadableFile
from expunge.core.records import Records
from expunge.datasets import load_records, save_npy


def arrays(folder, **more):
    content = {"x": np.arange(12, dtype=np.float32).reshape(4, 3), "y": np.array([0, 1, 1, 0]), **more}
    for name, array in content.items():
        np.save(folder / f"{name}.npy", array)
    return content


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int16])
@pytest.mark.parametrize("targets", ["classes", "floats"])
def test_round_trip(tmp_path, dtype, targets):
    x = torch.arange(5000 * 6).reshape(5000, 2, 3).to(dtype)
    y = torch.arange(5000) % 7 if targets == "classes" else torch.rand(5000, 2)
    ids = [f"é-{i}" for i in range(5000)]
    owners = [f"o{i % 11}" for i in range(5000)]
    before = Records(x, y, ids, owners, classes=9 if targets == "classes" else None)
    after = load_records(save_npy(before, tmp_path / "deep" / "er"))
    assert torch.equal(before.x, after.x)
    assert torch.equal(before.y, after.y)
    assert (before.ids, before.owners, before.classes) == (after.ids, after.owners, after.classes)
    assert np.array_equal(before.digests(), after.digests())
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["er"]


def test_selections_and_empty_sets_round_trip(tmp_path):
    before = Records(torch.eye(4), [0, 1, 2, 3]).without(["1"])
    after = load_records(save_npy(before, tmp_path / "a"))
    assert torch.equal(before.x, after.x)
    assert after.ids == ("0", "2", "3")
    none = load_records(save_npy(before.select([]), tmp_path / "b"))
    assert (len(none), none.classes) == (0, 4)


def test_save_refuses_to_overwrite_and_leaves_nothing_behind(tmp_path):
    records = Records(torch.eye(2), [0, 1])
    save_npy(records, tmp_path / "a")
    with pytest.raises(Misuse, match="already holds something; give a new folder"):
        save_npy(records, tmp_path / "a")
    with pytest.raises(BadRecords, match=r"numpy has no torch\.bfloat16; convert x to float32"):
        save_npy(Records(torch.eye(2, dtype=torch.bfloat16), [0, 1]), tmp_path / "b")
    with pytest.raises(BadRecords, match="cannot hold ids that end in a NUL"):
        save_npy(Records(torch.eye(2), [0, 1], ["a\0", "b"]), tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_rows_are_mapped_and_never_written_back(tmp_path):
    arrays(tmp_path)
    before = (tmp_path / "x.npy").read_bytes()
    records = load_records(tmp_path)
    records.x[0, 0] = 99
    assert (tmp_path / "x.npy").read_bytes() == before


def test_fortran_order_keeps_its_values(tmp_path):
    content = arrays(tmp_path)
    np.save(tmp_path / "x.npy", np.asfortranarray(content["x"]))
    assert np.array_equal(load_records(tmp_path).x.numpy(), content["x"])


def test_slices_of_a_map_keep_their_rows(tmp_path):
    content = arrays(tmp_path)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.array_equal(Records(mapped[2:], [0, 1]).x.numpy(), content["x"][2:])


def test_names_as_text_files_or_numbers(tmp_path):
    arrays(tmp_path, ids=np.array([7, 8, 9, 10]))
    (tmp_path / "owners.txt").write_text("ann\nann\nbob\n\u00e9va\n", encoding="utf-8")
    records = load_records(tmp_path, classes=3)
    assert records.ids == ("7", "8", "9", "10")
    assert records.owners == ("ann", "ann", "bob", "\u00e9va")
    assert records.classes == 3
    (tmp_path / "owners.npy").write_bytes(b"")
    with pytest.raises(UnreadableFile, match=r"holds both owners\.npy and owners\.txt; keep one"):
        load_records(tmp_path)


def test_too_few_names(tmp_path):
    arrays(tmp_path, ids=np.array(["a", "b"]))
    with pytest.raises(BadRecords, match="x has 4 rows but there are 2 ids; give one for each row"):
        load_records(tmp_path)


def test_missing_torn_and_pickled_files(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 3)))
    with pytest.raises(UnreadableFile, match=r"y\.npy is missing; a folder of arrays holds x\.npy and y\.npy"):
        load_records(tmp_path)
    arrays(tmp_path)
    whole = (tmp_path / "x.npy").read_bytes()
    for torn in (whole[:-5], whole[:40], whole[:7]):
        (tmp_path / "x.npy").write_bytes(torn)
        with pytest.raises(UnreadableFile, match=r"x\.npy is torn"):
            load_records(tmp_path)
    (tmp_path / "x.npy").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(UnreadableFile, match="holds a Python pickle, which is never opened"):
        load_records(tmp_path)
    np.save(tmp_path / "x.npy", np.array([{}, 1, 2, 3], dtype=object), allow_pickle=True)
    with pytest.raises(UnreadableFile, match="holds a Python pickle, which is never opened"):
        load_records(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"1,2,3")
    with pytest.raises(UnreadableFile, match=r"is no \.npy file; save it with numpy\.save"):
        load_records(tmp_path)


@pytest.mark.parametrize("bad", [np.ones((4, 3), ">f4"), np.array([["a"]] * 4), np.ones((4, 3), complex)])
def test_other_types_are_refused(tmp_path, bad):
    arrays(tmp_path, x=bad)
    with pytest.raises(UnreadableFile, match="save it as plain numbers of this machine's byte order"):
        load_records(tmp_path)


def test_bad_names_and_counts(tmp_path):
    arrays(tmp_path, ids=np.ones(4))
    with pytest.raises(UnreadableFile, match=r"ids\.npy holds <f8 of shape \(4,\); save \(n,\) text or whole numbers"):
        load_records(tmp_path)
    arrays(tmp_path, ids=np.arange(4))
    (tmp_path / "classes.txt").write_text("two")
    with pytest.raises(UnreadableFile, match=r'classes\.txt must hold the number of classes, got "two"'):
        load_records(tmp_path)


def test_options_of_tables_are_refused(tmp_path):
    arrays(tmp_path)
    with pytest.raises(Misuse, match="label= does not go with a folder of arrays; leave it out"):
        load_records(tmp_path, label="y")
    with pytest.raises(Misuse, match="classes must be a number here"):
        load_records(tmp_path, classes=["a", "b"])


def test_other_things_are_refused(tmp_path):
    with pytest.raises(UnreadableFile, match="there is nothing at"):
        load_records(tmp_path / "nowhere")
    with pytest.raises(UnreadableFile, match=r"holds none of x\.npy with y\.npy, IDX files"):
        load_records(tmp_path)
    for name, message in (
        ("a.npy", r"one array; give the folder that holds it as x\.npy"),
        ("a.pkl", r"may hold pickles and is never opened; save x\.npy and y\.npy"),
        ("a.xlsx", r"no table that can be read; save it as \.csv or \.parquet"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UnreadableFile, match=message):
            load_records(tmp_path / name)
