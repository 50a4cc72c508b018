"""Precision and recall of a distribution against another: curves, spectra, rejection."""

from rkl.metrics.precision_recall.curve import SLOPES as SLOPES
from rkl.metrics.precision_recall.curve import Curve as Curve
from rkl.metrics.precision_recall.curve import pr_curve as pr_curve
from rkl.metrics.precision_recall.operating import OperatingPoint as OperatingPoint
from rkl.metrics.precision_recall.operating import operating_point as operating_point
from rkl.metrics.precision_recall.sampled import SampledCurve as SampledCurve
from rkl.metrics.precision_recall.sampled import pr_curve_sampled as pr_curve_sampled
from rkl.metrics.precision_recall.spectrum import Spectrum as Spectrum
from rkl.metrics.precision_recall.spectrum import pr_spectrum as pr_spectrum
from rkl.metrics.precision_recall.spectrum import pr_weight as pr_weight
