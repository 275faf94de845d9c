import base64
import bz2
import gzip
import io
import json
import lzma
import os
import sqlite3
import tarfile
import textwrap
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from expunge import datasets
from expunge.core.errors import Misuse
from expunge.core.records import Records
from expunge.ledger.sweep import Needles, sweep

N = 20
NAMES = {f"mnist-train-{i:05d}": f"removed-{i}" for i in range(N)} | {
    f"owner-{i:03d}": f"person-{i}" for i in range(200)
}


@pytest.fixture(scope="module")
def train():
    return datasets.get("mnist").train


@pytest.fixture(scope="module")
def forget(train):
    return train.select(range(N))


@pytest.fixture(scope="module")
def needles(train, forget):
    stay = train.select(range(N, 2000)).where(lambda _, owner: owner not in set(forget.owners))
    return Needles.of(forget, beside=stay, names=NAMES)


@pytest.fixture(scope="module")
def adults():
    train = datasets.get("adult").train
    forget = train.select(range(N))
    return train, Needles.of(forget, beside=train.without(forget.ids))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def inside(row):
    """A page of noise with the row as a picture somewhere in it."""
    page = np.random.default_rng(1).integers(0, 256, (70, 90), dtype=np.uint8)
    page[11 : 11 + row.shape[0], 33 : 33 + row.shape[1]] = row
    return page


FORMS = {
    "raw bytes": lambda r, x: x.tobytes(),
    "float16": lambda r, x: x.astype("<f2").tobytes(),
    "float32": lambda r, x: x.astype("<f4").tobytes(),
    "float64": lambda r, x: x.astype("<f8").tobytes(),
    "bfloat16": lambda r, x: torch.tensor(x).to(torch.bfloat16).view(torch.int16).numpy().tobytes(),
    "float32 big-endian": lambda r, x: x.astype(">f4").tobytes(),
    "float64 big-endian": lambda r, x: x.astype(">f8").tobytes(),
    "float16 / 255": lambda r, x: (torch.tensor(x).half() * (1 / 255)).numpy().tobytes(),
    "float32 / 255": lambda r, x: (torch.tensor(x).float() * (1 / 255)).numpy().tobytes(),
    "float64 / 255": lambda r, x: (x / 255.0).tobytes(),
    "bfloat16 / 255": lambda r, x: (torch.tensor(x).bfloat16() * (1 / 255)).view(torch.int16).numpy().tobytes(),
    "float32 / 255 big-endian": lambda r, x: (x.astype("f4") / np.float32(255)).astype(">f4").tobytes(),
    "int64": lambda r, x: x.astype("<i8").tobytes(),
    "decimal text": lambda r, x: json.dumps({"x": x.tolist()}).encode(),
    "decimal text / 255": lambda r, x: json.dumps((torch.tensor(x).float() * (1 / 255)).tolist()).encode(),
    "content digest": lambda r, x: bytes(r.digests()[0]),
    "content digest ": lambda r, x: b"sha256:" + bytes(r.digests()[0]).hex().encode(),
    "content digest  ": lambda r, x: bytes(r.digests()[0]).hex().upper().encode(),
    "content digest   ": lambda r, x: b"x=" + base64.b64encode(bytes(r.digests()[0])),
    "id": lambda r, x: b'{"id": "' + r.ids[0].encode() + b'"}',
    "id ": lambda r, x: f"of {r.ids[0]}, once".encode("utf-16-le"),
    "owner": lambda r, x: b"whose,owner-000\n",
    "picture": lambda r, x: png(inside(x)),
    "picture ": lambda r, x: png(np.repeat(inside(x)[..., None], 3, axis=2)),
    "picture  ": lambda r, x: png(np.kron(inside(x), np.ones((4, 4), np.uint8))),
    "picture inverted": lambda r, x: png(inside(255 - x)),
}


def zipped(data, method):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("other.txt", b"nothing " * 20)
        archive.writestr("a/b.bin", data)
    return file.getvalue()


