"""Files that are whole or missing: they are written beside their place and moved into it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_path

__all__ = [
    "cache_folder",
    "check_writable",
    "expanded",
    "forget_partial",
    "named_in_errors",
    "replacing",
    "stderr_to",
    "utf8",
    "write_text",
]

_PARTIAL = ".partial-"  # how the name of a file begins that is not in its place yet


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file under another name, which takes its place at the end.

    Until then the old file is in place: a reader sees it, and it remains after a crash and on a full disk.

    Args:
        path: The file; its folder is made.

    Yields:
        The file to write, in the same folder and with the same ending. It is removed if the block raises.

    Raises:
        OSError: If the folder or the file cannot be written; it names the file.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/new/a.txt") as partial:
        ...         _ = partial.write_text("whole")
        ...     print(Path(folder, "new/a.txt").read_text(), len(list(Path(folder, "new").iterdir())))
        whole 1
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device or a pipe: it stays one
        with named_in_errors(path):
            yield path
        return
    with named_in_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_PARTIAL}{path.stem}-", suffix=path.suffix)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(_mode(path))
            with partial.open("rb") as written:
                os.fsync(written.fileno())  # a full disk may say so only here
            partial.replace(path)
        except BaseException:
            with suppress(OSError):  # of a disk that does not answer
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def named_in_errors(path: str | Path) -> Iterator[None]:
    """Have an error of the system name the file that was to be written: a full disk says so without a name.

    Args:
        path: The file.

    Yields:
        Nothing.

    Raises:
        OSError: What the block raises, with the name of the file.

    Example:
        >>> with named_in_errors("metrics.csv"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: [Errno 28] No space left on device: 'metrics.csv'
    """
    try:
        yield
    except OSError as error:
        of_the_file = error.filename is None or Path(str(error.filename)).name.startswith(_PARTIAL)
        if error.errno is not None and of_the_file:
            error.filename = str(path)
        raise


def forget_partial(folder: str | Path) -> None:
    """Remove what a killed process was writing with :func:`replacing`, in a folder and the folders in it.

    Args:
        folder: A folder that no other process writes into.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, ".partial-last-x1.ckpt").write_text("cut sho"), Path(folder, "a.txt").write_text("a")
        ...     forget_partial(folder)
        ...     print([f.name for f in Path(folder).iterdir()])
        ['a.txt']
    """
    for partial in Path(folder).rglob(f"{_PARTIAL}*"):
        partial.unlink(missing_ok=True)


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced, or those that a new file gets."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8 with Unix line ends, whole or not at all.

    A file's name that is no UTF-8 is written with escapes.

    Args:
        path: The file; its folder is made.
        text: Its content.

    Raises:
        OSError: If the file cannot be written; the old file stays as it was.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def check_writable(folder: str | Path) -> Path:
    """Raise if a folder cannot be made or written to. A command that takes long calls it before its work.

    Args:
        folder: The folder, which may not exist.

    Returns:
        The folder, or the nearest one above it that exists.

    Raises:
        ValueError: If the folder cannot be made or written to.
        OSError: If the disk is full; it names the folder.

    Example:
        >>> check_writable("no/such/folder") == Path.cwd()
        True
    """
    folder = Path(folder).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with named_in_errors(folder), tempfile.TemporaryFile(dir=existing):  # permissions alone do not say it
            return existing
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{folder} cannot be written: {existing} is not a folder that may be written to") from None


def utf8(path: str | Path) -> bool:
    """Return whether a path is text in UTF-8, without which PyTorch opens no file.

    Args:
        path: The path, as Python has it from the command line.

    Returns:
        True if it is.

    Example:
        >>> utf8("runs"), utf8(os.fsdecode(bytes([114, 255])))
        (True, False)
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def cache_folder(part: str) -> Path:
    """A folder in the user's cache folder, where this operating system has it.

    Args:
        part: Name of the folder, after its content, such as ``"help"``.

    Returns:
        The folder, which may not exist: ``~/.cache/nslightning/<part>`` on Linux, unless ``XDG_CACHE_HOME`` names
        another place than ``~/.cache``.

    Example:
        >>> cache_folder("help").parts[-2:]
        ('nslightning', 'help')
    """
    return user_cache_path("nslightning", appauthor=False) / part


def expanded(path: str | Path) -> Path:
    """A path as it was typed, ``~`` made a folder: a shell does that only at the beginning of a word.

    Args:
        path: The path.

    Returns:
        The path without ``~``.
    """
    return Path(path).expanduser()


@contextmanager
def stderr_to(path: str | Path) -> Iterator[None]:
    r"""Have processes that start meanwhile write their errors to the end of a file, and this one too.

    Args:
        path: The file.

    Yields:
        Nothing.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import subprocess
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with stderr_to(f"{folder}/errors.log"):
        ...         _ = subprocess.run("echo lost >&2", shell=True)
        ...     Path(folder, "errors.log").read_text()
        'lost\n'
    """
    with Path(path).open("ab") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
