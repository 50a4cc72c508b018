"""The study of one paper: its parts, and what runs one."""

from rkl.studies.neyman_scott.report import PARTS, study

__all__ = ["PARTS", "study"]
