"""What flows trained for precision or for recall come to, beside sampling for it."""

from rkl.studies.precision_recall.report import PARTS

__all__ = ["PARTS"]
