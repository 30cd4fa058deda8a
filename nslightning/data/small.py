"""Data sets held in memory: MNIST, Fashion-MNIST, CIFAR, SVHN, the embedded sample, synthetic images."""

import gzip
import hashlib
import io
import pickle
import zlib
from abc import abstractmethod
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets

from nslightning.data.base import ImageDataModule, Split
from nslightning.data.images import TensorImages
from nslightning.data.sampler import HOLDOUT, PIXELS, Draws, generator
from nslightning.data.verify import data_error, data_folder, file_md5, parse_idx

Pixels = tuple[NDArray[np.uint8], NDArray[Any]]


class DownloadedImages(ImageDataModule):
    """A published data set of small images, kept in memory; torchvision downloads it.

    Args:
        root: Folder of data sets, as torchvision's class takes it; by default the one in
            NSLIGHTNING_DATA_DIR, else ~/.cache/nslightning/data.
        batch_size: Training images per batch of one process.
        eval_batch_size: Images per batch in validation and test.
        workers: Processes that read images. 0 is the fastest: the images are then kept on the device that trains.
        download: Download (and check) what is missing.
        verify: Refuse files whose MD5 is not the published one. False admits a repacked copy, and the run's
            record says so; unreadable files are refused all the same.
        holdout: Fraction of the training images held out for validation, always the same ones. 0 validates
            on the official test images, as the papers did.
        seed: Seed of the order and of the augmentation.
    """

    _source: ClassVar[Any]  # torchvision's class
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]
    crop_padding: ClassVar[int] = 0
    flip: ClassVar[bool] = False
    subfolder: ClassVar[str] = ""  # of the default root

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        workers: int = 0,
        download: bool = False,
        verify: bool = True,
        holdout: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, workers, seed)
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout is {holdout}; it must be a fraction of the training images, 0 <= holdout < 1")
        self.root = data_folder() / self.subfolder if root is None else Path(root).expanduser()
        self.folder = self.root
        self.download, self.verify, self.holdout = download, verify, holdout
        self.validation = f"{holdout:.4g} of the training images, held out" if holdout else "the official test images"
        self._md5_matches: dict[str, bool] = {}

    @abstractmethod
    def _read(self, train: bool) -> Pixels:
        """Images uint8 ``(N, C, H, W)`` and labels ``(N,)``, every file checked."""

    def _download(self) -> None:
        self._source(self.root, download=True)

    def prepare_data(self) -> None:
        """Download when asked to; Lightning calls it in one process.

        Raises:
            DataError: If the download fails.
        """
        if not self.download:
            return
        try:
            self._download()
        except (RuntimeError, URLError, OSError) as error:
            fix = "Try again, or put the files there by hand; both work without --data.download."
            raise data_error(self.root, f"{self.name} could not be downloaded ({error})", fix) from error

    def _load(self, split: Split) -> Draws:
        if split == "test":
            return self._tensors(*self._checked(train=False))
        if split == "val" and not self.holdout:
            return self._split("test")
        images, labels = self._checked(train=True)
        if not self.holdout:
            return self._tensors(images, labels, train=True)
        order = torch.randperm(len(labels), generator=generator(HOLDOUT))
        held = round(self.holdout * len(labels))
        if not 0 < held < len(labels):
            raise ValueError(
                f"holdout={self.holdout} of {len(labels)} images leaves nothing to validate or to train on"
            )
        kept, held_out = order[held:].sort().values, order[:held].sort().values
        self._loaded["train"] = self._tensors(images[kept], labels[kept], train=True)
        self._loaded["val"] = self._tensors(images[held_out], labels[held_out])
        return self._loaded[split]

    def _tensors(self, images: Tensor, labels: Tensor, train: bool = False) -> TensorImages:
        padding, flip = (self.crop_padding, self.flip) if train else (0, False)
        return TensorImages(images, labels, self.mean, self.std, padding, flip, self.seed)

    def _checked(self, train: bool) -> tuple[Tensor, Tensor]:
        pixels, targets = self._read(train)
        images_of = f"{self.name}, {'training' if train else 'test'} images"
        if pixels.shape[1:] != self.image_shape or len(pixels) == 0:
            failed = f"shape: {images_of} are {pixels.shape[1:]}, not {self.image_shape}, {len(pixels)} of them"
            raise data_error(self.root, failed, self._fix())
        if pixels.dtype != np.uint8:
            raise data_error(self.root, f"type: {images_of} are {pixels.dtype}, not uint8", self._fix())
        if len(pixels) != len(targets):
            raise data_error(self.root, f"count: {images_of}: {len(pixels)} images, {len(targets)} labels", self._fix())
        if targets.min() < 0 or targets.max() >= self.num_classes:
            failed = f"labels: {images_of}: {targets.min()} to {targets.max()}, not 0 to {self.num_classes - 1}"
            raise data_error(self.root, failed, self._fix())
        self.verified = all(self._md5_matches.values())
        self.variant = "official" if self.verified else "repacked copy: MD5 not the published one"
        images = np.require(pixels, requirements=["C", "W"])  # contiguous and writable
        return torch.from_numpy(images), torch.from_numpy(targets.astype(np.int64))

    def _fix(self) -> str:
        """Return the advice that mends a damaged file."""
        return "Delete the file and add --data.download=true to download it again."

    def _existing(self, file: Path) -> Path:
        """The file itself, or an error that says how to get it."""
        if not file.is_file():
            fix = (
                "Add --data.download=true (for audit, experiment and zones, --download) to download it, or name the"
                " folder that has it in NSLIGHTNING_DATA_DIR or --data.root."
            )
            raise data_error(file, f"missing: {self.name} is read from it and it is not there", fix)
        return file

    def _compare(self, file: Path, digest: str, published: str) -> None:
        """Note whether a file is the published one, and refuse it if it must be."""
        self._md5_matches[file.name] = digest == published
        if self.verify and digest != published:
            fix = self._fix() + " For a repacked copy that you trust, add --data.verify=false."
            size = file.stat().st_size
            raise data_error(file, f"md5: {digest} ({size} bytes), the published file has {published}", fix)


