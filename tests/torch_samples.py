"""PyTorch's own samples of arguments for its functions and modules."""

import importlib
import importlib.util
import sys
import types
import unittest
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def _without_expecttest():
    """PyTorch's test helpers import what its own tests compare texts with; where it is missing, a stand-in serves."""
    if importlib.util.find_spec("expecttest") is not None:
        yield
        return
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
    try:
        yield
    finally:
        del sys.modules["expecttest"]


@cache
def no_derivative_of_aminmax():
    """Why this PyTorch cannot differentiate `aminmax`; None where it can."""
    try:
        torch.aminmax(torch.zeros(1, requires_grad=True)).max.sum().backward()
    except RuntimeError as error:
        return f"torch {torch.__version__}: {error}"
    return None


@cache
def functions():
    """The records of PyTorch's functions (`OpInfo`), those that run here."""
    with _without_expecttest():
        invocations = importlib.import_module("torch.testing._internal.common_methods_invocations")
    # The import forbids this process to set flags of torch.backends, which other tests do.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return [op for op in invocations.op_db if op.op is not None]


@cache
def modules():
    """The records of PyTorch's modules (`ModuleInfo`)."""
    functions()
    with _without_expecttest():
        return list(importlib.import_module("torch.testing._internal.common_modules").module_db)
