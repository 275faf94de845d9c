"""Membership attacks, audits and the field's table."""

from expunge.audit.answers import Answers
from expunge.audit.efficacy import mia_efficacy
from expunge.audit.metrics import Row, Table, accuracy, auc, measure, summarise, threshold_attack

__all__ = ["Answers", "Row", "Table", "accuracy", "auc", "measure", "mia_efficacy", "summarise", "threshold_attack"]
