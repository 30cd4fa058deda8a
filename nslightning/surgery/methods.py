"""The objects that replace the methods of a patched module; they are attributes of the instance.

The class of the module stays the same. Python looks a method up on the instance first, and ``nn.Module.__call__`` looks
``forward`` up there too: both get the object. The object runs the method that the class has at the time of the call.
What stands here makes it pass for the bound method, and gives each copy of the module its own.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import weakref
from collections.abc import Callable
from functools import partial, partialmethod, singledispatchmethod
from types import CodeType, MethodType
from typing import Any

import torch
from torch import nn

from nslightning._torch import call_with_hooks, compiler_is_reading, eager, kept_attributes
from nslightning.surgery.state import Part

__all__ = ["UNSET", "Method", "Reduction", "accessor", "accessors", "binds_itself"]

#: Stands for a missing argument or attribute, where None may be one.
UNSET: Any = object()
#: The code objects that call a method of a patched module; their local variable `self` is the module.
accessors: set[CodeType] = {nn.Module.__call__.__code__, getattr(nn.Module, call_with_hooks()).__code__}


class _MethodType(type):
    """Makes a method of a function and an object, too, as ``types.MethodType`` does for ``weakref.WeakMethod``."""

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 2 and isinstance(args[1], nn.Module):
            function, module = args
            methods = (m for m in module.__dict__.values() if issubclass(type(m), cls) and m.has_function(function))
            return next(methods, None) or MethodType(function, module)
        return super().__call__(*args)


class Method(metaclass=_MethodType):
    """One method of one patched module.

    It looks like the bound method that it replaces: signature, annotations, documentation, ``__wrapped__``,
    ``__func__`` and ``inspect.ismethod`` are those of the bound method. Copies and pickles belong to the copied module.
    It refers to the module weakly, so that Python frees a patched model as soon as an unpatched one. Where code holds
    it longer than the module, a call raises. A method that is copied or pickled without its module keeps its module
    alive. After :func:`~nslightning.unpatch` it runs the method that it replaced.

    Args:
        module: The module.
        name: The method's name.
        part: The surgery's record of the module.
        replaced: The attribute that the instance had under this name before.
    """

    #: The module, where this may be its only reference.
    owner: nn.Module | None = None

    def __init__(self, module: nn.Module, name: str, part: Part, replaced: Any = UNSET) -> None:
        self.ref, self.name, self.part, self.replaced = weakref.ref(module), name, part, replaced
        defined = inspect.getattr_static(type(module), name, None)
        self.unbound = isinstance(defined, (staticmethod, classmethod))  # it does not take the module as an argument
        self.descriptor: Any = defined if binds_itself(defined) else None
        self.kind = type(self.stock(module))
        for attribute in ("__doc__", "__module__", "__annotations__"):  # otherwise Python finds those of this class
            self.__dict__[attribute] = getattr(self.stock(module), attribute, None)

    @property
    def module(self) -> nn.Module:
        """The module that it belongs to."""
        module = self.ref()
        if module is None:
            raise ReferenceError(
                f"the module of this patched {self.name} is gone, since code kept only the method: keep the module in "
                f"a variable, such as `model`, and call `model.{self.name}`"
            )
        return module

    @property
    def is_replacement(self) -> bool:
        """Return whether the instance had an attribute under this name before the patch."""
        return self.replaced is not UNSET

    def stock(self, module: nn.Module) -> Callable[..., Any]:
        """The method that it replaces.

        Args:
            module: The module, or a shallow copy of it.

        Returns:
            The bound method.
        """
        if self.is_replacement:
            return self.replaced  # type: ignore[no-any-return] # of the user's class: any type
        if self.descriptor is not None:  # the class returns no plain function for it
            return self.descriptor.__get__(module, type(module))  # type: ignore[no-any-return] # the same
        method = getattr(type(module), self.name)
        if self.unbound:
            return method  # type: ignore[no-any-return] # of the user's class: any type
        if torch.compiler.is_compiling():  # the compiler of torch 2.11 does not follow a descriptor's `__get__`
            return partial(method, module)
        return method.__get__(module)  # type: ignore[no-any-return] # of the user's class: any type

    @property  # type: ignore[misc] # a read-only `__class__`
    def __class__(self) -> type:  # `inspect` and Lightning read it
        # The compiler of torch 2.11 would call the stock function of a bound method, and so drop the choice.
        return type(self) if compiler_is_reading() else self.kind

    @property
    def __wrapped__(self) -> Any:
        return self.stock(self.module)

    def __getattr__(self, name: str) -> Any:
        if name == "__globals__":
            raise AttributeError(
                "torch.jit.script drops the Jacobian choice: unpatch the model first (for cloudpickle, too, where a "
                "lambda is an attribute)"
            )
        if name in _OF_METHODS or name in _PICKLING:
            raise AttributeError(name)  # the object is not initialised yet
        return getattr(self.stock(self.module), name)

    def __repr__(self) -> str:
        return f"<patched {self.stock(self.module)!r}>"

    def __eq__(self, other: object) -> bool:
        """Whether the methods that they replace are equal: a model may look a bound method up in a dictionary."""
        if self is other or (module := self.ref()) is None:
            return self is other
        if isinstance(type(other), _MethodType):
            of = other.ref()  # type: ignore[attr-defined] # mypy narrows no type by its metaclass
            other = None if of is None else other.stock(of)  # type: ignore[attr-defined] # the same
        return bool(self.stock(module) == other)

    def __hash__(self) -> int:
        module = self.ref()
        return object.__hash__(self) if module is None else hash(self.stock(module))

    def has_function(self, function: Any) -> bool:
        """Return whether this object replaces the bound method of a function."""
        return getattr(self.stock(self.module), "__func__", None) is function

    @property
    def stands(self) -> bool:
        """Return whether the module has it in the method's place."""
        return self.module.__dict__.get(self.name) is self

    def retire(self) -> None:
        """Run the stock method from now on: code may have kept this object."""
        self.part.undone = True

    def __copy__(self) -> Method:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not self.stands:
            return copy.deepcopy(self.stock(self.module), memo)
        by_itself = id(self.module) not in memo
        module = copy.deepcopy(self.module, memo)
        if by_itself:
            return _kept(module, self.name)
        kept = (copy.deepcopy(self.replaced, memo),) if self.is_replacement else ()
        part = copy.deepcopy(self.part, memo)
        if id(self) in memo:  # the part knows the tables that this method stands in
            return memo[id(self)]
        return type(self)(module, self.name, part, *kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if kept_attributes(self.module) is not None:
            raise pickle.PicklingError(
                "torch.fx pickles the code of a GraphModule and no more: unpatch the model first"
            )
        if not self.stands:
            return getattr, (self.module, self.name)
        kept = (self.replaced,) if self.is_replacement else ()
        return _unpickled, (type(self), self.module, self.name, self.part, *kept)


def binds_itself(value: Any) -> bool:
    """Return whether an object in a class makes the method itself when it is read, as a decorator's object may.

    Args:
        value: What the class has under the method's name.

    Returns:
        False for functions, and for what is no method.
    """
    if isinstance(value, (partialmethod, singledispatchmethod)):
        return True
    cls = type(value)
    if cls.__module__ in ("builtins", "functools") or not callable(value):
        return False
    return hasattr(cls, "__get__") and not hasattr(cls, "__set__")


class Reduction(Method):
    """The method that tells :mod:`copy` and :mod:`pickle` what a module is made of.

    A shallow copy has the attributes of its original. It needs methods of its own, which read the copy.
    """

    def __call__(self, protocol: Any) -> Any:
        """What the module is made of."""
        reduced = self.stock(self.module)(protocol)
        if isinstance(reduced, str) or sys._getframe(1).f_code is not copy.copy.__code__:
            return reduced
        return _shallow_copy, reduced


def _shallow_copy(make: Callable[..., Any], args: tuple[Any, ...], state: Any = None, *_: Any) -> Any:
    """A copy from what a module is made of, as ``copy.copy`` makes it, with methods of its own."""
    copied = make(*args)
    if state is not None:
        copied.__setstate__(state)
    _adopt(copied)
    return copied


def _adopt(copied: nn.Module) -> None:
    """Give a shallow copy, and the copies inside it, their own methods in the place of those of the original."""
    for module in copied.modules():
        for name, method in list(vars(module).items()):
            if issubclass(type(method), Method) and method.name == name and method.ref() is not module:
                kept = (method.replaced,) if method.is_replacement else ()
                module.__dict__[name] = type(method)(module, name, method.part, *kept)


def _unpickled(cls: type[Method], module: nn.Module, name: str, part: Part, *replaced: Any) -> Any:
    """A method from a pickle of its whole module, which has no attributes yet, or from a pickle of the method alone."""
    return _kept(module, name) if name in module.__dict__ else cls(module, name, part, *replaced)


def _kept(module: nn.Module, name: str) -> Any:
    """A method that keeps its module alive, because the method may hold the only reference to the module."""
    method = getattr(module, name)
    if isinstance(method, Method):
        method.owner = module
    return method


_OF_METHODS = ("ref", "name", "part", "replaced", "owner", "unbound", "descriptor", "kind")
_PICKLING = ("__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__", "__reduce__")


@eager
def accessor(method: Method, depth: int) -> nn.Module:
    """The module on which a method was looked up: a shallow copy may share the object with its original.

    ``nn.DataParallel`` makes such copies, one per device. The first call gives them their own methods.

    Args:
        method: The method that is called.
        depth: How many frames of the stack lie between this function and the code that calls the method.

    Returns:
        The module.
    """
    frame = sys._getframe(depth)
    if frame.f_code in accessors and isinstance(caller := frame.f_locals.get("self"), nn.Module):
        if caller is not method.ref():
            _adopt(caller)
        return caller
    return method.module
