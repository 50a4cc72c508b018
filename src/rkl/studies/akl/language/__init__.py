"""The questions of the paper on adaptive KL, answered in language models.

Do both KLs end at one student? Which part of the teacher is fitted first? Does AKL gain over its
parents and others, at equal steps and in equal time? What do the students write, does the slope of
precision and recall move them, and does the divergence still matter on their own text?

``language`` and ``language-flat`` train a small teacher and students from scratch;
``language-real`` takes SmolLM2-135M and half of its layers.

Source: Wu et al., arXiv 2404.02657.
"""

from rkl.studies.akl.language.part import PARTS

__all__ = ["PARTS"]
