"""Callbacks that the command line adds to every training."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from nslightning import runs
from nslightning.commands.stopping import Signals, Stopped
from nslightning.files import write_text

__all__ = ["Bar", "LoggerNotes", "MovedRun", "SaveConfig", "StopWhenAsked", "makes_again"]


_SHOWN_EVERY = 0.25  # seconds


class Bar(RichProgressBar):
    """Lightning's progress bar without the loggers' version numbers, which say nothing here.

    It is drawn a few times a second: drawing it after each step takes longer than a small step, and each value that it
    shows has to be fetched from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next_shown = 0.0

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The logged values to show."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the bar, if it is time to."""
        now = monotonic()
        if now < self._next_shown and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        self._next_shown = now + _SHOWN_EVERY
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, completed=batch_idx + 1)


class LoggerNotes(Callback):
    """Says a line of a logger when the training's parts are made: a start that fails makes no run to upload.

    Args:
        notes: The lines.
    """

    def __init__(self, notes: Sequence[str]) -> None:
        self.notes = notes

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say them."""
        for note in self.notes:
            rank_zero_info(note)


class SaveConfig(SaveConfigCallback):
    """Saves the config when the first step is about to be taken: a run that cannot go on has overwritten nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``config.yaml``."""
        folder = trainer.log_dir  # broadcast from rank 0
        if trainer.is_global_zero:
            assert folder is not None
            header = "".join(f"# {line}\n" for line in self.parser.dump_header or ())
            content = makes_again(yaml.safe_load(self.parser.dump(self.config, skip_unset=False)))
            write_text(Path(folder, self.config_filename), header + yaml.safe_dump(content, sort_keys=False))


def makes_again(config: Any) -> Any:
    """A dumped config without what only described an object: a default that a class makes for itself.

    Args:
        config: Plain data.

    Returns:
        The same without such arguments.

    Example:
        >>> makes_again({"class_path": "a.B", "init_args": {"x": 1, "device": "Unable to serialize instance cpu"}})
        {'class_path': 'a.B', 'init_args': {'x': 1}}
    """
    if isinstance(config, dict):
        kept = {k: v for k, v in config.items() if not (isinstance(v, str) and v.startswith("Unable to serialize"))}
        return {k: makes_again(v) for k, v in kept.items()}
    return [makes_again(v) for v in config] if isinstance(config, list) else config


def _any(trainer: Trainer, mine: bool) -> bool:
    """Return whether something is so in any of the processes."""
    return bool(trainer.strategy.reduce_boolean_decision(mine, all=False)) if trainer.world_size > 1 else mine


def _after_last_step(trainer: Trainer) -> bool:
    """Return whether an epoch's last step is done, and the epoch is not."""
    loop = trainer.fit_loop
    epochs: Any = loop.epoch_progress.current
    batches = loop.epoch_loop.batch_progress
    done = batches.is_last_batch and batches.current.completed == batches.current.ready
    return bool(done and epochs.processed < epochs.started)


class MovedRun(Callback):
    """Has ModelCheckpoint keep the best checkpoints that it knew, though its folder has another path than before.

    Lightning compares the folder's path with the one that the checkpoint holds. Where they differ it forgets which one
    was the best, and the next one takes its place, however bad it is: after a run's folder was moved, and where it was
    named by another path to the same place.

    Args:
        folder: The run's folder, in which the run goes on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the old folder in what the callbacks are about to read."""
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if not isinstance(callback, ModelCheckpoint) or not state or callback.dirpath is None:
                continue
            old, new = state.get("dirpath"), Path(callback.dirpath)
            if old is None or old == callback.dirpath or not new.absolute().is_relative_to(self.folder.absolute()):
                continue
            inside = new.absolute().relative_to(self.folder.absolute()).parts
            if Path(old).parts[-len(inside) :] != inside:  # it was no folder of this run's
                continue
            state["dirpath"] = callback.dirpath
            for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
                state[name] = _moved(state.get(name) or "", old, new)
            kept = state.get("best_k_models") or {}
            state["best_k_models"] = {_moved(path, old, new): score for path, score in kept.items()}