class MNIST(DownloadedImages):
    """MNIST (LeCun et al. 1998), from ``<root>/MNIST/raw``: IDX files, gzipped or not."""

    name = "mnist"
    num_classes = 10
    image_shape = (1, 28, 28)
    mean, std = (0.5,), (0.5,)
    _source: ClassVar[Any] = datasets.MNIST
    # Of the files within the archives that torchvision publishes MD5s of: any packing of the same bytes is
    # the same.
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }

    def _read(self, train: bool) -> Pixels:
        part = "train" if train else "t10k"
        return self._idx(f"{part}-images-idx3-ubyte", 3)[:, None], self._idx(f"{part}-labels-idx1-ubyte", 1)

    def _idx(self, name: str, dims: int) -> NDArray[np.uint8]:
        folder = self.root / self._source.__name__ / "raw"
        packed = folder / f"{name}.gz"
        file = packed if packed.is_file() and not (folder / name).is_file() else self._existing(folder / name)
        content = read_bytes(file, self._fix())
        array = parse_idx(content, dims, file, self._fix())
        self._compare(file, hashlib.md5(content, usedforsecurity=False).hexdigest(), self.md5[name])
        return array


class FashionMNIST(MNIST):
    """Fashion-MNIST (Xiao et al. 2017), from ``<root>/FashionMNIST/raw``: IDX files, gzipped or not."""

    name = "fashion_mnist"
    _source: ClassVar[Any] = datasets.FashionMNIST
    md5: ClassVar[dict[str, str]] = {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    }


