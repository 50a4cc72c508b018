"""Consistency of the reverse-KL act for the variance of many small groups."""

from rkl.studies.neyman_scott.report import PARTS

__all__ = ["PARTS"]
