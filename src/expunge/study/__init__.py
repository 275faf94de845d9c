"""Studies: models before and after, and methods against each other, beside exact retraining."""

from expunge.study.cells import Cell, Trial
from expunge.study.comparison import Comparison, compare
from expunge.study.grid import run_study
from expunge.study.plan import Study
from expunge.study.scenario import Scenario
from expunge.study.summary import Line, StudyResult

__all__ = ["Cell", "Comparison", "Line", "Scenario", "Study", "StudyResult", "Trial", "compare", "run_study"]
