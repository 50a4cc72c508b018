"""Flows trained for precision or for recall, compared with sampling for it."""

from rkl.studies.precision_recall.report import PARTS

__all__ = ["PARTS"]
