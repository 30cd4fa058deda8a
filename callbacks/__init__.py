"""The Lightning callbacks, installed as `nslightning.callbacks`."""

if __name__ == "callbacks":
    raise ImportError(
        "`import callbacks` found nslightning.callbacks only because Python started in the checkout; this "
        "second copy would fail every isinstance check. Write `from nslightning.callbacks import ...`."
    )

from .arithmetic_setting import ArithmeticSetting
from .gradient_divergence import GradientDivergence
from .loss_watch import LossWatch
from .non_finite_guard import NonFinite, NonFiniteError, NonFiniteGuard
from .nonsmooth_patch import NonsmoothPatch
from .performance import Performance
from .run_record import RunRecord
from .step_seed import StepSeed
from .tie_monitor import TieMonitor
from .twin_divergence import TwinDivergence
from .weight_divergence import WeightDivergence
from .zone_monitor import ZoneMonitor

__all__ = [
    "ArithmeticSetting",
    "GradientDivergence",
    "LossWatch",
    "NonFinite",
    "NonFiniteError",
    "NonFiniteGuard",
    "NonsmoothPatch",
    "Performance",
    "RunRecord",
    "StepSeed",
    "TieMonitor",
    "TwinDivergence",
    "WeightDivergence",
    "ZoneMonitor",
]
