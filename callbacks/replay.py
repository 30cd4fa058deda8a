"""Running a training step again, without a trace."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

__all__ = ["NoLossError", "ReplayedStep", "silent", "takes_iterator"]


class NoLossError(ValueError):
    """A training step returned no loss, by which Lightning skips it."""


def takes_iterator(module: LightningModule) -> bool:
    """Return whether a training step fetches its batches by itself, from an iterator.

    Args:
        module: The module trained.

    Returns:
        True for ``training_step(self, dataloader_iter)``.
    """
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)


class ReplayedStep(nn.Module):
    """A training step as a module of its batch, with the scaled loss for output.

    Args:
        module: The module trained.
        batch_idx: The number of its batch.
        scale: Multiplies the loss.
    """

    def __init__(self, module: LightningModule, batch_idx: int, scale: float = 1.0) -> None:
        super().__init__()
        self.module, self.batch_idx, self.scale = module, batch_idx, scale

    def forward(self, batch: Any) -> Tensor:
        """Run the step.

        Args:
            batch: A training batch; for a step that takes an iterator, all that it fetched, in order.

        Returns:
            The loss, a 0-d tensor.

        Raises:
            NoLossError: If the step returns none.
        """
        step = self.module.training_step
        if takes_iterator(self.module):
            out = step(Replayed(batch))
        elif is_param_in_hook_signature(step, "batch_idx", min_args=2):  # as Lightning itself decides it
            out = step(batch, self.batch_idx)
        else:
            out = step(batch)
        loss = out.get("loss") if isinstance(out, dict) else out
        if not isinstance(loss, Tensor):
            raise NoLossError(f"training_step returned {type(loss).__name__} for a loss")
        return loss.sum() * self.scale


class Replayed(Iterator[Any]):
    """Hands out what was fetched before, as the iterator of Lightning that a step takes.

    Args:
        fetched: The batches that the iterator handed out in one step.
    """

    def __init__(self, fetched: Sequence[Any]) -> None:
        self._left = list(fetched)

    @property
    def done(self) -> bool:
        """Return whether nothing is left."""
        return not self._left

    def __next__(self) -> Any:
        if not self._left:
            raise StopIteration
        return self._left.pop(0)


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Let a module log nothing inside the block, and its metrics count nothing.

    Args:
        module: The module trained.
    """
    module.log = lambda *_, **__: None  # type: ignore[method-assign] # of this instance
    with ExitStack() as metrics:
        for metric in _metrics(module):
            metrics.enter_context(_as_it_was(metric))
        try:
            yield
        finally:
            del module.log


def _metrics(module: nn.Module) -> list[Metric]:
    """All metrics that a module holds, as parts or in plain attributes."""
    held = (
        leaf for part in module.modules() for leaf in tree_leaves([v for k, v in vars(part).items() if k != "_modules"])
    )
    metrics = [*(m for m in module.modules() if isinstance(m, Metric)), *(m for m in held if isinstance(m, Metric))]
    return list({id(metric): metric for metric in metrics}.values())


@contextmanager
def _as_it_was(metric: Metric) -> Iterator[None]:
    """Let a metric count on copies of its state inside the block, and put the state itself back after it."""
    before = dict(vars(metric))
    for name, value in before.items():
        if isinstance(value, Tensor):
            vars(metric)[name] = value.clone()
        elif isinstance(value, list):
            vars(metric)[name] = list(value)
    try:
        yield
    finally:
        vars(metric).clear()
        vars(metric).update(before)
