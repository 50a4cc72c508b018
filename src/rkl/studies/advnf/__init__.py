"""Does an adversarial term keep a flow from losing modes, and does it save data?"""

from rkl.studies.advnf.report import PARTS

__all__ = ["PARTS"]
