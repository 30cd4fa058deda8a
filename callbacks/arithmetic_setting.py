"""Sets the arithmetic of a training, from its setup to its teardown."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nslightning.arithmetic import Arithmetic

__all__ = ["ArithmeticSetting"]


class ArithmeticSetting(Callback):
    """Train, validate, test or predict in a named arithmetic; float32 means float32 unless it says otherwise.

    ``nslightning fit`` adds one by itself, from ``--arithmetic``. PyTorch's switches are set when the trainer sets up,
    in each process, and stand as before at the end. They are recorded with the run.

    Args:
        arithmetic: Words joined by ``+``: an order of summation, ``random_rounding``, ``tf32``, ...
            (:meth:`nslightning.arithmetic.Arithmetic.parse`).

    Raises:
        ValueError: If a word is not known.

    Example:
        >>> ArithmeticSetting("bias_last+tf32").arithmetic.tf32
        True
    """

    def __init__(self, arithmetic: str = "native") -> None:
        self.arithmetic = Arithmetic.parse(arithmetic)
        self._stack: ExitStack | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Bring the arithmetic into force.

        Raises:
            ValueError: If it has to see each operation and the network is to be compiled.
        """
        if self.arithmetic.in_modes and any(_compiled(module) for module in pl_module.modules()):
            raise ValueError(
                f"arithmetic={self.arithmetic} works operation by operation, which a compiled network hides; "
                "give --model.compile=false"
            )
        self._close()
        self._stack = ExitStack()
        self._stack.enter_context(self.arithmetic.applied())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take it back."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take it back where the training breaks off."""
        self._close()

    def _close(self) -> None:
        if self._stack is not None:
            self._stack.close()
            self._stack = None


def _compiled(module: Any) -> bool:
    return bool(getattr(module, "_compile", False)) or getattr(module, "_compiled_call_impl", None) is not None
