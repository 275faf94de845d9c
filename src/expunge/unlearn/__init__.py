"""Unlearning methods, one file an idea; `method.py` is the base."""

from expunge.unlearn.amnesiac import AmnesiacUnlearning
from expunge.unlearn.ascent import GradientAscent, NegGradPlus
from expunge.unlearn.bad_teacher import BadTeacher
from expunge.unlearn.boundary_shrink import BoundaryShrink
from expunge.unlearn.dampening import SelectiveSynapticDampening
from expunge.unlearn.finetune import FineTune
from expunge.unlearn.fisher_forgetting import FisherForgetting
from expunge.unlearn.influence import InfluenceUnlearning
from expunge.unlearn.l1_sparse import L1Sparse
from expunge.unlearn.method import Done, Method, Task
from expunge.unlearn.random_labels import RandomLabels
from expunge.unlearn.retrain import Retrain, RetrainBriefly
from expunge.unlearn.salun import SaliencyMasked, SalUn
from expunge.unlearn.scrub import Scrub
from expunge.unlearn.sisa import Sisa
from expunge.unlearn.sparsity import Magnitude, Masked, Pruned, RandomScores, RetrainSameMask, SynFlow
from expunge.unlearn.unrolling import UnrollingSGD

__all__ = [
    "AmnesiacUnlearning",
    "BadTeacher",
    "BoundaryShrink",
    "Done",
    "FineTune",
    "FisherForgetting",
    "GradientAscent",
    "InfluenceUnlearning",
    "L1Sparse",
    "Magnitude",
    "Masked",
    "Method",
    "NegGradPlus",
    "Pruned",
    "RandomLabels",
    "RandomScores",
    "Retrain",
    "RetrainBriefly",
    "RetrainSameMask",
    "SalUn",
    "SaliencyMasked",
    "Scrub",
    "SelectiveSynapticDampening",
    "Sisa",
    "SynFlow",
    "Task",
    "UnrollingSGD",
]
