"""How far the gradients of other Jacobian choices are from the one in use, while training."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import torch._dynamo
import torch._functorch.config
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nslightning.jacobians import Jacobians
from nslightning.probes import NORMS, Divergence, differences, gradients, measure, measure_difference
from nslightning.runs import forget_from
from nslightning.surgery import selections

from .logging import append_rows, interval, log_step, run_folder

__all__ = ["GradientDivergence"]

_RESERVED = {"seconds", "per_layer"}  # divergence/... that are no choice


class GradientDivergence(Callback):
    """Measures the divergence between the Jacobian choice in use and other ones, on the loss being trained.

    Every ``every_n_steps`` optimizer steps the training forward serves one extra backward pass per choice; the
    gradients of the choice in use are those of the training backward itself. Training is bit for bit what it is
    without the callback: parameters' ``grad``, random streams and buffers are left as they were.

    Gradients are unscaled (fp16 loss scaling, gradient accumulation) and, under DDP, taken on each process's own batch
    for all choices and then averaged over the processes, as DDP does with the gradients it trains on. With gradient
    accumulation the first batch of the step is measured. Where scaled gradients overflow, the values are not finite.

    Logged at each measured step:

    =============================== ==================================================================
    ``divergence/<choice>/l1``      sum of the absolute differences of all parameter gradients
    ``divergence/<choice>/l2``      Euclidean norm of the difference
    ``divergence/<choice>/linf``    largest absolute difference
    ``divergence/<choice>/relative``  ``l2`` over the norm of the gradient in use
    ``divergence/<choice>/cosine``  cosine of the angle between the two gradients
    ``divergence/seconds``          time that the measurement took
    ``divergence/per_layer``        W&B only: a table of the same norms per parameter
    =============================== ==================================================================

    The run folder gets ``divergence.csv``, one row per step, choice and parameter (an empty ``parameter`` is the
    total), and at the end ``divergence.pdf`` and ``.png``, the relative divergence against the step.

    Args:
        choices: The choices to compare with the one in use, by the name they are logged under.
        every_n_steps: Optimizer steps between two measurements.
        per_layer: Also record every parameter's divergence.
        method: ``"subtract"`` compares whole gradients: what rounding makes of another order of summation counts too.
            ``"propagate"`` carries the difference itself down from the ties
            (:func:`nslightning.probes.differences`): exact zeros where no tie matters, elsewhere the rounding of the
            difference's own terms, not of the gradients; for one more backward pass per measurement and less for each
            choice. Not for compiled models, nor with ``"random"`` in use.

    Raises:
        ValueError: If there is no choice, a name cannot be part of a metric's name, or the interval is not positive.

    Example:
        >>> callback = GradientDivergence({"relu1": Jacobians(relu=1.0)}, every_n_steps=10)
    """

    def __init__(
        self,
        choices: dict[str, Jacobians],
        every_n_steps: int = 50,
        per_layer: bool = True,
        method: Literal["subtract", "propagate"] = "subtract",
    ) -> None:
        if not choices:
            raise ValueError("GradientDivergence takes at least one choice, such as {'relu1': {'relu': 1.0}}")
        bad = [name for name in choices if not re.fullmatch(r"[\w.+-]+", name) or name in _RESERVED]
        if bad:
            raise ValueError(
                "a choice's name becomes part of divergence/<choice>/<norm>: letters, digits and _.+- only, and not "
                f"{' or '.join(sorted(_RESERVED))}; given {', '.join(map(repr, bad))}"
            )
        self.choices, self.every_n_steps, self.per_layer = dict(choices), interval(every_n_steps), per_layer
        self.method = method
        self._measured_step = -1
        self._others: dict[str, dict[str, Tensor]] = {}
        self._own: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []
        self._seconds = 0.0
        self._folder = Path()
        self._settings = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured; keep a compiled backward's graph usable more than once."""
        if not selections(pl_module):
            raise ValueError(
                "GradientDivergence needs a patched model: call `patch(model, Jacobians())` before training"
            )
        if not pl_module.automatic_optimization:
            raise ValueError("GradientDivergence measures at Lightning's own backward; manual optimization has none")
        in_use = [selection.jacobians for selection in selections(pl_module).values()]
        if self.method == "propagate" and (is_compiled(pl_module) or any(j.max_pool == "random" for j in in_use)):
            raise ValueError('method "propagate" is not for compiled models nor the "random" choice: use "subtract"')
        if self.method == "propagate" and len(set(in_use)) > 1:
            raise ValueError('parts patched with different choices need method "subtract"')
        if isinstance(trainer.strategy, ParallelStrategy) and not isinstance(trainer.strategy, DDPStrategy):
            raise ValueError(
                "GradientDivergence needs whole gradients on every process: train on one device or with "
                f"--trainer.strategy=ddp, not {type(trainer.strategy).__name__}"
            )
        self._measured_step = -1
        self._folder = run_folder(trainer)
        if is_compiled(pl_module):
            # A compiled backward may overwrite what the forward saved ("donated buffers"); it could not run once per
            # choice then. The setting holds for what is compiled under it, so what is compiled already goes.
            self._settings.enter_context(torch._functorch.config.patch(donated_buffer=False))
            torch.compiler.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that this run will write again; only now does Lightning know at which step it resumes."""
        if trainer.is_global_zero:
            forget_from(self._folder / "divergence.csv", trainer.global_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the other choices' gradients before the training backward frees the graph."""
        step = trainer.global_step
        if step % self.every_n_steps or step == self._measured_step:
            return
        self._measured_step = step
        start = _now(pl_module.device)
        with undisturbed(pl_module, step):
            if self.method == "propagate":
                in_use = next(iter(selections(pl_module).values())).jacobians
                self._own, self._others = differences(loss, pl_module, self.choices, in_use, retain_graph=True)
            else:
                self._others = gradients(loss, pl_module, self.choices, retain_graph=True)
        self._seconds = _now(pl_module.device) - start
        if self.method == "propagate":
            return

        def keep(name: str, gradient: Tensor) -> None:
            # A copy: the engine may hand this very tensor on to `grad`, where DDP and the scaler overwrite it.
            self._own[name] = gradient.detach().clone()

        self._own = {}
        self._hooks = [
            p.register_hook(lambda g, name=name: keep(name, g))
            for name, p in pl_module.named_parameters()
            if p.requires_grad
        ]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the gradients that the training backward has just produced."""
        if not self._others:
            return
        start = _now(pl_module.device)
        scale = _loss_scale(trainer)
        others, own = self._others, self._own
        self._forget()
        # A parameter that the loss does not depend on got no gradient.
        own = {
            name: _mean(trainer, own.get(name, torch.zeros_like(p)), scale)
            for name, p in pl_module.named_parameters()
            if p.requires_grad
        }
        compare = measure_difference if self.method == "propagate" else measure
        found = {
            choice: compare({name: _mean(trainer, other[name], scale) for name in own}, own)
            for choice, other in others.items()
        }
        self._seconds += _now(pl_module.device) - start
        self._record(trainer, found)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figure."""
        file = self._folder / "divergence.csv"
        if trainer.is_global_zero and file.exists():
            from nslightning.figures import divergence_by_step

            # Only a number's "nan" is one: an empty parameter and any choice's name are text.
            numbers = {norm: ["nan"] for norm in NORMS}
            rows = pd.read_csv(file, dtype={"choice": str}, keep_default_na=False, na_values=numbers)
            divergence_by_step(rows[rows["parameter"] == ""], self._folder / "divergence.pdf")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind: Lightning calls no ``teardown`` then."""
        self._forget()
        self._settings.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the compiler its setting back."""
        self._settings.close()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._others, self._own, self._hooks = {}, {}, []

    def _record(self, trainer: Trainer, found: Mapping[str, Divergence]) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        metrics = {f"divergence/{c}/{norm}": v for c, d in found.items() for norm, v in d.norms().items()}
        log_step(trainer, metrics | {"divergence/seconds": self._seconds})
        rows: list[dict[str, Any]] = []
        for choice, d in found.items():
            rows.append({"step": step, "choice": choice, "parameter": "", **d.norms()})
            if self.per_layer:
                rows += [{"step": step, "choice": choice, "parameter": p, **e.norms()} for p, e in d.per_layer.items()]
        append_rows(self._folder / "divergence.csv", rows)
        for logger in trainer.loggers if self.per_layer else []:
            if isinstance(logger, WandbLogger):
                columns = ["choice", "parameter", *NORMS]
                data = [[row[c] for c in columns] for row in rows if row["parameter"]]
                logger.log_table("divergence/per_layer", columns=columns, data=data, step=step)


