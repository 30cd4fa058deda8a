"""Turns folders of images into shards, and compares shards with the folder that they were made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nslightning.data.folder import Folder
from nslightning.data.shards import MANIFEST, UNFINISHED, Manifest, Shard, Shards, names, pyarrow
from nslightning.data.verify import data_error
from nslightning.files import forget_partial, replacing, write_text

__all__ = ["convert", "verify"]

_SPLITS = ("train", "val", "test")
_READERS = 8  # threads that read files: a network's disk serves several at once


def _ignore(line: str) -> None:
    pass


@dataclass(frozen=True)
class _Part:
    """The images of one shard, before they are read."""

    file: str
    split: str
    samples: Sequence[tuple[str, int]]
    names: Sequence[str]
    sizes: Sequence[int]


def convert(folder: Path, out: Path, shard_bytes: int, tell: Callable[[str], None] = _ignore) -> Manifest:
    """Turn ``<folder>/<split>/<class>/<image>`` into shards.

    Each shard is in its place once it is whole. Where a conversion was interrupted, the same call keeps the shards that
    were written and goes on.

    Args:
        folder: The images.
        out: The folder of shards, to be made.
        shard_bytes: The size that a shard does not exceed, unless it holds a single image.
        tell: Takes a line on the progress.

    Returns:
        The contents of the new folder.

    Raises:
        DataError: If the folder is not of that form, a file cannot be read or changes meanwhile, or ``out`` holds a
            conversion of other files.
        ImportError: If pyarrow is not installed.
        OSError: If it cannot be written.
    """
    pyarrow()
    source = Folder(folder, f"{folder} must hold train/<class>/<image>, and val and test of the same classes.")
    classes, parts, listing = _plan(source, shard_bytes, tell)
    if (out / MANIFEST).exists():
        manifest = Shards(str(out)).manifest
        if manifest.listing != listing:
            fix = "Convert into another folder, or delete this one first."
            raise data_error(out, f"it holds shards already, of other files than {folder} has now", fix)
        return manifest
    _begin(out, {"listing": listing, "shard_bytes": shard_bytes}, folder)
    shards: dict[str, list[Shard]] = {}
    total, done = sum(len(part.samples) for part in parts), 0
    with ThreadPoolExecutor(_READERS) as readers:
        for number, part in enumerate(parts):
            tell(f"{done:,} of {total:,} images, {number} of {len(parts)} shards")
            if not _is_there(out, part):
                _write(out, part, readers)
            shards.setdefault(part.split, []).append(_described(out, part))
            done += len(part.samples)
    for split, files in shards.items():
        _describe_to_hugging_face(out, split, files, classes)
    write_text(out / "dataset_dict.json", json.dumps({"splits": list(shards)}) + "\n")
    manifest = Manifest(1, classes, listing, shards)
    write_text(out / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
    (out / UNFINISHED).unlink()
    return manifest


def _plan(source: Folder, shard_bytes: int, tell: Callable[[str], None]) -> tuple[list[str], list[_Part], str]:
    """The classes, the images of each shard, and a digest of all names and sizes."""
    listing = hashlib.sha256()
    parts: list[_Part] = []
    for split in filter(source.has, _SPLITS):
        tell(f"listing {split}")
        samples = source.samples(split)
        sizes = [Path(path).stat().st_size for path, _ in samples]
        named = [_name(path, source.root / split) for path, _ in samples]
        for name, size in zip(named, sizes, strict=True):
            listing.update(f"{split}/{name}\0{size}\n".encode())
        for number, (begin, end) in enumerate(_cuts(sizes, shard_bytes)):
            file, cut = f"{split}/{number:05d}.arrow", slice(begin, end)
            parts.append(_Part(file, split, samples[cut], named[cut], sizes[cut]))
    return source.classes("train"), parts, listing.hexdigest()


def _cuts(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Return where shards begin and end.

    Example:
        >>> list(_cuts([4, 4, 4, 9, 1], 8))
        [(0, 2), (2, 3), (3, 4), (4, 5)]
    """
    begin = total = 0
    for index, size in enumerate(sizes):
        if index > begin and total + size > most:
            yield begin, index
            begin, total = index, 0
        total += size
    yield begin, len(sizes)


def _name(path: str, folder: Path) -> str:
    """Class and file. Arrow's text is Unicode; of a name that is not, a sign stands for what it does not have."""
    return Path(path).relative_to(folder).as_posix().encode(errors="surrogateescape").decode(errors="replace")


