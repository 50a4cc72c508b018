"""The study of one paper: its parts, and what runs one."""

from rkl.studies.akl.toy import PARTS, study

__all__ = ["PARTS", "study"]
