"""The sweep: looking through every file of a folder for what is left of removed records, in whatever form."""

from expunge.ledger.sweep.needles import Needles
from expunge.ledger.sweep.scan import Leftover, Sweep, sweep

__all__ = ["Leftover", "Needles", "Sweep", "sweep"]