class CIFAR10(DownloadedImages):
    """CIFAR-10 (Krizhevsky 2009), from ``<root>/cifar-10-batches-py``; random crop (padding 4) and flip."""

    name = "cifar10"
    num_classes = 10
    image_shape = (3, 32, 32)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    crop_padding = 4
    flip = True
    _source: ClassVar[Any] = datasets.CIFAR10
    _labels: ClassVar[str] = "labels"

    def _read(self, train: bool) -> Pixels:
        parts = []
        for name, published in self._source.train_list if train else self._source.test_list:
            file = self._existing(self.root / self._source.base_folder / name)
            self._compare(file, file_md5(file), published)
            parts.append(self._batch(file))
        images, labels = zip(*parts, strict=True)
        return np.concatenate(images).reshape(-1, *self.image_shape), np.concatenate(labels)

    def _batch(self, file: Path) -> Pixels:
        try:
            entry = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="latin1").load()
            return np.asarray(entry["data"]).reshape(-1, 3072), np.asarray(entry[self._labels])
        except Exception as error:  # a damaged pickle may raise anything
            failed = f"pickle: no images can be read from it ({type(error).__name__}: {error})"
            raise data_error(file, failed, self._fix()) from error


class CIFAR100(CIFAR10):
    """CIFAR-100 (Krizhevsky 2009), from ``<root>/cifar-100-python``; fine labels, treated as CIFAR-10."""

    name = "cifar100"
    num_classes = 100
    _source: ClassVar[Any] = datasets.CIFAR100
    _labels: ClassVar[str] = "fine_labels"


