"""Unlearning methods, one file an idea; `method.py` is the base."""

from expunge.unlearn.ascent import GradientAscent, NegGradPlus
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.random_labels import RandomLabels
from expunge.unlearn.retrain import Retrain, RetrainBriefly
from expunge.unlearn.sisa import Sisa

__all__ = [
    "Done",
    "FineTune",
    "GradientAscent",
    "Method",
    "NegGradPlus",
    "RandomLabels",
    "Retrain",
    "RetrainBriefly",
    "Sisa",
    "Task",
]
