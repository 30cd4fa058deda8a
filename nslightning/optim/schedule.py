"""Learning-rate schedules that torch has no single class for."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["WarmupCosine"]


class WarmupCosine(LambdaLR):
    r"""Linear warm-up, then half a cosine down to a fraction of the learning rate, then constant.

    With :math:`W` warm-up steps of :math:`T` in all, :math:`s` = `start` and :math:`r` = `final`, step
    :math:`t = 0, 1, \dots` has the optimizer's learning rate times

    .. math::
        s + (1 - s)\, t / W \quad (t < W), \qquad
        r + (1 - r)\,\tfrac12\Bigl(1 + \cos\pi\tfrac{t - W}{T - W}\Bigr) \quad (W \le t \le T), \qquad
        r \quad (t > T).

    With `start=0` it is the schedule of the INNAprop experiments with GPT-2, whose very first step has a
    learning rate of zero. A step is whatever the scheduler is stepped by: optimizer steps in
    :class:`~nslightning.models.LanguageModel`, epochs in :class:`~nslightning.models.ImageClassifier`.

    Args:
        optimizer: The optimizer.
        total: Steps until the end of the cosine.
        warmup: Steps of linear warm-up, fewer than `total`.
        start: The fraction of the learning rate to warm up from, in [0, 1].
        final: The fraction of the learning rate that is left, in [0, 1].
        last_epoch: The number of steps already taken, less one; as in torch.

    Raises:
        ValueError: A value is outside its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = WarmupCosine(optimizer, total=6, warmup=2, final=0.1)
        >>> rates = []
        >>> for _ in range(8):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 4))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.0, 0.5, 1.0, 0.8682, 0.55, 0.2318, 0.1, 0.1]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total: int,
        warmup: int = 0,
        start: float = 0.0,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= warmup < total:
            raise ValueError(f"warmup is {warmup} of {total} steps; it must be in 0 <= warmup < total")
        for name, value in (("start", start), ("final", final)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be a fraction of the learning rate, in [0, 1]")
        self.total, self.warmup, self.start, self.final = total, warmup, start, final
        super().__init__(optimizer, self._factor, last_epoch)

    def _factor(self, step: int) -> float:
        if step < self.warmup:
            return self.start + (1 - self.start) * step / self.warmup
        if step > self.total:
            return self.final
        progress = (step - self.warmup) / (self.total - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