class SVHN(DownloadedImages):
    """SVHN, cropped digits (Netzer et al. 2011), from ``<root>/*_32x32.mat``; the default root ends in svhn.

    Args:
        split: The training images: extra (531,131 of them: 1.6 GB of memory, twice that while it is read), on
            which the papers trained, or train (73,257).
        kwargs: The arguments of DownloadedImages.
    """

    name = "svhn"
    num_classes = 10
    image_shape = (3, 32, 32)
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    subfolder = "svhn"
    _source: ClassVar[Any] = datasets.SVHN

    def __init__(self, split: Literal["extra", "train"] = "extra", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if split not in ("extra", "train"):
            raise ValueError(f"split is {split!r}; SVHN trains on 'extra' or 'train'")
        self.split = split

    def _download(self) -> None:
        for split in (self.split, "test"):
            url, name, published = self._source.split_list[split]
            file = self.root / name
            if not file.is_file() or file_md5(file) != published:
                # The constructor would also read it, which for `extra` takes minutes.
                datasets.utils.download_url(url, self.root, name, published)

    def _read(self, train: bool) -> Pixels:
        _, name, published = self._source.split_list[self.split if train else "test"]
        file = self._existing(self.root / name)
        self._compare(file, file_md5(file), published)
        from scipy.io import loadmat  # here, because only SVHN needs it

        try:
            content = loadmat(file)
            images, digits = content["X"].transpose(3, 2, 0, 1), content["y"].ravel()
        except Exception as error:  # a damaged file may raise anything
            failed = f"mat: no images can be read from it ({type(error).__name__}: {error})"
            raise data_error(file, failed, self._fix()) from error
        return images, np.where(digits == 10, 0, digits)  # the files say 10 for the digit 0

    @property
    def provenance(self) -> dict[str, Any]:
        """A description of the data, with ``split``: the images trained on.

        Returns:
            The record.
        """
        return {**super().provenance, "split": self.split}


class FashionMNISTSample(ImageDataModule):
    """6,000 + 1,000 images of Fashion-MNIST that come with the package, class-balanced (MIT licence).

    Training images are drawn from its training images, validation images from its test images. For
    demonstrations and tests: accuracies do not compare with published ones.
    """

    name = "fashion_mnist_sample"
    num_classes = 10
    image_shape = (1, 28, 28)
    mean, std = (0.5,), (0.5,)
    sha256: ClassVar[dict[str, str]] = {  # unpacked
        "t10k-images-idx3-ubyte.gz": "62d34a8db5de4b3e53f20a2acd3b2d912ad98ea54035d9645e84cb5343b4c9fd",
        "t10k-labels-idx1-ubyte.gz": "007a311d92b2e693ce791ebd01e50e4091fb04167b9071fa8565dddf38d70f5b",
        "train-images-idx3-ubyte.gz": "3cceecc6d4f8a9c16e87dec245bb720f2165647526e517d174629a7af57e784b",
        "train-labels-idx1-ubyte.gz": "fbe27b732cf20e2fd31ac28076941320739edd58bfba20c758b1da86d1ee6857",
    }

    def _load(self, split: Split) -> Draws:
        if split == "test":
            return self._split("val")
        self.variant, self.verified = "embedded sample", True
        self.validation = "1,000 of the official test images; `test` uses the same"
        folder = files("nslightning.data") / "fashion_mnist_sample"
        part = "train" if split == "train" else "t10k"
        fix = "Install nslightning again."
        arrays = []
        for name, dims in ((f"{part}-images-idx3-ubyte.gz", 3), (f"{part}-labels-idx1-ubyte.gz", 1)):
            file = folder / name
            content = read_bytes(file, fix)
            array = parse_idx(content, dims, file, fix)
            if (digest := hashlib.sha256(content).hexdigest()) != self.sha256[name]:
                raise data_error(file, f"sha256: {digest}, not {self.sha256[name]}", fix)
            arrays.append(torch.from_numpy(array.copy()))
        return TensorImages(arrays[0][:, None], arrays[1].long(), self.mean, self.std, seed=self.seed)


class Synthetic(ImageDataModule):
    """Random images, for benchmarks and tests; pixels in [0, 1], not normalised.

    Args:
        image_shape: Channels, height and width.
        num_classes: Number of classes; labels are random.
        images: Number of training images.
        eval_images: Number of validation images.
        constant: Fraction of images with all pixels equal, so that ties happen: every pooling window away
            from the border is a tie, and in every second one, which is black, layers without bias give
            exact zeros too.
        batch_size: Training images per batch of one process.
        eval_batch_size: Images per batch in validation and test.
        workers: Processes that read images.
        seed: Seed of the pixels, the labels and the order.
    """

    name = "synthetic"

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
        images: int = 2048,
        eval_images: int = 512,
        constant: float = 0.0,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, workers, seed)
        if not 0 <= constant <= 1:
            raise ValueError(f"constant is {constant}; it must be a fraction of the images, 0 <= constant <= 1")
        self.image_shape, self.num_classes = image_shape, num_classes
        self.images, self.eval_images, self.constant = images, eval_images, constant
        self.variant = f"random, {constant:.4g} constant images"

    def _load(self, split: Split) -> Draws:
        if split == "test":
            return self._split("val")
        count = self.images if split == "train" else self.eval_images
        g = generator(PIXELS, self.seed, 1 if split == "train" else 2)
        pixels = torch.randint(0, 256, (count, *self.image_shape), generator=g, dtype=torch.uint8)
        labels = torch.randint(0, self.num_classes, (count,), generator=g)
        planted = torch.randperm(count, generator=g)[: round(self.constant * count)]
        levels = torch.randint(0, 256, (len(planted),), generator=g, dtype=torch.uint8)
        levels[::2] = 0
        pixels[planted] = levels[:, None, None, None]
        channels = self.image_shape[0]
        return TensorImages(pixels, labels, [0.0] * channels, [1.0] * channels, seed=self.seed)


def read_bytes(file: Path | Traversable, fix: str) -> bytes:
    """Read a file, unpacking it if its name ends in ``.gz``.

    Args:
        file: The file.
        fix: The command or change that mends a bad file, for the error.

    Returns:
        Its content.

    Raises:
        DataError: If it cannot be read or unpacked.
    """
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.name.endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise data_error(file, f"it cannot be read ({error})", fix) from error


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, strings, numbers and containers: a copy from anywhere must not run code."""

    _ALLOWED: ClassVar[set[tuple[str, str]]] = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        *(
            (f"numpy.{core}.{module}", name)
            for core in ("core", "_core")
            for module, name in (
                ("multiarray", "_reconstruct"),
                ("multiarray", "scalar"),
                ("numeric", "_frombuffer"),
            )
        ),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place among images")
        return super().find_class(module, name)
