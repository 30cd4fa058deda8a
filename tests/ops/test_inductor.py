"""Patched networks and compiled max pools through inductor, the compiler that users run; no GPU is needed.

Other tests trace with ``aot_eager``, which computes each operation of the graph by PyTorch. Here the graph becomes
compiled loops: values, strides and the way memory is reused are the compiler's.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, patch, using

LAST = torch.channels_last
POOLS = {"2 x 2": (2, 2, 0), "3 x 3, overlapping": (3, 2, 1)}
DTYPES = (torch.float32, torch.bfloat16)
CHOICES = ("native", "minimal", 10.0, "last", "sum")
MODES = ("default", "max-autotune-no-cudagraphs")
FORMATS = (torch.contiguous_format, LAST)
ALONE = [(m, name, layout, dtype) for m in MODES for name in POOLS for layout in FORMATS for dtype in DTYPES]
QUICK = [ALONE[0], ("default", "3 x 3, overlapping", LAST, torch.bfloat16)]  # the others take half a minute


@pytest.fixture(autouse=True)
def _separate():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tied(shape, dtype, layout, special=False):
    """Small whole numbers, which tie; with ``special`` also NaN, infinities and both zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-1, 2, shape, generator=generator).to(dtype)
    if special:
        for i, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
            x.view(-1)[i::7][:3] = value
    return x.contiguous(memory_format=layout).requires_grad_()


def assert_same_bits(a, b, message=""):
    assert (a.dtype, a.stride()) == (b.dtype, b.stride()), message
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{message}: {text}")
    assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()), message


@pytest.mark.parametrize(
    ("mode", "name", "layout", "dtype"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=", ".join(map(str, case)))
        for case in ALONE
    ],
)
def test_a_pool_that_is_compiled_alone_has_eager_modes_bits(mode, name, layout, dtype):
    kernel, stride, padding = POOLS[name]
    model = nn.MaxPool2d(kernel, stride, padding)
    patch(model, Jacobians())
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    inputs = [tied((2, 3, 9, 8), dtype, layout, special) for special in (False, True)]
    compiled(inputs[0])
    with torch.compiler.set_stance("fail_on_recompile"):  # one graph serves every input and choice
        for x in inputs:
            y = compiled(x)
            stock = F.max_pool2d(x, kernel, stride, padding)
            assert_same_bits(y, stock, "forward")
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            gradients = []
            for choice in CHOICES:
                with using(model, Jacobians(max_pool=choice)):
                    (got,) = torch.autograd.grad(y, x, g, retain_graph=True)
                    (want,) = torch.autograd.grad(model(x), x, g)
                assert_same_bits(got, want, str(choice))
                gradients.append(got.nan_to_num())
            assert not any(torch.equal(gradients[0], other) for other in gradients[1:])  # each choice mattered
            (reference,) = torch.autograd.grad(stock, x, g)
            (got,) = torch.autograd.grad(y, x, g)
            assert_same_bits(got, reference, "stock")


class Net(nn.Module):
    """A small LeNet whose numbers are whole: sums have the same value in every order."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3)
        self.pool, self.overlapping = nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1)
        self.relu, self.last = nn.ReLU(), nn.Linear(6 * 9, 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randint(-1, 2, p.shape, generator=generator))

    def forward(self, x):
        x = self.pool(self.relu(self.first(x)))
        return self.last(self.overlapping(self.relu(self.second(x))).flatten(1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_one_graph_of_a_network_serves_every_choice_with_eager_modes_gradients(mode):
    model = Net()
    reference = [p.clone() for p in model.parameters()]
    x = torch.randint(-1, 2, (4, 1, 14, 14), generator=torch.Generator().manual_seed(1)).float()
    stock = torch.autograd.grad(model(x)[:, 0].sum(), list(model.parameters()), allow_unused=True)
    patch(model, Jacobians())
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    compiled(x)
    kept = {}
    with torch.compiler.set_stance("fail_on_recompile"):
        for choice in (
            Jacobians(), Jacobians(relu=1.0), Jacobians(max_pool="last"), Jacobians(relu=1.0, max_pool="sum"),
            Jacobians(relu=0.5, max_pool="minimal"),
        ):  # fmt: skip
            with using(model, choice):
                got = torch.autograd.grad(compiled(x)[:, 0].sum(), list(model.parameters()), allow_unused=True)
                want = torch.autograd.grad(model(x)[:, 0].sum(), list(model.parameters()), allow_unused=True)
            for a, b in zip(got, want, strict=True):
                if choice.max_pool == "minimal":  # thirds are rounded
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                else:
                    assert torch.equal(a, b), choice
            kept[choice] = got[0]
    assert torch.equal(kept[Jacobians()], stock[0])
    values = list(kept.values())
    assert not any(torch.equal(values[0], other) for other in values[1:])  # each choice mattered
    assert all(torch.equal(a, b) for a, b in zip(reference, model.parameters(), strict=True))
