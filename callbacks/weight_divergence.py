"""Measures how far training has moved the weights from their start, or from another run's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nslightning.probes import measure

from .measurements import append_rows, interval, log_step, own_name, run_folder, start_table, starts_at_first_step
from .showing import show_file

__all__ = ["WeightDivergence"]


class WeightDivergence(Callback):
    """Measures the distance of the weights to a reference: the initial ones, a checkpoint's, or another run's.

    Where the reference is a run's folder, the weights of its checkpoints are compared with the weights after as many
    steps here, and only then: two runs that differ in their Jacobian choice alone are so compared after the fact, as
    :class:`~nslightning.models.Twins` compares them while they train. Weights are only read. Under DDP all processes
    hold the same ones, and the first one measures.

    Logged at each measured step, of the weights before it:

    ====================== =================================================================
    ``weights/l1``         sum of the absolute differences of all weights to the reference's
    ``weights/l2``         Euclidean norm of the difference
    ``weights/linf``       largest absolute difference
    ``weights/relative``   ``l2`` over the norm of the reference
    ``weights/cosine``     cosine of the angle between the two
    ====================== =================================================================

    A second WeightDivergence of the same run logs as ``weights-2/...`` and writes ``weights-2.csv``.

    The run folder gets ``weights.csv``, one row per step and parameter (an empty ``parameter`` is the total), with the
    final weights in the last rows. Checkpoints hold the initial weights where these are the reference, so that a
    resumed run measures from the same point.

    Args:
        reference: ``"initial"``, a checkpoint file, or the folder of a run with checkpoints.
        every_n_steps: Optimizer steps between two measurements; a run's checkpoints are compared at their own steps.
        per_layer: Also record every parameter's difference.

    Raises:
        ValueError: If the interval is not positive, or the reference has no such weights.
        FileNotFoundError: If the reference is no file, and no folder with checkpoints.
    """

    def __init__(self, reference: str = "initial", every_n_steps: int = 50, per_layer: bool = True) -> None:
        self.reference, self.every_n_steps, self.per_layer = reference, interval(every_n_steps), per_layer
        self._start: dict[str, Tensor] | None = None
        self._fixed: dict[str, Tensor] | None = None
        self._at_step: dict[int, Path] = {}
        if reference == "initial":
            return
        path = Path(reference)
        files = [path] if path.is_file() else sorted(Path(path, "checkpoints").glob("*.ckpt"))
        if not files:
            raise FileNotFoundError(
                f"WeightDivergence: {reference} is not a checkpoint, and not a run folder with checkpoints/*.ckpt"
            )
        if path.is_file():
            self._fixed = _read(path)["state_dict"]
        else:
            self._at_step = {_read(file)["global_step"]: file for file in files}

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self._generate_state_key(
            reference=self.reference, every_n_steps=self.every_n_steps, per_layer=self.per_layer
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training's initial weights; those of a checkpoint come after this."""
        if starts_at_first_step(trainer, stage):
            self._start = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the initial weights also where another interval was set: they are the run's, whoever kept them."""
        states = checkpoint.get("callbacks", {}).items()
        kept = (s["initial"] for key, s in states if key.startswith(type(self).__qualname__) and "initial" in s)
        self._start = next(kept, None) if self.reference == "initial" else None

    def state_dict(self) -> dict[str, Any]:
        """The initial weights, where they are the reference."""
        return {"initial": self._start} if self._start is not None else {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the folder."""
        self._name = own_name(trainer, self, "weights")
        self._file = run_folder(trainer) / f"{self._name}.csv"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the initial weights of a new run; drop the rows that this one will write again."""
        start_table(trainer, self._file)
        if self.reference == "initial" and self._start is None:
            if trainer.global_step:
                raise ValueError(
                    f"WeightDivergence: the training goes on at step {trainer.global_step} from a checkpoint without "
                    "initial weights, since no WeightDivergence was there when it was written: give the file of a "
                    "checkpoint as the reference"
                )
            self._start = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure before the first batch of a step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, whatever the interval."""
        if not trainer.interrupted:
            self._measure(trainer, pl_module, final=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the table to the loggers that take one."""
        if trainer.is_global_zero:
            show_file(trainer, f"{self._name}/table", self._file)

    def _measure(self, trainer: Trainer, module: LightningModule, final: bool = False) -> None:
        step = trainer.global_step
        due = step in self._at_step if self._at_step else final or step % self.every_n_steps == 0
        if not due:
            return
        if not trainer.is_global_zero:
            if not final:
                log_step(trainer, None)
            return
        reference = self._start or self._fixed or _read(self._at_step[step])["state_dict"]
        difference = measure(*_pairs(dict(module.named_parameters()), reference, self.reference))
        if not final:
            log_step(trainer, {f"{self._name}/{norm}": value for norm, value in difference.norms().items()})
        rows = [{"step": step, "parameter": "", **difference.norms()}]
        if self.per_layer:
            rows += [{"step": step, "parameter": name, **part.norms()} for name, part in difference.per_layer.items()]
        append_rows(self._file, rows)


def _pairs(
    weights: Mapping[str, Tensor], reference: Mapping[str, Tensor], where: str
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The weights and the reference's of the same names, on one device."""
    odd = [name for name, p in weights.items() if name not in reference or reference[name].shape != p.shape]
    if odd:
        raise ValueError(
            f"WeightDivergence: {where} holds no {odd[0]} of shape {tuple(weights[odd[0]].shape)}: it is the "
            f"checkpoint of another network ({len(odd)} of {len(weights)} parameters differ)"
        )
    return weights, {name: reference[name].to(p.device) for name, p in weights.items()}


def _read(file: Path) -> dict[str, Any]:
    """A checkpoint, its tensors left on disk until they are used."""
    content: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return content
