"""Certified removal: methods whose results carry an (epsilon, delta) guarantee, and what it rests on.

Begin with `NewtonHead`, for a linear head on features that do not depend on the removed rows. `explain` says a
guarantee in plain words, `recheck` computes it again, `falsify` attacks it. Of the others, each file says what it is
worth. Of another kind, and without noise: `deletion_robustness` tells the predictions of shards that vote which no
deletion can flip.
"""

from expunge.certify.accountant import Budget
from expunge.certify.clipped_models import ClippedModelFineTune
from expunge.certify.derivations import DERIVATIONS, settings_of
from expunge.certify.descent import DescentToDelete
from expunge.certify.disjoint import DisjointExtractor, head_on
from expunge.certify.doubt import recheck
from expunge.certify.explain import explain
from expunge.certify.falsify import falsify
from expunge.certify.guo import GuoRemoval
from expunge.certify.head import NewtonHead
from expunge.certify.leak import PairLeak, pair_leak
from expunge.certify.newton import NewtonUnlearning
from expunge.certify.noisy_fine_tune import ClippedFineTune
from expunge.certify.private import covered, train_private
from expunge.certify.rewind import RewindToDelete
from expunge.certify.votes import DeletionRobustness, deletion_robustness, robustness_by_shards, touched_shards

__all__ = [
    "DERIVATIONS",
    "Budget",
    "ClippedFineTune",
    "ClippedModelFineTune",
    "DeletionRobustness",
    "DescentToDelete",
    "DisjointExtractor",
    "GuoRemoval",
    "NewtonHead",
    "NewtonUnlearning",
    "PairLeak",
    "RewindToDelete",
    "covered",
    "deletion_robustness",
    "explain",
    "falsify",
    "head_on",
    "pair_leak",
    "recheck",
    "robustness_by_shards",
    "settings_of",
    "touched_shards",
    "train_private",
]
