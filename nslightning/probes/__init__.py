"""Measuring what a Jacobian choice changes, without Lightning."""

from nslightning.probes.cost import cost_ratio, cost_scaling
from nslightning.probes.divergence import NORMS, Divergence, divergence, measure, measure_difference
from nslightning.probes.gradients import gradients
from nslightning.probes.propagation import differences
from nslightning.probes.ties import Ties, counting, ties

__all__ = [
    "NORMS",
    "Divergence",
    "Ties",
    "cost_ratio",
    "cost_scaling",
    "counting",
    "differences",
    "divergence",
    "gradients",
    "measure",
    "measure_difference",
    "ties",
]
