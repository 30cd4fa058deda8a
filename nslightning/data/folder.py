"""Data sets of image files: ImageNet, and your own folders."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from nslightning.data.augmentation import Augmentation
from nslightning.data.base import TIMEOUT, ImageDataModule, Split
from nslightning.data.images import FileImages, pixels_of
from nslightning.data.preprocessing import Preprocessing, preprocessing_of
from nslightning.data.sampler import Draws
from nslightning.data.shards import Shards, ShardSamples, is_shards
from nslightning.data.verify import data_error, data_folder

Samples = list[tuple[str, int]] | ShardSamples


class Folder:
    """Image files, ``<root>/<split>/<class>/<image>``.

    Args:
        root: The folder.
        fix: The command or change that mends a folder of another form, for the errors.
    """

    def __init__(self, root: Path, fix: str) -> None:
        self.root, self.fix = root, fix

    def has(self, split: str) -> bool:
        """Return whether there is a folder of a split's name."""
        return (self.root / split).is_dir()

    def classes(self, split: str) -> list[str]:
        """Names of the classes.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            The names, sorted.

        Raises:
            DataError: If the folder is missing, or holds none.
        """
        folder = self.root / split
        if not folder.is_dir():
            raise data_error(folder, "missing: there is no such folder", self.fix)
        classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not classes:
            raise data_error(folder, "count: it holds no class folders", self.fix)
        return classes

    def samples(self, split: str) -> list[tuple[str, int]]:
        """Path and label of every image.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            The images, sorted by class and name. A warning counts the files that are left out, by their endings.

        Raises:
            DataError: If its classes are not those of ``train``, or one is empty.
        """
        folder = self.root / split
        classes = self.classes(split)
        if odd := sorted(set(classes) ^ set(self.classes("train"))):
            failed = f"classes: {', '.join(odd[:5])} not in both {split} and train ({len(odd)} of them)"
            raise data_error(folder, failed, self.fix)
        left_out = Counter[str]()

        def is_image(file: str) -> bool:
            taken = file.lower().endswith(IMG_EXTENSIONS)
            if not taken and not Path(file).name.startswith("."):
                left_out[Path(file).suffix.lower() or "no ending"] += 1
            return taken

        read = f"Files are read that end in {', '.join(IMG_EXTENSIONS)}"
        try:
            samples: list[tuple[str, int]] = datasets.ImageFolder(folder, is_valid_file=is_image).samples
        except FileNotFoundError as error:  # a class without an image
            raise data_error(folder, f"count: {str(error).strip().rstrip('.')}", f"{read}. {self.fix}") from None
        if left_out:
            count, endings = left_out.total(), ", ".join(f"{name} ({n:,})" for name, n in sorted(left_out.items()))
            files = "1 file" if count == 1 else f"{count:,} files"
            warnings.warn(f"{files} of {folder} are left out, by their names: {endings}. {read}", stacklevel=2)
        return samples


class ImageFolder(ImageDataModule):
    """Your own images: ``<root>/train/<class>/<image>``, ``<root>/val/...`` and, if there is one, ``test``.

    Args:
        root: The folder with train and val; or shards that ``nslightning shards`` made of it, in a folder or at an
            address such as ``s3://bucket/shards``, from where they are copied into the folder of data sets first.
        image_size: Height and width of the images; by default the preprocessing's own.
        batch_size: Training images per batch of one process.
        eval_batch_size: Images per batch in validation and test.
        workers: Processes that read images; about one per core.
        seed: Seed of the order and of the augmentation.
        preprocessing: ``he2016`` (resized to 256 for a centre crop of 224, bilinear, ImageNet's mean and standard
            deviation), or that of pretrained weights: ``timm/<name>``, ``torchvision/<name>``.
        augmentation: The augmentation of training images, such as
            ``{auto_augment: rand-m9-mstd0.5-inc1, erasing: 0.25}`` (:class:`~nslightning.data.Augmentation`); by
            default a random resized crop and a flip.
        timeout: Seconds without a batch from the workers after which the run ends; 0 waits without end.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str,
        image_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        workers: int = 4,
        seed: int = 0,
        preprocessing: str = "he2016",
        augmentation: Augmentation = Augmentation(),  # noqa: B008 # frozen
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, workers, seed, timeout)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        self.source = self._opened(root)
        self.folder: Path = self.source.folder if isinstance(self.source, Shards) else self.source.root
        self.preprocessing = preprocessing_of(preprocessing).at(image_size)
        self.augmentation = augmentation
        self.image_shape = (3, self.preprocessing.size, self.preprocessing.size)
        self.variant = "own images"
        self.num_classes = self._count_classes()

    def setup(self, stage: str) -> None:
        """Read what a stage needs, and compare the preprocessing with that of the model's pretrained weights.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        super().setup(stage)
        expected = _expected(None if self.trainer is None else self.trainer.lightning_module)
        if expected is not None and not expected.at(self.preprocessing.size).same_as(self.preprocessing):
            warnings.warn(
                f"the pretrained weights of {expected.name} expect another preprocessing than"
                f" {self.preprocessing.name}, and lose accuracy without it: --data.preprocessing={expected.name}",
                stacklevel=2,
            )

    @property
    def summary(self) -> str:
        """Describe a batch in a few words, and the files that it is made of.

        Returns:
            Such as ``images of 3x224x224, 10 classes; resized and cropped, the first file from 32 x 32 pixels``.
        """
        images = self._split("train")
        assert isinstance(images, FileImages)
        size = pixels_of([images.samples[0][0]])
        return f"{super().summary}; resized and cropped, the first file from {size}" if size else super().summary

    def prepare_data(self) -> None:
        """Copy shards that are named by an address from their object store; Lightning calls it once on each machine.

        Raises:
            DataError: If a shard cannot be copied.
        """
        if isinstance(self.source, Shards):
            self.source.fetch()

    @property
    def provenance(self) -> dict[str, Any]:
        """A description of the data; of shards also their address and the digest of their contents.

        Returns:
            The record.
        """
        if not isinstance(self.source, Shards):
            return super().provenance
        return super().provenance | {"shards": self.source.digest, "address": self.source.address}

    def _opened(self, root: str) -> Folder | Shards:
        if is_shards(root):
            return Shards(root)
        folder = Path(root).expanduser()
        return Folder(folder, self._fix(folder))

    @staticmethod
    def _fix(folder: Path) -> str:
        return (
            f"{folder} must hold train/<class>/<image> and val/<class>/<image> with the same classes;"
            " name another folder by --data.root."
        )

    def _count_classes(self) -> int:
        classes = self._classes("train")
        if len(classes) < 2:
            failed = f"classes: one class, {classes[0]}, and a classifier needs at least two"
            raise data_error(self.folder / "train", failed, self._fix(self.folder))
        return len(classes)

    def _classes(self, split: str) -> list[str]:
        return self.source.classes(split)

    def _load(self, split: Split) -> Draws:
        if split == "test" and not self.source.has("test"):
            return self._split("val")
        augmentation = self.augmentation if split == "train" else None
        return FileImages(self._samples(split), self.preprocessing, augmentation, self.seed)

    def _samples(self, split: Split) -> Samples:
        return self.source.samples(split)


