"""The common LightningDataModule and its resumable training loader."""

import signal
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import BatchSampler, DataLoader

from nslightning.data.ahead import ahead
from nslightning.data.images import FileImages, Normalisation, TensorImages
from nslightning.data.sampler import Batch, Draws, EvalSampler, TrainSampler, even_batch_size

TIMEOUT = 600.0  # seconds without a batch: a disk, or a network, does not answer

Split = Literal["train", "val", "test"]
_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}


def _whole(batch: Batch) -> Batch:
    """The collate function: ``__getitems__`` already returns a batch."""
    return batch


class Loader(DataLoader[Batch]):
    """A DataLoader whose batches are made, or finished, on the device that trains.

    Of images in memory, batches are made where the images are. The order of an epoch goes to that device once; a step
    then takes no transfer, no worker and no list of numbers. Images from files come from workers as bytes, are copied
    to a CUDA device while it works on the batch before, and normalised there.
    """

    device: torch.device | None = None  # that trains

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # a generator
        images, sampler = self.dataset, self.sampler
        by_itself = type(self.batch_sampler) is BatchSampler and self.num_workers == 0 and self.batch_size is not None
        if by_itself and isinstance(images, TensorImages) and isinstance(sampler, TrainSampler | EvalSampler):
            assert self.batch_size is not None
            for index in sampler.order().to(images.device).split(self.batch_size):
                yield images.batch(index, sampler.epoch)
        elif isinstance(images, FileImages):
            yield from self._normalised(images)
        else:
            yield from super().__iter__()

    def _normalised(self, images: FileImages) -> Iterator[Batch]:
        on_cuda = self.device is not None and self.device.type == "cuda"
        normalise: Normalisation | None = None
        batches: Iterator[Batch] = super().__iter__()
        for x, y in ahead(batches, self.device) if on_cuda and self.device is not None else batches:
            if x.dtype == torch.uint8:
                normalise = normalise or Normalisation(images.preprocessing.mean, images.preprocessing.std, x.device)
                x = normalise(x)
            yield x, y


