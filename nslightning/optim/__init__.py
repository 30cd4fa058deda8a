"""INNA and INNAprop, whose theory rests on conservative gradients; schedules; parameter groups by rule."""

from nslightning.optim.groups import parameter_groups
from nslightning.optim.inna import INNA
from nslightning.optim.innaprop import INNAprop
from nslightning.optim.schedule import TimmSchedule, WarmupCosine

__all__ = ["INNA", "INNAprop", "TimmSchedule", "WarmupCosine", "parameter_groups"]
