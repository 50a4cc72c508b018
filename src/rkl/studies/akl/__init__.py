"""The claims of the paper on adaptive KL about the two KLs, tested on its toy."""

from rkl.studies.akl.toy import PARTS

__all__ = ["PARTS"]
