"""Libraries for data in shards, side by side: ``python -m benchmarks.shards IMAGES WORK --out FILE``.

Each library that is installed converts a folder of JPEGs, and then serves it in the ways that it offers: image by image
in our own order, and in its own shuffled order. Measured are images per second from bytes alone, and of batches that
two workers decode and crop: by the clock, and per second of all processes' computing, which other programs on the
machine do not lengthen. Two questions have an answer of yes or no, by comparing the order of bytes: is an epoch's order
the same with another number of workers, and does an interrupted epoch go on in the same order under another number of
workers? Where two libraries need different versions of NumPy, each runs in its own environment; the folder itself
is measured in every run.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.machine import describe

BATCH, WORKERS, SHARD_BYTES = 64, 2, 8_000_000
Item = tuple[bytes, int]


class ByIndex(Dataset[Any]):
    """Items by their number.

    Args:
        get: Reads the bytes and the label of an item.
        count: Number of items.
        decode: Whether an item is the cropped image, or a digest of its bytes.
    """

    def __init__(self, get: Callable[[int], Item], count: int, decode: bool) -> None:
        self.get, self.count, self.decode = get, count, decode

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return finished(self.get(index), self.decode)


def finished(item: Item, decode: bool) -> tuple[Any, int]:
    """The image, cropped, or a number that stands for its bytes."""
    content, label = item
    if not decode:
        return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest()), label
    image = Image.open(io.BytesIO(content)).convert("RGB")
    crop = v2.Compose([v2.RandomResizedCrop(176), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return crop(image), label


def rate(items: Iterable[Any], size: Callable[[Any], int]) -> tuple[float, float]:
    """Images of one pass per second by the clock, and per second of computing, the workers' included."""
    begin, computed = time.perf_counter(), computing()
    count = sum(size(item) for item in items)
    return count / (time.perf_counter() - begin), count / (computing() - computed)


def computing() -> float:
    """Seconds that this process and its processes that ended have computed."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(use.ru_utime + use.ru_stime for use in map(resource.getrusage, who))


def keys(batches: Iterable[Any]) -> list[int]:
    """The images of batches, each by the number that stands for its bytes."""
    return [int(key) for batch in batches for key in batch[0]]


class Way:
    """One way in which a library serves images.

    Attributes:
        name: In the table.
        indexed: Whether it serves an image by its number.
    """

    name: str
    indexed = True

    def write(self, samples: Sequence[tuple[str, int]], folder: Path) -> None:
        """Convert images."""
        raise NotImplementedError

    def getter(self, folder: Path) -> tuple[Callable[[int], Item], int]:
        """A function that reads an image by its number, and the number of images."""
        raise NotImplementedError

    def stream(self, folder: Path, decode: bool, workers: int) -> Any:
        """A loader of shuffled batches in the library's own order."""
        raise NotImplementedError

    def resumed(self, folder: Path, before: int, workers: tuple[int, int]) -> list[int] | None:
        """The images that come after an interruption, with other workers; None where the library keeps no state."""
        return None


class Folder(Way):
    """The folder of JPEGs itself."""

    name = "folder of files"

    def write(self, samples: Sequence[tuple[str, int]], folder: Path) -> None:
        self.samples = samples

    def getter(self, folder: Path) -> tuple[Callable[[int], Item], int]:
        samples = self.samples

        def get(index: int) -> Item:
            path, label = samples[index]
            return Path(path).read_bytes(), label

        return get, len(samples)


