"""Hugging Face's ``Trainer`` under a Jacobian choice, by one callback.

Needs the extra ``huggingface``: ``pip install 'nslightning[huggingface]'``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nslightning.callbacks.measurements import append_rows, begin_table, choice_in_use
from nslightning.choices import Choice, named_choices, to_jacobians
from nslightning.jacobians import Jacobians
from nslightning.models.checkpoint_note import plan_of
from nslightning.probes import Divergence
from nslightning.probes.measured_backward import measured_backward
from nslightning.surgery import PatchReport, Rule, patch, selections, unpatch

__all__ = ["NonsmoothTrainerCallback"]


class NonsmoothTrainerCallback(TrainerCallback):
    """Patches the model of a Hugging Face ``Trainer``, and measures other choices on its training backward.

    The model is patched when the ``Trainer`` is made, before Accelerate wraps or compiles it. It stays patched after
    training, since the ``Trainer`` goes on using it; :meth:`unpatch` gives it back. Weights, and what
    ``save_pretrained`` writes, are those of the model without a patch. Measuring leaves the training bit for bit as it
    is.

    Written to ``output_dir``: ``patch_report.json`` with every site, after the first step; ``divergence.csv`` with one
    row per measured step and choice, whose column ``reference`` names the choice that trains (``native``: stock
    PyTorch's). A training that goes on replaces the rows from its first step on; a new training in the same folder
    keeps the former table as ``divergence.1.csv``. The same values go into
    ``trainer.state.log_history`` as ``divergence/<choice>/relative`` and ``divergence/<choice>/cosine``, and to W&B
    where a run is active. On several processes they are those of the first process's own batch.

    Args:
        jacobians: The choice for all sites; also its fields as a mapping, or a preset such as ``"jax"``.
        sites: Rules for some sites (:class:`~nslightning.surgery.Rule`).
        choices: Other choices to compare with the one in use, by name.
        every_n_steps: Optimizer steps between two measurements; the first step is measured.
        only: Patch only the modules that this selects.
        skip: Leave the modules that this selects alone.
        strict: Refuse a model with an operation that no choice can reach, instead of naming it in the report.

    Attributes:
        report: The report of the patch; None before there is a model.

    Raises:
        ValueError: If a rule or the number of steps is mistaken.

    Example:
        >>> callback = NonsmoothTrainerCallback(Jacobians(relu=1.0), choices={"stock": Jacobians()})
    """

    def __init__(
        self,
        jacobians: Choice = Jacobians(),  # noqa: B008 # frozen
        sites: Sequence[Rule | dict[str, Any]] | None = None,
        choices: Mapping[str, Choice] | Sequence[str] | None = None,
        every_n_steps: int = 50,
        only: Any = None,
        skip: Any = None,
        strict: bool = True,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is a number of steps from 1 on; given {every_n_steps}")
        self.plan = plan_of(to_jacobians(jacobians), sites)
        self.choices, self.every_n_steps = named_choices(choices or {}), every_n_steps
        self.only, self.skip, self.strict = only, skip, strict
        self.report: PatchReport | None = None
        self._measuring = ExitStack()
        self._measured: dict[str, Divergence] = {}
        self._report_written = False
        self._model: nn.Module | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Patch the model, if there is one already (``model_init`` makes it later)."""
        if kwargs.get("model") is not None:
            self._patch(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Patch the model, unless that is done.

        Raises:
            ValueError: If the model would be compiled before it is patched.
        """
        model: nn.Module = kwargs["model"]
        if not selections(model):
            if args.torch_compile:
                raise ValueError(
                    "NonsmoothTrainerCallback patches before compilation: give it to Trainer(callbacks=[...]), which "
                    "lets it patch at once, and train once with it"
                )
            self._patch(model)
        if self.choices and args.torch_compile:
            raise ValueError("a compiled model's ties cannot be recorded: measure without torch_compile, or choices={}")
        self._report_written = False
        if self.choices and state.is_world_process_zero:
            begin_table(_table(args), state.global_step)

    def _patch(self, model: nn.Module) -> None:
        if model is not self._model:  # the same model may train in a second Trainer
            self.report = patch(model, self.plan, only=self.only, skip=self.skip, strict=self.strict)
            self._model = model

    def unpatch(self) -> None:
        """Give the model back as it was made, without Accelerate's wrapper for mixed precision.

        Raises:
            ValueError: If nothing is patched.
        """
        if self._model is None:
            raise ValueError("NonsmoothTrainerCallback has patched no model yet, or gave it back")
        # Accelerate puts a wrapper with autocast over the instance's forward, and keeps the one that was there.
        wrapped = self._model.__dict__.pop("_original_forward", None)
        if wrapped is not None:
            self._model.forward = wrapped  # as Accelerate does
        unpatch(self._model)
        self._model = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure on the backward that comes, if it is time."""
        if self.choices and state.global_step % self.every_n_steps == 0:
            self._measured = self._measuring.enter_context(measured_backward(kwargs["model"], self.choices))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring after the first of several accumulated batches."""
        self._stop(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop measuring."""
        self._stop(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the report once the first step has shown the functional calls."""
        self._stop(args, state)
        if not self._report_written and self.report is not None and state.is_world_process_zero:
            assert args.output_dir is not None
            self.report.save(Path(args.output_dir, "patch_report.json"))
            self._report_written = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop measuring, where the last step did not."""
        self._measuring.close()

    def _stop(self, args: TrainingArguments, state: TrainerState) -> None:
        self._measuring.close()
        measured, self._measured = self._measured, {}
        if not measured or not state.is_world_process_zero:
            return
        assert self._model is not None  # a backward of it was measured
        step, reference = state.global_step, choice_in_use(self._model)
        rows = [{"step": step, "choice": n, "reference": reference, **d.norms()} for n, d in measured.items()]
        append_rows(_table(args), rows)
        values = {
            f"divergence/{name}/{norm}": value
            for name, d in measured.items()
            for norm, value in d.norms().items()
            if norm in ("relative", "cosine")  # which a loss's scale leaves alone
        }
        state.log_history.append({**values, "step": state.global_step})
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            wandb.log({**values, "train/global_step": state.global_step})


def _table(args: TrainingArguments) -> Path:
    assert args.output_dir is not None
    return Path(args.output_dir, "divergence.csv")