def _loss_scale(trainer: Trainer) -> float:
    """What the loss was multiplied by before its backward: fp16 scaling and gradient accumulation."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return (scaler.get_scale() if scaler is not None else 1.0) / trainer.accumulate_grad_batches


def _mean(trainer: Trainer, gradient: Tensor, scale: float) -> Tensor:
    """Unscale a gradient of this process and average it over all processes."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    gradient = gradient.to(wide) / scale
    return trainer.strategy.reduce(gradient, reduce_op="mean") if trainer.world_size > 1 else gradient


def _now(device: torch.device) -> float:
    """The time when all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_compiled(module: LightningModule) -> bool:
    """Whether ``torch.compile`` was applied to a module or to a part of it.

    Args:
        module: The module trained.

    Returns:
        True also for ``trainer.fit(torch.compile(module))``, which Lightning takes apart.
    """
    parts = module.modules()
    return module._compiler_ctx is not None or any(
        p._compiled_call_impl is not None or isinstance(p, torch._dynamo.OptimizedModule) for p in parts
    )


@contextmanager
def undisturbed(module: nn.Module, step: int) -> Iterator[None]:
    """Put random streams and buffers back after extra backward passes.

    A checkpointed region runs its forward again in every backward, and the ``"random"`` choice draws in it.

    Args:
        module: The module trained, with its patched parts.
        step: The training step; the ``"random"`` choice draws other numbers inside the block than in training, and
            others at each step.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with ExitStack() as streams:
        streams.enter_context(torch.random.fork_rng(devices))
        for selection in selections(module).values():
            streams.enter_context(selection.other_streams(selection.seed + 1 + step))
        yield
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
