"""Keeps a patched module alive while code holds one of its methods, as a bound method of a stock module does.

The objects in the place of the methods refer to their module weakly, so that Python frees it without its collector of
cycles. The class of the module therefore has a finaliser while such objects live. Where code holds one of them when
the module would end, the finaliser lets this object own the module.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from typing import Any

__all__ = ["is_own", "keep_by"]

_users: Counter[type] = Counter()  # objects that need the finaliser, by the class that has it
_kinds: set[type] = set()  # the classes of these objects


def is_own(cls: type) -> bool:
    """Return whether a class comes from a model's code, and not from a library.

    Args:
        cls: The class of a module.

    Returns:
        Whether it does.

    Example:
        >>> is_own(type("Net", (), {"__module__": "nets"})), is_own(dict)
        (True, False)
    """
    return cls.__module__.partition(".")[0] not in (
        "torch", "lightning", "pytorch_lightning", "typing", "abc", "builtins",
    )  # fmt: skip


def keep_by(method: Any, cls: type) -> None:
    """Let a method's object keep its module alive, if the module's class can have a finaliser.

    The classes of libraries cannot, nor can those that have a finaliser already: there code has to hold the module.

    Args:
        method: The object, an attribute of the module.
        cls: The class of the module.
    """
    if not is_own(cls) or getattr(cls, "__del__", _end) is not _end:
        return
    if not _users[cls]:
        type.__setattr__(cls, "__del__", _end)
    _users[cls] += 1
    _kinds.add(type(method))
    weakref.finalize(method, _release, cls).atexit = False


def _release(cls: type) -> None:
    _users[cls] -= 1
    if not _users[cls]:
        del _users[cls]
        if vars(cls).get("__del__") is _end:
            type.__delattr__(cls, "__del__")


def _end(module: Any) -> None:
    """Let the first method that other code holds own the module."""
    if sys.is_finalizing():
        return
    ((_, attribute_alone),) = _references({"": object()})
    for value, references in _references(vars(module)):
        if references > attribute_alone and type(value) in _kinds:
            value.owner = module
            return


def _references(attributes: dict[str, Any]) -> list[tuple[Any, int]]:
    return [(value, sys.getrefcount(value)) for value in attributes.values()]
