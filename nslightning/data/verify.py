"""Checks of the files a data set is read from, and the one error they raise."""

import hashlib
import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nslightning.files import cache_folder, expanded


class DataError(RuntimeError):
    """A data set on disk is missing, damaged, or not the published one.

    The message names the file, the check that failed and what mends it. It takes one string, so that a
    DataLoader worker can raise it again in the main process.
    """


def data_error(file: object, failed: str, fix: str) -> DataError:
    """Word a DataError.

    Args:
        file: The file or folder that fails.
        failed: The check that failed, and the value that it read.
        fix: The command or change that mends it.

    Returns:
        The error, to be raised.

    >>> print(data_error("train-labels", "size: 7 bytes, its header promises 60008", "Delete it."))
    train-labels: size: 7 bytes, its header promises 60008.
    Delete it.
    """
    return DataError(f"{file}: {failed}.\n{fix}")


def data_folder() -> Path:
    """Return the folder where data sets are looked for by default.

    Returns:
        The folder in ``NSLIGHTNING_DATA_DIR``, else ``nslightning/data`` in the user's cache folder (``~/.cache``).
    """
    named = os.environ.get("NSLIGHTNING_DATA_DIR")
    return expanded(named) if named else cache_folder("data")


def file_md5(file: Path) -> str:
    """MD5 of a file, read in pieces.

    Args:
        file: The file.

    Returns:
        The digest in hexadecimal.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def parse_idx(content: bytes, dims: int, file: object, fix: str) -> NDArray[np.uint8]:
    """Read an IDX file of bytes (LeCun's MNIST format), strictly.

    Args:
        content: The file's bytes, not compressed.
        dims: The number of dimensions it must have (3 for images, 1 for labels).
        file: Its name, for the error.
        fix: The command or change that mends a bad file, for the error.

    Returns:
        The array, uint8 of shape ``(N, H, W)`` or ``(N,)``, read-only.

    Raises:
        DataError: If the magic number or the length does not fit.

    >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]), 1, "labels", "")
    array([5, 7], dtype=uint8)
    """
    start = 4 * (1 + dims)
    magic = 0x0800 + dims  # 08: unsigned bytes
    start_bytes = int.from_bytes(content[:4], "big")
    if start_bytes != magic or len(content) < start:
        raise data_error(file, f"IDX header: it starts with {start_bytes:#010x}, not {magic:#010x}", fix)
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4"))
    if len(content) != start + math.prod(shape):
        promised = start + math.prod(shape)
        raise data_error(file, f"size: {len(content)} bytes, its IDX header promises {promised}", fix)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
