"""The study of one paper: its parts, and what runs one."""

from rkl.studies.precision_recall.report import PARTS, study

__all__ = ["PARTS", "study"]
