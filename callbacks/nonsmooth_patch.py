"""Any LightningModule under a Jacobian choice, by one callback."""

import os
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from nslightning._torch import is_compiled
from nslightning.choices import Choice, to_jacobians
from nslightning.jacobians import Jacobians
from nslightning.models.checkpoint_note import CheckpointNote, plan_of
from nslightning.surgery import PatchReport, patch, selections, unpatch

from .run_record import RunRecord

__all__ = ["NonsmoothPatch"]


class NonsmoothPatch(Callback):
    """Patches the LightningModule of any Trainer while it fits, validates, tests or predicts.

    The module needs no change. Its parameters, buffers and ``state_dict`` keys stay as they are, so an optimizer,
    DDP or a checkpoint sees the same module; only the derivative at ties differs. Calls in ``training_step`` take the
    choice as well as those in ``forward``.

    When it patches: after the module's own ``setup`` and ``configure_model``, which may build networks, and before a
    checkpoint is loaded and a strategy wraps the module. When it stops: in ``teardown``, or when an exception ends the
    run. The module is then exactly what it was, and a second ``fit`` patches it again.

    It records the same as a run of ``nslightning fit``: the patch report is printed and written to the
    logger's folder as ``patch_report.json`` and ``.txt``, with versions and settings in ``run.json``. Checkpoints name
    the choice. A run that goes on from a checkpoint of another choice warns, or refuses.

    The callbacks that measure (``GradientDivergence``, ``TieMonitor``, ...) work beside it, in any order.

    Args:
        jacobians: The choice for all sites; also its fields as a mapping, or a preset such as ``"jax"``.
        sites: Rules for some sites, later ones winning, such as ``{"stage": "encoder", "relu": 0.5}``
            (:class:`~nslightning.surgery.Rule`).
        only: Patch only the modules that this selects, such as ``"encoder.*"``.
        skip: Leave the modules that this selects alone.
        strict: Refuse a module with an operation that no choice can reach, instead of naming it in the report.
        on_mismatch: Whether to warn or to refuse when a checkpoint was made under another choice.
        seed: Seeds the ``"random"`` choice.

    Attributes:
        report: The report of the patch, or of the last one; None before the first run.

    Raises:
        ValueError: If a rule is mistaken.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = NonsmoothPatch(Jacobians(relu=1.0), sites=[{"stage": "encoder", "relu": 0.5}])
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        jacobians: Choice = Jacobians(),  # noqa: B008 # frozen
        sites: list[dict[str, Any]] | None = None,
        only: str | list[str] | None = None,
        skip: str | list[str] | None = None,
        strict: bool = True,
        on_mismatch: Literal["warn", "refuse"] = "warn",
        seed: int = 0,
    ) -> None:
        self.plan = plan_of(to_jacobians(jacobians), sites)
        self.only, self.skip, self.strict, self.seed = only, skip, strict, seed
        self.report: PatchReport | None = None
        self._note = CheckpointNote(self.plan, on_mismatch)
        self._patched: LightningModule | None = None
        self._record: RunRecord | None = None
        self._replaced: tuple[LightningModule, str] | None = None
        self._had_forward = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the module patched as soon as its last own hook before the strategy has run.

        Raises:
            ValueError: If the module, or a part of it, is patched already.
            TypeError: If it is compiled already.
        """
        kind = type(pl_module).__name__
        if self._patched is pl_module:  # a run inside a run
            return
        if selections(pl_module):
            raise ValueError(
                f"NonsmoothPatch: {kind} is patched already. Leave NonsmoothPatch out and give the module its choice "
                "(--model.jacobians), or unpatch the module first"
            )
        if any(map(is_compiled, pl_module.modules())):
            raise TypeError(
                f"NonsmoothPatch: {kind} is compiled already, and the compiled code keeps PyTorch's own derivative. "
                "Give trainer.fit the module itself, and call `self.network.compile()` in its on_fit_start"
            )
        others = [c for c in _callbacks(trainer) if isinstance(c, NonsmoothPatch) and c is not self]
        if others and others[0]._replaced is not None:
            raise ValueError("NonsmoothPatch stands twice among the callbacks; one takes rules for some sites: sites=")
        self._patch_after(pl_module, "configure_model" if is_overridden("configure_model", pl_module) else "setup")

    def _patch_after(self, module: LightningModule, hook: str) -> None:
        """Replace a hook of the module, on the instance, by one that patches afterwards."""
        original: Callable[..., Any] = getattr(module, hook)

        @wraps(original)
        def hook_then_patch(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._give_back_hook()
            self._had_forward = "forward" in module.__dict__
            # Lightning runs configure_model with another default device; the choice is kept on the CPU.
            with torch.device("cpu"):
                self.report = patch(
                    module, self.plan, only=self.only, skip=self.skip, seed=self.seed, strict=self.strict
                )
            self._patched = module
            return result

        self._replaced = (module, hook)
        setattr(module, hook, hook_then_patch)

    def _give_back_hook(self) -> None:
        if self._replaced is not None:
            module, hook = self._replaced
            module.__dict__.pop(hook, None)
            self._replaced = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the patch report, unless another callback does."""
        if any(isinstance(callback, RunRecord) for callback in _callbacks(trainer)):
            return
        seed = os.environ.get("PL_GLOBAL_SEED")  # where Lightning keeps what seed_everything was given
        self._record = RunRecord({}, None if seed is None else int(seed))
        self._record.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the run's record."""
        if self._record is not None:
            self._record.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Complete the report with the functional calls of the first step."""
        if self._record is not None:
            self._record.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note in the run's record that the run is finished."""
        if self._record is not None:
            self._record.on_fit_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note under which choice the weights were trained."""
        if self.report is not None:
            optimizer = type(trainer.optimizers[0]).__name__ if trainer.optimizers else None
            self._note.write(checkpoint, self.report, optimizer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn of a checkpoint that was made under another choice, or refuse it."""
        if self.report is not None:
            self._note.check(checkpoint, self.report)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module back as it was."""
        self._unpatch()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note how the run ended, and give the module back as it was: Lightning calls no ``teardown`` then."""
        try:
            if self._record is not None:
                self._record.on_exception(trainer, pl_module, exception)
        finally:
            self._unpatch()

    def _unpatch(self) -> None:
        self._give_back_hook()
        self._record = None
        module, self._patched = self._patched, None
        if module is None:
            return
        unpatch(module)
        if not self._had_forward:  # DDP's detour through `forward` leaves a bound method on the instance
            module.__dict__.pop("forward", None)


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set by a connector
    return callbacks
