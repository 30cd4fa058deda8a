"""Running a training step again, without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

__all__ = ["ReplayedStep", "silent"]


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
            batch: A training batch.

        Returns:
            The loss, a 0-d tensor.

        Raises:
            ValueError: If the step returns none.
        """
        out = self.module.training_step(batch, self.batch_idx)
        loss = out.get("loss") if isinstance(out, dict) else out
        if not isinstance(loss, Tensor):
            raise ValueError(f"training_step returned {type(loss).__name__} for a loss")
        return loss.sum() * self.scale


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Let a module log nothing inside the block.

    Args:
        module: The module trained.
    """
    module.log = lambda *_, **__: None  # type: ignore[method-assign] # of this instance
    try:
        yield
    finally:
        del module.log
