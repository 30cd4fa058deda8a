"""Options of Lightning's Trainer that it takes and that mean nothing, or fail late: refused at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_warn

from nslightning.commands.devices import check_accelerator

__all__ = ["check", "runs_on_cpu", "say_what_hangs", "say_what_is_slow"]


class Limit(NamedTuple):
    """The values that an option of the Trainer may have.

    Args:
        option: Its name.
        allows: Whether a value is allowed; None always is.
        says: Description of the allowed values; it ends the sentence "it is ...".
        commands: The subcommands that it matters to; empty for all.
    """

    option: str
    allows: Callable[[Any], bool]
    says: str
    commands: tuple[str, ...] = ()


def _at_least(low: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and value >= low


#: Processes of a training on the CPU: more of them fill the memory, and none is faster.
_PROCESSES_PER_CORE = 4

_NOTHING = "a number of batches from 1 on, or a share such as 0.1: without a batch nothing would happen"

_DEVICE_NUMBERS = re.compile(r"auto|-1|[1-9]\d*|\[\d+(, ?\d+)*\]|\d+,(\d+,?)*")
_DEVICES = "a number from 1 on, a list of their numbers, or -1 or auto for all"

#: One row per option.
LIMITS = (
    Limit("gradient_clip_val", _at_least(0), "a norm, or a value, from 0 on; null or 0 clips nothing"),
    Limit("accumulate_grad_batches", _at_least(1), "a number of batches, at least 1"),
    Limit("limit_train_batches", lambda v: v != 0, _NOTHING, ("fit",)),
    Limit("limit_val_batches", lambda v: v != 0, _NOTHING, ("validate",)),
    Limit("limit_test_batches", lambda v: v != 0, _NOTHING, ("test",)),
    Limit("limit_predict_batches", lambda v: v != 0, _NOTHING, ("predict",)),
    Limit("max_epochs", lambda v: v == -1 or v >= 1, "a number of epochs from 1 on, or -1 for no end", ("fit",)),
    Limit("max_steps", lambda v: v == -1 or v >= 1, "a number of steps from 1 on, or -1 for no end", ("fit",)),
    Limit("check_val_every_n_epoch", _at_least(1), "a number of epochs, at least 1; null counts batches instead"),
    Limit("devices", lambda v: _DEVICE_NUMBERS.fullmatch(str(v)) is not None, _DEVICES),
    Limit("num_sanity_val_steps", _at_least(-1), "a number of batches; 0 for no check, -1 for all batches"),
    Limit("log_every_n_steps", _at_least(0), "a number of steps, at least 1; 0 logs nothing"),
    Limit("val_check_interval", lambda v: not isinstance(v, (int, float)) or v > 0, "above 0: batches, or a share"),
)


def check(trainer: Namespace, command: str) -> None:
    """Raise if an option of the Trainer has a value that means nothing.

    Args:
        trainer: The options.
        command: The subcommand.

    Raises:
        ValueError: If an option has such a value.
    """
    check_accelerator(trainer.get("accelerator"))
    for limit in LIMITS:
        value = trainer.get(limit.option)
        if (not limit.commands or command in limit.commands) and value is not None and not limit.allows(value):
            raise ValueError(f"--trainer.{limit.option}={value} is not allowed; it is {limit.says}")
    devices = str(trainer.get("devices"))
    most = _PROCESSES_PER_CORE * (os.cpu_count() or 1)
    if devices.isdigit() and int(devices) > most and runs_on_cpu(trainer.get("accelerator", "auto")):
        raise ValueError(
            f"--trainer.devices={devices} would start {devices} processes on {os.cpu_count()} processor cores, and "
            f"fill the memory: at most {most} are allowed here, and 1 is the fastest"
        )
    if trainer.get("sync_batchnorm") and runs_on_cpu(trainer.get("accelerator", "auto")):
        raise ValueError(
            "--trainer.sync_batchnorm=true takes GPUs: PyTorch's SyncBatchNorm refuses tensors on a processor. Leave "
            "it out, or train a network without batch normalisation"
        )
    if trainer.get("default_root_dir") is not None:
        raise ValueError(
            f"--trainer.default_root_dir={trainer.default_root_dir} is not used: all of a run is in its own folder; "
            "--output=FOLDER says where run folders are kept"
        )


def runs_on_cpu(accelerator: Any) -> bool:
    """Return whether a run takes place on the CPU.

    Args:
        accelerator: The Trainer's argument.

    Returns:
        True if it does.
    """
    automatic = accelerator == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return accelerator == "cpu" or automatic


# Networks that train within minutes on a processor, by the beginning of their names.
_SMALL = ("paper/lenet", "paper/fc", "mini")


def say_what_is_slow(trainer: Namespace, network: str) -> None:
    """Warn where a training that is meant for a GPU is about to begin without one.

    Args:
        trainer: The Trainer's options.
        network: The network that is trained, by its name.
    """
    if not runs_on_cpu(trainer.accelerator) or trainer.fast_dev_run or network.startswith(_SMALL):
        return
    if str(trainer.precision) not in ("16-mixed", "16", "16-true"):
        return
    rank_zero_warn(
        f"{network} in {trainer.precision} on a processor is slow: there is no GPU here, and a processor computes 16 "
        "bits several times slower than 32. --trainer.precision=bf16-mixed or 32-true is faster, "
        "--trainer.fast_dev_run=true tries one batch, --trainer.limit_train_batches=20 a few, and "
        "--model.backbone=paper/lenet5 a small network"
    )


def say_what_hangs() -> None:
    """Warn where ``torchrun`` may start processes again that then wait for each other without end.

    Its launcher keeps one store over all restarts, with the addresses that the processes before wrote there.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        rank_zero_warn(
            "torchrun may start these processes again, and those may hang: they read addresses of processes that are "
            "gone. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, on every machine"
        )
