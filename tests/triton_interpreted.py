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
    check_strides,
    close,
    naive_pool,
)

from nslightning.ops.kernels import triton as triton_kernels
from nslightning.ops.kernels.triton import pool_backward, pool_forward

# NumPy multiplies the infinite gradients that the kernels take: NaN is what a device returns there, too.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")


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
    ours = pool_backward(g, mask, geometry, (8, 8), (1, 0, 0, 0))
    assert torch.equal(ours.double(), naive_pool(x, g, geometry, (1, 0, 0, 0)))


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """The operations take the kernels for tensors on the CPU, too."""
    monkeypatch.setattr("nslightning.ops.autograd.fused.kernels_for", lambda device: triton_kernels)
    monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)


def test_gradients_lie_in_memory_as_stocks(on_cpu) -> None:
    check_strides()


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


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_compilers_operators_have_the_bits_of_the_cpu_kernels(geometry, dtype, layout, monkeypatch) -> None:
    """Of whole numbers, whose sums and products have the same bits in every order."""
    from nslightning import Jacobians
    from nslightning.ops.autograd import fused
    from nslightning.ops.autograd.selection import Selection
    from nslightning.ops.kernels import cpu

    if not cpu.available():
        pytest.skip("the C++ kernels are not built: python -m nslightning.ops.kernels.build")
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(0, 3, (2, 3, 9, 10), generator=generator).to(dtype)
    x.view(-1)[::11] = float("nan")
    x = x.contiguous(memory_format=layout)
    numbers = [*sum(geometry, ()), 0]
    operators = torch.ops.nslightning
    y, reached = operators.pool_forward(x, numbers)
    g = 12 * torch.randint(-12, 13, y.shape, generator=generator).to(dtype)

    def gradient(choice) -> torch.Tensor:
        return operators.pool_backward(g, reached, Selection(Jacobians(max_pool=choice)).pool, numbers, [9, 10])

    choices = ("native", "last", "sum", "minimal", 10.0)
    want = [gradient(choice) for choice in choices]

    monkeypatch.setattr(fused, "kernels_for", lambda device: triton_kernels)
    monkeypatch.setattr(fused, "pool_gradient_of", fused._pool_gradient_by_memory)  # as for weights on a CUDA device
    for one, other in zip(operators.pool_forward(x, numbers), (y, reached), strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))
    for choice, expected in zip(choices, want, strict=True):
        got = gradient(choice)
        assert (got.dtype, got.stride()) == (dtype, expected.stride())
        if choice in ("minimal", 10.0):  # what a window's entries receive is rounded
            torch.testing.assert_close(got, expected, **close(dtype))
        else:
            assert torch.equal(got, expected), choice


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (1, 16)], ids=str)
def test_a_window_whose_sixteen_entries_tie(size) -> None:
    x = torch.zeros(1, 1, *(2 * n for n in size))
    geometry = (size, size, (0, 0), (1, 1))
    _, mask, _ = pool_forward(x, geometry, (2, 2))
    g = torch.arange(1.0, 5.0).view(1, 1, 2, 2)
    assert torch.equal(pool_backward(g, mask, geometry, x.shape[2:], (1, 0, 0, 0)),
                       (g / 16).repeat_interleave(size[0], 2).repeat_interleave(size[1], 3))  # fmt: skip


