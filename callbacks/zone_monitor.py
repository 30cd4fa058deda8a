"""Tells while training whether choices give one gradient, two, or two by rounding only."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nslightning._torch import is_compiled
from nslightning.choices import Choice, Choices, to_jacobians
from nslightning.jacobians import Jacobians
from nslightning.probes.zone import NoZoneError, zone
from nslightning.surgery import selections

from .gradient_divergence import checked_names, loss_scale, undisturbed
from .measurements import append_rows, interval, log_step, own_name, run_folder, start_table
from .replay import NoLossError, ReplayedStep, silent, takes_iterator
from .showing import show_file

__all__ = ["ZoneMonitor"]

_KINDS = ("regular", "bifurcation", "compensation")


class ZoneMonitor(Callback):
    """Names, every few steps, the zone in which the weights lie on the training batch, for pairs of Jacobian choices.

    *Regular*: both choices give the same gradient. *Bifurcation*: they give different ones. *Compensation*: they give
    different ones in the precision trained in, and the same one over the reals (:func:`nslightning.probes.zone`, which
    needs no threshold). The batch runs again before its training step, several times where ties matter, so this costs
    more than :class:`GradientDivergence`, which measures on the training forward. Training is bit for bit what it is
    without the callback, as long as ``training_step`` keeps nothing for later but what it logs. With gradient
    accumulation the first batch of the step is taken.

    Logged every ``every_n_steps`` optimizer steps; under DDP the means over the processes, each on its own batch:

    =============================== ==================================================================
    ``zones/<choice>/bifurcation``  1 in the bifurcation zone, else 0
    ``zones/<choice>/compensation`` 1 in the compensation zone, else 0
    ``zones/<choice>/regular``      1 in the regular zone, else 0
    ``zones/<choice>/observed``     Euclidean norm of the difference of the gradients as computed
    ``zones/<choice>/difference``   the same over the reals
    =============================== ==================================================================

    The run folder gets ``zones.csv``, one row per step and choice. Where gradients are not finite, or the step returns
    no loss, there is no zone: all values are NaN. So they are where the step cannot be run again on the same branches
    (under ``torch.vmap``, in another precision); a warning says so once for each reason.

    Args:
        choices: The choices by the name they are logged under, written as for :class:`GradientDivergence`.
        reference: The choice that each one is compared with.
        every_n_steps: Optimizer steps between two measurements.

    Raises:
        ValueError: If there is no choice, a name cannot be part of a metric's name, or the interval is not positive.
    """

    def __init__(
        self,
        choices: Choices,
        reference: Choice = Jacobians(),  # noqa: B008 # frozen
        every_n_steps: int = 200,
    ) -> None:
        self.choices = checked_names("ZoneMonitor", "zones/<choice>/<zone>", choices)
        self.reference = to_jacobians(reference)
        self.every_n_steps = interval(every_n_steps)
        self._measured_step = -1
        self._said: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be run again on the same branches."""
        if not selections(pl_module):
            raise ValueError("ZoneMonitor needs a patched model: call `patch(model, Jacobians())` before training")
        if any(map(is_compiled, pl_module.modules())):
            raise ValueError("ZoneMonitor watches activations as they are computed: train with --model.compile=false")
        if not pl_module.automatic_optimization:
            raise ValueError("ZoneMonitor runs the training step for its loss, and a manual one would train")
        if takes_iterator(pl_module):
            raise ValueError("ZoneMonitor runs a batch before it is trained on; a step that takes an iterator hides it")
        self._measured_step, self._name = -1, own_name(trainer, self, "zones")
        self._file = run_folder(trainer) / f"{self._name}.csv"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that this run will write again."""
        start_table(trainer, self._file)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Run the batch for its zones before it is trained on."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._measured_step:
            return
        self._measured_step = step
        rows = []
        scale = loss_scale(trainer)  # as in training: it decides what underflows in half precision
        for name, choice in self.choices.items():
            zone_and_norms = self._zone(trainer, pl_module, batch, batch_idx, choice, scale)
            values = torch.tensor(zone_and_norms, dtype=torch.float64)
            if trainer.world_size > 1:
                values = trainer.strategy.reduce(values.to(pl_module.device), reduce_op="mean")
            row = dict(zip((*_KINDS, "observed", "difference"), values.tolist(), strict=True))
            log_step(trainer, {f"{self._name}/{name}/{key}": value for key, value in row.items()})
            rows.append({"step": step, "choice": name, **row})
        if trainer.is_global_zero:
            append_rows(self._file, rows)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Send the table to the loggers that take one."""
        if trainer.is_global_zero:
            show_file(trainer, f"{self._name}/table", self._file)

    def _zone(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int, choice: Jacobians, scale: float
    ) -> list[float]:
        """The zone as indicators, and the two norms."""
        with (
            undisturbed(module, trainer.global_step),
            silent(module),
            trainer.precision_plugin.train_step_context(),
        ):
            try:
                measured = zone(ReplayedStep(module, batch_idx, scale), _identity, (batch,), choice, self.reference)
            except (NoLossError, NoZoneError):  # the step is skipped, or the weights have diverged
                return [float("nan")] * 5
            except (ValueError, RuntimeError) as reason:  # what the step itself cannot do, training will say
                if isinstance(reason, torch.OutOfMemoryError):
                    raise
                self._say(str(reason))
                return [float("nan")] * 5
        return [
            *(float(measured.kind == kind) for kind in _KINDS),
            measured.observed.l2 / scale,
            measured.difference / scale,
        ]

    def _say(self, reason: str) -> None:
        """Warn once for each reason why a step has no zone."""
        if reason not in self._said:
            self._said.add(reason)
            rank_zero_warn(f"ZoneMonitor measures no zone of such a step: {reason}")


def _identity(loss: Tensor) -> Tensor:
    return loss
