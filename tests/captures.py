"""A stand-in for the capture of a CUDA graph on a machine without a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nslightning.ops.autograd import native, selection

_ASKED = ("_local_scalar_dense", "is_nonzero", "equal")


class Capture(TorchDispatchMode):
    """Keeps the calls of kernels, to make them again on the same memory.

    Python's decisions at the capture stay as they were; values in memory are read again.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in func.name() for name in _ASKED), f"{func} waits for a value, which no capture allows"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, result in self.calls:
            for into, value in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(into, torch.Tensor) and into.data_ptr() != value.data_ptr():
                    into.copy_(value)


def capturing_on_the_host(monkeypatch):
    """CPU tensors are like CUDA tensors: a choice has its own memory there, and no value is looked at.

    Returns:
        Runs a function as captured; returns the capture and the function's result.
    """
    now = []
    for name in ("_has_own_memory", "_has_graphs"):
        monkeypatch.setattr(selection, name, lambda device: True)
    monkeypatch.setattr(native, "_library", lambda: None)  # their launches are no calls that the mode sees
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(now))

    def run(function):
        capture = Capture()
        now.append(True)
        try:
            with capture:
                return capture, function()
        finally:
            now.clear()

    return run
