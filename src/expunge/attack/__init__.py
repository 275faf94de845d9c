"""Malicious requests: built from the abstracts and surveys of Qian et al. (KDD 2023) and Zhao et al. (NeurIPS 2023).

The papers' full texts were not available; no table of theirs is reproduced.
"""

from expunge.attack.aim import margin, pick_targets
from expunge.attack.camouflage import Camouflage
from expunge.attack.evading import Evading, Evasion
from expunge.attack.judge import Judge
from expunge.attack.knowledge import Queries, Surrogate, White
from expunge.attack.perturb import PerturbRequests
from expunge.attack.reaction import Reaction
from expunge.attack.remembered import victims
from expunge.attack.replace import ReplaceRequests
from expunge.attack.select import SelectRequests
from expunge.attack.sequential import SequentialRequests
from expunge.attack.slow_down import SlowDown
from expunge.attack.strangers import Strangers, naive
from expunge.attack.victim import Victim

__all__ = [
    "Camouflage",
    "Evading",
    "Evasion",
    "Judge",
    "PerturbRequests",
    "Queries",
    "Reaction",
    "ReplaceRequests",
    "SelectRequests",
    "SequentialRequests",
    "SlowDown",
    "Strangers",
    "Surrogate",
    "Victim",
    "White",
    "margin",
    "naive",
    "pick_targets",
    "victims",
]