class Arrow(Way):
    """Arrow files as Hugging Face datasets keeps them, read by pyarrow: our `nslightning shards`."""

    name = "Arrow, read by pyarrow"

    def write(self, samples: Sequence[tuple[str, int]], folder: Path) -> None:
        import pyarrow as pa

        folder.mkdir()
        image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema({"image": image, "label": pa.int64()})
        for number, part in enumerate(parts(samples)):
            rows = [{"image": {"bytes": Path(p).read_bytes(), "path": Path(p).name}, "label": y} for p, y in part]
            with pa.OSFile(str(folder / f"{number:05d}.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as out:
                out.write_table(pa.Table.from_pylist(rows, schema))

    def getter(self, folder: Path) -> tuple[Callable[[int], Item], int]:
        import pyarrow as pa

        tables = [pa.ipc.open_stream(pa.memory_map(str(f))).read_all() for f in sorted(folder.glob("*.arrow"))]
        table = pa.concat_tables(tables)
        images, labels = table["image"], table["label"].to_numpy()
        chunks = [chunk.field("bytes") for chunk in images.chunks]
        starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

        def get(index: int) -> Item:
            chunk = int(np.searchsorted(starts, index, "right")) - 1
            return chunks[chunk][index - starts[chunk]].as_py(), int(labels[index])

        return get, len(labels)


class HuggingFace(Way):
    """Hugging Face datasets."""

    name = "datasets"

    def write(self, samples: Sequence[tuple[str, int]], folder: Path) -> None:
        import datasets

        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})

        def rows(samples: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
            for path, label in samples:
                yield {"image": {"bytes": Path(path).read_bytes(), "path": None}, "label": label}

        made = datasets.Dataset.from_generator(
            rows, features=features, cache_dir=str(folder / "cache"), gen_kwargs={"samples": list(samples)}
        )
        made.save_to_disk(folder / "shards", max_shard_size=SHARD_BYTES)

    def getter(self, folder: Path) -> tuple[Callable[[int], Item], int]:
        import datasets

        data = datasets.load_from_disk(folder / "shards")

        def get(index: int) -> Item:
            row = data[index]
            return row["image"]["bytes"], row["label"]

        return get, len(data)

    def stream(self, folder: Path, decode: bool, workers: int) -> Any:
        import datasets

        data = datasets.load_from_disk(folder / "shards").to_iterable_dataset(num_shards=8)
        data = data.shuffle(seed=0, buffer_size=1000)
        data = data.map(Row(decode), remove_columns=["image", "label"])
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(data.with_format("torch"), batch_size=BATCH, num_workers=workers, collate_fn=collate)

    def resumed(self, folder: Path, before: int, workers: tuple[int, int]) -> list[int] | None:
        return resumed(self, folder, before, workers)


class Row:
    """Finishes a row, in a form that pickles."""

    def __init__(self, decode: bool) -> None:
        self.decode = decode

    def __call__(self, row: Any) -> Any:
        x, y = finished((row["image"]["bytes"], row["label"]), self.decode)
        return {"x": x, "y": y}


def collate(rows: Sequence[Any]) -> tuple[Any, Any]:
    return torch.stack([torch.as_tensor(r["x"]) for r in rows]), torch.tensor([int(r["y"]) for r in rows])


def resumed(way: Way, folder: Path, before: int, workers: tuple[int, int]) -> list[int]:
    """Take some batches, keep the loader's state, and go on from it in a loader with other workers."""
    first = way.stream(folder, False, workers[0])
    iterator = iter(first)
    for _ in range(before):
        next(iterator)
    state = first.state_dict()
    del iterator
    second = way.stream(folder, False, workers[1])
    second.load_state_dict(state)
    return keys(second)


class LitData(Way):
    """litdata."""

    name = "litdata"

    def write(self, samples: Sequence[tuple[str, int]], folder: Path) -> None:
        import litdata

        folder.mkdir()
        cache = litdata.streaming.cache.Cache(str(folder), chunk_bytes=SHARD_BYTES)
        for index, (path, label) in enumerate(samples):
            cache[index] = {"bytes": Path(path).read_bytes(), "label": label}
        cache.done()
        cache.merge()

    def getter(self, folder: Path) -> tuple[Callable[[int], Item], int]:
        import litdata

        data = litdata.StreamingDataset(str(folder))

        def get(index: int) -> Item:
            row = data[index]
            return row["bytes"], int(row["label"])

        return get, len(data)

    def stream(self, folder: Path, decode: bool, workers: int) -> Any:
        import litdata

        def transform(row: Any) -> Any:
            return finished((row["bytes"], int(row["label"])), decode)

        data = litdata.StreamingDataset(str(folder), shuffle=True, seed=0, transform=transform)
        return litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=workers)

    def resumed(self, folder: Path, before: int, workers: tuple[int, int]) -> list[int] | None:
        return resumed(self, folder, before, workers)


class Mosaic(Way):
    """mosaicml-streaming."""

    name = "mosaicml-streaming"

    def write(self, samples: Sequence[tuple[str, int]], folder: Path) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}, size_limit=SHARD_BYTES) as out:
            for path, label in samples:
                out.write({"image": Path(path).read_bytes(), "label": label})

    def _data(self, folder: Path, **options: Any) -> Any:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        return StreamingDataset(local=str(folder), batch_size=BATCH, shuffle_seed=0, num_canonical_nodes=1, **options)

    def getter(self, folder: Path) -> tuple[Callable[[int], Item], int]:
        data = self._data(folder, shuffle=False)

        def get(index: int) -> Item:
            row = data.get_item(index)
            return row["image"], row["label"]

        return get, data.num_samples

    def stream(self, folder: Path, decode: bool, workers: int) -> Any:
        from streaming import StreamingDataLoader

        def made(rows: Sequence[Any]) -> Any:
            ready = [finished((row["image"], row["label"]), decode) for row in rows]
            return torch.stack([torch.as_tensor(x) for x, _ in ready]), torch.tensor([y for _, y in ready])

        data = self._data(folder, shuffle=True)
        return StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=made)

    def resumed(self, folder: Path, before: int, workers: tuple[int, int]) -> list[int] | None:
        return resumed(self, folder, before, workers)


