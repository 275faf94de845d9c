"""Malicious requests and cheating providers, and the judge that measures them.

Requests are built from the abstracts and surveys of Qian et al. (KDD 2023) and Zhao et al. (NeurIPS 2023), providers
from secondary accounts and the public code of Zhang et al. (ICML 2024). The papers' full texts were not available; no
table of theirs is reproduced.
"""

from expunge.attack.aim import margin, pick_targets
from expunge.attack.camouflage import Camouflage
from expunge.attack.evading import Evading, Evasion
from expunge.attack.forging import DriftingForger, ForgingAdversary
from expunge.attack.judge import Judge
from expunge.attack.knowledge import Queries, Surrogate, White
from expunge.attack.perturb import PerturbRequests
from expunge.attack.providers import FineTuneToPass, Holder, HonestRetrain, HonestSisa, Lazy, NoiseAdder
from expunge.attack.providers_hiding import SelectiveServer, SurrogateData
from expunge.attack.providers_retraining import RetrainingAdversary, Rewinder
from expunge.attack.reaction import Reaction
from expunge.attack.remembered import victims
from expunge.attack.replace import ReplaceRequests
from expunge.attack.select import SelectRequests
from expunge.attack.selectors import GreedyMatching, LastLayerNeighbour, RandomOfM
from expunge.attack.selectors_nearest import NearestNeighbour
from expunge.attack.sequential import SequentialRequests
from expunge.attack.slow_down import SlowDown
from expunge.attack.strangers import Strangers, naive
from expunge.attack.victim import Victim

__all__ = [
    "Camouflage",
    "DriftingForger",
    "Evading",
    "Evasion",
    "FineTuneToPass",
    "ForgingAdversary",
    "GreedyMatching",
    "Holder",
    "HonestRetrain",
    "HonestSisa",
    "Judge",
    "LastLayerNeighbour",
    "Lazy",
    "NearestNeighbour",
    "NoiseAdder",
    "PerturbRequests",
    "Queries",
    "RandomOfM",
    "Reaction",
    "ReplaceRequests",
    "RetrainingAdversary",
    "Rewinder",
    "SelectRequests",
    "SelectiveServer",
    "SequentialRequests",
    "SlowDown",
    "Strangers",
    "Surrogate",
    "SurrogateData",
    "Victim",
    "White",
    "margin",
    "naive",
    "pick_targets",
    "victims",
]
