"""What every method must keep to, at its defaults; those with needs of their own are tried beside their oracles."""

import pytest

from expunge.testing import conformance
from expunge.unlearn import (
    BadTeacher,
    BoundaryShrink,
    FisherForgetting,
    GradientAscent,
    InfluenceUnlearning,
    SaliencyMasked,
    SalUn,
    Scrub,
    SelectiveSynapticDampening,
    UnrollingSGD,
)

METHODS = (
    BadTeacher(),
    BoundaryShrink(),
    FisherForgetting(),
    InfluenceUnlearning(),
    SaliencyMasked(then=GradientAscent()),
    SalUn(),
    Scrub(),
    SelectiveSynapticDampening(),
    UnrollingSGD(),
)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_method_conforms(method):
    report = conformance(method)
    assert report.passed, report
