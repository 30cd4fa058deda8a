"""Food-101."""

import json
from pathlib import Path
from typing import ClassVar
from urllib.error import URLError

import torch
from torchvision import datasets

from nslightning.data.augmentation import Augmentation
from nslightning.data.base import TIMEOUT, ImageDataModule, Split
from nslightning.data.images import FileImages
from nslightning.data.preprocessing import HE2016
from nslightning.data.sampler import HOLDOUT, generator
from nslightning.data.verify import data_error, data_folder


class Food101(ImageDataModule):
    """Food-101 (Bossard et al. 2014): ``<root>/food-101/images/<class>/*.jpg`` and ``meta/{train,test}.json``.

    Images are normalised with ImageNet's mean and std. Evaluation resizes (256 for 224) and crops the centre.

    Args:
        root: Folder of data sets, as torchvision's class takes it; by default the one in
            NSLIGHTNING_DATA_DIR, else ~/.cache/nslightning/data.
        image_size: Height and width of the images.
        augment: Train on random resized crops and flips. False trains on what is evaluated on, as the
            INNAprop experiments did.
        batch_size: Training images per batch of one process.
        eval_batch_size: Images per batch in validation and test.
        workers: Processes that read images; about one per core.
        download: Download (5 GB, checked) what is missing.
        verify: Refuse anything but 101 classes of 750 training and 250 test images. False admits a part, and
            the run's record says so.
        holdout: Fraction of the training images held out for validation, always the same ones. 0 validates
            on the official test images, as the INNAprop experiments did.
        seed: Seed of the order and of the augmentation.
        timeout: Seconds without a batch from the workers after which the run ends; 0 waits without end.
    """

    name = "food101"
    num_classes = 101
    _published: ClassVar[dict[str, int]] = {"train": 75_750, "test": 25_250}

    def __init__(
        self,
        root: str | None = None,
        image_size: int = 224,
        augment: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        workers: int = 4,
        download: bool = False,
        verify: bool = True,
        holdout: float = 0.1,
        seed: int = 0,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, workers, seed, timeout)
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout is {holdout}; it must be a fraction of the training images, 0 <= holdout < 1")
        self.root = data_folder() if root is None else Path(root).expanduser()
        self.folder: Path = self.root / "food-101"
        self.image_shape = (3, image_size, image_size)
        self.augment, self.download, self.verify, self.holdout = augment, download, verify, holdout
        self.validation = f"{holdout:.4g} of the training images, held out" if holdout else "the official test images"
        self._complete: dict[str, bool] = {}

    def prepare_data(self) -> None:
        """Download when asked to; Lightning calls it in one process.

        Raises:
            DataError: If the download fails.
        """
        if not self.download:
            return
        try:
            datasets.Food101(self.root, download=True)
        except (RuntimeError, URLError, OSError) as error:
            fix = "Try again, or put the files there by hand; both work without --data.download."
            raise data_error(self.folder, f"food101 could not be downloaded ({error})", fix) from error

    def _fix(self) -> str:
        return (
            f"{self.folder} must hold images/<class>/*.jpg, meta/train.json and meta/test.json: delete it and"
            " add --data.download=true, or name the folder that has it in NSLIGHTNING_DATA_DIR or --data.root."
        )

    def _load(self, split: Split) -> FileImages:
        if split == "test":
            return self._files(self._samples("test"))
        if split == "val" and not self.holdout:
            return self._files(self._samples("test"))
        samples = self._samples("train")
        if not self.holdout:
            return self._files(samples, self.augment)
        order = torch.randperm(len(samples), generator=generator(HOLDOUT)).tolist()
        held = round(self.holdout * len(samples))
        if not 0 < held < len(samples):
            raise ValueError(
                f"holdout={self.holdout} of {len(samples)} images leaves nothing to validate or to train on"
            )
        chosen = sorted(order[:held] if split == "val" else order[held:])
        return self._files([samples[i] for i in chosen], self.augment and split == "train")

    def _files(self, samples: list[tuple[str, int]], augment: bool = False) -> FileImages:
        augmentation = Augmentation() if augment else None
        return FileImages(samples, HE2016.at(self.image_shape[1]), augmentation, self.seed)

    def _samples(self, part: str) -> list[tuple[str, int]]:
        """Path and label of every image that the official list of a part names."""
        file = self.folder / "meta" / f"{part}.json"
        if not file.is_file():
            raise data_error(file, "missing: the images are listed in it and it is not there", self._fix())
        try:
            content = json.loads(file.read_text()).items()
            listed = {str(name): [f"{path}.jpg" for path in paths] for name, paths in content}
        except (ValueError, AttributeError, TypeError) as error:
            failed = f"it cannot be read ({type(error).__name__}: {error})"
            raise data_error(file, failed, self._fix()) from None
        images = self.folder / "images"
        samples: list[tuple[str, int]] = []
        for label, name in enumerate(sorted(listed)):
            # One listing per class: asking for each of 101,000 files takes minutes on a network drive.
            on_disk = {f"{name}/{entry.name}" for entry in (images / name).glob("*.jpg")}
            if absent := sorted(set(listed[name]) - on_disk):
                failed = f"missing: {len(absent)} images that {file.name} lists are not there"
                raise data_error(images / absent[0], failed, self._fix())
            samples += [(str(images / path), label) for path in listed[name]]
        self._check_count(part, len(listed), len(samples))
        return samples

    def _check_count(self, part: str, classes: int, count: int) -> None:
        file, published = self.folder / "meta" / f"{part}.json", (self.num_classes, self._published[part])
        self._complete[part] = (classes, count) == published
        if self.verify and not self._complete[part]:
            failed = f"count: {count} images in {classes} classes, Food-101 has {published[1]} in 101"
            raise data_error(file, failed, self._fix() + " To use a part, add --data.verify=false.")
        if not count or classes > self.num_classes:
            failed = f"count: {count} images in {classes} classes, at least 1 in at most {self.num_classes}"
            raise data_error(file, failed, self._fix())
        self.verified = all(self._complete.values())
        self.variant = "official, by its counts" if self.verified else "not the official counts"
