"""Derivatives of a model's losses, and linear systems in them: pure functions on modules and tensors."""

from expunge.calculus.fisher import FisherDual
from expunge.calculus.influence import influence_scores
from expunge.calculus.objective import Objective
from expunge.calculus.rows import row_gradients
from expunge.calculus.solvers import Solution, conjugate_gradients, dense, lissa, solve_dense
from expunge.calculus.trace import mean_eigenvalue

__all__ = [
    "FisherDual",
    "Objective",
    "Solution",
    "conjugate_gradients",
    "dense",
    "influence_scores",
    "lissa",
    "mean_eigenvalue",
    "row_gradients",
    "solve_dense",
]
