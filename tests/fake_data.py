"""Tiny seeded data sets in the real on-disk formats; to be read with ``verify=False``.

``write_all(root)`` makes a folder for NSLIGHTNING_DATA_DIR.
"""

import gzip
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_idx(file: Path, array: np.ndarray) -> None:
    """One IDX file of bytes, gzipped if its name ends in .gz."""
    content = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes() + array.tobytes()
    file.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)


def write_mnist(root: Path, name: str = "MNIST", train: int = 80, test: int = 40, suffix: str = "") -> None:
    """MNIST or FashionMNIST: four IDX files; ``suffix=".gz"`` as they are downloaded."""
    folder = root / name / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        write_idx(
            folder / f"{part}-images-idx3-ubyte{suffix}",
            rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
        )
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count, dtype=np.uint8) % 10)


def write_cifar(root: Path, classes: int = 10, train: int = 80, test: int = 40) -> None:
    """CIFAR-10 (five training batches) or CIFAR-100 (one): pickles and their meta file."""
    if classes == 10:
        folder, label, meta = root / "cifar-10-batches-py", "labels", ("batches.meta", "label_names")
        files = [(f"data_batch_{i}", train // 5) for i in range(1, 6)] + [("test_batch", test)]
    else:
        folder, label, meta = root / "cifar-100-python", "fine_labels", ("meta", "fine_label_names")
        files = [("train", train), ("test", test)]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for name, count in files:
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = [i % classes for i in range(count)]
        (folder / name).write_bytes(pickle.dumps({"data": data, label: labels}, protocol=2))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: [f"class{i}" for i in range(classes)]}, protocol=2))


def write_svhn(root: Path, extra: int = 80, train: int = 80, test: int = 40) -> None:
    """SVHN's cropped digits: three .mat files, images last, 10 for the digit 0."""
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(2)
    for split, count in (("extra", extra), ("train", train), ("test", test)):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        digits = (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]
        savemat(root / f"{split}_32x32.mat", {"X": images, "y": digits}, do_compression=True)


def write_image_folder(
    root: Path,
    classes: tuple[str, ...] = ("ant", "bee"),
    per_class: int = 10,
    size: tuple[int, int] = (48, 40),
    extension: str = "jpg",
) -> None:
    """Train and val folders of JPEGs, every fourth one grey."""
    rng = np.random.default_rng(3)
    for split, count in (("train", per_class), ("val", max(per_class // 2, 1))):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                image = coarse.resize(size, Image.Resampling.BICUBIC)
                image = image.convert("L") if i % 4 == 3 else image
                image.save(folder / f"{name}_{i}.{extension}", "JPEG", quality=90)


def write_imagenet(root: Path, classes: int = 3, per_class: int = 8) -> None:
    """ImageNet's folders: train and val by WordNet id."""
    wnids = ("n01440764", "n02102040", "n02979186", "n03000684", "n03028079")[:classes]
    write_image_folder(root, wnids, per_class, (64, 48), "JPEG")


FOOD101_CLASSES = ("apple_pie", "bibimbap", "waffles")


def write_food101(root: Path, classes: Sequence[str] = FOOD101_CLASSES, train: int = 6, test: int = 2) -> Path:
    """Images by class, and the lists of both parts; every fourth image is grey."""
    rng = np.random.default_rng(5)
    folder = root / "food-101"
    (folder / "meta").mkdir(parents=True)
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for name in reversed(classes):  # the labels follow the alphabet, not the lists
        (folder / "images" / name).mkdir(parents=True)
        for i in range(train + test):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            image = coarse.resize((48, 40), Image.Resampling.BICUBIC).convert("L" if i % 4 == 3 else "RGB")
            image.save(folder / "images" / name / f"{1000 + i}.jpg", "JPEG", quality=90)
            lists["train" if i < train else "test"].setdefault(name, []).append(f"{name}/{1000 + i}")
    for part, content in lists.items():
        (folder / "meta" / f"{part}.json").write_text(json.dumps(content))
    return folder


def write_all(root: Path) -> None:
    """Every data set, where it is looked for by default when NSLIGHTNING_DATA_DIR is ``root``."""
    write_mnist(root)
    write_mnist(root, "FashionMNIST")
    write_cifar(root, 10)
    write_cifar(root, 100, train=200)
    write_svhn(root / "svhn")
    write_imagenet(root / "imagenet")