class ImageNet(ImageFolder):
    """ImageNet (ILSVRC 2012): ``<root>/train/<wnid>/*.JPEG`` and ``<root>/val/<wnid>/*.JPEG``.

    It cannot be downloaded without an account. Archives got from image-net.org are checked and unpacked by
    ``python -c "from torchvision.datasets import ImageNet as I; [I(ROOT, s) for s in ('train', 'val')]"``.

    Args:
        root: The folder with train and val, or shards of it; by default imagenet in the folder of data sets.
        image_size: Height and width of the images; by default the preprocessing's own.
        batch_size: Training images per batch of one process.
        eval_batch_size: Images per batch in validation and test.
        workers: Processes that read images; about one per core.
        verify: Refuse anything but 1,000 classes, 1,281,167 training and 50,000 validation images. False
            admits a part, and the run's record says so.
        seed: Seed of the order and of the augmentation.
        preprocessing: As in :class:`ImageFolder`.
        augmentation: As in :class:`ImageFolder`.
        timeout: As in :class:`ImageFolder`.
    """

    name = "imagenet"
    _published: ClassVar[dict[str, int]] = {"train": 1_281_167, "val": 50_000}

    def __init__(
        self,
        root: str | None = None,
        image_size: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        workers: int = 4,
        verify: bool = True,
        seed: int = 0,
        preprocessing: str = "he2016",
        augmentation: Augmentation = Augmentation(),  # noqa: B008 # frozen
        timeout: float = TIMEOUT,
    ) -> None:
        root = str(data_folder() / "imagenet") if root is None else root
        super().__init__(
            root, image_size, batch_size, eval_batch_size, workers, seed, preprocessing, augmentation, timeout
        )
        self.verify = verify
        self._complete: dict[str, bool] = {}

    def _count_classes(self) -> int:
        return 1000  # known before the folder is looked at

    @staticmethod
    def _fix(folder: Path) -> str:
        return (
            f"{folder} must hold train/<wnid>/*.JPEG and val/<wnid>/*.JPEG; name another folder by"
            " --data.root, or put the archives from image-net.org there and unpack them by"
            " python -c 'from torchvision.datasets import ImageNet as I;"
            f' I("{folder}", "train"); I("{folder}", "val")\'.'
        )

    def _load(self, split: Split) -> Draws:
        # The labels of the official test images are not public.
        return self._split("val") if split == "test" else super()._load(split)

    def _samples(self, split: Split) -> Samples:
        samples = super()._samples(split)
        counts, published = (len(self._classes(split)), len(samples)), (1000, self._published[split])
        self._complete[split] = counts == published
        fix = self._fix(self.folder)
        if self.verify and counts != published:
            failed = f"count: {counts[1]} images in {counts[0]} classes, ImageNet has {published[1]} in 1000"
            raise data_error(self.folder / split, failed, fix + " To use a part, add --data.verify=false.")
        if counts[0] > 1000:
            raise data_error(self.folder / split, f"count: {counts[0]} classes, more than 1000", fix)
        self.verified = all(self._complete.values())
        self.variant = "official, by its counts" if self.verified else "not the official counts"
        return samples


def _expected(model: Any) -> Preprocessing | None:
    """The preprocessing of a model's pretrained weights; None where it has none, or they say nothing."""
    settings: Any = getattr(model, "hparams", {})
    name = settings.get("backbone")
    if not settings.get("pretrained") or not isinstance(name, str) or ":" in name:
        return None
    try:
        return preprocessing_of(name)
    except ValueError:
        return None
