"""Images held on the device in memory, once per process, for all cells that a process runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nslightning import data
from nslightning.data import ImageDataModule
from nslightning.data.images import TensorImages
from nslightning.data.sampler import AUGMENT, TrainSampler, generator
from nslightning.data.small import DownloadedImages
from nslightning.spelling import did_you_mean

__all__ = ["Images", "load"]


class Images:
    """One split on the device: a batch is one gather, cropped and flipped there.

    Bit for bit the batches of :class:`~nslightning.data.images.TensorImages`, order and augmentation included.

    Args:
        source: The split.
        device: Where it is kept.
        normalise: False leaves the pixels in [0, 1].
        augment: False leaves out crop and flip.
    """

    def __init__(self, source: TensorImages, device: torch.device, normalise: bool, augment: bool) -> None:
        self._pixels, self.labels = source.images.to(device), source.labels.to(device)
        self._mean = source.mean if normalise else [0.0] * len(source.mean)
        self._std = source.std if normalise else [1.0] * len(source.std)
        self._padding, self._flip = (source.crop_padding, source.flip) if augment else (0, False)
        self._seed, self._drawn = source.seed, (-1, -1)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.labels.device

    def batches(
        self, size: int, dtype: torch.dtype, *, epoch: int = 0, seed: int | None = None, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the split once.

        Args:
            size: Images per batch; the last may hold fewer.
            dtype: Of the images.
            epoch: Which pass, for order and augmentation.
            seed: Seed of the order and the augmentation; None keeps the images in their order.
            limit: At most that many batches.

        Yields:
            Images ``(N, C, H, W)`` and labels ``(N,)``.
        """
        if seed is None:
            order = torch.arange(len(self))
        else:
            sampler = TrainSampler(range(len(self)), size, seed)
            sampler.set_epoch(epoch)
            order = torch.tensor(list(sampler)) % len(self)
        places = order.to(self.device).split(size)
        for index in places[:limit]:
            if self._padding or self._flip:
                pixels = self._augment(index, self._seed if seed is None else seed, epoch)
                yield self._floats(pixels).to(dtype), self.labels[index]
            else:  # a slice where they stand in order: nothing is copied
                rows = index if seed is not None else slice(int(index[0]), int(index[-1]) + 1)
                yield self._whole(dtype)[rows], self.labels[index]

    def _floats(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=self.device).view(-1, 1, 1) for v in (self._mean, self._std))
        return pixels.float().div_(255).sub_(mean).div_(std)

    def _whole(self, dtype: torch.dtype) -> Tensor:
        kept = self.__dict__.setdefault("_kept", {})
        if dtype not in kept:
            kept.clear()  # one dtype at a time: a copy of MNIST in float64 takes 376 MB
            kept[dtype] = torch.cat([self._floats(part).to(dtype) for part in self._pixels.split(4096)])
        whole: Tensor = kept[dtype]
        return whole

    def _augment(self, index: Tensor, seed: int, epoch: int) -> Tensor:
        if (seed, epoch) != self._drawn:
            g = generator(AUGMENT, seed, epoch)
            self._corners = torch.randint(0, 2 * self._padding + 1, (2, len(self)), generator=g).to(self.device)
            self._flipped = (torch.rand(len(self), generator=g) < (0.5 if self._flip else 0.0)).to(self.device)
            self._drawn = (seed, epoch)
        pixels = self._pixels[index]
        count, channels, height, width = pixels.shape
        top, left = self._corners[:, index, None]
        rows = top + torch.arange(height, device=self.device)
        columns = torch.arange(width, device=self.device).expand(count, width)
        columns = left + torch.where(self._flipped[index, None], columns.flip(1), columns)
        padded = pad(pixels, [self._padding] * 4)
        places = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(count, 1, -1)
        return padded.flatten(2).gather(2, places.expand(count, channels, -1)).view(pixels.shape)


class Loaded:
    """A data set's splits on a device, and what was read.

    Args:
        module: The data module.
        device: Where the images are kept.
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

    def _images(self, split: Any, augment: bool) -> Images:
        source = self._module._split(split)
        if not isinstance(source, TensorImages):
            raise ValueError(
                f"{type(self._module).__name__} is read from files; experiments keep their images in memory. "
                "Train it with `nslightning fit`, whose configs have one for it"
            )
        return Images(source, self._device, self._options[0], augment)

    @cached_property
    def train(self) -> Images:
        """The training images."""
        images = self._images("train", self._options[1])
        if self._train_images is not None:
            images._pixels, images.labels = images._pixels[: self._train_images], images.labels[: self._train_images]
        return images

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
        """Whether validation would be on the test images."""
        return self._module._split("val") is self._module._split("test")

    @property
    def variant(self) -> str:
        """Which copy was read, and how much of it."""
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
        device: Where the images are kept.
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
        raise ValueError(f"data={name!r} is no data set{did_you_mean(name, known)} There are: {', '.join(known)}")
    given = dict(options)
    if issubclass(kind, DownloadedImages):
        given = {"verify": False, **given}
    return kind(**given)
