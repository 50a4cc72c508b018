"""Where the reverse-KL act is consistent for the variance of many small groups, and where not."""

from rkl.studies.neyman_scott.report import PARTS

__all__ = ["PARTS"]
