"""The device that a command was asked to compute on: there, or named with what is there instead."""

from __future__ import annotations

from nslightning.commands.endings import CallError

__all__ = ["check_accelerator", "check_device"]


def check_device(device: str, option: str = "--device") -> None:
    """Raise if PyTorch cannot compute on a device here.

    Args:
        device: Its name, as PyTorch takes it.
        option: The option that named it.

    Raises:
        CallError: If it cannot; with the devices that are there.

    Example:
        >>> check_device("cpu")
    """
    import torch

    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind, none of it here, or PyTorch without it
        reason = str(error).splitlines()[0].partition(". Please")[0].partition(" (Triggered")[0]
        raise CallError(
            f"{option}={device} is not here: {reason.rstrip('.')}. There is {', '.join(_present())}; "
            f"{option}=cpu computes on the processor"
        ) from None


def check_accelerator(name: object) -> None:
    """Raise if a Trainer's accelerator is a GPU and there is none.

    Args:
        name: As given to the Trainer.

    Raises:
        CallError: If so.
    """
    import torch

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
