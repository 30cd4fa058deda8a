"""Mixing the images of a batch, and their labels: Mixup and CutMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["Mixing"]


@dataclass(frozen=True)
class Mixing:
    """The mixing of training batches: by Mixup (Zhang et al. 2018), by CutMix (Yun et al. 2019), or by one of both.

    Attributes:
        mixup: Mixup's alpha: shares are drawn from Beta(alpha, alpha). 0: no Mixup.
        cutmix: CutMix's alpha. 0: no CutMix.
        probability: Share of batches that are mixed.
        switch: Share of mixed batches that take CutMix, where both are on.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, 2])
        >>> mixed, shares = Mixing(mixup=0.2)(images, labels, num_classes=3)
        >>> mixed.shape, shares.shape, shares.sum(1)
        (torch.Size([2, 1, 4, 4]), torch.Size([2, 3]), tensor([1., 1.]))
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"mixing.{name} is at least 0; given {getattr(self, name)}")
        for name in ("probability", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mixing.{name} is a share from 0 to 1; given {getattr(self, name)}")
        if not self.mixup and not self.cutmix:
            raise ValueError("mixing needs mixup or cutmix above 0, such as {mixup: 0.2, cutmix: 1}")

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Mix a batch, or leave it, by draws from PyTorch's global stream on the CPU.

        Args:
            images: Images of shape (N, C, H, W).
            labels: int64 of shape (N,).
            num_classes: Number of classes.

        Returns:
            Images of the same shape; where they were mixed, the share of every class, of shape (N, num_classes), else
            the labels.
        """
        if torch.rand(()).item() >= self.probability:
            return images, labels
        cut = bool(self.cutmix) and (not self.mixup or torch.rand(()).item() < self.switch)
        mix: Any = (
            v2.CutMix(alpha=self.cutmix, num_classes=num_classes)
            if cut
            else v2.MixUp(alpha=self.mixup, num_classes=num_classes)
        )
        mixed, shares = mix(images, labels)
        return mixed, shares
