"""INNA and INNAprop, whose theory rests on conservative gradients, and a schedule to go with them."""

from nslightning.optim.inna import INNA
from nslightning.optim.innaprop import INNAprop
from nslightning.optim.schedule import WarmupCosine

__all__ = ["INNA", "INNAprop", "WarmupCosine"]
