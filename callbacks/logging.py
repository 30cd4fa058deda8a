"""Logging from callbacks, on the step axis that Lightning itself uses."""

from collections.abc import Mapping

from lightning.pytorch import Trainer

__all__ = ["log_step"]


def log_step(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Send values of the current training step to every logger, whatever ``log_every_n_steps`` says.

    Args:
        trainer: The trainer, on rank 0 or on all ranks; loggers write on rank 0 only.
        metrics: Values by name.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)