def _moved(path: str, old: str, new: Path) -> str:
    return str(new / Path(path).relative_to(old)) if path and Path(path).is_relative_to(old) else path


class StopWhenAsked(Callback):
    """Ends a training between two steps when a signal asks for it, with a checkpoint from which it goes on exactly.

    A stop waits for the end of an accumulation of gradients, and for a validation that is due: what is validated
    halfway would be logged as a whole. It is the last of the callbacks, so that the checkpoint has what they did.

    Args:
        signals: The handler, which keeps the signal.
        folder: The run's folder; None where there is none to keep.

    Attributes:
        began: Whether a step was begun: what goes wrong before is a mistake in the call, not a bug.
        step: The optimizer steps that were taken.
        saved: The checkpoint that was written for the stop.
    """

    def __init__(self, signals: Signals, folder: Path | None) -> None:
        self.signals = signals
        self.file = None if folder is None else folder / "checkpoints" / "stopped.ckpt"
        self.began, self.step, self.saved = False, 0, False
        self._in_step, self._requeue, self._requeues = False, False, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have signals wait for the end of the step from now on."""
        self.step = trainer.global_step
        self.signals.waits = True
        self.signals.install()
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            # Lightning's handler would save whatever the step had done when the signal came.
            self._requeues = True
            with suppress(ValueError):
                signal.signal(environment.requeue_signal or signal.SIGUSR1, self._on_requeue)

    def _on_requeue(self, signum: int, frame: FrameType | None) -> None:
        self._requeue = True

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """A step begins."""
        self.began = self._in_step = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop between two steps."""
        self._in_step, self.step = False, trainer.global_step
        epoch = trainer.fit_loop.epoch_loop
        if epoch._should_accumulate():
            return
        # The signal reaches the processes at different steps, and they save together.
        if self._requeues and _any(trainer, self._requeue):
            self._requeue = False
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # type: ignore[arg-type] # the handler reads no frame
        fetcher = trainer.fit_loop._data_fetcher
        validates = fetcher is not None and epoch._should_check_val_fx(fetcher)
        if self._asked(trainer) and not epoch.batch_progress.is_last_batch and not validates:
            # Lightning writes what was logged after this hook, and the step is not taken again.
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation in the middle of an epoch."""
        if trainer.sanity_checking or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            return
        if self._asked(trainer):
            self._stop(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop between two epochs, when the last one's values are written and its schedulers have taken their step."""
        if not self._asked(trainer):
            return
        if not self.began:
            raise Stopped(self.signals.signum or signal.SIGTERM)
        # The new epoch is counted already, and Lightning would take it for one that was begun.
        epochs = trainer.fit_loop.epoch_progress
        epochs.total.ready -= 1
        epochs.current.ready -= 1
        self._stop(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is left to wait for."""
        self.step = trainer.global_step
        self.signals.waits = False

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint of an earlier stop is of no more use, once there is a later one."""
        if not trainer.is_global_zero or self.file is None or not self.file.exists():
            return
        if runs.checkpoints_in(self.file.parent.parent)[0] != self.file:
            self.file.unlink()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save also where the signal ended the loader's workers, which raises between two steps."""
        over, self.signals.waits = not self.signals.waits, False
        if self.signals.signum is None or not self.began or self._in_step or self.saved:
            return
        if not over and _after_last_step(trainer):
            return  # in the validation of an epoch: going on from there would count a step twice
        kept = (getattr(c, "_last_global_step_saved", None) for c in trainer.checkpoint_callbacks)
        if over and trainer.global_step in kept:  # it came while the figures of a finished training were drawn
            self.saved = True
        else:
            self._save(trainer)

    def _asked(self, trainer: Trainer) -> bool:
        """Return whether a signal came, to any of the processes."""
        return _any(trainer, self.signals.signum is not None)

    def _stop(self, trainer: Trainer) -> None:
        self._save(trainer)
        raise Stopped(self.signals.signum or signal.SIGTERM)

    def _save(self, trainer: Trainer) -> None:
        self.step = trainer.global_step
        if self.file is not None and trainer.checkpoint_callbacks:
            trainer.save_checkpoint(self.file)
            self.saved = True
