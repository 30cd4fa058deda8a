"""The common base of all LightningModules that train under a Jacobian choice."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau

from nslightning._torch import is_compiled
from nslightning.choices import to_jacobians
from nslightning.jacobians import Jacobians
from nslightning.models.captured import CapturedNetwork, refuse_capture
from nslightning.models.checkpoint_note import CheckpointNote, plan_of
from nslightning.models.fused import fused
from nslightning.models.own import without_own_code
from nslightning.models.step_metrics import StepMetrics
from nslightning.optim.groups import scale_learning_rates
from nslightning.optim.schedule import WarmupCosine
from nslightning.surgery import PatchReport, PatchWarning, Rule, patch

__all__ = ["PatchedModule", "at_least_float32", "steps_may_be_left_out"]


class _Shared:
    """A factory that copies of a module share.

    Those of the command line hold its parser, which cannot be copied, as averages of weights copy a module.
    """

    def __init__(self, factory: Callable[..., Any]) -> None:
        self._factory = factory

    def __call__(self, *arguments: Any) -> Any:
        return self._factory(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self


@contextmanager
def steps_may_be_left_out(trainer: Trainer | None) -> Iterator[None]:
    """Let a schedule take its first step before the optimizer does, where fp16's loss scale leaves steps out.

    PyTorch would warn of calls in the wrong order.

    Args:
        trainer: The trainer.

    Yields:
        Nothing.
    """
    if trainer is None or getattr(trainer.precision_plugin, "scaler", None) is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        yield


class PatchedModule(LightningModule):
    """A LightningModule around one patched network: hyperparameters, optimizer, compilation, checkpoint notes.

    A subclass calls this constructor first, builds its network, gives it to :meth:`patch_network` and writes the
    steps. Its own arguments become the hyperparameters.

    Args:
        jacobians: The choice of the Jacobian at ties, in force while training.
        optimizer: Any optimizer class, given the parameters. A checkpoint of the command line holds its
            configuration; a callable given in Python is not stored, and is given again to
            ``load_from_checkpoint``.
        lr_scheduler: Any scheduler class, given the optimizer. ``ReduceLROnPlateau`` watches ``val/loss``, or
            what Lightning's own version of it has to ``monitor``.
        compile: Compile the network with ``torch.compile``. One compiled backward serves every choice.
        cuda_graph: Run training forwards and backwards from CUDA graphs
            (:class:`~nslightning.models.captured.CapturedNetwork`). One captured backward serves every choice.
        sites: Rules for some of the network's sites, later ones winning, such as ``{"stage": "layer1", "relu": 0.5}``
            (:class:`~nslightning.surgery.Rule`); everywhere else ``jacobians`` holds.
        strict: Refuse a network with an operation that no choice can reach, instead of naming it in the report.
        on_mismatch: Whether to warn or to refuse when a checkpoint is loaded that was made under another choice or
            with other patched sites.

    Attributes:
        plan: The choice for every site.
        patch_report: The report of the patch, site by site.

    Raises:
        ValueError: If ``"random"`` is to be compiled, or a rule is mistaken.
    """

    #: The unit in which a scheduler is stepped that is not made for steps.
    scheduled_by: ClassVar[Literal["epoch", "step"]] = "epoch"
    _lr_interval: Literal["epoch", "step"] | None = None
    patch_report: PatchReport

    def __init__(
        self,
        jacobians: Jacobians,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        compile: bool,
        sites: Sequence[Rule | dict[str, Any]] | None = None,
        strict: bool = True,
        on_mismatch: Literal["warn", "refuse"] = "warn",
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        jacobians = to_jacobians(jacobians)
        self.plan = plan_of(jacobians, sites)
        self._note = CheckpointNote(self.plan, on_mismatch)
        drawn = {field for rule in self.plan.rules for field, value in rule.changes.items() if value == "random"}
        if drawn and (compile or cuda_graph):
            drawn_choices = ", ".join(f'{field}="random"' for field in sorted(drawn))
            done, option = ("compiled", "compile") if compile else ("captured", "cuda_graph")
            raise ValueError(
                f"{drawn_choices} is drawn inside the backward, which cannot be {done}; use {option}=False"
            )
        frame = inspect.currentframe()
        assert frame is not None  # CPython has frames
        # As plain data, so that checkpoints load with `weights_only`; Lightning's instantiator makes objects of it.
        self.save_hyperparameters(frame=frame.f_back)
        callables = [k for k in ("optimizer", "lr_scheduler") if callable(self.hparams[k])]
        self.save_hyperparameters(ignore=callables, frame=frame.f_back)
        self.hparams.update(jacobians=jacobians.to_dict(), _instantiator="lightning.pytorch.cli.instantiate_module")
        if sites:
            self.hparams.update(sites=self.plan.to_list()[1:])
        self.jacobians, self._strict = jacobians, strict
        self._optimizer = _Shared(optimizer)
        self._lr_scheduler = None if lr_scheduler is None else _Shared(lr_scheduler)
        self._compile = compile
        self._cuda_graph = cuda_graph
        self._captured: CapturedNetwork | None = None
        self._trained_with: str | None = None
        self._step_metrics = StepMetrics()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a model, under the Jacobian choice that it was trained under unless another is given.

        Args:
            checkpoint_path: A checkpoint of the command line or of a ``Trainer``.
            *args: As in Lightning.
            **kwargs: As in Lightning; arguments of this class win over those in the checkpoint.

        Returns:
            The model. A checkpoint of the command line brings its optimizer along; callables given in Python are
            not stored, and without them ``configure_optimizers`` warns. Nothing that the file names is run: your
            own network (``package.module:factory``) is made where ``backbone`` names it here.
        """
        if isinstance(kwargs.get("jacobians"), Jacobians):
            kwargs["jacobians"] = kwargs["jacobians"].to_dict()  # what Lightning's instantiator takes
        with nullcontext() if "backbone" in kwargs else without_own_code():
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def patch_network(self, name: str, network: nn.Module, example: Any, seed: int) -> None:
        """Make a network the one that is trained, under the Jacobian choice of every site.

        Args:
            name: The attribute that it becomes.
            network: The network, not patched.
            example: An input, for one forward that finds the functional calls.
            seed: Seeds the ``"random"`` choice.

        Raises:
            UnreachedError: If no choice can reach an operation of the network, and this is ``strict``.
        """
        setattr(self, name, network)
        self._network_name = name
        self.patch_report = patch(network, self.plan, example=example, seed=seed, strict=self._strict)

    def setup(self, stage: str) -> None:
        """Set the precision, and compile the network if asked to; Lightning calls this before anything runs."""
        # Lightning does it after loading a checkpoint, whose float64 weights a float32 module would round.
        self.trainer.precision_plugin.convert_module(self)
        network: nn.Module = getattr(self, self._network_name)
        if self._compile and not is_compiled(network):
            network.compile()
        if self._cuda_graph and stage == "fit":
            refuse_capture(
                self.trainer.strategy.root_device,
                processes=self.trainer.world_size,
                accumulates=self.trainer.accumulate_grad_batches,
                compiled=self._compile,
            )
            self._captured = CapturedNetwork(network)

    def teardown(self, stage: str) -> None:
        """Let go of what was captured."""
        self._captured = None

    def run_network(self, *inputs: Tensor) -> Any:
        """Run the network, from a captured graph where ``cuda_graph`` was asked for.

        Args:
            *inputs: Its inputs.

        Returns:
            Its output.
        """
        return (self._captured or getattr(self, self._network_name))(*inputs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Run a step that a callback is to measure eagerly: its graph is looked into."""
        if self._captured is not None:
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined] # set by a connector
            self._captured.eager = any(getattr(callback, "measures_backward", False) for callback in callbacks)

    def log_step(self, metrics: Callable[[], Mapping[str, Tensor]]) -> None:
        """Log what a training step measures of itself, if the step shows it; else it is not computed.

        Args:
            metrics: Computes the values by name (:class:`~nslightning.models.step_metrics.StepMetrics`).
        """
        self._step_metrics.step(self, metrics)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step that a callback has just made the last one."""
        self._step_metrics.step_ends(self)

    @property
    def lr(self) -> float | None:
        """The learning rate of a training that is prepared or runs: what a ``LearningRateFinder`` reads and sets.

        Setting it is for all groups of parameters, and for the schedule from its beginning.
        """
        groups = [group for optimizer in self._optimizers() for group in optimizer.param_groups]
        return float(groups[0]["lr"]) if groups else None

    @lr.setter
    def lr(self, lr: float) -> None:
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = lr
        for config in self._trainer.lr_scheduler_configs if self._trainer is not None else ():
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [lr] * len(config.scheduler.base_lrs)

    def _optimizers(self) -> list[Any]:
        return list(self._trainer.optimizers) if self._trainer is not None else []

    def parameter_groups(self) -> Any:
        """Return the optimizer's parameters, or groups of them.

        Returns:
            All parameters.
        """
        return self.parameters()

    def lr_interval(self, scheduler: Any) -> str:
        """Return the unit of a scheduler's steps.

        Args:
            scheduler: The scheduler.

        Returns:
            ``epoch`` or ``step``: what was asked for, else ``step`` for those that count steps by their nature, else
            this class's own.
        """
        made_for_steps = isinstance(scheduler, (OneCycleLR, CyclicLR))
        return self._lr_interval or ("step" if made_for_steps else self.scheduled_by)

    def _training_length(self, interval: str) -> int:
        """Steps or epochs of this training.

        Raises:
            ValueError: If the training has no end.
        """
        steps = self.trainer.estimated_stepping_batches
        length = steps if interval == "step" else self.trainer.max_epochs
        if length is None or length < 0 or math.isinf(length):
            raise ValueError(
                "a schedule for all of a training needs its length: give --trainer.max_epochs, or the schedule's total"
            )
        return int(length)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        optimizer = self._optimizer(self.parameter_groups())
        if not self._reads_gradients_before_step():
            optimizer = fused(optimizer)
        scale_learning_rates(optimizer)
        if self._trained_with not in (None, type(optimizer).__name__):
            warnings.warn(
                f"the checkpoint was trained with {self._trained_with}, and this model has"
                f" {type(optimizer).__name__}; give load_from_checkpoint the optimizer again: optimizer=...",
                PatchWarning,
                stacklevel=2,
            )
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        stepped: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval(scheduler)}
        if isinstance(scheduler, WarmupCosine) and scheduler.total is None:
            scheduler.fit_to(self._training_length(stepped["interval"]))
        if isinstance(scheduler, ReduceLROnPlateau):
            # It waits for a metric of the validation; torch's own class does not name it.
            stepped |= {"interval": "epoch", "monitor": getattr(scheduler, "monitor", "val/loss")}
        return {"optimizer": optimizer, "lr_scheduler": stepped}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule; PyTorch asks for a step of the optimizer before, and fp16's loss scale may leave it out."""
        with steps_may_be_left_out(self._trainer):
            super().lr_scheduler_step(scheduler, metric)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which Jacobian the weights were trained under."""
        optimizer = type(self.trainer.optimizers[0]).__name__ if self.trainer.optimizers else None
        self._note.write(checkpoint, self.patch_report, optimizer)

    def _reads_gradients_before_step(self) -> bool:
        """Return whether gradients are clipped, or looked at, between the fp16 scaler's unscaling and the step."""
        trainer = self._trainer
        if trainer is None or getattr(trainer.precision_plugin, "scaler", None) is None:
            return False
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        looks = any(type(c).on_before_optimizer_step is not Callback.on_before_optimizer_step for c in callbacks)
        looks |= type(self).on_before_optimizer_step is not PatchedModule.on_before_optimizer_step
        return bool(trainer.gradient_clip_val) or looks or trainer.lightning_module is not self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say so when a checkpoint was made under another choice or patch, or refuse it.

        Warns:
            PatchWarning: If the Jacobian choice or the patched sites differ.

        Raises:
            ValueError: If the choices or the sites differ, and ``on_mismatch`` is ``"refuse"``.
        """
        self._trained_with = CheckpointNote.optimizer(checkpoint)
        self._note.check(checkpoint, self.patch_report)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in the precision that a loss is computed in.

    In half precision, cross-entropy's sum over the classes loses the small gradients.

    Args:
        logits: Tensor of any floating dtype.

    Returns:
        float32, or float64 where the logits are float64.
    """
    return logits if logits.dtype == torch.float64 else logits.float()