def _begin(out: Path, settings: dict[str, Any], folder: Path) -> None:
    """Take a folder for a conversion; where one was interrupted it is to have been of the same files."""
    file = out / UNFINISHED
    if file.exists():
        before = json.loads(file.read_text())
        if before != settings:
            other = "other files" if before.get("listing") != settings["listing"] else "shards of another size"
            fix = "Give the options that it began with, or delete it."
            raise data_error(out, f"a conversion of {folder} was begun there, with {other}", fix)
        forget_partial(out)
        return
    if out.exists() and any(out.iterdir()):
        raise data_error(out, "the folder is not empty, and holds no shards", "Name a folder that is to be made.")
    write_text(file, json.dumps(settings) + "\n")


def _is_there(out: Path, part: _Part) -> bool:
    """Return whether a shard was written before an interruption."""
    file = out / part.file
    try:
        return file.exists() and names(file).to_pylist() == part.names
    except (OSError, ValueError):
        return False


def _write(out: Path, part: _Part, readers: ThreadPoolExecutor) -> None:
    pa = pyarrow()
    contents = list(readers.map(_read, (path for path, _ in part.samples), part.sizes))
    columns = [pa.array(contents, pa.binary()), pa.array(part.names, pa.string())]
    image = pa.StructArray.from_arrays(columns, ["bytes", "path"])
    labels = pa.array([label for _, label in part.samples], pa.int64())
    batch = pa.record_batch([image, labels], ["image", "label"])
    with (
        replacing(out / part.file) as partial,
        partial.open("wb") as file,
        pa.ipc.new_stream(file, batch.schema) as stream,
    ):
        stream.write_batch(batch)


def _read(path: str, size: int) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        fix = "Mend or delete it; the same command goes on."
        raise data_error(path, f"it cannot be read ({error.strerror})", fix) from None
    if len(content) != size:
        raise data_error(path, "it changed while the folder was converted", "Start again, with the folder left alone.")
    return content


def _described(out: Path, part: _Part) -> Shard:
    file = out / part.file
    return Shard(part.file, len(part.samples), file.stat().st_size, _digest(file))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe_to_hugging_face(out: Path, split: str, shards: Sequence[Shard], classes: list[str]) -> None:
    """The two files by which ``datasets.load_from_disk`` knows what a folder holds."""
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    state: dict[str, Any] = {
        "_data_files": [{"filename": Path(shard.file).name} for shard in shards],
        "_fingerprint": hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()[:16],
        **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
        "_split": split,
    }
    for name, content in (("dataset_info", {"features": features}), ("state", state)):
        write_text(out / split / f"{name}.json", json.dumps(content, indent=1) + "\n")


def verify(out: Path, folder: Path | None = None, tell: Callable[[str], None] = _ignore) -> Manifest:
    """Hold shards against their list and, where it is at hand, against the folder that they were made of.

    Each file is to have its digest, each label is to be one of the classes. With the folder, each image is to have the
    bytes, the name and the class of its file.

    Args:
        out: The folder of shards.
        folder: The images.
        tell: Takes a line on the progress.

    Returns:
        The contents of the folder of shards.

    Raises:
        DataError: If anything differs; the message names the first.
    """
    shards = Shards(str(out))
    manifest = shards.manifest
    fix = "Delete these shards and convert the folder again."
    source = None
    if folder is not None:
        source = Folder(folder, f"{folder} is to be the folder that {out} was made of.")
        if (splits := list(filter(source.has, _SPLITS))) != list(manifest.splits):
            failed = f"splits: {', '.join(manifest.splits)}, and {folder} has {', '.join(splits)}"
            raise data_error(out, failed, fix)
        if source.classes("train") != manifest.classes:
            failed = f"classes: {len(manifest.classes)}, not the {len(source.classes('train'))} of {folder}"
            raise data_error(out, failed, fix)
    for split, files in manifest.splits.items():
        for number, shard in enumerate(files):
            tell(f"{split}: {number} of {len(files)} shards")
            if not (out / shard.file).exists() or _digest(out / shard.file) != shard.sha256:
                raise data_error(out / shard.file, "sum: it is not the file that was written", fix)
        samples = shards.samples(split)
        if any(not 0 <= label < len(manifest.classes) for _, label in samples):
            raise data_error(out / split, "classes: a label names no class", fix)
        if folder is None or source is None:
            continue
        files_there = source.samples(split)
        if len(files_there) != len(samples):
            failed = f"count: {len(samples):,} images, and {folder / split} has {len(files_there):,}"
            raise data_error(out / split, failed, fix)
        written = (name for shard in files for name in names(out / shard.file).to_pylist())
        rows = zip(samples, files_there, written, strict=True)
        for index, ((image, label), (path, expected), name) in enumerate(rows):
            if index % 1000 == 0:
                tell(f"{split}: {index:,} of {len(samples):,} images compared")
            same = name == _name(path, source.root / split) and label == expected
            if not same or image.read() != Path(path).read_bytes():
                raise data_error(image, f"it is not {path}", fix)
    return manifest
