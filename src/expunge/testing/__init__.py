"""The public conformance suite for unlearning methods, ours or others', and the liars that it must catch."""

from expunge.testing.case import Case, digits, private_copy
from expunge.testing.conformance import CHECKS, EXCEPTIONS, Conformance, conformance
from expunge.testing.foreign import Foreign
from expunge.testing.liars import LIARS, Lie
from expunge.testing.trial import NamedCheck, Trial
from expunge.testing.watch import WriteWatch

__all__ = [
    "CHECKS",
    "EXCEPTIONS",
    "LIARS",
    "Case",
    "Conformance",
    "Foreign",
    "Lie",
    "NamedCheck",
    "Trial",
    "WriteWatch",
    "conformance",
    "digits",
    "private_copy",
]
