"""Images in shards: a few large files in place of many small ones, read at any place.

A shard is an Arrow file with the bytes of some hundreds of images, as Hugging Face's ``datasets`` keeps them:
``datasets.load_from_disk`` opens the folder too. Our own sampler says which image comes when, so a shard need only give
an image by its number: pyarrow finds where each image's bytes lie, and the system's ``pread`` reads them. A memory map
would end the process by a signal where a network's file system goes away; a read says which file and why.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from nslightning.data.verify import data_error, data_folder
from nslightning.files import replacing

__all__ = ["MANIFEST", "Manifest", "Shard", "ShardImage", "ShardSamples", "Shards", "is_shards", "names", "pyarrow"]

MANIFEST = "shards.json"  # written last: a folder that has it is whole
UNFINISHED = "conversion.json"  # what is converted, while it is
_OPEN_FILES = 256  # of the 1,024 that a process may have open by default
_COPY = 1 << 22  # bytes at a time


def pyarrow() -> ModuleType:
    """pyarrow, which reads and writes shards.

    Returns:
        The package.

    Raises:
        ImportError: If it is not installed; the message names the extra.
    """
    try:
        import pyarrow as package
    except ImportError as error:
        raise ImportError(
            f"shards take the package pyarrow, which cannot be imported ({error}): pip install nslightning[shards]"
        ) from error
    module: ModuleType = package
    return module


@dataclass(frozen=True)
class Shard:
    """One file of images.

    Attributes:
        file: Its place in the folder of shards, such as ``train/00000.arrow``.
        images: Number of images in it.
        bytes: Its size.
        sha256: The digest of its bytes.
    """

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a folder of shards: its file ``shards.json``.

    Attributes:
        format: The form of the shards.
        classes: Names of the classes, in the order of their labels.
        listing: Digest of the names and sizes of the files that were converted.
        splits: The shards of each split, in the order of their images.
    """

    format: Literal[1]
    classes: list[str]
    listing: str
    splits: dict[str, list[Shard]]

    @property
    def images(self) -> dict[str, int]:
        """Return how many images each split holds."""
        return {split: sum(shard.images for shard in shards) for split, shards in self.splits.items()}

    @classmethod
    def read(cls, content: bytes, file: object) -> Manifest:
        """Read the file's content.

        Args:
            content: The bytes of ``shards.json``.
            file: Its name, for the error.

        Returns:
            The manifest.

        Raises:
            DataError: If it is damaged, or of another version.
        """
        try:
            return pydantic.TypeAdapter(cls).validate_json(content)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its text"
            fix = "Convert the folder again, by nslightning shards FOLDER OUT."
            raise data_error(file, f"it is not a list of shards ({place}: {first['msg']})", fix) from None


def is_shards(root: str) -> bool:
    """Return whether a folder of images is one of shards, by its file ``shards.json`` or its address.

    Args:
        root: A folder, or the address of a folder in an object store, such as ``s3://bucket/shards``.

    Returns:
        True if it is, or is being made.
    """
    return _is_address(root) or any((Path(root).expanduser() / name).exists() for name in (MANIFEST, UNFINISHED))


def _is_address(root: str) -> bool:
    return "://" in root


class Shards:
    """A folder of shards, here or in an object store.

    Args:
        root: The folder, or its address: ``s3://bucket/folder``, ``gs://bucket/folder``, ``file:///folder``.

    Attributes:
        address: The address of shards that are copied to this machine first; None for a folder.
        folder: The folder of the shards on this machine, or the one that they will be copied to.

    Raises:
        DataError: If it holds no finished shards.
        ImportError: If pyarrow is not installed.
    """

    def __init__(self, root: str) -> None:
        pyarrow()
        self.address = root.rstrip("/") if _is_address(root) else None
        if self.address is None:
            self.folder = Path(root).expanduser()
        else:
            named = hashlib.sha256(self.address.encode() + self._content).hexdigest()[:16]
            self.folder = data_folder() / "shards" / named

    def has(self, split: str) -> bool:
        """Return whether there are images of a split."""
        return split in self.manifest.splits

    def classes(self, split: str) -> list[str]:
        """Names of the classes, in the order of their labels; the same for every split."""
        return self.manifest.classes

    @cached_property
    def manifest(self) -> Manifest:
        """The contents of the folder."""
        return Manifest.read(self._content, f"{self.address or self.folder}/{MANIFEST}")

    @property
    def digest(self) -> str:
        """The identity of the shards: the digest of their manifest, which has the digest of each."""
        return hashlib.sha256(self._content).hexdigest()

    @cached_property
    def _content(self) -> bytes:
        if self.address is None:
            file = self.folder / MANIFEST
            if file.exists():
                return file.read_bytes()
            failed = "missing: the conversion into these shards is not finished"
            raise data_error(file, failed, f"The same command goes on with it: nslightning shards FOLDER {self.folder}")
        try:
            store, path = self._store()
            with store.open_input_stream(f"{path}/{MANIFEST}") as stream:
                content: bytes = stream.read()
                return content
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            fix = "Make shards by nslightning shards FOLDER OUT, and copy the folder OUT there."
            place = f"{self.address}/{MANIFEST}"
            raise data_error(place, f"it cannot be read ({_first_line(error)})", fix) from None

    def _store(self) -> tuple[Any, str]:
        pyarrow()
        from pyarrow.fs import FileSystem

        store, path = FileSystem.from_uri(self.address)
        return store, path.rstrip("/")

    def fetch(self) -> None:
        """Copy what is not on this machine yet from the object store; nothing for a folder.

        A file that is copied has the size and the digest that the manifest promises, or is not there.

        Raises:
            DataError: If a file cannot be read, or is damaged.
        """
        if self.address is None:
            return
        store, path = self._store()
        for shard in (shard for shards in self.manifest.splits.values() for shard in shards):
            file = self.folder / shard.file
            if file.exists() and file.stat().st_size == shard.bytes:
                continue
            digest, place = hashlib.sha256(), f"{self.address}/{shard.file}"
            with replacing(file) as partial, partial.open("wb") as out:
                try:
                    stream = store.open_input_stream(f"{path}/{shard.file}")
                except (OSError, ValueError) as error:
                    fix = "Copy the whole folder of shards there again."
                    raise data_error(place, f"it cannot be read ({_first_line(error)})", fix) from None
                with stream:
                    while piece := stream.read(_COPY):
                        digest.update(piece)
                        out.write(piece)
                if digest.hexdigest() != shard.sha256:
                    raise data_error(place, "its bytes are not those that were converted", "Copy it there again.")

    def samples(self, split: str) -> ShardSamples:
        """The images of a split.

        Args:
            split: ``train``, ``val`` or ``test``.

        Returns:
            Images and labels, in the order of the folder that was converted.

        Raises:
            DataError: If the split, or one of its files, is missing or damaged.
        """
        if split not in self.manifest.splits:
            fix = "Convert a folder that has it, by nslightning shards FOLDER OUT."
            raise data_error(self.address or self.folder, f"missing: these shards have no {split}", fix)
        return ShardSamples(self.folder, self.manifest.splits[split])


