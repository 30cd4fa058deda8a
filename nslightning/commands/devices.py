"""The device that a command was asked to compute on; where it is missing, an error that lists the present ones."""

from __future__ import annotations

from nslightning.commands.endings import CallError
from nslightning.spelling import did_you_mean

_KINDS = ("cpu", "cuda", "mps")
_ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps", "tpu")

__all__ = ["check_accelerator", "check_device"]


def check_device(device: str, option: str = "--device") -> None:
    """Raise if PyTorch cannot compute on a device here.

    Args:
        device: Its name, as PyTorch takes it.
        option: The option that named it.

    Raises:
        CallError: If the machine has no such device; the message lists its devices.

    Example:
        >>> check_device("cpu")
    """
    import torch

    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError):  # no such kind, none of it here, or PyTorch without it
        present = _present()
        known = device.partition(":")[0] in _KINDS
        named = "." if known else "; a GPU is named cuda, cuda:1, ... or mps, the processor cpu."
        raise CallError(f"{option}={device} is not here{named} There is {' and '.join(present)}") from None


def check_accelerator(name: object) -> None:
    """Raise if a Trainer's accelerator is a GPU and there is none.

    Args:
        name: The Trainer's argument.

    Raises:
        CallError: If so.
    """
    import torch

    if isinstance(name, str) and name not in _ACCELERATORS:
        hint = did_you_mean(name, _ACCELERATORS)
        known = ", ".join(_ACCELERATORS)
        raise CallError(f"--trainer.accelerator={name} is not an accelerator{hint} There are: {known}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    present["gpu"] = any(present.values())
    if isinstance(name, str) and not present.get(name, True):
        raise CallError(
            f"--trainer.accelerator={name}: there is no such device here that PyTorch {torch.__version__} can use; "
            "--trainer.accelerator=auto takes what there is, cpu the processor"
        )


def _present() -> list[str]:
    import torch

    mps = ["mps"] * torch.backends.mps.is_available()
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *mps]
