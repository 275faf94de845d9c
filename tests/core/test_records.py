"""Rows: their digests, their identity, their errors, and that selections copy nothing."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.core.coins import generator
from expunge.core.digest import array_of, canonical_json
from expunge.core.errors import BadRecords, Misuse, UnknownRecord, Unsupported
from expunge.core.recipe import Recipe
from expunge.core.records import Records
from expunge.learn.training import train

NAN, INF = float("nan"), float("inf")


def six(**more):
    x = torch.arange(18, dtype=torch.float32).reshape(6, 3)
    owners = ["ann", "bob", "ann", "cid", "bob", "ann"]
    return Records(x, [0, 1, 2, 0, 1, 2], list("abcdef"), owners, **more)


class Rows:
    """A map-style data set over given rows and labels; a row of one element is handed out with that label's type."""

    def __init__(self, x, y):
        self.x, self.y, self.reads = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.reads += 1
        return self.x[index], self.y[index]


def test_digests_of_all_of_mnist_against_hashlib_on_a_sample(mnist):
    records = mnist.train
    digests = records.digests()
    assert digests.shape == (60_000, 32)
    assert digests is records.digests()
    header = canonical_json(["|u1", [28, 28], "<i8", []])
    pixels, labels = records.x.numpy(), records.y.numpy()
    for row in [0, 1, 4095, 4096, 4097, 59_999, *np.random.default_rng(0).integers(0, 60_000, 500)]:
        content = struct.pack("<I", len(header)) + header + pixels[row].tobytes() + labels[row].tobytes()
        assert digests[row].tobytes() == hashlib.sha256(content).digest()
    assert len({row.tobytes() for row in digests}) == len(np.unique(pixels.reshape(60_000, -1), axis=0))


def test_digests_do_not_see_where_rows_lie(tmp_path):
    x = np.random.default_rng(0).random((50, 4, 3), dtype=np.float32)
    y = np.arange(50) % 3
    np.save(tmp_path / "x.npy", x)
    whole = Records(x, y)
    others = [
        Records(torch.from_numpy(x).clone(), torch.from_numpy(y)),
        Records(np.asfortranarray(x), list(y)),
        Records(np.repeat(x, 2, 0)[::2], y.astype(np.int8)),
        Records(x[::-1][::-1], y),
        Records(torch.from_numpy(x).permute(2, 0, 1).contiguous().permute(1, 2, 0), y),
        *(Records(np.load(tmp_path / "x.npy", mmap_mode=mode), y) for mode in ("r", "c", "r+")),
        Records.from_dataset(Rows(torch.from_numpy(x), torch.from_numpy(y))),
        whole.select(range(50)),
    ]
    for records in others:
        assert np.array_equal(records.digests(), whole.digests())
        assert np.array_equal(records.keys, whole.keys.copy()) == (records.owners == whole.owners)
    pick = [7, 3, 49]
    late, early = Records(x, y).select(pick), whole.select(pick)
    assert np.array_equal(late.digests(), whole.digests()[pick])
    assert np.array_equal(early.digests(), whole.digests()[pick])


@pytest.mark.parametrize("step", [slice(None, None, -1), slice(1, None, 2)])
def test_views_of_arrays_are_taken(step):
    x = np.arange(12.0).reshape(4, 3)
    assert Records(x[step], np.zeros(len(x[step]), int)).x.tolist() == x[step].tolist()


def test_two_owners_may_hold_the_same_row_and_both_count():
    x = torch.tensor([[1.0, 1.0]] * 4 + [[0.0, 2.0]])
    records = Records(x, [1, 1, 1, 1, 0], list("abcde"), ["ann", "ann", "bob", "bob", "bob"])
    assert (len(records.of_owner("ann")), len(records.of_owner("bob"))) == (2, 3)
    assert len({digest.tobytes() for digest in records.digests()}) == 2
    assert len(set(records.keys.tolist())) == 3  # (owner, content) is the identity
    recipe = Recipe(model="softmax", epochs=2, batch_size=8)
    assert train(recipe, records).log.rows_read == 10
    fewer = [train(recipe, records.take(ids)).digest() for ids in ("ace", "abce", "abcde")]
    assert len(set(fewer)) == 3


