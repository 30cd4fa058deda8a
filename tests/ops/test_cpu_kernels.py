"""The compiled CPU kernels: against naive references, and bit for bit against the composition they stand for."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    GEOMETRIES,
    LAYOUTS,
    WEIGHTS,
    bits_of,
    both_ways,
    check_max_pool,
    check_pool_difference,
    check_relu,
    check_strides,
)

from nslightning import Jacobians, PatchWarning, ops, patch
from nslightning.ops.autograd import fused
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.pooling import pool, regular
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.autograd.tie_bits import find_ties
from nslightning.ops.kernels import cpu as cpu_kernels

pytestmark = pytest.mark.skipif(
    not cpu_kernels.available(), reason="there was no C++ compiler when the package was installed"
)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
dtypes = pytest.mark.parametrize("dtype", cpu_kernels.DTYPES, ids=str)


@layouts
@dtypes
@pytest.mark.parametrize("constant", [False, True], ids=["exact", "published"])
def test_relu(dtype, layout, constant):
    check_relu(cpu_kernels, dtype, layout, constant)


@layouts
@dtypes
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_max_pool(geometry, weights, layout, dtype):
    check_max_pool(cpu_kernels, geometry, weights, layout, dtype)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 1023, 1024, 1025, 300_001])
def test_relu_of_any_size_on_any_number_of_threads(size):
    x = torch.randint(-1, 2, (size,), generator=torch.Generator().manual_seed(size)).double()
    g = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            y, bits = cpu_kernels.relu_forward(x)
            assert torch.equal(y, torch.relu(x))
            ours = cpu_kernels.relu_backward(g, y, bits, 0.1)
            assert torch.equal(ours, torch.where(x == 0, 0.1 * g, torch.where(x < 0, 0.0, g)))
            for position in {0, size // 2, size - 1} if size else ():  # wherever the only one is
                lonely = torch.ones_like(x)
                assert not cpu_kernels.any_zero(lonely)
                lonely[position] = -0.0
                assert cpu_kernels.any_zero(lonely)
        finally:
            torch.set_num_threads(before)


@dtypes
@pytest.mark.parametrize("size", [0, 1, 7, 2**14, 2**14 + 1, 300_001])
@pytest.mark.parametrize("carried", [False, True], ids=["subtracted", "carried"])
def test_sums_of_any_size_on_any_number_of_threads(size, carried, dtype):
    generator = torch.Generator().manual_seed(size)
    first, b = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    x, y = first.double(), b.double()
    d, a = (x, x + y) if carried else (x - y, x)
    largest = d.abs().max() if size else torch.zeros((), dtype=torch.float64)
    want = [math.fsum(d.abs().tolist()), math.fsum((d * d).tolist()), float(largest)]
    want += [math.fsum((a * a).tolist()), math.fsum((a * y).tolist())]
    sums, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            sums.append(cpu_kernels.sums(first, b, carried=carried))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*sums)
    assert sums[0].tolist() == pytest.approx(want, rel=1e-13, abs=1e-11)
    assert sums[0][2] == largest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 2**14 + 3, 40_000])
def test_sums_does_not_hide_what_is_not_finite(bad, at):
    a, b = torch.ones(50_000), torch.ones(50_000)
    a[at] = bad
    sums = cpu_kernels.sums(a, b, carried=False)
    if math.isnan(bad):
        assert sums.isnan().all()
    else:
        assert sums.tolist() == [math.inf, math.inf, math.inf, math.inf, bad]


@layouts
@dtypes
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_difference_of_two_poolings_in_one_pass(geometry, layout, dtype):
    check_pool_difference(cpu_kernels, geometry, layout, dtype)


def test_signs_of_zeros_and_payloads_of_nans_are_stock():
    x = torch.tensor([-0.0, 0.0, float("nan"), -1.0, 1e-45, -1e-45] * 30)
    x.view(torch.int32)[2] += 5
    y, _ = cpu_kernels.relu_forward(x)
    assert torch.equal(y.view(torch.int32), torch.relu(x).view(torch.int32))


def test_whether_a_window_is_tied():
    geometry = ((2, 2), (2, 2), (0, 0), (1, 1))
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert cpu_kernels.pool_forward(x, geometry, (2, 2))[2] is False
    x[0, 0, 2, 2:] = 15.0
    assert cpu_kernels.pool_forward(x, geometry, (2, 2))[2] is True
    assert cpu_kernels.pool_forward(x, geometry, (2, 2), zeros=False)[2] is True
    for zero in (0.0, -0.0):
        x[0, 0, 2:, 2:] = zero
        assert cpu_kernels.pool_forward(x, geometry, (2, 2))[2] is True
        assert cpu_kernels.pool_forward(x, geometry, (2, 2), zeros=False)[2] is False
    x[0, 0, 2:, 2:] = -1.0
    assert cpu_kernels.pool_forward(x, geometry, (2, 2), zeros=False)[2] is True


@layouts
@dtypes
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_windows_tied_at_zero_are_left_out_of_every_geometry(geometry, dtype, layout):
    (kernel, stride, padding, dilation), zero = geometry, torch.zeros(2, 3, 9, 8, dtype=dtype)
    size = tuple(F.max_pool2d(zero, kernel, stride, padding, dilation).shape[2:])
    for value, met in ((0.0, False), (-0.0, False), (0.5, True), (-0.5, True)):
        x = (zero + value).contiguous(memory_format=layout)
        assert cpu_kernels.pool_forward(x, geometry, size)[2] is True
        assert cpu_kernels.pool_forward(x, geometry, size, zeros=False)[2] is met


@pytest.mark.parametrize("jacobian", ["native", "minimal", "last", 10.0])
@pytest.mark.parametrize("shape", [(3, 50, 6, 7), (2, 30, 7, 40), (1, 2, 6, 1300)], ids=str)
def test_rows_worked_on_at_once_are_the_composition(shape, jacobian, monkeypatch):
    """Several blocks of short rows, the last one not full, some of it another plane's; and rows longer than a block."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, shape, generator=generator).float()
    g = torch.randn((*shape[:2], shape[2] // 2, shape[3] // 2), generator=generator)
    selection, geometry = Selection(Jacobians(max_pool=jacobian)), regular(2, 2, 2, 0, 1, False)
    ours = both_ways(lambda x: pool(x, selection, geometry), x, g, monkeypatch, cpu_kernels)
    for one, other in zip(*ours, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ours[0][0], F.max_pool2d(x, 2))


def test_gradients_lie_in_memory_as_stocks(monkeypatch):
    monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    check_strides()


@layouts
@pytest.mark.parametrize("choice", ["minimal", 10.0, "last", None], ids=str)
def test_composed_gradients_of_pooling_lie_in_memory_as_stocks(choice, layout, monkeypatch):
    monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    monkeypatch.setattr(fused, "kernels_for", lambda device: None)
    x = torch.randint(0, 2, (2, 3, 8, 6)).double().contiguous(memory_format=layout).requires_grad_()
    for kernel in (2, 3, (8, 6)):
        stock, ours = F.max_pool2d(x, kernel, 2), pool(x, Selection(Jacobians(max_pool=choice)), regular(2, kernel, 2))
        for order in (torch.contiguous_format, torch.channels_last):
            g = torch.ones(stock.shape, dtype=x.dtype).contiguous(memory_format=order)
            strides = [torch.autograd.grad(y, x, g, retain_graph=True)[0].stride() for y in (ours, stock)]
            assert strides[0] == strides[1]


@layouts
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_what_one_choice_adds_to_another_is_the_subtraction(geometry, layout, monkeypatch):
    x = torch.randint(0, 3, (5, 3, 9, 8)).float().contiguous(memory_format=layout).requires_grad_()
    monkeypatch.setattr(fused, "_PART", 2 * x[0].numel())  # two images at a time, and one that is left
    ours = []
    pair = Selection(Jacobians(max_pool=10.0)), Selection(Jacobians(max_pool="last"))

    def record(_, vjp, difference):
        ours.append((difference(*pair), vjp(pair[0]) - vjp(pair[1])))

    selection = Selection(Jacobians())
    selection.recorder = record
    kernel, stride, padding, dilation = geometry
    y = pool(x, selection, regular(2, kernel, stride, padding, dilation, False))
    y.backward(torch.randn_like(y))
    ((difference, subtracted),) = ours
    assert difference.any()
    assert torch.equal(difference, subtracted)


@layouts
@pytest.mark.parametrize(
    "choice", [{}, {"relu": 0.3}, {"relu": -2.0, "rule": "published"}, {"relu": "random"}], ids=str
)
@dtypes
def test_relu_is_the_composition(choice, layout, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (2, 3, 5, 7), generator=generator).to(dtype).contiguous(memory_format=layout)
    g = torch.randn(x.shape, generator=generator, dtype=dtype)
    ours = both_ways(lambda x: pointwise("relu", x, Selection(Jacobians(**choice))), x, g, monkeypatch, cpu_kernels)
    for one, other in zip(*ours, strict=True):
        assert torch.equal(one, other)


@layouts
@pytest.mark.parametrize("jacobian", ["native", "minimal", "last", "sum", 10.0, 0.3, "random"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_max_pool_is_the_composition(jacobian, layout, data):
    kernel = data.draw(st.sampled_from([(2, 2), (3, 3), (3, 2), (1, 4), (3, 4)]), label="kernel")
    stride = data.draw(st.tuples(*[st.integers(1, 4)] * 2), label="stride")
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    dilation = data.draw(st.sampled_from([(1, 1), (2, 1)]), label="dilation") if padding == (0, 0) else (1, 1)
    shape = (2, 3, data.draw(st.integers(5, 11)), data.draw(st.integers(5, 11)))
    geometry = regular(2, kernel, stride, padding, dilation, data.draw(st.booleans(), label="ceil_mode"))
    dtype = data.draw(st.sampled_from(cpu_kernels.DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    x = torch.randint(0, data.draw(st.integers(1, 4)), shape, generator=generator).to(dtype)
    x = x.contiguous(memory_format=layout)
    g = torch.randn(geometry.forward(x)[0].shape, generator=generator, dtype=dtype)
    with pytest.MonkeyPatch.context() as patched:
        ours = both_ways(
            lambda x: pool(x, Selection(Jacobians(max_pool=jacobian)), geometry), x, g, patched, cpu_kernels
        )
    for one, other in zip(*ours, strict=True):
        assert torch.equal(one, other)


OPERATIONS = {
    "relu6": ({"relu6": (0.3, -2.0)}, ()), "published": ({"relu6": (0.3, 1.0), "rule": "published"}, ()),
    "leaky_relu": ({"leaky_relu": 0.7}, (0.1,)), "hardtanh": ({"hardtanh": (5.0, 0.0)}, (-1.0, 1.0)),
    "hardswish": ({"hardswish": (1.0, 0.5)}, ()), "abs": ({"abs": 0.25}, ()),
    "hardshrink": ({"hardshrink": (0.3, -2.0)}, (1.0,)), "softshrink": ({"softshrink": (1.0, 0.1)}, (0.5,)),
}  # fmt: skip


@layouts
@dtypes
@pytest.mark.parametrize(("choice", "parameters"), OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("spread", [4, 2000])  # of the entries, every second or one in many tied
def test_marked_ties_are_the_composition(choice, parameters, spread, dtype, layout, monkeypatch):
    name = next(iter(choice))
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-spread, spread, (5, 8, 50, 31), generator=generator).to(dtype).contiguous(memory_format=layout)
    g = torch.randn(x.shape, generator=generator, dtype=dtype)
    g.view(-1)[:2] = torch.tensor([float("inf"), float("nan")])

    def both(x, g):
        results = []
        for used in (True, False):
            monkeypatch.setattr(cpu_kernels, "available", lambda used=used: used)
            monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
            leaf = x.clone().requires_grad_()
            y = pointwise(name, leaf, Selection(Jacobians(**choice)), *parameters)
            results += [bits_of(torch.autograd.grad(y, leaf, g)[0])]
        return results

    assert torch.equal(*both(x, g))
    assert torch.equal(*both(x[:1, :1, :3, :2], g[:1, :1, :3, :2]))  # a fraction of a block
    assert torch.equal(*both(x[:, :, ::2], g[:, :, ::2]))  # not dense
    assert torch.equal(*both(x, g[0, 0, 0, 5].expand(x.shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_what_stands_in_fresh_memory_is_no_tie(dtype, monkeypatch):
    """PyTorch's operations read all of a block that is not full. In the deterministic mode fresh memory is NaN."""
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        (zero,) = find_ties(torch.tensor([1.0, 0.0, 0.0, 2.0, 0.0], dtype=dtype), [0.0], (0,))
        (last,) = find_ties(torch.tensor([1.0, 2.0, 0.0], dtype=dtype), [0.0], (0,))
    finally:
        torch.use_deterministic_algorithms(before)
    assert zero.bits.tolist() == [[0b10110]]
    assert last.bits.tolist() == [[0b100]]


@layouts
@pytest.mark.parametrize("jacobian", ["minimal", 10.0])
@pytest.mark.parametrize("geometry", [(2, 2, 0), (3, 2, 1), (3, 1, 1)], ids=str)
def test_pooling_on_any_number_of_threads(geometry, jacobian, layout):
    """Parts begin and end within planes and images, and windows lie over several rows."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(0, 4, (3, 5, 121, 77), generator=generator).float().contiguous(memory_format=layout)
    g = torch.randn(F.max_pool2d(x, *geometry).shape, generator=generator)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3, 4):
        torch.set_num_threads(threads)
        try:
            leaf = x.clone().requires_grad_()
            y = ops.max_pool2d(leaf, *geometry, jacobian=jacobian)
            assert "MaxPool2d" in y.grad_fn.name()
            results.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0][0], F.max_pool2d(x, *geometry))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_random_draws_are_those_of_the_composition(monkeypatch):
    x = torch.randint(-1, 2, (300_001,), generator=torch.Generator().manual_seed(0)).float()  # several blocks
    ours = both_ways(
        lambda x: pointwise("relu", x, Selection(Jacobians(relu="random"))),
        x,
        torch.ones_like(x),
        monkeypatch,
        cpu_kernels,
    )
    assert torch.equal(ours[0][1], ours[1][1])
    assert 0.49 < ours[0][1][x == 0].mean() < 0.51


def test_what_the_kernels_do_not_take_is_composed():
    x = torch.zeros(2, 3, 4, 4)
    assert fused.fits(x)
    assert not fused.fits(x.int())
    assert not fused.fits(x[:, :, ::2])  # not dense
    assert not fused.fits(torch.zeros(2, device="meta"))
    five = regular(2, 5, 1, 2, 1, False)
    assert not fused.pool_fits(x, five)  # 25 entries in a window
    assert fused.pool_fits(x, regular(2, 3, 1, 1, 1, False))
    assert fused.pool_fits(x.half(), regular(2, 2))
    assert fused.pool_fits(x.half(), regular(2, 3, 2))  # windows overlap: each sum is rounded, as in stock
    assert not fused.pool_fits(x.half(), regular(2, 4, 2))  # 16 entries: composed in another order
    assert not fused.fits(torch._neg_view(x))
    with torch._subclasses.FakeTensorMode() as mode:
        assert not fused.fits(mode.from_tensor(x))
    batched = torch.autograd.grad(  # is_grads_batched: batches of gradients have no plain memory
        ops.relu(x.requires_grad_(), 0.5), x, torch.ones(5, *x.shape), is_grads_batched=True
    )[0]
    assert torch.equal(batched, torch.full((5, *x.shape), 0.5))


def test_the_source_compiles_without_a_warning(repo_root, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path / "kernels.so"
    source = repo_root / "nslightning" / "ops" / "kernels" / "cpu.cpp"
    flags = ["-std=c++17", "-O2", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    done = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ctypes.c_int64.in_dll(ctypes.CDLL(str(library)), "version").value == cpu_kernels._VERSION


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_pooling_without_a_gradient_takes_the_kernel_where_it_is_the_faster_one(mode, monkeypatch):
    calls = []
    kernel = cpu_kernels.pool_forward
    monkeypatch.setattr(
        cpu_kernels, "pool_forward", lambda *arguments, **more: calls.append(1) or kernel(*arguments, **more)
    )
    x = torch.randint(-1, 2, (2, 3, 9, 9), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0, 0, :2], x[1, 1, 3] = float("nan"), -0.0
    with mode():
        for source, taken in ((x, 1), (x.contiguous(memory_format=torch.channels_last), 0)):
            calls.clear()
            y = pool(source, Selection(Jacobians(max_pool="minimal")), regular(2, 3, 2, 1))
            want = F.max_pool2d(source, 3, 2, 1)
            assert torch.equal(y.view(torch.int32), want.view(torch.int32))
            assert y.stride() == want.stride()
            assert len(calls) == taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_without_memory_are_composed(dtype):
    x = torch.zeros(1, 1, 4, 4, dtype=dtype, requires_grad=True)
    for operation in (lambda x: ops.relu(x, 1.0), lambda x: ops.leaky_relu(x, 0.1, 0.5)):
        y = operation(x)
        (gradient,) = torch.autograd.grad(y, x, torch._efficientzerotensor(y.shape, dtype=dtype))
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_subnormal_numbers_are_zeros_where_stock_takes_them_for_that(dtype):
    x = torch.tensor([1, 2, -32767, 0, -32768, 100], dtype=torch.int16).view(dtype)
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush them")
        try:
            leaf = x.clone().requires_grad_()
            y = ops.relu(leaf, 0.5)
            (g,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
            zero, positive = leaf == 0, leaf > 0
            assert torch.equal(bits_of(y.detach()), bits_of(torch.relu(x)))
        finally:
            torch.set_flush_denormal(False)
        assert g.tolist() == [0.5 if z else float(p) for z, p in zip(zero.tolist(), positive.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("choice", "parameters"), OPERATIONS.values(), ids=OPERATIONS)
def test_every_number_of_half_precision_is_the_composition(choice, parameters, dtype, monkeypatch):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = torch.where(x.isnan(), torch.ones_like(x), x)
    g = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    gradients = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(cpu_kernels, "available", lambda: False)
            monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
        leaf = x.clone().requires_grad_()
        y = pointwise(next(iter(choice)), leaf, Selection(Jacobians(**choice)), *parameters)
        gradients.append(bits_of(torch.autograd.grad(y, leaf, g)[0]))
    assert torch.equal(*gradients)


@layouts
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 8, 21])  # eight at a time, and those that are left
def test_sums_of_half_precision_are_rounded_as_stock_rounds_them(channels, dtype, layout):
    """Of overlapping windows: gradients of every size, so that sums are subnormal, rounded, and infinite."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, channels, 19, 17)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=layout).requires_grad_()
    stock = F.max_pool2d(x, 3, 2, 1)
    g = torch.randint(-(2**15), 2**15, stock.shape, generator=generator).to(torch.int16).view(dtype)
    g = torch.where(g.isnan(), -0.0, g)
    g[:, :, ::3] = torch.finfo(dtype).max  # rows, of which two windows side by side may have the same maximum
    y = pool(x, Selection(Jacobians()), regular(2, 3, 2, 1))
    assert torch.equal(bits_of(y.detach()), bits_of(stock.detach()))
    got, want = (torch.autograd.grad(result, x, g)[0] for result in (y, stock))
    numbers = ~want.isnan()  # infinity less infinity, whose bits an addition chooses
    assert (want[numbers].isinf().any(), got.stride()) == (True, want.stride())
    assert torch.equal(bits_of(got)[numbers], bits_of(want)[numbers])
    assert torch.equal(got.isnan(), want.isnan())


def test_nan_in_half_precision_is_pooled_as_stock_does():
    x = torch.ones(1, 1, 4, 4, dtype=torch.bfloat16)
    x.view(torch.int16)[0, 0, 0, 0] = -1
    y = pool(x.clone().requires_grad_(), Selection(Jacobians()), regular(2, 2))
    assert "MaxPool2d" in y.grad_fn.name()
    assert torch.equal(bits_of(y.detach()), bits_of(F.max_pool2d(x, 2)))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.parametrize("inplace", [False, True])
def test_a_trace_runs(inplace):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace), torch.nn.ReLU6(inplace))
    patch(model, Jacobians())
    x = torch.ones(1, 4)
    with torch.no_grad(), pytest.warns(PatchWarning, match="no Jacobian choice"):
        traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("dtype", cpu_kernels.DTYPES, ids=str)
def test_in_place_counts_one_version(dtype):
    x = torch.zeros(8, dtype=dtype, requires_grad=True).clone()
    before = x._version
    assert ops.relu(x, 1.0, inplace=True) is x
    assert x._version == before + 1


@pytest.mark.parametrize("native_nodes", [True, False], ids=["C++", "Python"])
def test_zeros_matter_to_no_choice_behind_stocks_relu_alone(native_nodes, monkeypatch):
    """A window of zeros behind a ReLU sends its gradient to entries where that dies; a LeakyReLU lets it through."""
    from nslightning.ops.autograd.nodes import kept_ties

    if not native_nodes:
        monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    below = {
        "relu": torch.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "prelu": lambda x: F.prelu(x, torch.ones(1)),
        "threshold": lambda x: F.threshold(x, 0.0, 0.0), "exp": lambda x: x.exp() - 1,
    }  # fmt: skip
    for name, function in below.items():
        y = pool(function(x), Selection(Jacobians(max_pool="minimal")), regular(2, 2))
        assert kept_ties(y.grad_fn) == (name != "relu"), name
