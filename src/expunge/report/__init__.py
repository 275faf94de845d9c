"""What people are shown: tables, plots, and one self-contained HTML page."""

from expunge.report.page import Chapter, Grid, Report, write
from expunge.report.pareto import Spent, gap_against_seconds
from expunge.report.plots import Point, accuracy_against_seconds, rows_as_png
from expunge.report.studied import study_grids, study_report
from expunge.report.text import print_grid

__all__ = [
    "Chapter",
    "Grid",
    "Point",
    "Report",
    "Spent",
    "accuracy_against_seconds",
    "gap_against_seconds",
    "print_grid",
    "rows_as_png",
    "study_grids",
    "study_report",
    "write",
]