BAD = [
    ({"x": torch.zeros(6)}, r"x must be \(rows, ...\), got shape \(6,\); use x.reshape\(len\(x\), -1\)"),
    ({"x": torch.zeros(5, 3)}, "x has 5 rows but there are 6 labels; give one for each row"),
    ({"ids": list("abcde")}, "x has 6 rows but there are 5 ids; give one for each row"),
    ({"owners": ["ann"]}, "x has 6 rows but there are 1 owners; give one for each row"),
    ({"ids": list("abcdba")}, 'id "b" stands more than once; ids must be unique, owners may repeat'),
    ({"ids": range(6)}, r"ids must be text, got 0 of type int; use map\(str, ids\)"),
    ({"owners": [None] * 6}, r"owners must be text, got None of type NoneType; use map\(str, owners\)"),
    ({"x": [[1.0]] * 6}, "x must be a numeric tensor or array, got list; convert it first"),
    ({"x": np.array([["a"]] * 6)}, "x must be a numeric tensor or array, got ndarray of <U1; convert it first"),
    ({"x": np.ones((6, 3), np.longdouble)}, "x must be a numeric tensor or array, got ndarray of .*; convert it first"),
    ({"x": torch.zeros(6, 3, dtype=torch.complex64)}, "x must be real numbers, got torch.complex64; .*"),
    ({"y": [0, 1, 2, 0, 1, -2]}, "label -2 of row 5 is out of range; labels run from 0 to 2"),
    ({"y": [0, 1, 2, 9, 1, 2], "classes": 3}, "label 9 of row 3 is out of range; labels run from 0 to 2"),
    ({"y": torch.zeros(6, 2, dtype=torch.int64)}, r"class labels must be one integer a row, got shape \(6, 2\) of .*"),
    ({"y": torch.zeros(6, dtype=torch.complex64)}, "class labels must be one integer a row, got shape .*"),
    ({"y": list("uvwxyz")}, "labels must be numbers, got .*; number the classes from 0"),
    ({"y": torch.zeros(6, 2, 2)}, r"float targets must be \(n,\) or \(n, k\), got shape \(6, 2, 2\)"),
    ({"y": [0.0, 1.0, NAN, 0.0, 1.0, 2.0]}, "the target of row 2 is NaN or infinite; drop the row or fill it first"),
    ({"y": torch.tensor([[0.0, INF]] * 6)}, "the target of row 0 is NaN or infinite; drop the row or fill it first"),
    ({"y": [0.5] * 6, "classes": 3}, "float targets have no classes, got classes=3; convert the labels to integers"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_rows_are_refused_in_one_line(change, message):
    fine = {"x": torch.zeros(6, 3), "y": [0, 1, 2, 0, 1, 2], "ids": list("abcdef")}
    Records(**fine)
    with pytest.raises(BadRecords, match=rf"^{message}$"):
        Records(**{**fine, **change})


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("row", [0, 4095, 4096, 4999])
def test_nan_is_found_in_every_chunk(bad, row):
    x = torch.zeros(5000, 2)
    x[row, 1] = bad
    message = f'^record "{row}" \\(row {row}\\) holds NaN or infinity; drop or fill it first$'
    with pytest.raises(BadRecords, match=message):
        Records(x, torch.zeros(5000, dtype=torch.int64))
    with pytest.raises(BadRecords, match=message):
        Records.from_dataset(Rows(x, torch.zeros(5000, dtype=torch.int64)))


def test_a_data_set_is_checked_like_a_tensor():
    x, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])
    with pytest.raises(BadRecords, match=r"^the data set holds no rows; give at least one$"):
        Records.from_dataset(Rows(x[:0], y[:0]))
    with pytest.raises(BadRecords, match=r"^label 2 of row 2 is out of range"):
        Records.from_dataset(Rows(x, y), classes=2)
    with pytest.raises(BadRecords, match=r"^x has 4 rows but there are 2 ids"):
        Records.from_dataset(Rows(x, y), list("ab"))
    with pytest.raises(BadRecords, match=r"^x must be \(rows, ...\), got shape \(4,\)"):
        Records.from_dataset(Rows(x[:, 0], y))


