"""The order of the items: a function of seed, epoch and position alone.

An item is an image, or a block of tokens. A training draw is one integer, ``epoch * items + index``: it tells
the data set which item to read *and* which augmentation to apply, in whatever worker or process it is read. Where an
epoch sees an image several times, ``epoch * repeats + repeat`` takes the place of ``epoch``.
"""

import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

Batch = tuple[Tensor, Tensor]

ORDER, AUGMENT, HOLDOUT, PIXELS, ERASE = 1, 2, 3, 4, 5  # what a generator is for: the streams of one seed must differ


def _seed(purpose: int, *key: int) -> int:
    return int(np.random.SeedSequence((purpose, *key)).generate_state(1, np.uint64)[0])


def generator(purpose: int, *key: int) -> torch.Generator:
    """A separate CPU random generator for one purpose.

    Args:
        purpose: ``ORDER``, ``AUGMENT``, ``HOLDOUT``, ``PIXELS`` or ``ERASE``.
        key: Non-negative integers, such as seed and epoch.

    Returns:
        The generator; the global ones are left alone.

    >>> a, b = (torch.randperm(9, generator=generator(ORDER, 0, 3)) for _ in range(2))
    >>> torch.equal(a, b)
    True
    """
    return torch.Generator().manual_seed(_seed(purpose, *key))


@contextmanager
def seeded(purpose: int, *key: int) -> Iterator[None]:
    """Seed the global CPU streams of torch, NumPy and Python inside the block, and put their states back afterwards.

    For code that draws from them: torchvision's transforms from torch's, timm's from the others. ``torch.manual_seed``
    would also reseed the GPUs.

    Args:
        purpose: ``ORDER``, ``AUGMENT``, ``HOLDOUT``, ``PIXELS`` or ``ERASE``.
        key: Non-negative integers, such as seed, epoch and index.

    Yields:
        Nothing.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 # the stream that timm reads
    seed = _seed(purpose, *key)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 # the stream that timm reads
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002 # the stream that timm reads


class Draws(Dataset[Batch]):
    """A data set that serves a whole batch for a list of draws.

    Attributes:
        in_memory: Whether items cost so little to serve that workers would only slow it down.
        repeats: Number of times that one epoch of training sees an item.
    """

    in_memory: ClassVar[bool] = False
    repeats: int = 1

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch.

        Args:
            draws: ``epoch * len(self) + index`` for every item.

        Returns:
            Inputs and targets, each with one row per draw.
        """
        raise NotImplementedError

    def __getitem__(self, draw: int) -> Batch:
        inputs, targets = self.__getitems__([draw])
        return inputs[0], targets[0]


class TrainSampler(DistributedSampler[int]):
    """One process's share of a permutation that depends on (seed, epoch) only.

    Process r of W takes positions r, r+W, ...: the W batches of a step together are the batch that one
    process with ``W * batch_size`` would take. The last, smaller batch is kept, as the papers do, but what
    W does not divide (at most W-1 items, others in every epoch) is left out, and so is a last batch of a
    single item per process, which batch normalisation cannot train on. Nothing is padded: every item is
    seen at most once an epoch, and the mean of the processes' gradients is the gradient of the union.

    It is a ``DistributedSampler`` so that Lightning leaves it in place under DDP.

    Args:
        dataset: The data set; its length alone matters.
        batch_size: Items per batch of one process.
        seed: Seed of the order.
        rank: This process.
        world: The number of processes.
        repeats: Number of times that an epoch sees an item; the repeats follow each other, so that they go to different
            processes, and the epoch holds one item of ``repeats``.

    >>> list(TrainSampler(range(6), 3, seed=0)) == list(TrainSampler(range(6), 3, seed=0))
    True
    >>> sorted(n % 6 for n in TrainSampler(range(6), 3, seed=0, repeats=3))
    [0, 0, 0, 2, 2, 2]
    >>> len(TrainSampler(range(7), 2, seed=0, rank=1, world=2))  # not 7 / 2 but 3, less a batch of one item
    2
    """

    def __init__(
        self, dataset: Sized, batch_size: int, seed: int, rank: int = 0, world: int = 1, repeats: int = 1
    ) -> None:
        super().__init__(dataset, world, rank, seed=seed)  # type: ignore[arg-type] # only its len matters
        self.items, self.repeats = len(dataset), repeats
        if self.items < repeats:
            raise ValueError(f"{self.items} items cannot be repeated {repeats} times in an epoch of as many draws")
        self.num_samples = self.items // repeats * repeats // world
        if self.num_samples > batch_size > 1 and self.num_samples % batch_size == 1:
            self.num_samples -= 1
        self.start = 0  # draws of this process to pass over, when an epoch is resumed

    def order(self) -> Tensor:
        """The items that this process takes in the sampler's epoch, in their order.

        Returns:
            Indices, int64, shape ``(len(self) - start,)``.
        """
        order = torch.randperm(self.items, generator=generator(ORDER, self.seed, self.epoch))
        return self._mine(order[: self.items // self.repeats].repeat_interleave(self.repeats))

    def __iter__(self) -> Iterator[int]:
        repeat = torch.arange(self.repeats).repeat(self.items // self.repeats)
        times = self._mine(self.epoch * self.repeats + repeat)
        return iter((times * self.items + self.order()).tolist())

    def _mine(self, draws: Tensor) -> Tensor:
        """Return this process's share of the draws."""
        return draws[self.rank : self.num_samples * self.num_replicas : self.num_replicas][self.start :]

    def __len__(self) -> int:
        return self.num_samples


class EvalSampler(DistributedSampler[int]):
    """Every item exactly once over all processes: r, r+W, ... for process r of W, nothing padded.

    Args:
        dataset: The data set; its length alone matters.
        rank: This process.
        world: The number of processes.

    >>> [list(EvalSampler(range(5), rank, 2)) for rank in (0, 1)]
    [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Sized, rank: int = 0, world: int = 1) -> None:
        super().__init__(dataset, world, rank, shuffle=False)  # type: ignore[arg-type] # only its len
        self.mine = range(rank, len(dataset), world)

    def order(self) -> Tensor:
        """The items of this process, in their order.

        Returns:
            Indices, int64, shape ``(len(self),)``.
        """
        return torch.arange(self.mine.start, self.mine.stop, self.mine.step)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.mine)

    def __len__(self) -> int:
        return len(self.mine)


def even_batch_size(items: int, world: int, wanted: int) -> int:
    """The batch size nearest to the wanted one with which every process has the same number of batches.

    DDP broadcasts batch norm's buffers in every forward, Lightning's validation included: with different
    numbers of batches the processes' collectives would not match, which may hang.

    Args:
        items: The number of items, shared out as ``EvalSampler`` does.
        world: The number of processes.
        wanted: The batch size asked for.

    Returns:
        A batch size, ``wanted`` itself with one process.

    >>> even_batch_size(10_000, 2, 100), even_batch_size(10_001, 2, 100)
    (100, 99)
    """
    if world == 1:
        return wanted
    # The last round of world * size images must leave at least one for each process.
    sizes = range(1, max(wanted, -(-items // world)) + 1)
    return min((n for n in sizes if (items - 1) % (world * n) >= world - 1), key=lambda n: abs(n - wanted))
