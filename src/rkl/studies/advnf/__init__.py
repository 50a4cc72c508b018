"""The study of one paper: its parts, and what runs one."""

from rkl.studies.advnf.report import PARTS, study

__all__ = ["PARTS", "study"]
