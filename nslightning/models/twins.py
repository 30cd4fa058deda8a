"""Networks that train in lockstep: one initialisation, one stream of batches, a Jacobian choice each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nslightning.choices import named_choices
from nslightning.jacobians import Jacobians
from nslightning.models.classifier import ImageClassifier
from nslightning.models.patched import steps_may_be_left_out

__all__ = ["CONTROL", "Twins"]

#: The twin that takes the first one's choice again.
CONTROL = "control"


class _Twin(ImageClassifier):
    """The module that ``fit`` trains, logging under its own name: ``train/<twin>/loss`` for ``train/loss``."""

    name: str

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        stage, metric = name.split("/", 1)
        kwargs["prog_bar"] = kwargs.get("prog_bar", False) and self.name == self.trainer.lightning_module.first
        self.trainer.lightning_module.log(f"{stage}/{self.name}/{metric}", value, *args, **kwargs)

    def parameter_groups(self) -> Any:
        """The parameter groups of all twins, since one optimizer steps them."""
        if self._trainer is None:  # when it is made: only whether the rules are right
            return super().parameter_groups()
        groups: list[dict[str, Any]] = []
        for twin in cast("Twins", self.trainer.lightning_module).named_twins().values():
            own = super(_Twin, twin).parameter_groups()
            ruled = own if isinstance(own, list) else [{"params": list(own)}]
            groups += [{**group, "twin": twin.name} for group in ruled]
        return groups


class Twins(LightningModule):
    """Image classifiers that train in lockstep and differ in nothing but their Jacobian choice.

    All start from the same weights and see the same batches, augmented in the same way, with the same dropout masks.
    Each one trains exactly as ``nslightning fit`` trains it alone: with its own batch statistics, optimizer state,
    gradient norm to clip and fp16 loss scale, so that a twin that overflows or diverges does nothing to the others.
    (Boustany 2024 shared one scaler between runs: after one had diverged, the others stood still.) In one process and
    with two, that is bit for bit so; the order in which more processes add up their gradients is the communication
    library's.

    The control repeats the first choice. Its distance to the first twin is what everything but the choice makes of
    the weights; with deterministic kernels it is exactly 0.

    There is one optimizer, in which each twin has its own parameter groups, and one loss per twin. The graphs of
    all twins are held at once: a step takes the memory and time of as many separate runs.

    Logged: what :class:`~nslightning.models.ImageClassifier` logs, as ``train/<twin>/loss``, ``val/<twin>/acc1`` and
    so on. :class:`~nslightning.callbacks.TwinDivergence` measures how far the twins have come apart.

    Args:
        choices: The choices by the name of the twin that takes it. The first twin is the one to compare with.
        control: Train the first choice twice; the second one is called ``control``.
        **options: Those of :class:`~nslightning.models.ImageClassifier`, the same for all twins.

    Attributes:
        twins: The modules by name; ``twins["beta10"]`` is a trained classifier like any other.
        first: The name of the twin to compare with.
        title: Name in reports, such as ``3 twins of paper/lenet5``.
        patch_report: The report of the first twin's patch; the other twins are patched likewise.

    Raises:
        ValueError: If there are fewer than two twins, or a name cannot be part of a metric's name.

    Example:
        >>> twins = Twins({"native": Jacobians(), "beta10": Jacobians(max_pool=10)}, backbone="paper/lenet5")
        >>> list(twins.twins)
        ['native', 'beta10', 'control']
        >>> a, b, _ = (twin.backbone.get_parameter("conv1.weight") for twin in twins.twins.values())
        >>> torch.equal(a, b)
        True
    """

    def __init__(self, choices: dict[str, Jacobians], control: bool = True, **options: Any) -> None:
        super().__init__()
        choices = named_choices(choices)
        everyone = _with_control(choices, control)
        self.save_hyperparameters(ignore=[name for name, value in options.items() if callable(value)])
        plain = {name: jacobians.to_dict() for name, jacobians in choices.items()}
        self.hparams.update(choices=plain, _instantiator="lightning.pytorch.cli.instantiate_module")
        self.twins = nn.ModuleDict()
        for i, (name, jacobians) in enumerate(everyone.items()):
            with isolate_rng() if i + 1 < len(everyone) else nullcontext():  # the same weights for every twin
                twin = self.twins[name] = _Twin(jacobians=jacobians, **options)
            twin.name = name
        self.first = next(iter(everyone))
        first = self.named_twins()[self.first]
        self.title, self.patch_report = f"{len(everyone)} twins of {first.title}", first.patch_report

    def setup(self, stage: str) -> None:
        """Prepare each twin as it prepares itself, and give each its own scaler of fp16 losses."""
        plugin = self.trainer.precision_plugin
        for twin in self.named_twins().values():
            twin.trainer = self.trainer
            twin.setup(stage)
        scaler = getattr(plugin, "scaler", None)
        if stage == "fit" and scaler is not None:
            self._scaler = scaler
            plugin.scaler = _Scalers(scaler, list(self.twins))  # type: ignore[attr-defined] # of fp16 plugins

    def teardown(self, stage: str) -> None:
        """Give the trainer back its own scaler, and let go of what was captured."""
        for twin in self.named_twins().values():
            twin.teardown(stage)
        if (scaler := self.__dict__.pop("_scaler", None)) is not None:
            self.trainer.precision_plugin.scaler = scaler  # type: ignore[attr-defined] # of fp16 plugins

    def configure_optimizers(self) -> Any:
        """One optimizer with parameter groups for each twin, and its scheduler.

        Raises:
            ValueError: If what the twins do to each other cannot be excluded.
        """
        configured = self.named_twins()[self.first].configure_optimizers()
        optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        if isinstance(optimizer, LBFGS):
            raise ValueError("LBFGS searches along one line for all parameters; twins need an optimizer without one")
        if isinstance(configured, dict) and isinstance(configured["lr_scheduler"]["scheduler"], ReduceLROnPlateau):
            raise ValueError(
                "ReduceLROnPlateau would set all learning rates by one twin's loss; give the twins a scheduler that "
                "knows the epoch only, such as CosineAnnealingLR"
            )
        return configured

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; a twin's own scaler may have left out its first steps."""
        with steps_may_be_left_out(self._trainer):
            super().lr_scheduler_step(scheduler, metric)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The losses of one batch, of shape (twins,)."""
        return torch.stack([twin.training_step(batch, batch_idx) for twin in self._in_turn()])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the step that a callback has just made the last one."""
        for twin in self.named_twins().values():
            twin.on_train_batch_end(outputs, batch, batch_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The gradients of each twin's own loss."""
        loss.sum().backward(*args, **kwargs)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each twin's gradients by their own norm."""
        for name in self.twins:
            with _only(optimizer, name):
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracies of each twin on one validation batch."""
        for twin in self._in_turn():
            twin.validation_step(batch, batch_idx)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracies of each twin on one test batch."""
        for twin in self._in_turn():
            twin.test_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note each twin's Jacobian choice."""
        checkpoint["twins"] = {}
        for name, twin in self.named_twins().items():
            twin.on_save_checkpoint(checkpoint["twins"].setdefault(name, {}))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say so when a twin goes on under another choice."""
        for name, twin in self.named_twins().items():
            twin.on_load_checkpoint(checkpoint.get("twins", {}).get(name, {}))

    def named_twins(self) -> Mapping[str, _Twin]:
        """The twins by name, as the classifiers that they are.

        Returns:
            One classifier for each name, the first one first.
        """
        return cast("Mapping[str, _Twin]", self.twins)

    def _in_turn(self) -> Iterator[_Twin]:
        """The twins, each under the random numbers that the first one draws."""
        for i, twin in enumerate(self.named_twins().values()):
            with isolate_rng() if i + 1 < len(self.twins) else nullcontext():
                yield twin


class _Scalers:
    """A scaler for each twin in the place of one for all: an overflow halves one twin's scale and skips its step only.

    Args:
        template: The scaler that each one is a copy of.
        names: The twins.
    """

    def __init__(self, template: torch.amp.GradScaler, names: Sequence[str]) -> None:
        self.scalers = {name: copy.deepcopy(template) for name in names}

    def scale(self, losses: Tensor) -> Tensor:
        return torch.stack([s.scale(loss) for s, loss in zip(self.scalers.values(), losses, strict=True)])

    def unscale_(self, optimizer: Optimizer) -> None:
        for name, scaler in self.scalers.items():
            with _only(optimizer, name):
                scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, **kwargs: Any) -> None:
        for name, scaler in self.scalers.items():
            with _only(optimizer, name):
                scaler.step(optimizer, **kwargs)

    def update(self) -> None:
        for scaler in self.scalers.values():
            scaler.update()

    def state_dict(self) -> dict[str, Any]:
        return {name: scaler.state_dict() for name, scaler in self.scalers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, scaler in self.scalers.items():
            scaler.load_state_dict(state[name])


@contextmanager
def _only(optimizer: Optimizer, twin: str) -> Iterator[None]:
    """Let an optimizer see one twin's parameter groups."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["twin"] == twin]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def _with_control(choices: Mapping[str, Jacobians], control: bool) -> dict[str, Jacobians]:
    """The choices of all twins."""
    bad = [n for n in choices if not re.fullmatch(r"[\w+-]+", n) or hasattr(nn.ModuleDict, n) or n == CONTROL]
    if bad:
        raise ValueError(
            "a twin's name becomes part of train/<twin>/loss and of its weights' names: letters, digits and _+- only, "
            f"no name that torch's ModuleDict has, and not {CONTROL}; given {', '.join(map(repr, bad))}"
        )
    everyone = dict(choices) | ({CONTROL: next(iter(choices.values()))} if control and choices else {})
    if len(everyone) < 2:
        raise ValueError(
            "twins are at least two: give choices such as {native: {}, beta10: {max_pool: 10}}, or leave control on"
        )
    return everyone