class WebDataset(Way):
    """webdataset."""

    name = "webdataset"
    indexed = False

    def write(self, samples: Sequence[tuple[str, int]], folder: Path) -> None:
        import webdataset

        folder.mkdir()
        with webdataset.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as out:
            for index, (path, label) in enumerate(samples):
                out.write({"__key__": f"{index:08d}", "jpg": Path(path).read_bytes(), "cls": str(label).encode()})

    def stream(self, folder: Path, decode: bool, workers: int) -> Any:
        import webdataset

        def made(row: Any) -> Any:
            return finished((row["jpg"], int(row["cls"])), decode)

        urls = [str(file) for file in sorted(folder.glob("*.tar"))]
        data = webdataset.WebDataset(urls, shardshuffle=100, seed=0, detshuffle=True).shuffle(1000).map(made)
        return DataLoader(data, batch_size=BATCH, num_workers=workers)


WAYS: dict[str, tuple[str | None, type[Way]]] = {
    "folder": (None, Folder),
    "arrow": ("pyarrow", Arrow),
    "datasets": ("datasets", HuggingFace),
    "litdata": ("litdata", LitData),
    "mosaicml-streaming": ("streaming", Mosaic),
    "webdataset": ("webdataset", WebDataset),
}


def parts(samples: Sequence[tuple[str, int]]) -> Iterator[Sequence[tuple[str, int]]]:
    """Images in parts of about the size of a shard."""
    begin = size = 0
    for index, (path, _) in enumerate(samples):
        if size and size + Path(path).stat().st_size > SHARD_BYTES:
            yield samples[begin:index]
            begin, size = index, 0
        size += Path(path).stat().st_size
    yield samples[begin:]


def measure(way: Way, samples: Sequence[tuple[str, int]], folder: Path, rounds: int) -> dict[str, Any]:
    """All that the table says of one way."""
    begin = time.perf_counter()
    way.write(samples, folder)
    row: dict[str, Any] = {"convert_s": time.perf_counter() - begin}
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    if way.indexed:
        get, count = way.getter(folder)
        assert count == len(samples)
        for index in (0, 1, count // 2, count - 1):
            assert get(index) == (Path(samples[index][0]).read_bytes(), samples[index][1]), (way.name, index)
        row["indexed_bytes"] = [rate((get(i) for i in order), lambda _: 1) for _ in range(rounds)]
        loader = DataLoader(ByIndex(get, count, True), BATCH, sampler=order, num_workers=WORKERS)
        row["indexed_batches"] = [rate(loader, lambda batch: len(batch[1])) for _ in range(rounds)]
    try:
        loader = way.stream(folder, True, WORKERS)
    except NotImplementedError:
        return row
    row["own_batches"] = [rate(loader, lambda batch: len(batch[1])) for _ in range(rounds)]
    one, two = (keys(way.stream(folder, False, workers)) for workers in (1, 2))
    row["own_order_whole"] = [len(set(one)), len(set(two)), len(samples)]
    row["own_order_same_with_other_workers"] = one == two
    before = 10
    try:
        rest = way.resumed(folder, before, (2, 1))
    except Exception as error:  # whatever a library refuses with
        row["resume_with_other_workers"] = f"refused: {type(error).__name__}: {str(error)[:200]}"
        return row
    if rest is None:
        row["resume_with_other_workers"] = "no state"
    else:
        seen = set(two[: before * BATCH])
        row["resume_with_other_workers"] = {
            "same order": rest == two[before * BATCH :],
            "seen twice": len(seen & set(rest)),
            "never seen": len(set(two) - seen - set(rest)),
        }
    return row


def best(rates: Sequence[tuple[float, float]]) -> list[int]:
    """The largest of each kind of rate: what disturbs a pass only slows it down."""
    return [round(max(kind)) for kind in zip(*rates, strict=True)]


def main() -> None:
    """Measure what is installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="A folder of class folders of JPEGs.")
    parser.add_argument("work", type=Path, help="An empty folder for shards.")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    samples = ImageFolder(arguments.images).samples
    samples = [samples[i] for i in torch.randperm(len(samples), generator=torch.Generator().manual_seed(1)).tolist()]
    rows: dict[str, Any] = {}
    for name in ["folder", *(name for name in arguments.only if name != "folder")]:
        package, kind = WAYS[name]
        if package is not None and importlib.util.find_spec(package) is None:
            continue
        folder = arguments.work / name
        shutil.rmtree(folder, ignore_errors=True)
        row = measure(kind(), samples, folder, arguments.rounds)
        distribution = {"arrow": "pyarrow", "folder": "torchvision"}.get(name, name)
        rows[name] = {"version": version(distribution), **row}
        shown = {k: best(v) if k.endswith(("bytes", "batches")) else v for k, v in row.items()}
        print(kind.name, shown, flush=True)
    if arguments.out is not None:
        content = {"machine": describe("cpu"), "images": len(samples), "workers": WORKERS, "ways": rows}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