def tarred(data, mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        entry = tarfile.TarInfo("b.bin")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def padded(data):
    """So many bytes that a run of base64 is made of it; in front an odd number, so that nothing is aligned."""
    return b"#" * 37 + data + b"#" * 40


CONTAINERS = {
    "plain": (lambda d: d, None),
    "middle": (lambda d: bytes(range(251)) + d + bytes(range(251)), None),
    "zip stored": (lambda d: zipped(d, zipfile.ZIP_STORED), None),
    "zip": (lambda d: zipped(d, zipfile.ZIP_DEFLATED), "zip"),
    "zip bz2": (lambda d: zipped(d, zipfile.ZIP_BZIP2), "zip"),
    "gzip": (gzip.compress, "gzip"),
    "gzip inside": (lambda d: b"head" * 5 + gzip.compress(d) + b"tail" * 9, "gzip"),
    "zlib": (lambda d: b"blob\0" + zlib.compress(d) + b"next", "zlib"),
    "bz2": (bz2.compress, "bz2"),
    "xz": (lzma.compress, "xz"),
    "lzma": (lambda d: lzma.compress(d, format=lzma.FORMAT_ALONE), "lzma"),
    "tar": (lambda d: tarred(d, "w"), None),
    "tar.gz": (lambda d: tarred(d, "w:gz"), "gzip"),
    "base64": (lambda d: b'{"image": "' + base64.b64encode(padded(d)) + b'"}', "base64"),
    "base64 urlsafe": (lambda d: b"image=" + base64.urlsafe_b64encode(padded(d)), "base64"),
    "base64 lines": (lambda d: b"-- \n" + base64.encodebytes(padded(d)), "base64"),
    "base64 lines in json": (lambda d: json.dumps(base64.encodebytes(padded(d)).decode()).encode(), "base64"),
    "data uri": (lambda d: b'<img src="data:image/png;base64,' + base64.b64encode(padded(d)) + b'">', "base64"),
    "hex": (lambda d: b"x'" + padded(d).hex().encode() + b"'", "hex"),
    "HEX lines": (lambda d: "\n".join(textwrap.wrap(padded(d).hex().upper(), 60)).encode(), "hex"),
    "gzip in base64 in zip": (
        lambda d: zipped(b"b:" + base64.b64encode(gzip.compress(padded(d))), zipfile.ZIP_DEFLATED),
        "gzip",
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.replace("  ", " b").replace(" ", "-"))
def test_a_row_is_found_in_every_form_in_every_container(form, container, needles, forget, tmp_path):
    pack, named = CONTAINERS[container]
    data = FORMS[form](forget, forget.x[0].numpy())
    (tmp_path / "some.bin").write_bytes(pack(data))
    result = sweep(tmp_path, needles)
    hits = [one for one in result.leftovers if one.form == form.strip()]
    assert hits, result
    assert {one.record for one in hits} == ({"person-0"} if form == "owner" else {"removed-0"})
    assert {one.path for one in hits} == {"some.bin"}
    assert named is None or any(named in one.through for one in hits)
    assert not result.clean
    assert result.not_searched == ()


def changed(form, data):
    """The same with one byte of the row changed, or its name gone on."""
    if form.strip() in ("id", "owner"):
        return data.replace(b"mnist-train-00000", b"mnist-train-99999").replace(b"owner-000", b"owner-0000")
    middle = len(data) // 2
    if "text" in form:
        middle = next(place for place in range(middle, len(data)) if data[place : place + 1].isdigit())
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("form", [name for name in FORMS if "picture" not in name and name != "id "])
def test_with_one_byte_changed_nothing_is_found(form, needles, forget, tmp_path):
    data = FORMS[form](forget, forget.x[0].numpy())
    (tmp_path / "some.bin").write_bytes(changed(form, data))
    assert sweep(tmp_path, needles).clean


def test_a_picture_with_one_pixel_changed_is_not_found(needles, forget, tmp_path):
    pixels = forget.x[0].numpy().copy()
    pixels[14, 14] ^= 1
    (tmp_path / "a.png").write_bytes(png(inside(pixels)))
    assert sweep(tmp_path, needles).clean


def test_a_workspace_of_rows_that_stay_is_clean(train, needles, tmp_path):
    stay = train.select(range(N, 2000)).where(lambda _, owner: owner not in set(train.owners[:N]))
    np.savez(tmp_path / "rows.npz", x=stay.x.numpy(), f=stay.x[:300].float().numpy() / 255)
    np.savez_compressed(tmp_path / "small.npz", x=stay.x.numpy()[:200])
    torch.save({"weights": torch.randn(100, 100, generator=torch.Generator().manual_seed(1))}, tmp_path / "model.pt")
    lines = [{"id": i, "digest": bytes(d).hex()} for i, d in zip(stay.ids, stay.digests(), strict=True)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "7.png").write_bytes(png(stay.x[7].numpy()))
    result = sweep(tmp_path, needles)
    assert result.clean, result.to_json()
    assert result.files == 5
    assert result.size_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert str(result).startswith("clean: 5 files")


def adult_forms(train):
    row = train.x[3].numpy()
    return {
        "raw bytes": row.tobytes(),
        "float64": row.astype(np.float64).tobytes(),
        "json": json.dumps(row.tolist()).encode(),
        "csv": ("id,7," + ",".join(map(str, row)) + ",1\n").encode(),
        "numpy print": np.array2string(row, threshold=10**6, max_line_width=70, floatmode="unique").encode(),
        "javascript": ("[" + ",".join(repr(v).removesuffix(".0") for v in row.tolist()) + "]").encode(),
    }


@pytest.mark.parametrize("form", ["raw bytes", "float64", "json", "csv", "numpy print", "javascript"])
def test_a_row_of_a_table_is_found(form, adults, tmp_path):
    train, needles = adults
    (tmp_path / "a").write_bytes(b"x" * 11 + adult_forms(train)[form])
    result = sweep(tmp_path, needles)
    assert [one.record for one in result.leftovers] == ["record 4"]


@pytest.mark.parametrize("form", ["raw bytes", "json"])
def test_all_other_rows_of_a_table_are_not(form, adults, tmp_path):
    train, needles = adults
    stay = train.select(range(N, 4000))
    data = stay.x.numpy().tobytes() if form == "raw bytes" else json.dumps(stay.x[:300].tolist()).encode()
    (tmp_path / "a").write_bytes(data)
    assert sweep(tmp_path, needles).clean


def test_what_a_row_that_stays_shares_is_searched_by_name_only(tmp_path):
    x = torch.randint(0, 256, (3, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    x[1] = x[0]
    records = Records(
        x, [0, 0, 1], ids=["first-row", "second-row", "third-row"], owners=["ada", "bob", "carol"], classes=2
    )
    needles = Needles.of(records.select([0]), beside=records.select([1, 2]))
    (tmp_path / "rows").write_bytes(x.numpy().tobytes() + bytes(records.digests()[0]))
    assert needles.shared == 1
    assert sweep(tmp_path, needles).clean
    (tmp_path / "names").write_text("second-row, third-row, first-row")
    assert [one.form for one in sweep(tmp_path, needles).leftovers] == ["id"]
    alone = Needles.of(records.select([0]))
    assert {one.form for one in sweep(tmp_path, alone).leftovers} >= {"raw bytes", "content digest", "id"}


@pytest.mark.parametrize("size", [(1 << 20) - 400, (1 << 20) - 1, (1 << 20), (1 << 20) + 5, (1 << 21) - 783])
@pytest.mark.parametrize("form", ["raw bytes", "id", "decimal text", "float32"])
def test_a_row_across_the_edge_of_a_chunk_is_found(form, size, needles, forget, tmp_path):
    noise = np.random.default_rng(1).integers(128, 256, 1 << 22, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(noise[:size] + FORMS[form](forget, forget.x[0].numpy()) + noise[size:])
    assert {one.form for one in sweep(tmp_path, needles).leftovers} == {form}


@pytest.mark.parametrize("size", [1 << 20, 3 << 20])
def test_a_row_in_base64_across_the_edge_of_a_chunk_is_found(size, needles, forget, tmp_path):
    rest = np.random.default_rng(1).integers(0, 256, 4 << 20, dtype=np.uint8).tobytes()
    (tmp_path / "a").write_bytes(base64.b64encode(rest[: size * 3 // 4 - 300] + forget.x[0].numpy().tobytes() + rest))
    assert [one.through for one in sweep(tmp_path, needles).leftovers] == [("base64",)]


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("mnist-train-00000", True),
        ("(mnist-train-00000)", True),
        ("removed mnist-train-00000.", True),
        ("see mnist-train-00000.png", True),
        ("of mnist-train-00000-", True),
        ("/mnist-train-00000/", True),
        ("mnist-train-000001", False),
        ("mnist-train-00000a", False),
        ("xmnist-train-00000", False),
        ("fashion-mnist-train-00000", False),
        ("mnist-train-00000-7", False),
        ("mnist-train-00000.7", False),
        ("mnist-train-00000_7", False),
        ("mnist-train-0000", False),
    ],
)
def test_ids_are_found_as_whole_words_only(text, there, needles, tmp_path):
    (tmp_path / "a.log").write_text(f"a {text} b")
    assert sweep(tmp_path, needles).clean is not there


@pytest.mark.parametrize(
    "name",
    ["mnist-train-00000", "mnist-train-00000.png", "batch-mnist-train-00000.pt", "owner-000/a.txt", "x_owner-000"],
)
def test_names_of_files_and_folders_are_searched_and_hidden_in_the_report(name, needles, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    result = sweep(tmp_path, needles)
    assert result.leftovers
    assert all(one.offset == -1 for one in result.leftovers)
    text = json.dumps(result.to_json())
    assert "mnist-train" not in text
    assert "owner-000" not in text


def test_an_id_that_stays_is_not_taken_for_a_shorter_one_that_went(tmp_path):
    x = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    records = Records(x, [0, 1], ids=["row-1", "row-17"], classes=2)
    (tmp_path / "row-17.txt").write_text("row-17")
    assert sweep(tmp_path, Needles.of(records.select([0]), beside=records.select([1]))).clean
    assert not sweep(tmp_path, Needles.of(records.select([1]), beside=records.select([0]))).clean


def test_numbers_and_short_names_are_searched_in_quotes_only(tmp_path):
    x = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    needles = Needles.of(Records(x, [0, 1], ids=["17", "123456"], classes=2))
    assert needles.not_searched_by_id == 2
    (tmp_path / "a").write_text('17 123456 "178" "1234567"')
    assert sweep(tmp_path, needles).clean
    (tmp_path / "b").write_text("{\"id\": \"17\"} {'id': '123456'}")
    assert sorted(one.record for one in sweep(tmp_path, needles).leftovers) == ["record 1", "record 2"]


def test_rows_of_one_value_are_counted_and_not_searched_by_content(tmp_path):
    x = torch.zeros(2, 64, dtype=torch.uint8)
    x[1] = torch.arange(64)
    needles = Needles.of(Records(x, [0, 1], ids=["zero-row", "other-row"], classes=2))
    (tmp_path / "a").write_bytes(bytes(1000))
    result = sweep(tmp_path, needles)
    assert (result.clean, result.not_searched_by_content) == (True, 1)


@pytest.fixture
def database(tmp_path):
    connection = sqlite3.connect(tmp_path / "work.db", isolation_level=None)
    connection.execute("pragma secure_delete = off")
    connection.execute("create table rows (id text, owner text, x blob)")
    yield connection
    connection.close()


def fill(connection, forget, pack):
    connection.execute("insert into rows values ('first', 'zoe', ?)", (os.urandom(20000),))
    connection.execute("begin")
    for i in range(40):
        connection.execute("insert into rows values (?, ?, ?)", (f"stay-{i}", "zoe", os.urandom(3000)))
        if i == 20:
            connection.execute("insert into rows values (?, ?, ?)", (forget.ids[0], "zoe", pack(forget.x[0])))
    connection.execute("commit")


def test_a_deleted_row_of_a_database_is_found(database, needles, forget, tmp_path):
    fill(database, forget, lambda x: x.numpy().tobytes())
    database.execute("delete from rows where id = ?", (forget.ids[0],))
    assert database.execute("select count(*) from rows").fetchone() == (41,)
    result = sweep(tmp_path, needles)
    assert {one.form for one in result.leftovers} >= {"raw bytes", "id"}


@pytest.mark.parametrize("dropped", [False, True], ids=["there", "dropped"])
def test_a_row_over_pages_of_a_database_is_found(dropped, database, needles, forget, tmp_path):
    fill(database, forget, lambda x: (x.double() / 255).numpy().tobytes())
    if dropped:
        database.execute("drop table rows")
    found = {(one.form, one.through) for one in sweep(tmp_path, needles).leftovers}
    assert ("float64 / 255", ("sqlite",)) in found


def test_a_database_that_was_cleaned_is_clean(database, needles, forget, tmp_path):
    fill(database, forget, lambda x: x.numpy().tobytes())
    database.execute("delete from rows where id = ?", (forget.ids[0],))
    assert not sweep(tmp_path, needles).clean
    database.execute("vacuum")
    assert sweep(tmp_path, needles).clean


@pytest.mark.parametrize("long", [False, True], ids=["in one page", "over pages"])
def test_a_row_in_the_log_of_a_database_is_found(long, database, needles, forget, tmp_path):
    database.execute("pragma journal_mode = wal")
    database.execute("pragma wal_autocheckpoint = 0")
    fill(database, forget, lambda x: (x.double() / 255 if long else x).numpy().tobytes())
    result = sweep(tmp_path, needles)
    assert ("work.db-wal", "float64 / 255" if long else "raw bytes") in {
        (one.path, one.form) for one in result.leftovers
    }


def test_a_bomb_is_not_clean_and_ends_soon(needles, tmp_path):
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(30_000_000)))
    assert sweep(tmp_path, needles).clean
    result = sweep(tmp_path, needles, unpacked_bytes=5_000_000)
    assert not result.clean
    assert result.leftovers == ()
    assert result.not_searched == (("bomb.gz", "unpacks to more bytes than are searched"),)


def test_what_is_packed_too_deep_is_told(needles, forget, tmp_path):
    data = forget.x[0].numpy().tobytes()
    for _ in range(4):
        data = bz2.compress(data)
    (tmp_path / "a.gz").write_bytes(data)
    assert sweep(tmp_path, needles).leftovers
    result = sweep(tmp_path, needles, depth=3)
    assert (result.clean, result.leftovers, result.not_searched) == (False, (), (("a.gz", "bz2 packed too deep"),))


def encrypted_zip():
    data = bytearray(zipped(b"secret " * 30, zipfile.ZIP_DEFLATED))
    data[6] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(os.urandom(5000))[:-900],
        b"\x28\xb5\x2f\xfd" + bytes(50),
        b"Salted__" + bytes(50),
        b"PAR1" + bytes(50),
        encrypted_zip(),
        png(np.arange(10000, dtype=np.uint8).reshape(100, 100))[:80],
    ],
    ids=["torn gzip", "zstd", "encrypted", "parquet", "encrypted zip", "torn png"],
)
def test_what_cannot_be_read_is_not_clean(data, needles, tmp_path):
    (tmp_path / "a.bin").write_bytes(data)
    result = sweep(tmp_path, needles)
    assert not result.clean
    assert [path for path, _ in result.not_searched] == ["a.bin"]


def test_a_lossy_picture_is_not_clean(needles, forget, tmp_path):
    Image.fromarray(forget.x[0].numpy()).save(tmp_path / "a.jpg")
    assert not sweep(tmp_path, needles).clean


def test_a_file_that_cannot_be_opened_is_not_clean(needles, tmp_path, monkeypatch):
    (tmp_path / "locked").write_text("x")
    opened = os.open

    def refuse(path, *rest, **more):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    result = sweep(tmp_path, needles)
    assert result.not_searched == (("locked", "cannot be opened: Permission denied"),)
    assert not result.clean


def test_links_and_special_files_are_told_and_not_followed(needles, forget, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "row").write_bytes(forget.x[0].numpy().tobytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file").symlink_to(tmp_path / "out" / "row")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "out")
    os.mkfifo(tmp_path / "in" / "pipe")
    result = sweep(tmp_path / "in", needles)
    assert result.leftovers == ()
    assert dict(result.not_searched) == {
        "file": "a symbolic link",
        "folder": "a symbolic link",
        "pipe": "no regular file",
    }


def test_skipped_paths_are_not_read(needles, forget, tmp_path):
    for name in ("a", "b/c", "d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(forget.x[0].numpy().tobytes())
    seen = []
    result = sweep(tmp_path, needles, skip=["b", tmp_path / "a"], report=lambda *what: seen.append(what))
    assert {one.path for one in result.leftovers} == {"d"}
    assert seen == [("d", 1, 784)]


def test_the_report_holds_no_id_and_no_content(needles, forget, tmp_path):
    for place, record_id in enumerate(forget.ids):
        data = forget.x[place].numpy().tobytes() + record_id.encode() + bytes(forget.digests()[place])
        (tmp_path / f"{record_id}.bin").write_bytes(data)
    result = sweep(tmp_path, needles)
    text = json.dumps(result.to_json()) + str(result) + repr(result)
    assert len({one.record for one in result.leftovers}) == N
    for place, record_id in enumerate(forget.ids):
        assert record_id not in text
        assert bytes(forget.digests()[place]).hex() not in text


def test_root_must_be_a_folder(needles, tmp_path):
    with pytest.raises(Misuse, match="root must be a folder"):
        sweep(tmp_path / "none", needles)


@pytest.mark.parametrize("line", ["-0.536,0.362", "-0.536, 0.362", "-0.536;0.362", "-0.536\t0.362"])
def test_a_row_of_two_numbers_is_found_in_a_line_of_a_table(tmp_path, line):
    x = torch.tensor([[-0.536, 0.362], [0.125, 0.5]])
    rows = Records(x, torch.tensor([0, 1]), ["r-0001", "r-0002"], ["ann-1", "bob-2"])
    looked = Needles.of(rows.select([0]), beside=rows.select([1]))
    (tmp_path / "table.csv").write_text(f"x,{line},no\n")
    found = sweep(tmp_path, looked)
    assert [one.form for one in found.leftovers] == ["decimal text"]
    (tmp_path / "table.csv").write_text("x,-0.537,0.362,no\n")
    assert sweep(tmp_path, looked).clean


def test_rows_of_too_few_digits_are_counted(tmp_path):
    rows = Records(torch.tensor([[1.0, 0.0], [-0.536, 0.362]]), torch.tensor([0, 1]), ["r-0001", "r-0002"])
    assert Needles.of(rows).not_searched_as_text == 1
    assert sweep(tmp_path, Needles.of(rows)).not_searched_as_text == 1
