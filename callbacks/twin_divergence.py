"""Measures how far networks that train in lockstep have come apart."""

import csv
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from nslightning.exact_csv import read_exactly
from nslightning.files import replacing
from nslightning.models import Twins
from nslightning.probes import Divergence, measure

from .measurements import append_rows, interval, log_step, own_name, run_folder, start_table
from .showing import show_figure, show_file

__all__ = ["TwinDivergence"]


class TwinDivergence(Callback):
    """Measures how far each twin is from the first one: its weights, and the gradients it is about to step along.

    Both are taken just before an optimizer step; gradients are unscaled, accumulated and averaged over processes, not
    yet clipped. At the first step the weights are the same, and the gradients differ by the Jacobian choice alone.
    Measured are every ``every_n_steps``-th step, the first of each epoch, and at the end the weights. Nothing of the
    training is touched. Under DDP all processes hold the same weights and gradients, and the first one measures.

    Logged at each measured step, for every twin but the first:

    ================================ =================================================================
    ``weights/<twin>/l1``            sum of the absolute differences of all weights to the first twin's
    ``weights/<twin>/l2``            Euclidean norm of the difference
    ``weights/<twin>/linf``          largest absolute difference
    ``weights/<twin>/relative``      ``l2`` over the norm of the first twin's weights
    ``weights/<twin>/cosine``        cosine of the angle between the two
    ``gradients/<twin>/...``         the same five of the gradients
    ================================ =================================================================

    The run folder gets ``twins.csv`` with one value a row: step, epoch, twin, parameter (empty: all of them), metric,
    value. It also has every twin's ``train/loss`` and ``train/acc1`` at the measured steps and its validation metrics
    after each epoch, so that it holds all that ``twins.pdf`` and ``.png`` show, which are drawn at the end.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        per_layer: Also write every parameter's differences to ``twins.csv``.

    Raises:
        ValueError: If the interval is not positive.
    """

    reads_step_metrics: ClassVar[bool] = True  # of the measured steps

    def __init__(self, every_n_steps: int = 50, per_layer: bool = True) -> None:
        self.every_n_steps, self.per_layer = interval(every_n_steps), per_layer

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that has no twins."""
        if not isinstance(pl_module, Twins):
            raise ValueError(
                f"TwinDivergence compares the networks of Twins, and this is {type(pl_module).__name__}: "
                "use WeightDivergence, or train with `nslightning twins`"
            )
        self._file = run_folder(trainer) / f"{own_name(trainer, self, 'twins')}.csv"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that this run will write again."""
        start_table(trainer, self._file)
        self._began = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare weights and gradients before they change."""
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if trainer.global_step % self.every_n_steps and done > trainer.accumulate_grad_batches:
            return
        if not trainer.is_global_zero:
            log_step(trainer, None)
            return
        rows, metrics = list[dict[str, Any]](), dict[str, float]()
        for quantity in ("weights", "gradients"):
            measured = self._measured(trainer, pl_module, quantity)
            metrics |= {
                row["metric"].replace("/", f"/{row['twin']}/", 1): row["value"]
                for row in measured
                if not row["parameter"]
            }
            rows += measured
        log_step(trainer, metrics)
        append_rows(self._file, rows + self._logged(trainer, pl_module, "train", trainer.global_step))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the twins' accuracies."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            # By the step that was taken last: a run that goes on from here need not validate again.
            step = max(0, trainer.global_step - 1)
            if trainer.global_step == self._began:  # it does, where the validation was not over
                self._forget_validation(step)
            append_rows(self._file, self._logged(trainer, pl_module, "val", step))

    def _forget_validation(self, step: int) -> None:
        """Drop the rows of a validation that is done again."""
        if not self._file.exists():
            return
        with self._file.open(newline="", encoding="utf-8") as table:
            header, *lines = csv.reader(table)
        place, metric = header.index("step"), header.index("metric")
        kept = [line for line in lines if line[place] != str(step) or not line[metric].startswith("val/")]
        if len(kept) < len(lines):
            with replacing(self._file) as partial, partial.open("w", newline="", encoding="utf-8") as table:
                csv.writer(table, lineterminator="\n").writerows([header, *kept])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the final weights."""
        if trainer.is_global_zero and not trainer.interrupted:
            append_rows(self._file, self._measured(trainer, pl_module, "weights"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figure."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw the figure of the measurements."""
        if trainer.global_step:
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._file.exists():
            from nslightning.figures import twins_by_step

            rows = read_exactly(self._file, dtype={"twin": str}, keep_default_na=False, na_values={"value": ["nan"]})
            totals = rows[rows["parameter"] == ""]
            if len(totals):
                twins_by_step(totals, self._file.with_suffix(".pdf"))
                show_figure(trainer, f"{self._file.stem}/figure", self._file.with_suffix(".png"))
            show_file(trainer, f"{self._file.stem}/table", self._file)

    def _measured(self, trainer: Trainer, module: LightningModule, quantity: str) -> list[dict[str, Any]]:
        """The distances of every twin's weights or gradients to the first one's."""
        assert isinstance(module, Twins)
        twins, rows = module.named_twins(), list[dict[str, Any]]()
        reference = _tensors(twins[module.first], quantity)
        for name in [n for n in twins if n != module.first]:
            difference = measure(_tensors(twins[name], quantity), reference)
            parts: Mapping[str, Divergence] = {"": difference, **(difference.per_layer if self.per_layer else {})}
            at = {"step": trainer.global_step, "epoch": trainer.current_epoch, "twin": name}
            rows += [
                {**at, "parameter": parameter, "metric": f"{quantity}/{norm}", "value": value}
                for parameter, part in parts.items()
                for norm, value in part.norms().items()
            ]
        return rows

    @staticmethod
    def _logged(trainer: Trainer, module: LightningModule, stage: str, step: int) -> list[dict[str, Any]]:
        """Return the metrics that the twins logged."""
        rows = []
        for key, value in trainer.callback_metrics.items():
            of, _, rest = key.partition("/")
            twin, _, metric = rest.partition("/")
            if of == stage and metric:
                at = {"step": step, "epoch": trainer.current_epoch, "twin": twin, "parameter": ""}
                rows.append({**at, "metric": f"{stage}/{metric}", "value": value.item()})
        return rows


def _tensors(module: nn.Module, quantity: str) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    if quantity == "weights":
        return dict(named)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items() if p.requires_grad}
