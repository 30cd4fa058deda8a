"""The C++ nodes on a CUDA device, against stock and the Python nodes there: needs ``NSLIGHTNING_NATIVE=cuda``.

``benchmarks/on_gpu.sh`` runs them before it measures. What can be tested without a GPU is in test_cuda_kernels.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_native_nodes import GRADIENTS, LAYOUTS, POINTWISE, POOLS, assert_same, tied_input
from torch import nn

from nslightning import Jacobians, patch, using
from nslightning.ops.autograd import native
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.pooling import pool, regular
from nslightning.ops.autograd.selection import Selection

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _in_force():
    if (state := native.cuda_state()) != "in force":
        pytest.skip(f"the C++ nodes do not take CUDA tensors: {state} (NSLIGHTNING_NATIVE=cuda asks for it)")


# Not in force without a device either; the mark says why first.
pytestmark = pytest.mark.cuda


@pytest.fixture
def without(monkeypatch):
    """Run a function with the Python nodes."""

    def run(function, *args):
        with monkeypatch.context() as patched:
            patched.setattr(native, "_library", lambda: None)
            return function(*args)

    return run


def gradient(name, x, g, jacobians):
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = pointwise(name.partition(" ")[0], leaf, Selection(jacobians), *POINTWISE[name][0])
    return y, torch.autograd.grad(y, leaf, g)[0]


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise_nodes_have_the_bits_and_strides_of_stock_and_of_the_python_nodes(name, dtype, without):
    _, kinks, choices, stock = POINTWISE[name]
    field = name.partition(" ")[0]
    for layout, incoming in itertools.product(LAYOUTS, GRADIENTS):
        x = LAYOUTS[layout](tied_input(kinks, dtype).cuda())
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        want = stock(leaf)
        g = GRADIENTS[incoming](want.detach().cpu()).cuda()
        (reference,) = torch.autograd.grad(want, leaf, g)
        for choice in choices:
            jacobians = Jacobians(**{field: choice})
            y, ours = gradient(name, x, g, jacobians)
            assert native.describe(y.grad_fn) is not None
            assert_same(y, want)
            if jacobians == Jacobians():
                assert_same(ours, reference)
            assert torch.equal(ours.nan_to_num(123.0), without(gradient, name, x, g, jacobians)[1].nan_to_num(123.0))
            tied = sum(x == k for k in kinks).bool()
            assert_same(ours[~tied], reference[~tied])


@pytest.mark.parametrize("geometry", POOLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_nodes_have_the_bits_and_strides_of_stock_and_of_the_python_nodes(geometry, dtype, without):
    windows = regular(2, *POOLS[geometry])
    for layout in ("contiguous", "channels_last", "permuted", "one channel"):
        x = torch.randint(-1, 3, (2, 6, 9, 8), generator=torch.Generator().manual_seed(2)).to(dtype)
        x = LAYOUTS[layout](x.cuda())
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        want = F.max_pool2d(leaf, *POOLS[geometry])
        for incoming in GRADIENTS.values():
            g = incoming(want.detach().cpu()).cuda()
            (reference,) = torch.autograd.grad(want, leaf, g, retain_graph=True)

            def run(jacobian, x=x, g=g):
                leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
                y = pool(leaf, Selection(Jacobians(max_pool=jacobian)), windows)
                return y, torch.autograd.grad(y, leaf, g)[0]

            for jacobian in (0.0, "minimal", "last", "sum", 10.0):
                y, ours = run(jacobian)
                assert native.describe(y.grad_fn) is not None
                assert_same(y, want)
                if jacobian == 0.0:
                    assert_same(ours, reference)
                python = without(run, jacobian)[1]
                if windows.disjoint(x.shape[2:]) or jacobian in (0.0, "last"):
                    assert torch.equal(ours, python), (layout, jacobian)
                else:  # Triton's kernel may contract a product and a sum, and adds up a target's two parts at once
                    torch.testing.assert_close(ours, python, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-4)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU6(inplace=True),
        nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(72, 16), nn.LeakyReLU(0.1), nn.Linear(16, 4), nn.Hardswish(),
    )  # fmt: skip
    nn.init.zeros_(model[0].weight[:4].data)
    nn.init.zeros_(model[0].bias[:4].data)
    model.cuda()
    patch(model, Jacobians(relu=1.0, max_pool="minimal", relu6=(0.5, 0.25), hardswish=(0.5, 0.5)))
    return model


def test_nothing_waits_for_the_device():
    model, x = network(), torch.randn(4, 3, 16, 16, device="cuda")
    model(x).sum().backward()  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_is_captured_in_a_cuda_graph():
    model, x = network(), torch.randn(4, 3, 16, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().sum().backward()
    graph.replay()
    torch.cuda.synchronize()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


@pytest.mark.parametrize("nodes", ["C++", "Python"])
def test_a_replay_takes_the_choice_in_force_then(nodes, monkeypatch):
    if nodes == "Python":  # with Triton's kernels
        monkeypatch.setattr(native, "_library", lambda: None)
    model, x = network(), torch.randint(-1, 2, (4, 3, 16, 16), device="cuda").float()
    parameters = list(model.parameters())
    choices = (
        Jacobians(),
        Jacobians(relu=1.0, max_pool="minimal", relu6=(0.5, 0.25), leaky_relu=0.7, hardswish=(0.5, 0.5)),
        Jacobians(max_pool="last"),
        Jacobians(max_pool=10.0, relu=0.25),
        Jacobians(relu=0.25, rule="published"),
    )

    def step():
        return torch.autograd.grad(model(x).square().sum(), parameters)

    want = []
    for choice in choices:
        with using(model, choice):
            want.append([g.clone() for g in step()])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    seen = set()
    for choice, expected in list(zip(choices, want, strict=True)) * 2:
        with using(model, choice):
            graph.replay()
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other)
        seen.add(tuple(one.norm().item() for one in gradients))
    assert len(seen) == len(choices)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_step_takes_the_choice_in_force(mode):
    torch._dynamo.reset()
    model, x = network(), torch.randint(-1, 2, (4, 3, 16, 16), device="cuda").float()
    compiled = torch.compile(model, mode=mode)
    for choice in (Jacobians(), Jacobians(relu=1.0), Jacobians(relu=1.0, max_pool="minimal"), Jacobians()) * 3:
        with using(model, choice):
            torch.compiler.cudagraph_mark_step_begin()
            got = torch.autograd.grad(compiled(x).square().sum(), list(model.parameters()))
            got = [g.clone() for g in got]
            want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_autocast_and_every_run_give_the_same_bits():
    model, x = network(), torch.randn(4, 3, 16, 16, device="cuda")

    def run():
        with torch.autocast("cuda", dtype=torch.float16):
            return torch.autograd.grad(model(x).sum(), list(model.parameters()))

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_more_entries_than_32_bits_count():
    rows = 2**31 // 4096 + 8
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs a device with 40 GiB")
    x = torch.zeros(1, rows, 64, 64, device="cuda", dtype=torch.float16)
    x[:, -1, ::2] = 1.0
    x.requires_grad_()
    y = pointwise("relu", x, Selection(Jacobians(relu=0.5)))
    (g,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=torch.float16).expand(x.shape))
    assert torch.equal(g[0, -1], torch.where(x[0, -1] == 0, 0.5, 1.0).half())
    assert bool((g[0, :-1] == 0.5).all())
    del y, g
    y = pool(x, Selection(Jacobians(max_pool="minimal")), regular(2, 2))
    (g,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(g[0, -1, ::2], torch.full((32, 64), 0.5, device="cuda").half())
    assert not g[0, -1, 1::2].any()
    assert bool((g[0, :-1] == 0.25).all())