def test_random_augmentation_is_refused():
    class Augmented(Rows):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.rand(()), y

    message = "^item 0 differs when read twice; records must be deterministic, so augment in the model$"
    with pytest.raises(BadRecords, match=message):
        Records.from_dataset(Augmented(torch.rand(40, 5), torch.zeros(40, dtype=torch.int64)))


def test_augmentation_that_strikes_seldom_is_refused_too():
    class Flipped(Rows):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return (x.flip(0) if self.reads in (7, 9) else x), y  # item 0 is the same both times

    with pytest.raises(BadRecords, match=r"differs when read twice"):
        Records.from_dataset(Flipped(torch.rand(40, 5), torch.zeros(40, dtype=torch.int64)))


@pytest.mark.parametrize("labels", [torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_trains_to_the_bytes_of_its_tensor(labels, workers):
    if workers and labels is not torch.int64:
        return
    x, y = torch.rand(90, 5, generator=generator(1)), (torch.arange(90) % 3).to(labels)
    owners = [f"o{i % 7}" for i in range(90)]
    loss = "mse" if labels is torch.float32 else "cross_entropy"
    recipe = Recipe(model="mlp", loss=loss, model_args={"hidden": [6]}, epochs=3, batch_size=16)
    tensor = Records(x, y, owners=owners)
    streamed = Records.from_dataset(Rows(x, y), owners=owners, workers=workers)
    assert streamed.streamed
    assert not tensor.streamed
    assert np.array_equal(tensor.digests(), streamed.digests())
    for pick in (range(90), range(60, 5, -2)):
        first, second = train(recipe, tensor.select(pick)), train(recipe, streamed.select(pick))
        assert first.digest() == second.digest()
        assert first.log.losses == second.log.losses
    assert torch.equal(streamed.x, x)
    assert torch.equal(streamed.select([4, 2]).x, x[[4, 2]])


def test_reading_a_data_set_draws_no_global_coin():
    state = torch.get_rng_state()
    records = Records.from_dataset(Rows(torch.rand(9, 2, generator=generator(0)), torch.zeros(9, dtype=torch.int64)))
    list(records.batches([torch.arange(9)]))
    assert torch.equal(torch.get_rng_state(), state)


def test_streamed_rows_have_no_shared_tensor():
    records = Records.from_dataset(Rows(torch.rand(3, 2), torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(
        Unsupported, match=r"^these rows are streamed from a data set; load them into one tensor first$"
    ):
        records.shared()


def test_selections_share_the_rows():
    records = six()
    views = [records.take("fa"), records.without("b"), records.of_owner("ann"), records.of_class(2)]
    views += [*records.split(0.5, generator(0)), records.where(lambda i, _: i > "b"), records.select([1]).select([0])]
    for view in views:
        tensor, places = view.shared()
        assert tensor is records.x
        assert torch.equal(view.x, records.x[places])
        assert [records.ids[i] for i in places] == list(view.ids)
        assert view.y.tolist() == records.y[places].tolist()
        assert (view.classes, view.shape) == (3, (3,))


@pytest.mark.parametrize("mode", ["r", "c", "r+"])
def test_a_memory_map_is_neither_read_nor_copied_when_opened_and_selected(tmp_path, mode):
    np.save(tmp_path / "x.npy", np.zeros((1000, 64), np.uint8))
    records = Records(np.load(tmp_path / "x.npy", mmap_mode=mode), np.zeros(1000, int))
    some = records.without(["5"]).select(range(100, 200))
    with (tmp_path / "x.npy").open("r+b") as file:  # a copy made above would not see this
        file.seek(128 + 102 * 64)
        file.write(b"\7" * 64)
    assert records.x[102].tolist() == [7] * 64
    assert some.x[1].tolist() == [7] * 64
    assert next(some.batches([torch.tensor([0, 1])]))[0].sum(1).tolist() == [0, 7 * 64]


def test_selecting():
    records = six()
    assert records.take(["f", "a"]).ids == ("f", "a")
    assert records.take(["f", "a"]).owners == ("ann", "ann")
    assert records.without(["c"]).ids == tuple("abdef")
    assert records.of_owner("bob").ids == ("b", "e")
    assert records.of_class(0).ids == ("a", "d")
    assert ("a" in records, "z" in records) == (True, False)
    assert len(records.select([])) == len(records.select([]).x) == len(records.select([]).digests()) == 0
    assert repr(records) == "Records(6 rows of 3 owners, shape (3,), 3 classes)"
    assert Records(records.x, [0] * 6).owners == Records(records.x, [0] * 6).ids == tuple("012345")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r: r.take(["a", "z"]), 'record "z" is not among the 6 records; list them with: expunge records'),
        (lambda r: r.without(["z"]), 'record "z" is not among the 6 records; .*'),
        (lambda r: r.of_owner("zoe"), 'owner "zoe" holds no record here; list owners with: expunge records --owners'),
        (lambda r: r.of_class(7), "class 7 holds no record here; classes run from 0 to 2"),
        (lambda r: Records(r.x, [0.5] * 6).of_class(0), "these records have float targets and so no classes; .*"),
    ],
)
def test_what_is_not_there_is_unknown(act, message):
    with pytest.raises(UnknownRecord, match=rf"^{message}$"):
        act(six())


def test_selecting_twice_or_nowhere_is_refused():
    with pytest.raises(BadRecords, match=r'^id "a" stands more than once'):
        six().select([0, 1, 0])
    with pytest.raises(Misuse, match=r"^positions must lie in 0 to 5, got -1 to 2; count from the front$"):
        six().select([2, -1])
    with pytest.raises(Misuse, match=r"^positions must lie in 0 to 5, got 6 to 6; count from the front$"):
        six().select([6])
    with pytest.raises(Misuse, match=r"^positions must be numbers, got a mask of truth values; use mask.nonzero\(\)"):
        six().select(np.ones(6, bool))


@pytest.mark.parametrize("by_owner", [False, True])
def test_split_is_a_share_that_does_not_see_the_order(by_owner):
    records = six()
    first, rest = records.split(0.34, generator(3), by_owner=by_owner)
    assert sorted(first.ids + rest.ids) == list("abcdef")
    again, _ = records.select([5, 3, 1, 0, 2, 4]).split(0.34, generator(3), by_owner=by_owner)
    assert set(again.ids) == set(first.ids)
    assert not by_owner or not set(first.owners) & set(rest.owners)
    assert by_owner or len(first) == 2
    with pytest.raises(BadRecords, match=r"^share must lie between 0 and 1, got 1.0$"):
        records.split(1.0, generator(3))


def test_plus_joins_and_refuses():
    records = six()
    more = Records(torch.ones(1, 3), [1], ["g"], ["dan"], classes=3)
    both = records.select([0]).plus(more)
    assert (both.ids, both.owners, both.y.tolist(), both.classes) == (("a", "g"), ("ann", "dan"), [0, 1], 3)
    with pytest.raises(BadRecords, match=r'^id "g" stands more than once'):
        more.plus(more)
    for other in (
        Records(torch.ones(1, 4), [1], ["g"], classes=3),
        Records(torch.ones(1, 3), [1], ["g"], classes=4),
        Records(torch.ones(1, 3, dtype=torch.uint8), [1], ["g"], classes=3),  # pixels would lose their scale
    ):
        with pytest.raises(BadRecords, match=r"^cannot join rows of .*; shapes, dtypes and classes must agree$"):
            records.plus(other)


@given(st.permutations(range(40)), st.sampled_from([1, 3, 16, 64]))
@settings(max_examples=15, deadline=None, print_blob=True)
def test_a_permutation_of_the_rows_changes_no_byte_of_training(order, batch_size):
    x = torch.rand(40, 4, generator=generator(0)).round(decimals=1)
    x[5:9] = x[4]  # rows alike, some of one owner and some not
    y = torch.arange(40) % 3
    y[5:9] = y[4]
    records = Records(x, y, owners=[f"o{i // 3}" for i in range(40)])
    recipe = Recipe(model="softmax", epochs=2, batch_size=batch_size, model_args={"shape": [4], "outputs": 3})
    other = Records(x[order], y[order], [f"x{i}" for i in order], [records.owners[i] for i in order])
    first = train(recipe, records)
    for shuffled in (records.select(order), other):
        again = train(recipe, shuffled)
        assert again.digest() == first.digest()
        assert again.log.losses == first.log.losses


def test_array_of_refuses_what_has_no_canonical_bytes():
    with pytest.raises(Unsupported, match=r"dense"):
        array_of(torch.eye(2).to_sparse())
