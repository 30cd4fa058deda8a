"""Code of a method that runs after the method has returned: generators, coroutines, and functions that it returns.

A step of a generator or a coroutine is its code up to the next ``yield`` or ``await``, or to its end. Each step is run
by a function of the caller's, so that it is a part of the method.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch

from nslightning._torch import eager
from nslightning.ops.record import FUNCTIONS
from nslightning.surgery.report import PatchWarning

__all__ = ["Steps", "driven", "with_entrances"]

#: Called when the first step begins. What it returns runs each step, and returns what the step returns.
Steps = Callable[[], Callable[[Callable[[], Any]], Any]]


@eager
def driven(method: Callable[..., Any], args: tuple[Any, ...], result: Any, steps: Steps) -> Any:
    """A driver for the generator, coroutine or asynchronous generator that a method returned.

    A context manager that is made from a generator gets the driver in the generator's place.

    Args:
        method: The method.
        args: Its positional arguments.
        result: What it returned.
        steps: Runs the steps.

    Returns:
        The driver, which does what the result would do; None if the result is something else.
    """
    if isinstance(result, (_GeneratorContextManager, _AsyncGeneratorContextManager)):
        driver = driven(method, args, result.gen, steps)
        result.gen = result.gen if driver is None else driver
        return None
    if any(result is x for x in args):  # the caller made it, not the method
        return None
    if inspect.isgenerator(result):
        begins = inspect.getgeneratorstate(result) == inspect.GEN_CREATED
        return _driven(result, steps) if begins and result.gi_code is not _driven.__code__ else None
    if inspect.iscoroutine(result):
        begins = inspect.getcoroutinestate(result) == inspect.CORO_CREATED
        return _awaited(result, steps) if begins and result.cr_code is not _awaited.__code__ else None
    if isinstance(result, AsyncGenerator) and inspect.isasyncgenfunction(inspect.unwrap(method)):
        return _iterated(result, steps)
    return None


@eager
def _driven(generator: Any, steps: Steps) -> Generator[Any, Any, Any]:
    run, step = steps(), partial(generator.send, None)
    while True:
        try:
            value = run(step)
        except StopIteration as stop:
            return stop.value
        try:
            sent = yield value
            step = partial(generator.send, sent)
        except GeneratorExit:
            generator.close()
            raise
        except BaseException as error:
            step = partial(generator.throw, error)


async def _awaited(coroutine: Coroutine[Any, Any, Any], steps: Steps) -> Any:
    return await _Awaitable(_driven(coroutine, steps))


async def _iterated(generator: AsyncGenerator[Any, Any], steps: Steps) -> AsyncGenerator[Any, Any]:
    step = generator.asend(None)
    while True:
        try:
            value = await _Awaitable(_driven(step, steps))
        except StopAsyncIteration:
            return
        try:
            step = generator.asend((yield value))
        except GeneratorExit:
            await generator.aclose()
            raise
        except BaseException as error:
            step = generator.athrow(error)


class _Awaitable:
    """An awaitable object made from a generator."""

    def __init__(self, generator: Generator[Any, Any, Any]) -> None:
        self.generator = generator

    def __await__(self) -> Generator[Any, Any, Any]:
        return self.generator


@eager
def with_entrances(name: str, method: Callable[..., Any], result: Any, entrance: Callable[[Any], Any]) -> Any:
    """A method's result, in which the functions that take a choice, or that the method made, are entrances.

    Args:
        name: The method's name.
        method: The method.
        result: What it returned.
        entrance: Makes the entrance of a function.

    Returns:
        The result; a list and a dictionary are changed in place.

    Warns:
        PatchWarning: If code runs later that cannot be an entrance.
    """
    if isinstance(result, (map, filter)) and torch.is_grad_enabled():
        warnings.warn(
            f"{name} returns a {type(result).__name__}, whose code runs later and keeps PyTorch's derivative: "
            "return a list, or a generator",
            PatchWarning,
            stacklevel=4,
        )
    if type(result) is tuple:
        changed = tuple(with_entrances(name, method, x, entrance) for x in result)
        return changed if any(x is not y for x, y in zip(changed, result, strict=True)) else result
    if type(result) in (list, dict) and len(result) <= 64:
        for key, x in list(result.items() if isinstance(result, dict) else enumerate(result)):
            if (changed := _with_entrance(method, x, entrance)) is not x:
                result[key] = changed
        return result
    return _with_entrance(method, result, entrance)


def _with_entrance(method: Callable[..., Any], value: Any, entrance: Callable[[Any], Any]) -> Any:
    function = value.func if isinstance(value, partial) else value
    if not (_makes(method, function) or (callable(function) and _chooses(function))):
        return value
    return entrance(value) if function is value else partial(entrance(function), *value.args, **value.keywords)


def _makes(method: Callable[..., Any], function: Any) -> bool:
    """Return whether the code of a method makes a function: a closure or a lambda that its body defines."""
    if not isinstance(function, FunctionType) or not inspect.isroutine(method):
        return False
    code: CodeType | None = getattr(inspect.unwrap(method), "__code__", None)
    return code is not None and function.__code__ in _inner(code)


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def _chooses(function: Callable[..., Any]) -> bool:
    """Return whether a function of PyTorch's takes a choice."""
    try:
        return function in FUNCTIONS
    except TypeError:  # it has no hash
        return False
