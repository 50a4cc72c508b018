"""The claims of the paper on adaptive KL, tested on its toy and in language models."""

from collections.abc import Mapping

from rkl.studies.akl import language, toy
from rkl.studies.study import Part

PARTS: Mapping[str, Part] = {**toy.PARTS, **language.PARTS}

__all__ = ["PARTS"]