def _survive_the_stop(worker: int) -> None:
    """Let a worker outlive the first SIGTERM, and say nothing when its reader stops in the middle of a batch.

    A batch system sends it to all processes of a job. The training stops at its next step, for which it needs its
    workers: a validation that they are killed in is neither done nor undone. They end with their loader, which sends
    SIGTERM to those that do not.

    A thread of multiprocessing's hands the batches over. Where the training stops while it takes one, that thread
    prints a traceback of a connection that was reset, though nothing is lost.

    Args:
        worker: The worker's number, from the loader.
    """

    def first(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def unless_reader_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    signal.signal(signal.SIGTERM, first)
    sys.excepthook = unless_reader_stopped  # called by that thread alone: the loader passes on a worker's own errors


class TrainLoader(Loader):
    """A loader that Lightning resumes in the middle of an epoch.

    Lightning counts the batches that were trained on; the loader starts an interrupted epoch at that count.
    Nothing is read before the first batch is asked for, because on resume Lightning makes the iterator
    before it sets the sampler's epoch and its own count.
    """

    trainer: Trainer | None = None
    _interrupted: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The settings that must be the same for an interrupted epoch to go on.

        Returns:
            The number of items, the batch over all processes, and the seed.
        """
        sampler = self.sampler
        if not isinstance(sampler, TrainSampler):  # `overfit_batches` puts a SequentialSampler here
            return {}
        batch = (self.batch_size or 1) * sampler.num_replicas
        state = {"items": sampler.items, "batch_size x processes": batch, "seed": sampler.seed}
        return state if sampler.repeats == 1 else {**state, "repeats": sampler.repeats}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the next epoch an interrupted one.

        Args:
            state: The dict that ``state_dict`` returned when the checkpoint was written.

        Raises:
            ValueError: If an epoch was interrupted whose batches were others.
        """
        self._interrupted = state
        # Of an epoch that would have fewer batches now than were trained on, Lightning asks for no batch at all.
        progress = None if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress
        if progress is not None and not progress.is_last_batch:
            self._refuse_others(progress.current.ready, state)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override] # a generator
        start = 0
        if (state := self._interrupted) is not None:
            self._interrupted = None
            start = self._batches_done()
            self._refuse_others(start, state)
        if isinstance(self.sampler, TrainSampler):
            self.sampler.start = start * (self.batch_size or 1)
        yield from super().__iter__()

    def _refuse_others(self, start: int, state: dict[str, Any]) -> None:
        """Raise where the rest of an epoch is not known."""
        if start and state != self.state_dict():
            raise ValueError(
                f"the checkpoint was written after {start} batches of an epoch with {state}, and this run"
                f" has {self.state_dict()}: the rest of that epoch is not known. Resume with as many images a step"
                " over all processes and the same other --data options, or from a checkpoint of an epoch's end."
            )

    def _batches_done(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready


class ResumableDataModule(LightningDataModule, ABC):
    """Items, images or blocks of tokens, in batches of inputs and targets.

    The content of a training batch depends on (seed, epoch, position) only: not on the number of workers or
    processes, nor on interruptions; the global random streams are neither read nor moved.

    Args:
        batch_size: Training items per batch of one process.
        eval_batch_size: Items per batch in validation and test.
        workers: Processes that read items. With 0, items in memory are kept on the device that trains, where their
            batches are made.
        seed: Seed of the order and of the augmentation.
        timeout: Seconds without a batch from the workers after which the run ends; 0 waits without end.

    Attributes:
        name: Short name of the data set.
        items: Plural noun for its items in messages, such as ``images``.
    """

    name: str
    items: ClassVar[str]

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        workers: int = 0,
        seed: int = 0,
        timeout: float = TIMEOUT,
    ) -> None:
        super().__init__()
        for argument, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("workers", workers, 0),
            ("seed", seed, 0),
            ("timeout", timeout, 0),
        ):
            if value < least:
                raise ValueError(f"{argument} is {value}; it must be at least {least}")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.workers, self.seed, self.timeout = workers, seed, timeout
        self.folder: Path | None = None
        self.variant = "official"
        self.verified = False
        self.validation = f"its own {self.items}"
        self._loaded: dict[Split, Draws] = {}
        self._placed: dict[Split, TensorImages] = {}  # on the device that trains

    @abstractmethod
    def _load(self, split: Split) -> Draws:
        """Check and read one split, and note the values of ``provenance``."""

    @property
    def provenance(self) -> dict[str, Any]:
        """A description of the data for a run's record; complete once ``setup`` has run.

        Returns:
            ``dataset``, ``variant``, ``verified`` (were the files compared with what is published, and are
            they equal), ``counts`` of the splits read, ``folder``, and ``validation``: where its items
            come from.
        """
        return {
            "dataset": self.name,
            "variant": self.variant,
            "verified": self.verified,
            "counts": {split: len(items) for split, items in self._loaded.items()},
            "folder": None if self.folder is None else str(self.folder),
            "validation": self.validation,
        }

    def setup(self, stage: str) -> None:
        """Read what a stage needs.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        for split in _SPLITS[stage]:
            self._split(split)

    def _split(self, split: Split) -> Draws:
        if split not in self._loaded:
            self._loaded[split] = self._load(split)
        return self._loaded[split]

    def _on_device(self, split: Split) -> Draws:
        """A split; where it is in memory and no worker serves it, on the device that trains."""
        items = self._split(split)
        if isinstance(items, FileImages):
            items.as_bytes = self._device is not None and self._device.type == "cuda" and not items.erases
        if self.trainer is None or self.workers or not isinstance(items, TensorImages):
            return items
        placed = self._placed.get(split)
        assert self._device is not None
        if placed is None or placed.device != self._device:
            placed = self._placed[split] = items.to(self._device)
        return placed

    @property
    def _device(self) -> torch.device | None:
        return None if self.trainer is None else self.trainer.strategy.root_device

    def teardown(self, stage: str) -> None:
        """Free what was kept on a device.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
        """
        self._placed.clear()

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches, this process's share.

        Returns:
            The loader.
        """
        items = self._on_device("train")
        rank, world = self._place(items)
        sampler = TrainSampler(items, self.batch_size, self.seed, rank, world, items.repeats)
        loader = TrainLoader(items, batch_size=self.batch_size, sampler=sampler, **self._options(items))
        loader.trainer, loader.device = self.trainer, self._device
        return loader

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, this process's share.

        Returns:
            The loader.
        """
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches, this process's share.

        Returns:
            The loader.
        """
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test batches.

        Returns:
            The loader.
        """
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: Split) -> DataLoader[Batch]:
        items = self._on_device(split)
        rank, world = self._place(items)
        size = even_batch_size(len(items), world, self.eval_batch_size)
        sampler = EvalSampler(items, rank, world)
        # Keywords, because Lightning makes another loader for `predict` and passes batch_size itself.
        loader = Loader(items, batch_size=size, sampler=sampler, **self._options(items))
        loader.device = self._device
        return loader

    def _place(self, items: Draws) -> tuple[int, int]:
        """Rank of this process and number of processes."""
        if self.trainer is None:
            return 0, 1
        rank, world = self.trainer.global_rank, self.trainer.world_size
        if len(items) < world:
            raise ValueError(f"{self.name}: {len(items)} {self.items} cannot be shared by {world} processes")
        return rank, world

    def _options(self, items: Draws) -> dict[str, Any]:
        if items.in_memory:
            # Lightning's advice to use many workers is wrong for items in memory: they are served faster
            # without.
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
        return {
            "collate_fn": _whole,
            "num_workers": self.workers,
            "worker_init_fn": _survive_the_stop if self.workers else None,
            "persistent_workers": self.workers > 0,
            "timeout": self.timeout if self.workers else 0,
            "pin_memory": torch.cuda.is_available() and not (isinstance(items, TensorImages) and not self.workers),
            "generator": torch.Generator(),  # else its workers' seed is drawn from the global generator
        }


class ImageDataModule(ResumableDataModule):
    """Images for classification; batches are ``(images, labels)``: float32 ``(N, C, H, W)``, int64 ``(N,)``.

    Args:
        batch_size: Training images per batch of one process.
        eval_batch_size: Images per batch in validation and test.
        workers: Processes that read images. With 0, images in memory are kept on the device that trains, as bytes, and
            cropped, flipped and normalised there.
        seed: Seed of the order and of the augmentation.

    Attributes:
        name: Short name of the data set.
        num_classes: Number of classes.
        image_shape: Channels, height and width of an image.
    """

    items: ClassVar[str] = "images"
    num_classes: int
    image_shape: tuple[int, int, int]

    @property
    def summary(self) -> str:
        """Describe a batch in a few words.

        Returns:
            Such as ``images of 3x32x32, 10 classes``.
        """
        return f"images of {'x'.join(map(str, self.image_shape))}, {self.num_classes} classes"
