"""Learning-rate schedules that torch has no single class for."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nslightning.spelling import did_you_mean

__all__ = ["TimmSchedule", "WarmupCosine"]

_TIMM = ("cosine", "tanh", "step", "multistep", "poly")


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
    :class:`~nslightning.models.LanguageModel`, epochs in :class:`~nslightning.models.ImageClassifier`, or what its
    ``lr_interval`` says.

    Args:
        optimizer: The optimizer.
        total: Steps until the end of the cosine. None: as many as the training has, which this package's modules
            fill in (:meth:`fit_to`).
        warmup: Steps of linear warm-up, fewer than `total`; below 1 a share of them.
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
        total: int | None = None,
        warmup: float = 0,
        start: float = 0.0,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        for name, value in (("start", start), ("final", final)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}; it must be a fraction of the learning rate, in [0, 1]")
        self.warmup, self.start, self.final = warmup, start, final
        self.total = total
        if total is not None:
            self._check(total)
        super().__init__(optimizer, self._factor, last_epoch)

    def fit_to(self, total: int) -> None:
        """Set the number of steps, where none was set, and the learning rate of the first one.

        Args:
            total: Steps until the end of the cosine.
        """
        if self.total is not None:
            return
        self._check(total)
        self.total = total
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._factor(self.last_epoch)

    def _check(self, total: int) -> None:
        if self.warmup < 0 or self._warmup_steps(total) >= total:
            raise ValueError(
                f"warmup is {self.warmup} of {total} steps; it must be in 0 <= warmup < total, or a share below 1"
            )

    def _warmup_steps(self, total: int) -> int:
        return round(self.warmup * total) if self.warmup < 1 else int(self.warmup)

    def _factor(self, step: int) -> float:
        if self.total is None:
            if step > 0:
                raise ValueError("WarmupCosine has no total number of steps: give it one, or call fit_to")
            return 1.0
        warmup = self._warmup_steps(self.total)
        if step < warmup:
            return self.start + (1 - self.start) * step / warmup
        if step > self.total:
            return self.final
        progress = (step - warmup) / (self.total - warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


class TimmSchedule(LRScheduler):
    """A schedule of timm's, by the name that its training script takes.

    timm's arguments count epochs; here they count calls of ``step``, after each optimizer step or after each epoch.

    Args:
        optimizer: The optimizer.
        name: ``cosine``, ``tanh``, ``step``, ``multistep`` or ``poly``.
        total: Steps until the end of the schedule, without the cooldown.
        last_epoch: The number of steps already taken, less one; as in torch.
        **options: As in ``timm.scheduler.create_scheduler_v2``: ``warmup_epochs``, ``warmup_lr``, ``min_lr``,
            ``decay_rate``, ``decay_epochs``, ``cycle_mul``, ``noise`` ...

    Raises:
        ValueError: If there is no such schedule or option.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        >>> schedule = TimmSchedule(optimizer, "cosine", total=4, warmup_epochs=1, warmup_lr=0.1)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates.append(round(optimizer.param_groups[0]["lr"], 4))
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.1, 0.8536, 0.5, 0.1464, 0.0]
    """

    def __init__(self, optimizer: Optimizer, name: str, total: int, last_epoch: int = -1, **options: Any) -> None:
        from timm.scheduler.scheduler_factory import create_scheduler_v2

        if name not in _TIMM:
            raise ValueError(f"there is no schedule {name!r}{did_you_mean(name, _TIMM)} There are {', '.join(_TIMM)}")
        try:
            self._schedule, _ = create_scheduler_v2(optimizer, name, num_epochs=total, **options)
        except TypeError as error:
            raise ValueError(f"timm's schedules refuse these options: {error}") from error
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Any]:
        """The learning rates of the optimizer's groups at this step."""
        self._schedule.step(self.last_epoch)
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken, of which all else is a function.

        Returns:
            The state, without the schedule itself.
        """
        return {key: value for key, value in super().state_dict().items() if key != "_schedule"}
