"""Images held on the device in memory, once per process, for all cells that a process runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from nslightning import data
from nslightning.data import ImageDataModule
from nslightning.data.images import TensorImages
from nslightning.data.sampler import TrainSampler
from nslightning.data.small import DownloadedImages
from nslightning.spelling import did_you_mean

__all__ = ["Images", "load"]


class Images:
    """One split on the device, in the order and the dtype that a cell asks for.

    Its batches are those of :class:`~nslightning.data.images.TensorImages`, made by it: ``fit`` sees the same ones.

    Args:
        source: The split.
        device: The device that keeps it.
        normalise: False leaves the pixels in [0, 1].
        augment: False leaves out crop and flip.
        first: Keep only the first of the images; None keeps all.
    """

    def __init__(
        self, source: TensorImages, device: torch.device, normalise: bool, augment: bool, first: int | None = None
    ) -> None:
        channels = len(source.mean)
        mean, std = (source.mean, source.std) if normalise else ([0.0] * channels, [1.0] * channels)
        padding, flip = (source.crop_padding, source.flip) if augment else (0, False)
        self.images = TensorImages(
            source.images[:first], source.labels[:first], mean, std, padding, flip, source.seed
        ).to(device)
        self._seed = source.seed
        self._kept: dict[torch.dtype, Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Tensor:
        """The labels, int64 ``(N,)``."""
        return self.images.labels

    @property
    def device(self) -> torch.device:
        """Return where the images are."""
        return self.images.device

    def batches(
        self,
        size: int,
        dtype: torch.dtype,
        *,
        epoch: int = 0,
        seed: int | None = None,
        limit: int | None = None,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the split once.

        Args:
            size: Images per batch; the last may hold fewer.
            dtype: Dtype of the images.
            epoch: Number of the pass, for order and augmentation.
            seed: Seed of the order and the augmentation; None keeps the images in their order.
            limit: Largest number of batches.
            start: Batches to pass over.

        Yields:
            Images ``(N, C, H, W)`` and labels ``(N,)``.
        """
        if seed is None:
            order = torch.arange(len(self))
        else:
            sampler = TrainSampler(range(len(self)), size, seed)
            sampler.set_epoch(epoch)
            order = sampler.order()
        self.images.reseed(self._seed if seed is None else seed)
        augmented = self.images.crop_padding or self.images.flip
        for i, index in enumerate(order.to(self.device).split(size)[start:limit], start):
            if augmented:
                x, y = self.images.batch(index, epoch)
                yield x.to(dtype), y
            else:  # a slice where they stand in order: nothing is copied
                rows = index if seed is not None else slice(i * size, i * size + len(index))
                yield self._whole(dtype)[rows], self.labels[rows]

    def _whole(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._kept:
            self._kept.clear()  # one dtype at a time: a copy of MNIST in float64 takes 376 MB
            parts = self.images.images.split(4096)
            self._kept[dtype] = torch.cat([self.images.normalise(part).to(dtype) for part in parts])
        return self._kept[dtype]


class Loaded:
    """A data set's splits on a device, and what was read.

    Args:
        module: The data module.
        device: The device that keeps the images.
        normalise: False leaves the pixels in [0, 1].
        augment: False leaves out crop and flip.
        train_images: Keep only the first of the training images; None keeps all.
    """

    def __init__(
        self, module: ImageDataModule, device: torch.device, normalise: bool, augment: bool, train_images: int | None
    ) -> None:
        self._module, self._device, self._options = module, device, (normalise, augment)
        self._train_images = train_images
        self.num_classes, self.image_shape = module.num_classes, module.image_shape

    def _images(self, split: Any, augment: bool, first: int | None = None) -> Images:
        source = self._module._split(split)
        if not isinstance(source, TensorImages):
            raise ValueError(
                f"{type(self._module).__name__} is read from files; experiments keep their images in memory. "
                "Train it with `nslightning fit`, whose configs have one for it"
            )
        return Images(source, self._device, self._options[0], augment, first)

    @cached_property
    def train(self) -> Images:
        """The training images."""
        return self._images("train", self._options[1], self._train_images)

    @cached_property
    def val(self) -> Images:
        """The validation images."""
        return self._images("val", False)

    @cached_property
    def test(self) -> Images:
        """The test images."""
        return self._images("test", False)

    @property
    def shares_test(self) -> bool:
        """Return whether validation would be on the test images."""
        return self._module._split("val") is self._module._split("test")

    @property
    def variant(self) -> str:
        """Return which copy was read, and how much of it."""
        part = f", first {self._train_images} training images" if self._train_images is not None else ""
        return f"{self._module.name} ({self._module.variant}{part})"


@lru_cache(maxsize=2)
def load(
    name: str,
    options: tuple[tuple[str, Any], ...],
    device: torch.device,
    normalise: bool = True,
    augment: bool = True,
    train_images: int | None = None,
) -> Loaded:
    """A data set of :mod:`nslightning.data`, read once per process.

    A repacked copy is admitted: its name goes into every table that is made from it.

    Args:
        name: The class, such as ``"MNIST"``.
        options: Its arguments, as sorted pairs.
        device: The device that keeps the images.
        normalise: False leaves the pixels in [0, 1].
        augment: False leaves out crop and flip.
        train_images: Keep only the first of the training images; None keeps all.

    Returns:
        The splits, each read when it is first asked for.

    Raises:
        ValueError: If there is no such data set.
    """
    return Loaded(_module(name, options), device, normalise, augment, train_images)


def download(name: str, options: tuple[tuple[str, Any], ...]) -> None:
    """Fetch a data set into the folder that it is read from; what is there already stays.

    Args:
        name: The class; nothing is done for one that is not downloaded.
        options: Its arguments, as sorted pairs.

    Raises:
        ValueError: If there is no such data set.
        DataError: If it cannot be fetched.
    """
    module = _module(name, options)
    if isinstance(module, DownloadedImages):
        module.download = True
        module.prepare_data()


def _module(name: str, options: tuple[tuple[str, Any], ...]) -> ImageDataModule:
    kind = getattr(data, name, None)
    if not (isinstance(kind, type) and issubclass(kind, ImageDataModule)):
        classes = {n: k for n in data.__all__ if isinstance(k := getattr(data, n), type) and k is not ImageDataModule}
        known = [n for n, k in classes.items() if issubclass(k, ImageDataModule)]
        raise ValueError(f"data={name!r} is not a data set{did_you_mean(name, known)} There are: {', '.join(known)}")
    arguments = dict(options)
    if issubclass(kind, DownloadedImages):
        arguments = {"verify": False, **arguments}
    return kind(**arguments)
