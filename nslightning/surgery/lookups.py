"""Patches properties and special methods such as ``__call__``, which Python looks up on the class.

An attribute of the instance cannot replace these. While a patched instance lives, its class holds a replacement: a
property or a function of the same name, which checks whether the instance is patched. Other instances of the class run
the code that they ran before.
"""

from __future__ import annotations

import copy
import dis
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property, partial, wraps
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from nslightning.surgery.methods import Caller, accessors
from nslightning.surgery.state import PART, Part

__all__ = ["Looked", "lookups"]

# These return no tensor, or serve to pickle, copy or delete an object.
_NO_TENSOR = frozenset((
    "__len__", "__length_hint__", "__contains__", "__bool__", "__index__", "__int__", "__float__", "__complex__",
    "__format__", "__bytes__", "__fspath__", "__del__", "__copy__", "__deepcopy__", "__getnewargs__",
    "__getnewargs_ex__", "__post_init__",
))  # fmt: skip
_OF_MODULES = frozenset(dir(nn.Module)) - {"__call__"}


def lookups(cls: type, own: Callable[[type], bool]) -> Iterator[tuple[type, str]]:
    """The properties and special methods of a class whose code may call functions.

    Args:
        cls: The class of a module.
        own: Whether a class comes from a model's code, and not from a library.

    Yields:
        The class that defines it, and its name.
    """
    for definer in cls.__mro__:
        if not own(definer):
            continue
        for name, value in vars(definer).items():
            special = name.startswith("__") and name.endswith("__")
            if special and (name in _NO_TENSOR or name in _OF_MODULES or not isinstance(value, FunctionType)):
                continue
            if (special or isinstance(value, (property, cached_property))) and any(map(_calls, _codes(value))):
                yield definer, name


class Looked(Caller):
    """The property or the special method of one patched module.

    Args:
        module: The module.
        name: The name of the property or the method.
        part: The surgery's record of the module.
        definer: The class that defines it.
    """

    def __init__(self, module: nn.Module, name: str, part: Part, definer: type) -> None:
        self.definer = definer
        followed = _followed.get((definer, name)) or _Followed(definer, name)
        self.function = followed.function
        super().__init__(module, name, part)
        self.returns_results = name == "__call__"
        self.release = followed.used_by(self)

    def stock(self, module: nn.Module) -> Callable[..., Any]:
        """The code of the getter or of the special method.

        Args:
            module: The module, or a shallow copy of it.

        Returns:
            The bound function.
        """
        if torch.compiler.is_compiling():
            return partial(self.function, module)
        return MethodType(self.function, module)

    def __getattr__(self, name: str) -> Any:
        if name in ("definer", "function", "release"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Looked:
        return Looked(copy.deepcopy(self.module, memo), self.name, copy.deepcopy(self.part, memo), self.definer)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Looked, (self.module, self.name, self.part, self.definer)


class _Followed:
    """Replaces a property or a special method in its class while at least one patched instance needs it."""

    def __init__(self, definer: type, name: str) -> None:
        self.definer, self.name, self.users = definer, name, 0
        self.before = vars(definer)[name]
        self.function, self.after = _entrance(self.before, (definer, name))
        _followed[definer, name] = self
        type.__setattr__(definer, name, self.after)

    def used_by(self, looked: Looked) -> Callable[[], Any]:
        """Count a patched instance. Calling the returned function, or the end of the instance, uncounts it."""
        self.users += 1
        release = weakref.finalize(looked, self._release)
        release.atexit = False
        return release

    def _release(self) -> None:
        self.users -= 1
        if not self.users:
            del _followed[self.definer, self.name]
            if vars(self.definer).get(self.name) is self.after:
                type.__setattr__(self.definer, self.name, self.before)


_followed: dict[tuple[type, str], _Followed] = {}


def _entrance(value: Any, key: tuple[type, str]) -> tuple[Callable[..., Any], Any]:
    """The code of a property or a special method, and the replacement that runs it through a patched module."""
    if isinstance(value, property):
        assert value.fget is not None
        return value.fget, value.getter(_asking(value.fget, key))
    if isinstance(value, cached_property):
        new = copy.copy(value)
        new.func = _asking(value.func, key)
        return value.func, new
    return value, _asking(value, key)


def _asking(function: Callable[..., Any], key: tuple[type, str]) -> Callable[..., Any]:
    @wraps(function)
    def entrance(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: Part | None = self.__dict__.get(PART)
        looked = None if part is None else part.lookups.get(key)
        return function(self, *args, **kwargs) if looked is None else looked(*args, **kwargs)

    accessors.add(entrance.__code__)  # type: ignore[attr-defined] # a function's
    return entrance


def _codes(value: Any) -> Iterator[Any]:
    getter = value.fget if isinstance(value, property) else getattr(value, "func", value)
    if isinstance(getter, FunctionType):
        yield getter.__code__


def _calls(code: Any) -> bool:
    """Return whether code calls anything. Code without a call combines values by operators, which have no kinks."""
    return any(line.opname.startswith("CALL") for line in dis.get_instructions(code))
