"""Patches properties, descriptors and special methods such as ``__call__``, which Python looks up on the class.

An attribute of the instance cannot replace these. While a patched instance lives, its class holds a replacement: a
property, a descriptor or a function of the same name, which checks whether the instance is patched. Other instances of
the class run the code that they ran before.
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

from nslightning.surgery.entrances import Caller
from nslightning.surgery.methods import accessors
from nslightning.surgery.state import PART, Part

__all__ = ["Looked", "lookups"]

# These return no tensor, or serve to pickle, copy or delete an object.
_NO_TENSOR = frozenset((
    "__len__", "__length_hint__", "__contains__", "__bool__", "__index__", "__int__", "__float__", "__complex__",
    "__format__", "__bytes__", "__fspath__", "__del__", "__copy__", "__deepcopy__", "__getnewargs__",
    "__getnewargs_ex__", "__post_init__",
))  # fmt: skip
_OF_MODULES = frozenset(dir(nn.Module)) - {"__call__"}


def lookups(cls: type, own: Callable[[type], bool]) -> Iterator[tuple[type, str, str]]:
    """The properties, descriptors and special methods of a class whose code may call functions.

    Args:
        cls: The class of a module.
        own: Whether a class comes from a model's code, and not from a library.

    Yields:
        The class that defines it, its name, and when Python runs the code: ``"read"``, ``"set"`` or ``"call"``.
    """
    for definer in filter(own, cls.__mro__):
        for name, value in vars(definer).items():
            yield from ((definer, name, when) for when, function in _functions(name, value).items() if _calls(function))


class Looked(Caller):
    """The property, the descriptor or the special method of one patched module.

    Args:
        module: The module.
        name: The name of the attribute or the method.
        part: The surgery's record of the module.
        definer: The class that defines it.
        when: When Python runs the code, as in :func:`lookups`.
    """

    def __init__(self, module: nn.Module, name: str, part: Part, definer: type, when: str) -> None:
        self.definer, self.when = definer, when
        followed = _followed.get((definer, name)) or _Followed(definer, name)
        self.function = followed.functions[when]
        super().__init__(module, name, part)
        self.returns_results = name == "__call__"
        self.release = followed.used_by(self)

    def stock(self, module: nn.Module) -> Callable[..., Any]:
        """The code of the getter, the setter or the special method.

        Args:
            module: The module, or a shallow copy of it.

        Returns:
            The bound function.
        """
        if torch.compiler.is_compiling():
            return partial(self.function, module)
        return MethodType(self.function, module)

    def __getattr__(self, name: str) -> Any:
        if name in ("definer", "when", "function", "release"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Looked:
        module, part = copy.deepcopy(self.module, memo), copy.deepcopy(self.part, memo)
        return Looked(module, self.name, part, self.definer, self.when)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Looked, (self.module, self.name, self.part, self.definer, self.when)


class _Followed:
    """Replaces an attribute of a class while at least one patched instance needs it."""

    def __init__(self, definer: type, name: str) -> None:
        self.definer, self.name, self.users = definer, name, 0
        self.before = vars(definer)[name]
        self.functions = _functions(name, self.before)
        asking = {when: _asking(function, (definer, name, when)) for when, function in self.functions.items()}
        self.after = _replacement(self.before, asking)
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


def _functions(name: str, value: Any) -> dict[str, Callable[..., Any]]:
    """The functions of a class attribute that Python runs itself: when it is read or set, or by a special syntax."""
    if name.startswith("__") and name.endswith("__"):
        special = isinstance(value, FunctionType) and name not in _NO_TENSOR and name not in _OF_MODULES
        return {"call": value} if special else {}
    if isinstance(value, property):
        found = {"read": value.fget, "set": value.fset}
    elif isinstance(value, cached_property):
        found = {"read": value.func}
    elif _is_attribute(value):
        found = {"read": _getter(value, name), "set": _setter(value)}
    else:
        return {}
    return {when: function for when, function in found.items() if function is not None}


def _is_attribute(value: Any) -> bool:
    """Return whether an object in a class is a descriptor that stands for a value, and not for a method."""
    cls = type(value)
    if cls.__module__ in ("builtins", "functools") or not (hasattr(cls, "__get__") or hasattr(cls, "__set__")):
        return False
    return hasattr(cls, "__set__") or not callable(value)


def _getter(descriptor: Any, name: str) -> Callable[[Any], Any]:
    get = getattr(type(descriptor), "__get__", None)

    def getter(module: Any) -> Any:
        if get is None:  # Python then takes the instance's attribute
            return vars(module).get(name, descriptor)
        return get(descriptor, module, type(module))

    return getter


def _setter(descriptor: Any) -> Callable[[Any, Any], Any] | None:
    set_value = getattr(type(descriptor), "__set__", None)
    return None if set_value is None else lambda module, value: set_value(descriptor, module, value)


class _Descriptor:
    """Stands for a descriptor in its class."""

    def __init__(self, value: Any, read: Callable[[Any], Any]) -> None:
        self._value, self._read = value, read

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        if module is None:
            return self._value.__get__(None, owner) if hasattr(type(self._value), "__get__") else self._value
        return self._read(module)

    @property  # type: ignore[misc] # a read-only `__class__`
    def __class__(self) -> type:
        return type(self._value)

    def __getattr__(self, name: str) -> Any:
        if name in ("_value", "_read"):
            raise AttributeError(name)
        return getattr(self._value, name)


class _SettableDescriptor(_Descriptor):
    """Stands for a descriptor that sees an attribute being set."""

    def __init__(self, value: Any, read: Callable[[Any], Any], write: Callable[[Any, Any], Any]) -> None:
        super().__init__(value, read)
        self._write = write

    def __set__(self, module: Any, value: Any) -> None:
        self._write(module, value)

    def __delete__(self, module: Any) -> None:
        self._value.__delete__(module)


def _replacement(value: Any, asking: dict[str, Callable[..., Any]]) -> Any:
    """What the class holds in the place of a value: it runs the value's functions through a patched module."""
    if "call" in asking:
        return asking["call"]
    if isinstance(value, property):
        value = value.getter(asking["read"]) if "read" in asking else value
        return value.setter(asking["set"]) if "set" in asking else value
    if isinstance(value, cached_property):
        cached = copy.copy(value)
        cached.func = asking["read"]
        return cached
    return (
        _SettableDescriptor(value, asking["read"], asking["set"])
        if "set" in asking
        else _Descriptor(value, asking["read"])
    )


def _asking(function: Callable[..., Any], key: tuple[type, str, str]) -> Callable[..., Any]:
    @wraps(function)
    def entrance(self: Any, *args: Any, **kwargs: Any) -> Any:
        part: Part | None = self.__dict__.get(PART) if isinstance(self, nn.Module) else None
        looked = None if part is None else part.lookups.get(key)
        return function(self, *args, **kwargs) if looked is None else looked(*args, **kwargs)

    accessors.add(entrance.__code__)  # type: ignore[attr-defined] # a function's
    return entrance


def _calls(function: Callable[..., Any]) -> bool:
    """Return whether code calls anything. Code without a call combines values by operators, which have no kinks."""
    code = getattr(function, "__code__", None)
    return code is not None and any(line.opname.startswith("CALL") for line in dis.get_instructions(code))
