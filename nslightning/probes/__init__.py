"""Measuring what a Jacobian choice changes, without Lightning."""

from nslightning.probes.by_hand import Handwritten, handwritten
from nslightning.probes.clarke import Clarke, clarke
from nslightning.probes.cost import cost_ratio, cost_scaling
from nslightning.probes.divergence import (
    NORMS,
    Divergence,
    MethodWarning,
    divergence,
    measure,
    measure_difference,
    measure_differences,
)
from nslightning.probes.gradients import gradients
from nslightning.probes.graph import UnseenError
from nslightning.probes.guarantee import Guarantee, clarke_guarantee
from nslightning.probes.propagation import Recording, differences, recording
from nslightning.probes.ties import Ties, counting, ties
from nslightning.probes.worst import Worst, worst_choice
from nslightning.probes.zone import THRESHOLDS, NoZoneError, Zone, differs_bitwise, l1_sum, linf_sum, zone

__all__ = [
    "NORMS",
    "THRESHOLDS",
    "Clarke",
    "Divergence",
    "Guarantee",
    "Handwritten",
    "MethodWarning",
    "NoZoneError",
    "Recording",
    "Ties",
    "UnseenError",
    "Worst",
    "Zone",
    "clarke",
    "clarke_guarantee",
    "cost_ratio",
    "cost_scaling",
    "counting",
    "differences",
    "differs_bitwise",
    "divergence",
    "gradients",
    "handwritten",
    "l1_sum",
    "linf_sum",
    "measure",
    "measure_difference",
    "measure_differences",
    "recording",
    "ties",
    "worst_choice",
    "zone",
]
