"""What the paper on adaptive KL claims of the two KLs, tested on its toy."""

from rkl.studies.akl.toy import PARTS

__all__ = ["PARTS"]
