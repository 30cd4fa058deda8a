"""The CUDA kernels against naive references, run by Triton's interpreter: see test_triton_kernels.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import (
    GEOMETRIES,
    LAYOUTS,
    WEIGHTS,
    both_ways,
    check_max_pool,
    check_pool_difference,
    check_relu,
    naive_pool,
)

from nslightning.ops.kernels import triton as triton_kernels
from nslightning.ops.kernels.triton import pool_backward, pool_forward


# The interpreter truncates to bfloat16 where the device rounds: choices whose products are exact tell no difference.
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("constant", [False, True], ids=["exact", "published"])
def test_relu(dtype, layout, constant) -> None:
    check_relu(triton_kernels, dtype, layout, constant)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_max_pool(geometry, weights, layout) -> None:
    check_max_pool(triton_kernels, geometry, weights, layout)


@pytest.mark.parametrize("geometry", GEOMETRIES[:2], ids=str)
def test_difference_of_two_poolings_in_one_pass(geometry) -> None:
    check_pool_difference(triton_kernels, geometry, torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_max_pool_in_half_precision(dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 3, (2, 3, 8, 8), generator=generator).to(dtype)
    geometry = ((2, 2), (2, 2), (0, 0), (1, 1))
    y, mask, _ = pool_forward(x, geometry, (4, 4))
    assert torch.equal(y, F.max_pool2d(x, 2))
    g = torch.randint(-12, 13, y.shape, generator=generator).to(dtype) * 12  # divided by 1 to 4 without rounding
    found = pool_backward(g, mask, geometry, (8, 8), (1, 0, 0, 0))
    assert torch.equal(found.double(), naive_pool(x, g, geometry, (1, 0, 0, 0)))


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """The operations take the kernels for tensors on the CPU, too."""
    monkeypatch.setattr("nslightning.ops.autograd.fused._kernels", lambda device: triton_kernels)
    monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("choice", [{}, {"relu": 0.5}, {"relu": -2.0, "rule": "published"}], ids=str)
def test_relu_takes_the_kernels(choice, layout, monkeypatch) -> None:
    from nslightning import Jacobians
    from nslightning.ops.autograd.pointwise import pointwise
    from nslightning.ops.autograd.selection import Selection

    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (2, 3, 5, 7), generator=generator).float().contiguous(memory_format=layout)
    g, selection = torch.randn(x.shape, generator=generator), Selection(Jacobians(**choice))
    fused, composed = both_ways(lambda x: pointwise("relu", x, selection), x, g, monkeypatch, triton_kernels)
    for one, other in zip(fused, composed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("alpha", [None, 0.0, 1.0, -2.5], ids=str)
@pytest.mark.parametrize("rule", ["exact", "published"])
def test_relu_reads_the_choice_from_the_selections_memory(alpha, rule) -> None:
    from nslightning import Jacobians
    from nslightning.ops.autograd.selection import Selection

    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-1, 2, (3, 700), generator=generator).float()
    g = torch.randn(x.shape, generator=generator)
    g.view(-1)[::5] = float("inf")
    y, bits = triton_kernels.relu_forward(x)
    memory = Selection(Jacobians(relu=alpha, rule=rule)).memory
    read = triton_kernels.relu_backward(g, y, bits, memory["relu"], constant=memory[".published"])
    want = torch.where(x > 0, g, 0.0)
    if alpha is not None and (alpha != 0 or rule == "published"):
        want = torch.where(x == 0, torch.full_like(g, alpha) if rule == "published" else g * alpha, want)
    assert torch.equal(read, want)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_max_pool_reads_the_choice_from_the_selections_memory(weights) -> None:
    from nslightning.ops.autograd.selection import pool_coefficients

    generator = torch.Generator().manual_seed(6)
    x, geometry = torch.randint(0, 2, (2, 2, 9, 9), generator=generator).float(), ((3, 3), (2, 2), (0, 0), (1, 1))
    y, mask, _ = pool_forward(x, geometry, (4, 4))
    g = torch.randn(y.shape, generator=generator)
    share, whole, each, last = torch.tensor(weights, dtype=torch.float64).unbind()
    table = pool_coefficients.__wrapped__(share, whole, each, torch.float32)
    read = triton_kernels.pool_shares(g, mask, geometry, (9, 9), table, last)
    assert torch.equal(read, pool_backward(g, mask, geometry, (9, 9), weights))


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (1, 16)], ids=str)
def test_a_window_whose_sixteen_entries_tie(size) -> None:
    x = torch.zeros(1, 1, *(2 * n for n in size))
    geometry = (size, size, (0, 0), (1, 1))
    _, mask, _ = pool_forward(x, geometry, (2, 2))
    g = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
    assert torch.equal(pool_backward(g, mask, geometry, x.shape[2:], (1, 0, 0, 0)),
                       (g / 16).repeat_interleave(size[0], 2).repeat_interleave(size[1], 3))  # fmt: skip


def test_relu_in_place_and_random(on_cpu) -> None:
    from nslightning import Jacobians
    from nslightning.ops.autograd.pointwise import pointwise
    from nslightning.ops.autograd.selection import Selection

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
    fused, composed = both_ways(
        lambda x: max_pool2d(x, *geometry, jacobian=jacobian), x, g, monkeypatch, triton_kernels
    )
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
