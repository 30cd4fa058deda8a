"""Images as data sets that serve whole batches: in memory, or from files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import pad

from nslightning.data.augmentation import Augmentation
from nslightning.data.preprocessing import Preprocessing, ToBytes
from nslightning.data.sampler import AUGMENT, ERASE, Batch, Draws, generator, seeded
from nslightning.data.shards import ShardImage
from nslightning.data.verify import data_error

# Tags of TIFF, and what their values mean.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_UNKNOWN_SCALE = ("F", "F;16", "F;32")  # Pillow's modes of floating-point numbers; "I" is 16 bits of a PNG or a PGM


class Normalisation:
    """Bytes to normalised floats, bit for bit as torchvision's ``ToTensor`` and ``Normalize``, on any device.

    Args:
        mean: One mean per channel, of pixels in [0, 1].
        std: One standard deviation per channel.
        device: The device of the pixels.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        # CUDA divides by a number by multiplying with its reciprocal, which rounds otherwise; by a tensor it divides.
        self.white = torch.tensor(255.0, device=device)
        self.mean, self.std = (torch.tensor(list(values), device=device).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Normalise.

        Args:
            pixels: uint8, shape ``(N, C, H, W)``.

        Returns:
            float32, the same shape.
        """
        return pixels.float().div_(self.white).sub_(self.mean).div_(self.std)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes to normalised floats (:class:`Normalisation`).

    Args:
        pixels: uint8, shape ``(N, C, H, W)``.
        mean: One mean per channel, of pixels in [0, 1].
        std: One standard deviation per channel.

    Returns:
        float32, the same shape.

    >>> normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), [0.5], [0.5])
    tensor([[[[-1.,  1.]]]])
    """
    return Normalisation(mean, std, pixels.device)(pixels)


class TensorImages(Draws):
    """Images held as bytes in memory or on a device; a batch is gathered, cropped, flipped and normalised there.

    The numbers that crops and flips depend on are drawn on the CPU, an epoch's at once, and every operation on the
    pixels is exact or rounded as on a CPU: the bits of a batch are the same wherever it is made.

    Args:
        images: uint8, shape ``(N, C, H, W)``.
        labels: int64, shape ``(N,)``.
        mean: One mean per channel.
        std: One standard deviation per channel.
        crop_padding: Crop at random from the image padded with this many black pixels on each side.
        flip: Flip left to right with probability 1/2.
        seed: Seed of crops and flips, which depend on (seed, epoch, index) only.

    >>> data = TensorImages(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4), [0.0], [1.0])
    >>> data.__getitems__([2, 0])[1]
    tensor([2, 0])
    """

    in_memory: ClassVar[bool] = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.labels = images, labels
        self.mean, self.std = mean, std
        self.crop_padding, self.flip, self.seed = crop_padding, flip, seed
        self.normalise = Normalisation(mean, std, images.device)
        self._drawn = -1

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Return where the images are."""
        return self.labels.device

    def to(self, device: torch.device) -> TensorImages:
        """Move the images to a device.

        Args:
            device: The device to move to.

        Returns:
            A copy; these images themselves where they are there already.
        """
        if device == self.device:
            return self
        options = (self.mean, self.std, self.crop_padding, self.flip, self.seed)
        return TensorImages(self.images.to(device), self.labels.to(device), *options)

    def reseed(self, seed: int) -> None:
        """Take another seed for crops and flips.

        Args:
            seed: The seed.
        """
        if seed != self.seed:
            self.seed, self._drawn = seed, -1

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """Make a batch.

        Args:
            index: Numbers of the images: int64, shape ``(N,)``, on their device.
            epoch: Number of the pass over the images, for crops and flips.

        Returns:
            Images, float32 ``(N, C, H, W)``, and labels, int64 ``(N,)``, on the images' device.
        """
        pixels = self.images[index]
        if self.crop_padding or self.flip:
            pixels = self._augment(pixels, index, epoch)
        return self.normalise(pixels), self.labels[index]

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Make the batch of a list of draws.

        Args:
            draws: ``epoch * len(self) + index`` for every image.

        Returns:
            As of :meth:`batch`.
        """
        numbers = torch.as_tensor(draws)
        return self.batch((numbers % len(self)).to(self.device), int(numbers[0]) // len(self))

    def _augment(self, pixels: Tensor, index: Tensor, epoch: int) -> Tensor:
        count, channels, height, width = pixels.shape
        if epoch != self._drawn:  # the whole epoch is drawn at once
            g = generator(AUGMENT, self.seed, epoch)
            corners = torch.randint(0, 2 * self.crop_padding + 1, (2, len(self)), generator=g)
            flipped = torch.rand(len(self), generator=g) < (0.5 if self.flip else 0.0)
            self._corners, self._flipped = corners.to(self.device), flipped.to(self.device)
            self._rows = torch.arange(height, device=self.device)
            self._columns = torch.arange(width, device=self.device)
            self._drawn = epoch
        top, left = self._corners[:, index, None]
        columns = self._columns.expand(count, width)
        columns = left + torch.where(self._flipped[index, None], columns.flip(1), columns)
        padded = pad(pixels, [self.crop_padding] * 4)
        # Places in a flattened channel: one `gather` is several times faster than indexing four dimensions.
        places = (top + self._rows)[:, :, None] * padded.shape[3] + columns[:, None, :]
        places = places.view(count, 1, -1).expand(count, channels, -1)
        return padded.flatten(2).gather(2, places).view(pixels.shape)


class FileImages(Draws):
    """Images read from files, transformed one by one.

    Args:
        samples: Path and label of every image; in place of a path an image of a shard.
        preprocessing: Size, crop, interpolation, mean and standard deviation.
        augmentation: The augmentation of training images; None for images that are evaluated.
        seed: Seed of the augmentation, which depends on (seed, epoch, index, repeat) only.

    Attributes:
        as_bytes: The code that takes the batches normalises them: a quarter of the memory to copy to a device.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str | ShardImage, int]],
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.samples, self.preprocessing, self.augmentation, self.seed = samples, preprocessing, augmentation, seed
        self.repeats = 1 if augmentation is None else augmentation.repeats
        self.as_bytes = False
        self._transforms: dict[int, ToBytes] = {}  # by the size of the result
        self._transform(0)  # so that a mistaken setting raises here

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch.

        Args:
            draws: ``(epoch * repeats + repeat) * len(self) + index`` for every image, all of one epoch.

        Returns:
            Images, float32 ``(N, 3, size, size)`` (uint8 with ``as_bytes``), and labels, int64 ``(N,)``.

        Raises:
            DataError: If a file cannot be decoded.
        """
        pixels, labels, keys = [], [], [divmod(draw, len(self)) for draw in draws]
        for time, index in keys:
            path, label = self.samples[index]
            image = read_image(path)
            with seeded(AUGMENT, self.seed, time, index):
                pixels.append(self._transform(time // self.repeats)(image))
            labels.append(label)
        if self.as_bytes:
            return torch.stack(pixels), torch.tensor(labels)
        images = normalise(torch.stack(pixels), self.preprocessing.mean, self.preprocessing.std)
        if self.erases and self.augmentation is not None:
            for row, (time, index) in enumerate(keys):
                with seeded(ERASE, self.seed, time, index):
                    images[row] = self.augmentation.erase(images[row])
        return images, torch.tensor(labels)

    @property
    def erases(self) -> bool:
        """Return whether parts of images are erased after the normalisation."""
        return self.augmentation is not None and bool(self.augmentation.erasing)

    def _transform(self, epoch: int) -> ToBytes:
        own = self.preprocessing.size
        size = own if self.augmentation is None else self.augmentation.size(epoch, own)
        if size not in self._transforms:
            preprocessing = self.preprocessing.at(size)
            self._transforms[size] = (
                preprocessing.evaluation() if self.augmentation is None else self.augmentation.training(preprocessing)
            )
        return self._transforms[size]


def pixels_of(files: Sequence[str | ShardImage]) -> str:
    """The sizes of image files, width by height, from their headers.

    Args:
        files: Paths, or images of shards. Files that cannot be read are left out: reading them raises the error.

    Returns:
        Such as ``"32 x 32 pixels"``, or ``"30 x 20 to 640 x 480 pixels"`` for the smallest and the largest; empty where
        no file can be read.
    """
    sizes = set()
    for file in files:
        with (
            suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError),
            _stream(file) as stream,
            Image.open(stream) as opened,
        ):
            sizes.add(opened.size)
    ends = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    shown = [f"{width} x {height}" for width, height in dict.fromkeys((ends[0], ends[-1]))] if ends else []
    return f"{' to '.join(shown)} pixels" if shown else ""


def _stream(file: str | ShardImage) -> IO[bytes]:
    return Path(file).open("rb") if isinstance(file, str) else io.BytesIO(file.read())


def read_image(file: str | ShardImage) -> Image.Image:
    """Read one image file as RGB with eight bits a channel.

    Images of 12 or 16 bits a channel keep their eight highest bits, as in torchvision and Pillow. EXIF says which side
    is up.
    Transparency is dropped, as in torchvision's data sets, and of an animation the first frame is taken.

    Args:
        file: The file's path, or its image in a shard.

    Returns:
        The image, of mode RGB.

    Raises:
        DataError: If the file is gone or damaged, its disk does not answer, or its numbers have no known scale.
    """
    try:
        # Pillow leaves a file open that it was handed by name and could not read.
        with (
            _stream(file) as stream,
            Image.open(stream) as opened,
        ):
            if (numbers := _without_scale(opened)) is not None:
                failed = f"its pixels are {numbers}, and nothing says which number is white"
                raise data_error(file, failed, "Save it with 8 or 16 bits per channel, such as a PNG.")
            tags = _tags(opened)
            image = ImageOps.exif_transpose(opened)
            if image.mode == "I" or image.mode.startswith("I;16"):
                high = np.asarray(image).astype(np.uint32) >> tags.get(_BITS, (16,))[0] - 8
                if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts images of eight bits alone
                    high = 255 - high
                image = Image.fromarray(high.astype(np.uint8))
            if image.mode == "P":  # through RGBA, so that a palette with transparency is no special case
                image = image.convert("RGBA")
            return image.convert("RGB")
    except FileNotFoundError:
        raise data_error(file, "it was there at the start and is gone", "Put it back and start again.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # of Pillow, on damaged files
        if isinstance(error, OSError) and error.errno is not None:  # of the system, not of Pillow
            fix = "The file may be whole: go on once its disk, or its network, answers again."
            raise data_error(file, f"it cannot be read ({error.strerror})", fix) from None
        fix = "Replace it by an intact copy, or by a PNG of 8 or 16 bits per channel, or delete it to train without it."
        raise data_error(file, f"the image cannot be decoded ({error})", fix) from None


def _tags(image: Image.Image) -> Mapping[int, Any]:
    """The tags of a TIFF, which describe its pixels; other files have no tags."""
    return getattr(image, "tag_v2", {})


def _without_scale(image: Image.Image) -> str | None:
    """The kind of an image's numbers where the file does not say which number is white; None where it does."""
    if image.mode in _UNKNOWN_SCALE:
        return "floating-point numbers"
    tags = _tags(image)
    if _SIGNED in tags.get(_SAMPLE_FORMAT, ()):
        return f"signed integers of {tags[_BITS][0]} bits"
    return "integers of 32 bits" if image.mode == "I" and image.format not in ("PNG", "PPM") else None
