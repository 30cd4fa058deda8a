"""The CUDA kernels against naive references, run by Triton's interpreter: see test_triton_kernels.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nslightning.ops.triton_kernels import pool_backward, pool_forward, relu_backward, relu_forward

LAYOUTS = [torch.contiguous_format, torch.channels_last]


# The interpreter truncates to bfloat16 where the device rounds: choices whose products are exact tell no difference.
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["exact", "published"])
def test_relu(dtype, layout, constant) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (3, 5, 7, 19), generator=generator).to(dtype)
    x.view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    x = x.contiguous(memory_format=layout)
    y, bits = relu_forward(x)
    torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0, equal_nan=True)
    assert sum(int(b).bit_count() for b in bits) == int((x == 0).sum())
    g = torch.randn(x.shape, generator=generator).to(dtype)  # contiguous: laid out another way than channels_last
    g.view(-1)[10:12] = torch.tensor([float("nan"), float("inf")])
    at_zero = torch.full_like(g, -2.5) if constant else g * 0.5
    expected = torch.where(x == 0, at_zero, torch.where(x < 0, 0, g))
    found = relu_backward(g, y, bits, -2.5 if constant else 0.5, constant=constant)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def naive_pool(x, g, geometry, weights, target) -> torch.Tensor:
    """Window by window, in float64."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = geometry
    share, whole, each, last = weights
    gradient = torch.zeros(x.shape, dtype=torch.float64)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, g.shape)).tolist():
        entries = [(i * sh - ph + a * dh, j * sw - pw + b * dw) for a in range(kh) for b in range(kw)]
        entries = [(h, w) for h, w in entries if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]]
        values = [x[n, c, h, w].item() for h, w in entries]
        nans = [e for e, v in zip(entries, values, strict=True) if v != v]
        tied = nans[-1:] or [e for e, v in zip(entries, values, strict=True) if v == max(values)]
        incoming, k = g[n, c, i, j].item(), len(tied)
        chosen = int(target[n, c, i, j]) if target is not None else k - 1 if last else 0
        for rank, (h, w) in enumerate(tied):
            coefficient = 1.0 if k == 1 else share / k + each + whole * (rank == chosen)
            gradient[n, c, h, w] += incoming * coefficient
    return gradient


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "geometry",
    [
        ((2, 2), (2, 2), (0, 0), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((3, 2), (1, 2), (1, 0), (2, 1)),
        ((2, 3), (3, 1), (1, 1), (1, 2)),
        ((4, 4), (4, 4), (2, 1), (1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "weights",
    [(0, 1, 0, 0), (0, 1, 0, 1), (1, 0, 0, 0), (10, -9, 0, 0), (0, 0, 1, 0), "random"],
    ids=["native", "last", "minimal", "beta10", "sum", "random"],
)
def test_max_pool(geometry, weights, layout) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 3, (2, 3, 9, 8), generator=generator).float()
    x[0, 0, 1, :2], x[1, 1] = float("nan"), -float("inf")
    x = x.contiguous(memory_format=layout).requires_grad_()
    kernel, stride, padding, dilation = geometry
    stock = F.max_pool2d(x, kernel, stride, padding, dilation)
    y, mask = pool_forward(x.detach(), geometry, tuple(stock.shape[2:]))
    torch.testing.assert_close(y, stock, rtol=0, atol=0, equal_nan=True)
    g = torch.randn(stock.shape, generator=generator)
    target = None
    if weights == "random":
        weights, count = (0, 1, 0, 0), mask.clone().apply_(lambda m: (m & 0xFFFF).bit_count())
        target = (torch.rand(count.shape, generator=generator) * count).to(torch.int16)
        target = torch.empty_like(mask).copy_(target)
    found = pool_backward(g, mask, geometry, tuple(x.shape[2:]), weights, target)
    torch.testing.assert_close(found.double(), naive_pool(x, g, geometry, weights, target), rtol=1e-5, atol=1e-5)
    if weights == (0, 1, 0, 0) and target is None:  # added up in the stock order
        assert torch.equal(found, *torch.autograd.grad(stock, x, g))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_max_pool_in_half_precision(dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 3, (2, 3, 8, 8), generator=generator).to(dtype)
    geometry = ((2, 2), (2, 2), (0, 0), (1, 1))
    y, mask = pool_forward(x, geometry, (4, 4))
    assert torch.equal(y, F.max_pool2d(x, 2))
    g = torch.randint(-12, 13, y.shape, generator=generator).to(dtype) * 12  # divided by 1 to 4 without rounding
    found = pool_backward(g, mask, geometry, (8, 8), (1, 0, 0, 0))
    assert torch.equal(found.double(), naive_pool(x, g, geometry, (1, 0, 0, 0), None))


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """The operations take the kernels for tensors on the CPU, too."""
    monkeypatch.setattr("nslightning.ops.fused._has_kernels", lambda device: True)


def both_ways(operation, x, g, monkeypatch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output, gradient and second derivative of an operation, by the kernels and composed."""
    found = []
    for kernels in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr("nslightning.ops.fused._has_kernels", lambda device, used=kernels: used)
            given, incoming = x.clone().requires_grad_(), g.clone().requires_grad_()
            y = operation(given)
            assert ("_ReLU" in str(y.grad_fn) or "_MaxPool2d" in str(y.grad_fn)) == kernels
            (gradient,) = torch.autograd.grad(y, given, incoming.detach(), retain_graph=True)
            (again,) = torch.autograd.grad(y, given, incoming, create_graph=True)
            (second,) = torch.autograd.grad(again.square().sum(), incoming)
            found.append([y.detach(), gradient, again.detach(), second])
    return found[0], found[1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("choice", [{}, {"relu": 0.5}, {"relu": -2.0, "rule": "published"}], ids=str)
def test_relu_takes_the_kernels(choice, layout, monkeypatch) -> None:
    from nslightning import Jacobians
    from nslightning.ops.pointwise import pointwise
    from nslightning.ops.selection import Selection

    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (2, 3, 5, 7), generator=generator).float().contiguous(memory_format=layout)
    g, selection = torch.randn(x.shape, generator=generator), Selection(Jacobians(**choice))
    fused, composed = both_ways(lambda x: pointwise("relu", x, selection), x, g, monkeypatch)
    for one, other in zip(fused, composed, strict=True):
        assert torch.equal(one, other)


def test_relu_in_place_and_random(on_cpu) -> None:
    from nslightning import Jacobians
    from nslightning.ops.pointwise import pointwise
    from nslightning.ops.selection import Selection

    x = torch.tensor([-1.0, 0.0, 2.0, 0.0], requires_grad=True)
    selection = Selection(Jacobians(relu=1.0))
    h = x * 1
    y = pointwise("relu", h, selection, inplace=True)
    assert y.data_ptr() == h.data_ptr()
    (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(gradient, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    selection.set(Jacobians(relu=0.25))  # read when the backward runs
    assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], torch.tensor([0.0, 0.25, 1.0, 0.25]))
    selection.set(Jacobians(relu="random"))
    (drawn,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(drawn[[0, 2]], torch.tensor([0.0, 1.0]))
    expected = torch.rand(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn[[1, 3]], expected)


@pytest.mark.parametrize("jacobian", ["native", "minimal", "last", "sum", 10.0, "random"])
@pytest.mark.parametrize("geometry", [(2, 2, 0, 1, False), (3, 2, 1, 1, False), (2, 3, 0, 2, True)], ids=str)
def test_max_pool_takes_the_kernels(geometry, jacobian, monkeypatch) -> None:
    from nslightning.ops import max_pool2d

    generator = torch.Generator().manual_seed(4)
    x = torch.randint(0, 3, (2, 3, 8, 10), generator=generator).float()
    g = torch.randn(F.max_pool2d(x, *geometry).shape, generator=generator)
    fused, composed = both_ways(lambda x: max_pool2d(x, *geometry, jacobian=jacobian), x, g, monkeypatch)
    assert torch.equal(fused[0], composed[0])
    if jacobian != "random":  # else each draws anew
        for one, other in zip(fused[1:], composed[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    if jacobian == "native":
        assert torch.equal(fused[1], composed[1])


def test_differences_are_carried_through_the_kernels(on_cpu) -> None:
    from nslightning import Jacobians, patch
    from nslightning.probes import divergence

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(2), torch.nn.Flatten(),
        torch.nn.Linear(36, 3), torch.nn.ReLU(),
    )  # fmt: skip
    torch.nn.init.zeros_(model[0].bias[:2])
    model[0].weight.data[:2] = 0
    patch(model, Jacobians())
    loss = model(torch.randn(4, 1, 8, 8)).square().sum()
    choices = {"both": Jacobians(relu=1.0, max_pool="minimal")}
    found = [divergence(loss, model, choices, method=m, retain_graph=True)["both"] for m in ("subtract", "propagate")]
    assert found[0].l2 > 0
    assert found[1].l2 == pytest.approx(found[0].l2, rel=1e-4)
