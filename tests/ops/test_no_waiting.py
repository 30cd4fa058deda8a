"""On a device nothing waits and nothing is copied.

The device is "meta" here: its tensors have no values, so that whatever looks at one raises; a mode sees copies. (Fake
CUDA tensors would do for the forward alone: autograd's engine asks for a real device.)
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nslightning import Jacobians, ops
from nslightning.ops.autograd.selection import Selection, pool_coefficients, pool_difference_coefficients, read_now

WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "_unique2", "masked_select")


class Watch(TorchDispatchMode):
    """Notes what waits for a device, and what is copied between a device and the host."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        devices = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor)}
        if (name in WAITS and "meta" in devices) or (name in ("_to_copy", "copy_", "to") and len(devices) > 1):
            self.seen.append(name)
        return result


POINTWISE = {
    "relu": lambda x: ops.relu(x, 0.5),
    "relu, published": lambda x: ops.relu(x, 0.5, rule="published"),
    "relu6": lambda x: ops.relu6(x, (0.5, 0.25)),
    "leaky_relu": lambda x: ops.leaky_relu(x, at_zero=0.5),
    "prelu": lambda x: ops.prelu(x, torch.ones(1, device="meta"), at_zero=0.5),
    "hardtanh": lambda x: ops.hardtanh(x, at_kinks=(0.5, 0.25)),
    "clamp": lambda x: ops.clamp(x, -1, 1, at_bounds=(0.5, 0.25)),
    "hardswish": lambda x: ops.hardswish(x, (0.5, 0.25)),
    "hardsigmoid": lambda x: ops.hardsigmoid(x, (0.5, 0.25)),
    "hardshrink": lambda x: ops.hardshrink(x, at_kinks=(0.5, 0.25)),
    "softshrink": lambda x: ops.softshrink(x, at_kinks=(0.5, 0.25)),
    "threshold": lambda x: ops.threshold(x, 0.0, 0.0, at_threshold=0.5),
    "elu": lambda x: ops.elu(x, 2.0, at_zero=0.5),
    "selu": lambda x: ops.selu(x, at_zero=0.5),
    "abs": lambda x: ops.abs(x, at_zero=0.5),
    "norm": lambda x: ops.norm(x, -1, at_zero=0.5),
    "l1_loss": lambda x: ops.l1_loss(x, torch.zeros_like(x), at_zero=0.5),
}
SHARES = ("native", "first", "last", "minimal", "sum", 10.0)
SHARED = {
    "amax": lambda x, j: ops.amax(x, -1, jacobian=j),
    "max": lambda x, j: ops.max(x, -1, jacobian=j).values,
    "maximum": lambda x, j: ops.maximum(x, x * 2, jacobian=j),
    "max_pool2d": lambda x, j: ops.max_pool2d(x, 3, 2, 1, jacobian=j),
    "max_pool1d": lambda x, j: ops.max_pool1d(x[0], 2, jacobian=j),
    "max_pool3d": lambda x, j: ops.max_pool3d(x, 2, jacobian=j),
    "adaptive_max_pool2d": lambda x, j: ops.adaptive_max_pool2d(x, 3, jacobian=j),
}
CASES = {**POINTWISE, **{f"{n}, {j}": (lambda x, f=f, j=j: f(x, j)) for n, f in SHARED.items() for j in SHARES}}


def watched(function):
    x = torch.empty(2, 3, 8, 8, device="meta", requires_grad=True)
    with Watch() as watch:
        y = function(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    return watch.seen


@pytest.mark.parametrize("name", CASES)
def test_no_operation_waits_for_the_device_or_copies(name):
    pool_coefficients.cache_clear()
    assert watched(CASES[name]) == []


def test_the_watch_sees_what_waits_and_what_copies():
    x = torch.ones(3, device="meta")
    with Watch() as watch:
        torch.ones(3).to("meta")
        with pytest.raises(RuntimeError, match="meta"):
            x.sum().item()
    assert watch.seen == ["_to_copy"]


def test_tables_are_formed_on_the_device():
    pool_coefficients.cache_clear()
    with Watch() as watch:
        weights, device = (0.5, 0.5, 0.0, 0.0), torch.device("meta")
        assert pool_coefficients(*weights[:3], torch.float32, device).device.type == "meta"
        table, _ = pool_difference_coefficients(weights, (1.0, 0.0, 0.0, 0.0), torch.float32, device)
        assert table.device.type == "meta"
    assert watch.seen == []


def test_a_compiled_backward_reads_the_choice_on_the_gradients_device():
    selection, g = Selection(Jacobians(relu=0.5)), torch.empty(3, device="meta")
    with Watch() as watch:
        values = selection.on(g.device)["relu"]
        selection.set(Jacobians(relu=1.0))
        assert read_now(values, g).device.type == "meta"
    assert watch.seen == []
    assert selection.on(torch.device("cpu"))["relu"] is selection.kinks["relu"]


def test_the_published_minimal_divides_before_it_multiplies():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        x = torch.randint(0, 2, (4, 3, 9, 9), generator=generator).to(dtype).requires_grad_()
        g = torch.randn(4, 3, 3, 3, generator=generator, dtype=dtype)
        beta = 0.7
        y = ops.max_pool2d(x, 3, jacobian=beta, rule="published")
        (ours,) = torch.autograd.grad(y, x, g)
        # Independently: windows side by side, of each the equal shares (beta g) / k and the first entry's (1 - beta) g.
        windows = F.unfold(x.detach().flatten(0, 1).unsqueeze(1), 3, stride=3).view(12, 9, 9)
        reached = windows == windows.amax(1, keepdim=True)
        first = torch.zeros_like(windows).scatter(1, reached.to(torch.uint8).argmax(1, keepdim=True), 1.0)
        incoming = g.reshape(12, 1, 9)
        shares = (incoming * beta) / reached.sum(1, keepdim=True) * reached
        want = F.fold(first * (incoming * (1 - beta)) + shares, (9, 9), 3, stride=3).view(4, 3, 9, 9)
        assert torch.equal(ours, want)