class ShardSamples(Sequence[tuple["ShardImage", int]]):
    """Images and labels of a split's shards.

    Where each image lies is known from the beginning: 20 bytes of memory an image, and none of pyarrow's. Files are
    opened where they are read, in each process of a loader.

    Args:
        folder: The folder of shards.
        shards: Its files.

    Raises:
        DataError: If a file is missing or damaged.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.files = [folder / shard.file for shard in shards]
        places = [_places(file, shard) for file, shard in zip(self.files, shards, strict=True)]
        self._first = np.cumsum([0, *(shard.images for shard in shards)])
        self._starts, self._lengths, self._labels = (np.concatenate(part) for part in zip(*places, strict=True))
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return ShardImage(self, int(index)), int(self._labels[index])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def place(self, index: int) -> tuple[Path, int]:
        """Return where an image lies.

        Args:
            index: Its number in the split.

        Returns:
            The shard, and the image's number in it.
        """
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        return self.files[shard], int(index - self._first[shard])

    def read(self, index: int) -> bytes:
        """The bytes of an image file.

        Args:
            index: The image's number in the split.

        Returns:
            The content of the image file that was converted.

        Raises:
            OSError: If the shard cannot be read.
        """
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        return _read_at(self._descriptor(shard), int(self._lengths[index]), int(self._starts[index]))

    def _descriptor(self, shard: int) -> int:
        if (descriptor := self._open.get(shard)) is None:
            descriptor = self._open[shard] = os.open(self.files[shard], os.O_RDONLY | getattr(os, "O_BINARY", 0))
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return descriptor

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            with suppress(OSError):
                os.close(descriptor)


@dataclass(frozen=True)
class ShardImage:
    """An image in a shard.

    Args:
        samples: The images of its split.
        index: Its number among them.
    """

    samples: ShardSamples
    index: int

    def read(self) -> bytes:
        """The bytes of the image file; ``OSError`` if the shard cannot be read."""
        return self.samples.read(self.index)

    def __str__(self) -> str:
        file, row = self.samples.place(self.index)
        try:
            return f"{file}, image {row} ({names(file)[row].as_py()})"
        except (OSError, ValueError):  # the name stands in the file that cannot be read
            return f"{file}, image {row}"


def names(file: Path) -> Any:
    """Return the names that the image files in a shard had.

    Args:
        file: The shard.

    Returns:
        An Arrow array of strings, ``<class>/<file>`` each.

    Raises:
        ValueError: If it is no Arrow file.
        OSError: If it cannot be read.
    """
    pa = pyarrow()
    (batch,) = pa.ipc.open_stream(pa.memory_map(str(file)))
    return batch.column("image").field("path")


def _places(file: Path, shard: Shard) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    """Start and length of each image's bytes in a file, and its label."""
    pa = pyarrow()
    fix = "Copy it there again, or delete it and convert the folder again: nslightning shards FOLDER OUT."
    if not file.exists():
        raise data_error(file, "missing: shards.json names this file and it is not there", fix)
    if (size := file.stat().st_size) != shard.bytes:
        raise data_error(file, f"size: {size:,} bytes, shards.json promises {shard.bytes:,}", fix)
    try:
        whole = pa.memory_map(str(file)).read_buffer()
        (batch,) = pa.ipc.open_stream(pa.BufferReader(whole))
        column = batch.column("image").field("bytes")
        labels = batch.column("label").to_numpy().astype(np.int32)
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise data_error(file, f"it is not a shard ({_first_line(error)})", fix) from None
    if len(column) != shard.images:
        raise data_error(file, f"count: {len(column)} images, shards.json promises {shard.images}", fix)
    _, offsets, content = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset :][: len(column) + 1].astype(np.int64)
    return ends[:-1] + (content.address - whole.address), np.diff(ends), labels


def _read_at(descriptor: int, count: int, start: int) -> bytes:
    if hasattr(os, "pread"):  # which leaves the position alone that forked processes share
        return os.pread(descriptor, count, start)
    os.lseek(descriptor, start, os.SEEK_SET)
    return os.read(descriptor, count)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
