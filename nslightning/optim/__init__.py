"""Optimizers whose theory rests on conservative gradients: INNA and INNAprop."""

from nslightning.optim.inna import INNA
from nslightning.optim.innaprop import INNAprop

__all__ = ["INNA", "INNAprop"]
