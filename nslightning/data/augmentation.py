"""The augmentation of training images, besides the network's own preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.transforms import v2

from nslightning.data.preprocessing import Preprocessing, ToBytes

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Random crop, flip, colours and erasing of training images.

    The default is that of He et al. (2016): a random crop of random size, flipped with probability 1/2. Every image's
    draws depend on (seed, epoch, image, repeat) alone.

    Attributes:
        scale: Smallest and largest share of the image's area that a crop takes.
        ratio: Smallest and largest ratio of a crop's width to its height.
        flip: Probability of flipping left to right.
        auto_augment: A policy of timm, such as ``rand-m9-mstd0.5-inc1`` (RandAugment), ``augmix-m3-w3`` or
            ``original``.
        transforms: Transforms of ``torchvision.transforms.v2`` for the bytes of an image, after crop, flip and policy.
        erasing: Probability of replacing a random rectangle of the result by Gaussian noise.
        repeats: Number of times that one epoch sees an image, each time with other draws (Hoffer et al. 2020). The
            epoch keeps its length: it holds one image of ``repeats``.
        sizes: Pairs of an epoch and the size of training images from then on, such as ``[[0, 128], [6, 160]]``
            (progressive resizing). Empty: the preprocessing's own. Images that are evaluated keep theirs.

    Example:
        >>> Augmentation(erasing=0.25, sizes=[(0, 128), (6, 160)]).size(5, 224)
        128
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    auto_augment: str | None = None
    transforms: list[v2.Transform] | None = None
    erasing: float = 0.0
    repeats: int = 1
    sizes: Sequence[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        for name in ("flip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name} is a probability, from 0 to 1; given {getattr(self, name)}")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"augmentation.scale is two shares of the image, 0 < low <= high <= 1; given {self.scale}")
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"augmentation.ratio is two numbers, 0 < low <= high; given {self.ratio}")
        if self.repeats < 1:
            raise ValueError(f"augmentation.repeats is at least 1; given {self.repeats}")
        epochs = [epoch for epoch, _ in self.sizes]
        if epochs and (epochs[0] != 0 or epochs != sorted(set(epochs))):
            raise ValueError(f"augmentation.sizes begins with epoch 0, and its epochs grow; given {list(self.sizes)}")
        if any(size < 1 for _, size in self.sizes):
            raise ValueError(f"augmentation.sizes are at least 1 pixel; given {list(self.sizes)}")

    def size(self, epoch: int, own: int) -> int:
        """The size of training images in an epoch.

        Args:
            epoch: The epoch, from 0.
            own: The preprocessing's own size.

        Returns:
            Height and width in pixels.
        """
        return next((size for first, size in reversed(self.sizes) if first <= epoch), own)

    def training(self, preprocessing: Preprocessing) -> ToBytes:
        """The transform of one training image, up to its bytes.

        Args:
            preprocessing: Size, interpolation and mean.

        Returns:
            From a PIL image to uint8 of shape (3, size, size). It draws from the global streams of Python, NumPy and
            PyTorch.

        Raises:
            ValueError: If timm does not know the policy.
        """
        size, interpolation = preprocessing.size, preprocessing.interpolation_mode
        steps: list[Any] = [
            v2.RandomResizedCrop(size, self.scale, self.ratio, interpolation),
            v2.RandomHorizontalFlip(self.flip),
        ]
        if self.auto_augment is not None:
            steps.append(_policy(self.auto_augment, preprocessing))
        transform: ToBytes = v2.Compose([*steps, v2.PILToTensor(), *(self.transforms or ())])
        return transform

    def erase(self, image: Tensor) -> Tensor:
        """Erase a random rectangle of an image that is normalised.

        Args:
            image: float32 of shape (C, H, W).

        Returns:
            An image of the same shape.
        """
        if not self.erasing:
            return image
        erased: Tensor = v2.RandomErasing(self.erasing, value="random")(image)
        return erased


def _policy(name: str, preprocessing: Preprocessing) -> Any:
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    settings: dict[str, Any] = {
        "translate_const": int(preprocessing.size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in preprocessing.mean),
    }
    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    try:
        return makers.get(name.partition("-")[0], auto_augment_transform)(name, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"timm does not know the policy auto_augment={name!r} ({error or type(error).__name__}); it is such as "
            "rand-m9-mstd0.5-inc1, augmix-m3-w3, original or v0"
        ) from error