def surrounded(numbers, before_and_after) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers in the middle of a memory, so that a kernel that leaves them is seen; and that memory."""
    room = 4096  # no index of the last program lies farther away
    memory = torch.full((numbers.numel() + 2 * room,), before_and_after, dtype=numbers.dtype)
    inner = memory[room:-room].view(numbers.shape)
    return inner.copy_(numbers), memory


@pytest.mark.parametrize("n", [1024 + 13, 1024 + 16])
def test_the_last_block_stays_inside_its_tensors(n) -> None:
    """The entries fill no block, and a byte or not; what lies behind them is neither counted nor written."""
    values = torch.arange(n).remainder(3) - 1.0
    x, _ = surrounded(values, 0.0)  # zeros, which were ties
    y, around_y = surrounded(torch.zeros(n), 7.0)
    bits, around_bits = surrounded(torch.zeros(-(-n // 8), dtype=torch.uint8), 7)
    gradient, around_gradient = surrounded(torch.zeros(n), 7.0)
    triton_kernels._relu_forward[(2,)](x, y, bits, n, ROWS=128)
    assert sum(int(b).bit_count() for b in bits) == int((values == 0).sum())
    assert torch.equal(y, values.relu())
    g = torch.arange(1.0, n + 1)
    triton_kernels._relu_backward[(2,)](g, y, bits, gradient, n, 0.5, 0, MEMORY=False, ROWS=128)
    assert torch.equal(gradient, torch.where(values == 0, g / 2, torch.where(values > 0, g, 0)))

    images = torch.arange(3 * 9 * 9.0).remainder(4).view(1, 3, 9, 9)
    sizes = {"C": 3, "H": 9, "W": 9, "OH": 4, "OW": 4, "KH": 3, "KW": 3}
    window = {**sizes, "SH": 2, "SW": 2, "PH": 0, "PW": 0, "DH": 1, "DW": 1, "LAST": False, "WIDE": False}
    pooled, around_pooled = surrounded(torch.zeros(1, 3, 4, 4), 7.0)
    mask, around_mask = surrounded(torch.zeros(1, 3, 4, 4, dtype=torch.int16), 7)
    to_images, around_images = surrounded(torch.zeros_like(images), 7.0)
    triton_kernels._pool_forward[(1,)](images, pooled, mask, pooled.numel(), **window, BLOCK=1024)
    assert torch.equal(pooled, F.max_pool2d(images, 3, 2))
    weights = torch.tensor([0.0, *(1.0 / k for k in range(1, 17)), 0.0, *(1.0 / k for k in range(1, 17))])
    g = torch.full_like(pooled, 2520.0)  # divided by 1 to 9 without rounding
    triton_kernels._pool_backward[(1,)](
        g, mask, weights, 0, to_images, images.numel(), **window, MEMORY=False, BLOCK=1024
    )
    assert torch.equal(to_images.double(), naive_pool(images, g, ((3, 3), (2, 2), (0, 0), (1, 1)), (1, 0, 0, 0)))

    for inner, memory in ((y, around_y), (bits, around_bits), (gradient, around_gradient), (pooled, around_pooled),
                          (mask, around_mask), (to_images, around_images)):  # fmt: skip
        assert (memory[:4096] == 7).all()
        assert (memory[4096 + inner.numel() :] == 7).all()


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
    measured = [
        divergence(loss, model, choices, method=m, retain_graph=True)["both"] for m in ("subtract", "propagate")
    ]
    assert measured[0].l2 > 0
    assert measured[1].l2 == pytest.approx(measured[0].l2, rel=1e-4)


def innaprop_by_hand(x, g, w, v, count, setting, sign) -> tuple[torch.Tensor, ...]:
    """A step of INNAprop with each operation rounded by itself, as the kernel's text says."""
    lr, alpha, beta, decay = (setting.get(name, default) for name, default in INNAPROP_DEFAULTS.items())
    published = setting.get("decay", "published") == "published"
    v = v * 0.999 + (1 - 0.999) * g * g
    # By way of float64, which rounds a root as IEEE asks; a vector library's root may be a last digit off.
    scale = v.double().sqrt().float() / (1 - 0.999**count) ** 0.5 + 1e-8
    moved = x * (1 - lr * decay)
    if w is not None:
        w = w + (-lr * decay * (1 - alpha * beta) / beta if published else 0.0) * x
        moved = moved + lr * w
        w = w * (1 - alpha * lr) + -sign * lr * (1 - alpha * beta) * g / scale
    return moved + -sign * lr * beta * g / scale, w, v


INNAPROP_DEFAULTS = {"lr": 1e-3, "alpha": 0.1, "beta": 0.9, "weight_decay": 0.01}


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"decay": "decoupled", "weight_decay": 0.1, "maximize": True},
        {"alpha": 1.0, "beta": 1.0, "weight_decay": 0.1},
        {"lr": 0.1, "alpha": 0.5, "beta": 0.07},
    ],
    ids=str,
)
def test_innaprop_in_one_kernel(setting, monkeypatch) -> None:
    """Sizes of several blocks, of a part of one and of none, another layout of the gradient, and an odd address."""
    from nslightning.optim import INNAprop, _fused

    monkeypatch.setattr(_fused, "fits", lambda weights, steps: True)
    monkeypatch.setattr("nslightning.optim._velocity.BLOCK_PER_THREAD", 2**30)  # whole tensors, as on a CUDA device
    generator = torch.Generator().manual_seed(0)
    odd = torch.randn(131, generator=generator)[1:]
    start = [torch.randn(shape, generator=generator) for shape in ((2, 4096), (70, 70), (3,), (), (0, 2))]
    params = [torch.nn.Parameter(t.clone()) for t in (*start, odd)]
    plain = [torch.nn.Parameter(t.detach().clone()) for t in params]
    states = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    moves = setting.get("alpha", 0.1) * setting.get("beta", 0.9) != 1
    states = [(x, w if moves else None, v) for x, w, v in states]
    fused, foreach = INNAprop(params, fused=True, **setting), INNAprop(plain, foreach=True, **setting)
    for count in (1, 2, 3):
        for i, (param, other) in enumerate(zip(params, plain, strict=True)):
            g = torch.randn(param.shape, generator=generator)
            param.grad = g.t().contiguous().t() if i == 1 else g
            other.grad = g.clone()
            sign = -1.0 if setting.get("maximize") else 1.0
            states[i] = innaprop_by_hand(states[i][0], g, *states[i][1:], count, setting, sign)
        fused.step()
        foreach.step()
        for param, other, (x, w, v) in zip(params, plain, states, strict=True):
            assert torch.equal(param, x)
            assert torch.equal(fused.state[param]["exp_avg_sq"], v)
            assert w is None or torch.equal(fused.state[param]["velocity"], w)
            torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_innaprops_last_block_stays_inside_its_tensors() -> None:
    from nslightning.optim import _fused

    tensors = [surrounded(torch.ones(13), 7.0) for _ in range(4)]
    weight, g, velocity, square = (inner for inner, _ in tensors)
    coefficients = _fused.Coefficients(0.9, 1e-8, 0.5, 0.0, 0.1, -0.1, 0.9, -0.1)
    _fused.step([weight], [g], [velocity], [square], [torch.ones(())], coefficients)
    assert torch.equal(g, torch.ones(13))
    for inner, memory in tensors:
        assert (memory[:4096] == 7).all()
        assert (memory[4096 + inner.numel() :] == 7).all()
