"""The user's own networks, named ``package.module:factory``."""

from __future__ import annotations

import copy
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nslightning.spelling import did_you_mean

__all__ = ["OwnNameError", "OwnNetworkError", "current_folder_importable", "is_own", "own_network", "without_own_code"]

_ONLY_NAMES = ContextVar("_ONLY_NAMES", default=False)


class OwnNameError(ValueError):
    """A name of the form ``package.module:factory`` that names no factory and no network."""


class OwnNetworkError(RuntimeError):
    """The user's own code fails, or its network does not run."""


def is_own(name: str) -> bool:
    """Return whether a backbone's name has the form ``package.module:factory``.

    Args:
        name: The name.

    Returns:
        True where a colon comes before any slash; ``timm/hf-hub:...`` is timm's.

    Example:
        >>> is_own("my_package.nets:make"), is_own("timm/resnet18")
        (True, False)
    """
    before, colon, _ = name.partition(":")
    return bool(colon) and "/" not in before


@contextmanager
def current_folder_importable() -> Iterator[None]:
    """Let ``import`` find modules in the current folder, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextmanager
def without_own_code() -> Iterator[None]:
    """Refuse networks from the user's own code: inside, names come from a file that a stranger may have written."""
    before = _ONLY_NAMES.set(True)
    try:
        yield
    finally:
        _ONLY_NAMES.reset(before)


def own_network(name: str, offered: dict[str, Any] | None = None, options: dict[str, Any] | None = None) -> nn.Module:
    """Make the network that ``package.module:factory`` names.

    Modules in the current folder are found. The import draws no random numbers from the global streams.

    Args:
        name: ``package.module:factory``. The factory is a function or class that makes an ``nn.Module``, or it is an
            ``nn.Module``, which is copied.
        offered: Arguments that are passed where the factory names them, such as ``num_classes``.
        options: Arguments that are passed in any case.

    Returns:
        The network.

    Raises:
        OwnNameError: If there is no such module, or no such factory in it; or inside :func:`without_own_code`.
        ValueError: If there are ``options`` and the name is a network, which takes none.
        OwnNetworkError: If the code itself fails.
    """
    if _ONLY_NAMES.get():
        raise OwnNameError(
            f"the checkpoint names code to run, {name}: if you trust it, say so by naming the network yourself: "
            f"load_from_checkpoint(..., backbone={name!r})"
        )
    where, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*where.split("."), attribute)):
        raise OwnNameError(f"{name!r} is not of the form package.module:factory")
    options = options or {}
    with current_folder_importable():
        factory = _look_up(where, attribute)
        if isinstance(factory, nn.Module):
            if options:
                raise ValueError(f"{name} is a network, which takes no options; given {', '.join(options)}")
            return copy.deepcopy(factory)
        if not callable(factory):
            raise OwnNameError(f"{name} is of type {type(factory).__name__}, neither a factory nor an nn.Module")
        arguments = _arguments(name, factory, offered or {}, options)
        try:
            network = factory(**arguments)
        except Exception as error:
            call = ", ".join(f"{k}={v!r}" for k, v in arguments.items())
            raise OwnNetworkError(f"{name}({call}) failed with {_failure(error)}") from error
    if not isinstance(network, nn.Module):
        raise OwnNameError(f"{name}() returns a {type(network).__name__}, not an nn.Module")
    return network


def _look_up(where: str, attribute: str) -> Any:
    try:
        with torch.random.fork_rng(devices=[]):  # importing may draw, and only does so the first time
            module = import_module(where)
    except ModuleNotFoundError as error:
        missing = error.name or where
        if where != missing and not where.startswith(f"{missing}."):
            raise OwnNetworkError(f"{where} exists, and imports {missing}, which is not installed") from error
        here = Path.cwd()
        files = [*here.glob("*.py"), *here.joinpath(*where.split(".")[:-1]).glob("*.py")]
        modules = sorted({".".join(file.relative_to(here).with_suffix("").parts) for file in files})
        hint = did_you_mean(f"{where}:{attribute}", [f"{module}:{attribute}" for module in modules], otherwise="")
        raise OwnNameError(f"there is no module {missing!r} in {Path.cwd()} or installed{hint}") from error
    except Exception as error:
        raise OwnNetworkError(f"importing {where} failed with {_failure(error)}") from error
    if not hasattr(module, attribute):
        public = [n for n, v in vars(module).items() if not n.startswith("_") and callable(v)]
        hint = did_you_mean(f"{where}:{attribute}", [f"{where}:{other}" for other in public], otherwise="")
        raise OwnNameError(f"module {where} has no {attribute!r}{hint}")
    return getattr(module, attribute)


def _failure(error: Exception) -> str:
    """An error of the user's own code, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(Path.cwd())]
    line = f" ({Path(inside[-1].filename).name}, line {inside[-1].lineno})" if inside else ""
    return f"{type(error).__name__}: {error}{line}"


def _arguments(name: str, factory: Any, offered: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options, and those of the offered arguments that a factory names."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # a class written in C
        return options
    unknown = sorted(options.keys() - parameters.keys())
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        hint = did_you_mean(unknown[0], list(parameters))
        raise ValueError(f"{name} has no option {unknown[0]!r}{hint} It takes: {', '.join(parameters)}")
    return {key: value for key, value in offered.items() if key in parameters} | options
