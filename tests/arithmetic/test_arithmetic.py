"""Named arithmetics: orders of summation against sums written out, random rounding, switches, records."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from nslightning import patch
from nslightning.arithmetic import (
    Arithmetic,
    HalfProducts,
    Ordered,
    RandomRounding,
    linear,
    record,
    sequential_product,
)
from nslightning.arithmetic.products import _library
from nslightning.arithmetic.record import switches
from nslightning.callbacks import ArithmeticSetting
from nslightning.data import FashionMNISTSample
from nslightning.experiments import settings
from nslightning.experiments.computing import compute
from nslightning.jacobians import Jacobians
from nslightning.models import ImageClassifier
from nslightning.models.paper import lenet5
from nslightning.probes import Divergence, divergence, zone


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fused(a: float, b: float, c: float) -> np.float32:
    """``a b + c`` rounded once, from rational numbers."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))  # the float64 may lie on a tie: its neighbours decide
    candidates = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    errors = [(abs(Fraction(float(x)) - exact), int(x.view(np.int32)) & 1) for x in candidates]
    return candidates[errors.index(min(errors))]


# ------------------------------------------------------------------------------------------- orders of summation
def test_sequential_sums_are_fused_multiply_adds_one_after_another() -> None:
    a, b = drawn(2, 17), drawn(17, 3, seed=1)
    a[0, :2], b[:2, 0] = torch.tensor([1.0, 2.0**-24 + 2.0**-40]), 1.0  # a tie, but for a bit that float64 drops last
    expected = np.zeros((2, 3), np.float32)
    for r in range(2):
        for n in range(3):
            for k in range(17):
                expected[r, n] = fused(a[r, k], b[k, n], expected[r, n])
    assert torch.equal(sequential_product(a, b), torch.from_numpy(expected))
    assert torch.equal(sequential_product(a, b, compiled=False), torch.from_numpy(expected))


@pytest.mark.skipif(_library() is None, reason="the compiled loop was not built here")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_loop_gives_the_bits_of_the_composition(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for scale in (1.0, 1e-22, 1e18):  # subnormal products, and those near overflow
            a, b = drawn(37, 101) * scale, drawn(101, 29, seed=1) * scale
            assert torch.equal(sequential_product(a, b), sequential_product(a, b, compiled=False))
        a[3, 4], b[5, 6] = torch.inf, torch.nan
        one, other = sequential_product(a, b), sequential_product(a, b, compiled=False)
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert one.isnan()[:, 6].all()
    finally:
        torch.set_num_threads(before)


def test_each_order_is_the_sum_that_its_name_says() -> None:
    x, w, b = drawn(5, 4, 50), drawn(7, 50, seed=1), drawn(7, seed=2)

    def part(k0: int, k1: int) -> torch.Tensor:
        return F.linear(x[..., k0:k1], w[:, k0:k1])

    expected = {
        "native": F.linear(x, w, b),
        "bias_last": F.linear(x, w) + b,
        "split_k=3": ((part(0, 17) + part(17, 34)) + part(34, 50)) + b,
        "blocks=20": ((b + part(0, 20)) + part(20, 40)) + part(40, 50),
        "sequential": sequential_product(x.reshape(20, 50), w.t()).reshape(5, 4, 7) + b,
    }
    for order, value in expected.items():
        assert torch.equal(linear(x, w, b, order), value), order
        without = linear(x, w, None, order)
        with Ordered(order):
            assert torch.equal(F.linear(x, w, b), value), order
            assert torch.equal(F.linear(x, w), without), order
    assert len({tuple(v.flatten().tolist()) for v in expected.values()}) == 4  # so few inputs are one block to MKL


def test_a_random_order_changes_bits_and_not_values() -> None:
    x, w, b = drawn(20, 500), drawn(30, 500, seed=1), drawn(30, seed=2)
    one, other = (linear(x, w, b, "random_order") for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.allclose(one, F.linear(x.double(), w.double(), b.double()).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["bias_last", "sequential", "split_k=4", "blocks=100", "random_order"])
def test_gradients_are_those_of_a_linear_layer(order: str) -> None:
    x, w, b, g = drawn(6, 300), drawn(5, 300, seed=1), drawn(5, seed=2), drawn(6, 5, seed=3)
    results, wide = [], []
    for dtype, kept in ((torch.float32, results), (torch.float64, wide)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = linear(*leaves, order) if dtype == torch.float32 else F.linear(*leaves)
        kept += torch.autograd.grad(y, leaves, g.to(dtype))
    for one, exact in zip(results, wide, strict=True):
        assert torch.allclose(one.double(), exact, rtol=1e-5, atol=1e-5)


def test_halves_are_widened_before_their_sums_are_ordered() -> None:
    x, w, b = drawn(6, 300).half(), drawn(5, 300, seed=1).half(), drawn(5, seed=2).half()
    with Arithmetic.parse("half_products+sequential").applied():
        y = F.linear(x, w, b)
    assert torch.equal(y, linear(x.float(), w.float(), b.float(), "sequential").half())
    with pytest.raises(ValueError, match=r"sequential sums are formed in float32.*half_products\+sequential"):
        linear(x, w, b, "sequential")


# --------------------------------------------------------------------------------------------- stochastic arithmetic
def test_exact_results_stay_and_others_become_one_of_their_two_neighbours() -> None:
    x, y = torch.full((4000,), 0.1), torch.full((4000,), 0.7)
    exact = float(x[0].double() * y[0].double())
    with RandomRounding(0):
        products, doubled, halves = x * y, x * 2, x / 2
        added = x.clone().add_(y)
    below, above = sorted(set(products.tolist()))
    assert below < exact < above
    assert np.nextafter(np.float32(below), np.float32(1)) == np.float32(above)
    share = float((products == above).double().mean())
    assert share == pytest.approx((exact - below) / (above - below), abs=0.04)  # the mean is exact
    assert torch.equal(doubled, torch.full_like(x, 0.2))
    assert torch.equal(halves, torch.full_like(x, 0.05))
    assert len(set(added.tolist())) <= 2
    with RandomRounding(0):
        assert torch.equal(x * y, products)  # the seed decides


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_of_matrices_move_by_one_ulp_and_zeros_stay(dtype: torch.dtype) -> None:
    a, b = drawn(40, 30).to(dtype), drawn(30, 50, seed=1).to(dtype)
    a[3] = 0
    plain = a @ b
    with RandomRounding(1):
        moved = a @ b
    up = torch.nextafter(plain.double(), torch.full((), torch.inf).double()) if dtype == torch.float64 else None
    apart = (moved != plain).double().mean()
    assert 0.4 < float(apart) < 0.6
    assert torch.equal(moved[3], torch.zeros_like(moved[3]))
    eps = torch.finfo(dtype).eps
    assert bool(((moved.double() - plain.double()).abs() <= eps * plain.double().abs()).all())
    assert up is None or bool((moved == up).any())


def functions() -> dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor]]:
    """Functions of tensors that a converter gives them: of those that round, and of those that do not."""
    x, y, w, b = drawn(4, 6), drawn(4, 6, seed=1), drawn(5, 6, seed=2), drawn(5, seed=3)
    image, kernel, query = drawn(2, 4, 8, 8, seed=4), drawn(3, 4, 3, 3, seed=5), drawn(2, 2, 5, 4, seed=6)
    positive, key, value = x.abs() + 0.1, drawn(2, 2, 5, 4, seed=7), drawn(2, 2, 5, 4, seed=8)
    rows = torch.tensor([0, 2, 1, 0])
    made = {
        name: lambda to, name=name: getattr(F, name)(to(x))
        for name in (
            *("relu", "relu6", "hardtanh", "hardshrink", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish"),
            *("softplus", "softshrink", "hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "glu", "normalize"),
        )
    }
    made |= {
        name: lambda to, name=name: getattr(torch, name)(to(positive))
        for name in (
            *("exp2", "log2", "log10", "sin", "cosh", "erfc", "lgamma", "sqrt", "square", "reciprocal", "abs", "sign"),
            *("floor", "frac", "sum", "mean", "std", "prod", "median", "amax", "trace", "clone", "t"),
        )
    }
    return made | {
        "add": lambda to: to(x) + to(y),
        "add a number": lambda to: to(x) + 0.1,
        "double": lambda to: to(x) * 2,
        "maximum": lambda to: torch.maximum(to(x), to(y)),
        "sort": lambda to: to(x).sort().values,
        "flip and cat": lambda to: torch.cat([to(x).flip(0), to(y)]),
        "cumprod": lambda to: to(x).cumprod(1),
        "linear": lambda to: F.linear(to(x), to(w), to(b)),
        "conv2d": lambda to: F.conv2d(to(image), to(kernel)),
        "max_pool2d": lambda to: F.max_pool2d(to(image), 2),
        "overlapping max_pool2d": lambda to: F.max_pool2d(to(image), 3, 1),
        "avg_pool3d": lambda to: F.avg_pool3d(to(image), 3),
        "layer_norm": lambda to: F.layer_norm(to(x), (6,)),
        "prelu": lambda to: F.prelu(to(x), to(b[:1])),
        "attention": lambda to: F.scaled_dot_product_attention(to(query), to(key), to(value)),
        "bilinear": lambda to: F.interpolate(to(image), scale_factor=1.7, mode="bilinear"),
        "nearest": lambda to: F.interpolate(to(image), scale_factor=2),
        "embedding": lambda to: F.embedding(rows, to(w)),
        "scatter_add": lambda to: to(torch.zeros(3, 6)).index_add(0, rows, to(x)),
        "pad": lambda to: F.pad(to(image), (1, 1, 1, 1), mode="reflect"),
        "huber": lambda to: F.huber_loss(to(x), to(y)),
        "cross_entropy": lambda to: F.cross_entropy(to(x), rows),
        "cdist": lambda to: torch.cdist(to(x), to(w)),
        "solve": lambda to: torch.linalg.solve(to(query[0, 0, :4]), to(x)),
        "fft": lambda to: torch.fft.fft(to(x)).real,
        "rms_norm": lambda to: F.rms_norm(to(x), (6,)),
    }


@pytest.mark.parametrize("name", list(functions()))
def test_what_rounds_is_rounded_at_random_and_what_does_not_is_not(name: str) -> None:
    """Float64 tells which functions and gradients round in float32, whatever the mode knows of them."""
    function = functions()[name]

    def results(dtype: torch.dtype, seed: int | None = None) -> list[torch.Tensor]:
        leaves: list[torch.Tensor] = []

        def leaf(t: torch.Tensor) -> torch.Tensor:
            leaves.append(t.to(dtype).requires_grad_())
            return leaves[-1]

        with nullcontext() if seed is None else RandomRounding(seed):
            value = function(leaf)
            direction = drawn(value.numel(), seed=9).view_as(value).to(dtype)
            return [value.detach(), *torch.autograd.grad(value, leaves, direction)]

    single, double = results(torch.float32), results(torch.float64)
    rounds = any(not torch.equal(one.double(), wide) for one, wide in zip(single, double, strict=True))
    seeds = [results(torch.float32, seed) for seed in range(4)]
    varies = any(not torch.equal(a, b) for other in seeds[1:] for a, b in zip(seeds[0], other, strict=True))
    assert varies or not rounds
    assert rounds or not varies


def test_in_double_precision_too_exact_results_stay_and_others_have_the_right_neighbours() -> None:
    """Against rational numbers."""
    a, b = drawn(300).double() + drawn(300, seed=1).double() / 3, drawn(300, seed=2).double() / 7
    a[0], b[0] = 1.0, 2.0**-60
    operations = {
        "add": (lambda x, y: x + y, lambda x, y: x + y),
        "sub": (lambda x, y: x - y, lambda x, y: x - y),
        "mul": (lambda x, y: x * y, lambda x, y: x * y),
        "div": (lambda x, y: x / y, lambda x, y: x / y),
    }
    for name, (of_tensors, of_numbers) in operations.items():
        moved = 0
        for seed in range(4):
            with RandomRounding(seed):
                rounded = of_tensors(a, b)
                kept = of_tensors(a, torch.full_like(a, {"mul": 4.0, "div": 4.0}.get(name, 0.0)))
            assert torch.equal(kept, of_tensors(a, torch.full_like(a, {"mul": 4.0, "div": 4.0}.get(name, 0.0)))), name
            moved += int((rounded != of_tensors(a, b)).sum())
            for x, y, r in zip(a.tolist(), b.tolist(), rounded.tolist(), strict=True):
                exact = of_numbers(Fraction(x), Fraction(y))
                inward = np.nextafter(r, np.inf if Fraction(r) < exact else -np.inf)
                assert Fraction(r) == exact or (Fraction(r) < exact) != (Fraction(float(inward)) < exact), name
        assert 0.1 < moved / 1200 < 0.4, name  # the mean of min(e, 1 - e) over the errors e is 1/4
    with RandomRounding(0):
        assert torch.equal(torch.full((9,), 2.25).double().sqrt(), torch.full((9,), 1.5).double())
        roots = {float(v) for seed in range(40) for v in torch.full((50,), 2.0).double().sqrt()}
    assert {np.nextafter(min(roots), 2)} == {max(roots)}
    assert Fraction(min(roots)) ** 2 < 2 < Fraction(max(roots)) ** 2


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_the_steps_of_optimizers_are_rounded_and_count_steps(options: dict[str, bool]) -> None:
    weights = []
    for seed in range(2):
        weight = torch.nn.Parameter(drawn(40))
        optimizer = torch.optim.AdamW([weight], **options)
        with RandomRounding(seed):
            for _ in range(3):
                weight.grad = drawn(40, seed=1)
                optimizer.step()
        assert float(optimizer.state[weight]["step"]) == 3
        weights.append(weight.detach())
    assert not torch.equal(*weights)
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-6)


def test_results_keep_their_strides_and_composed_operations_their_parts() -> None:
    x, w = drawn(4, 6), drawn(5, 6, seed=1)
    with RandomRounding(0):
        assert (x.t() + x.t()).stride() == (1, 6)
        assert F.conv2d(drawn(1, 2, 5, 5).to(memory_format=torch.channels_last), drawn(3, 2, 3, 3)).is_contiguous(
            memory_format=torch.channels_last
        )
    with torch.inference_mode():
        seeds = []
        for seed in range(2):
            with RandomRounding(seed):
                seeds.append(F.linear(x, w))
                assert torch.equal(F.dropout(x.reshape(6, 4).flatten(), 0.5, training=False), x.flatten())
    assert not torch.equal(*seeds)
    with RandomRounding(0):
        assert not torch.equal(torch.add(x, 0.1, out=torch.empty(4, 6)), x + 0.1)


def test_a_conversion_rounds_and_halves_of_float32_sums_do() -> None:
    with RandomRounding(0):
        halves = torch.full((4000,), 0.1).half()
        assert torch.equal(torch.full((9,), 0.1).double(), torch.full((9,), 0.1, dtype=torch.float32).double())
        whole = torch.arange(1, 200)
        assert torch.equal(whole.float(), torch.tensor([float(k) for k in range(1, 200)]))
        assert torch.equal((whole > 50).double(), torch.tensor([float(k > 50) for k in range(1, 200)]).double())
        assert torch.equal((2 * whole) / torch.full_like(whole, 2), whole.float())
        assert len({float(v) for seed in range(20) for v in whole[:1] / 3}) > 1
        copied = [torch.zeros(199), torch.zeros(3)]
        torch._foreach_copy_(copied, [whole.float(), torch.ones(3)])
        assert torch.equal(copied[0], whole.float())
        assert torch.equal(torch.ones(3, dtype=torch.complex64).to(torch.complex128).real, torch.ones(3).double())
    below, above = sorted(set(halves.tolist()))
    assert np.nextafter(np.float16(below), np.float16(1)) == np.float16(above)
    assert float(halves.double().mean()) == pytest.approx(0.1, abs=4e-6)
    x, w = drawn(20, 30).half(), drawn(40, 30, seed=1).half()
    rounded = []
    for seed in (1, 2):
        with Arithmetic.parse(f"half_products+random_rounding+seed={seed}").applied():
            rounded.append(F.linear(x, w))
    assert 0.2 < float((rounded[0] != rounded[1]).double().mean()) < 0.5  # 1/3 for errors that are uniform


def test_what_rounds_nothing_is_left_alone_and_gradients_are_rounded_too() -> None:
    model = lenet5(10, (1, 28, 28))
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with RandomRounding(0):
        assert torch.equal(
            F.max_pool2d(F.relu(x - 0.5).round(decimals=1), 2), F.max_pool2d(F.relu(x - 0.5).round(decimals=1), 2)
        )
    before = torch.random.get_rng_state()

    def gradient(seed: int | None) -> torch.Tensor:
        with Arithmetic(random_rounding=seed is not None, seed=seed or 0).applied():
            loss = model(x).logsumexp(1).sum()
            return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    plain, one, other = gradient(None), gradient(1), gradient(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    for moved in (one, other):
        assert 0 < float((moved - plain).norm() / plain.norm()) < 1e-5
    assert not torch.equal(one, other)


def test_a_zone_under_random_rounding_tells_the_floor_that_it_makes() -> None:
    model = lenet5(10, (1, 28, 28))
    patch(model, Jacobians())
    (x, _) = next(iter(FashionMNISTSample(batch_size=8).train_dataloader()))  # a background that ties

    def loss(output: torch.Tensor) -> torch.Tensor:
        return output.logsumexp(1).sum()

    minimal = Jacobians(max_pool="minimal")
    exact = zone(model, loss, x, minimal)
    assert exact.noise is not None
    assert exact.noise.l2 == 0
    with Arithmetic.parse("random_rounding").applied():
        rounded = zone(model, loss, x, minimal)
    assert rounded.noise is not None
    assert 0 < rounded.noise.relative < 1e-5
    assert rounded.kind == exact.kind
    assert "one choice's from itself by" in str(rounded)
    assert "from itself" not in str(exact)


def test_the_floor_is_that_of_independent_roundings() -> None:
    """Each entry of a product moves by -1, 0, 1 ulp with the chances 1/4, 1/2, 1/4, in each of the two backwards.

    The squared difference of an entry has the mean 1 and the variance 3/2, in units of its ulp. The gradients are
    known: each weight's is 3 * 0.3, whose ulp is 2^-24, and each bias' is 3, whose ulp is 2^-22.
    """
    rows, columns = 50, 40
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows), torch.nn.ReLU())
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)  # each unit ties
    x, zero, one = torch.full((3, columns), 0.3), Jacobians(), Jacobians(relu=1.0)
    patch(model, zero)

    def both(arithmetic: str) -> tuple[Divergence, Divergence, Divergence]:
        with Arithmetic.parse(arithmetic).applied():
            measured = divergence(model(x).sum(), model, {"zero": zero}, one, control=True)
            noise = zone(model, torch.sum, x, zero, one).noise
        assert noise is not None
        return measured["zero"], measured["control"], noise

    apart, *controls = both("native")
    assert [control.l2 for control in controls] == [0.0, 0.0]
    apart, *controls = both("random_rounding")
    assert apart.l2 == pytest.approx((rows * columns * 0.9**2 + rows * 3.0**2) ** 0.5, rel=1e-5)
    for control in controls:
        weights = (control.per_layer["0.weight"].l2 * 2**24) ** 2
        biases = (control.per_layer["0.bias"].l2 * 2**22) ** 2
        assert abs(weights - rows * columns) < 5 * (1.5 * rows * columns) ** 0.5
        assert abs(biases - rows) < 5 * (1.5 * rows) ** 0.5


def test_the_control_is_a_whole_backward_whatever_the_choices_reach() -> None:
    """The only tie lies in the first layer: the choices' backwards start below the second, the control's does not."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 400))
    torch.nn.init.zeros_(model[0].weight)
    model[0].bias = torch.nn.Parameter(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    patch(model, Jacobians())
    with RandomRounding(0):
        loss = model(torch.ones(3, 4)).logsumexp(1).sum()
        measured = divergence(loss, model, {"one": Jacobians(relu=1.0)}, control=True)
        carried = divergence(loss, model, {"one": Jacobians(relu=1.0)}, method="propagate", control=True)
    assert measured["one"].per_layer["2.weight"].l2 == 0
    assert measured["control"].per_layer["2.weight"].l2 > 0
    assert set(carried) == {"one", "control"}
    assert carried["one"].l2 > 0
    assert (carried["control"].l2, carried["control"].method) == (0.0, "propagate")
    with pytest.raises(ValueError, match="the name 'control' is the reference's second gradient"):
        divergence(loss, model, {"control": Jacobians(relu=1.0)}, control=True)


# ----------------------------------------------------------------------------------------------- settings and records
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("bias_first", "'bias_first' is not one of native, bias_last, sequential, split_k=N, blocks=N, random_order,"),
        ("split_k", "is not one of"),
        ("split_k=0", "is not one of"),
        ("bias_last+sequential", "names two orders"),
        ("threads=0", "at least one"),
        ("tf32=1", "is not one of"),
    ],
)
def test_an_arithmetic_that_is_none(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arithmetic.parse(words)


@pytest.mark.parametrize("words", ["native", "bias_last+tf32", "split_k=4+random_rounding+threads=2+seed=3"])
def test_an_arithmetic_reads_what_it_writes(words: str) -> None:
    assert str(Arithmetic.parse(words)) == words


def test_float32_means_float32_unless_it_is_asked_otherwise_and_switches_are_taken_back() -> None:
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's own default
    before = switches()
    with Arithmetic().applied():
        within = switches()
        assert not within["tf32_matmul"]
        assert not within["tf32_cudnn"]
        assert within["matmul_precision"] == "highest"
        assert not within["fp16_reduced_reductions"]
        assert not within["bf16_reduced_reductions"]
    assert switches() == before
    every = "tf32+reduced_reductions+deterministic+cudnn_benchmark+flush_to_zero+threads=1"

    def inside() -> None:
        with Arithmetic.parse(every).applied():
            seen.update(switches())
            raise KeyError

    seen: dict[str, object] = {}
    with pytest.raises(KeyError):
        inside()
    for name in ("tf32_matmul", "tf32_cudnn", "fp16_reduced_reductions", "deterministic", "cudnn_benchmark"):
        assert seen[name] is True, name
    assert seen["flush_to_zero"] is True
    assert seen["threads"] == 1
    assert switches() == before  # taken back all the same


def test_the_record_names_machine_libraries_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    recorded = record()
    assert recorded["variables"]["MKL_CBWR"] == "COMPATIBLE"
    assert recorded["processor"]
    assert recorded["cores"] >= 1
    assert recorded["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert {"tf32_cudnn", "deterministic", "flush_to_zero", "threads"} <= set(recorded)


def test_a_cell_computes_in_its_arithmetic_and_records_it() -> None:
    options = {"backbone": "paper/fc", "width": 32, "depth": 2, "data": "FashionMNISTSample", "train_images": 128}
    options |= {"epochs": 3, "batch_size": 16}
    metrics = {
        a: compute("train", settings("train", {**options, "arithmetic": a}), "cpu") for a in ("native", "random_order")
    }  # no library's order is a random one; on some processors it is the sequential one
    losses = [next(r["value"] for r in o.rows if r["metric"] == "train_loss") for o in metrics.values()]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert metrics["random_order"].provenance["arithmetic"] == "random_order"
    assert metrics["native"].provenance["environment"]["arithmetic"]["tf32_cudnn"] is False
    half = compute("train", settings("train", {**options, "precision": 16}), "cpu")
    assert half.provenance["arithmetic"] == "half_products"


# ------------------------------------------------------------------------------------------------------------ Trainer
def fitted(arithmetic: str, seen: dict[str, object] | None = None, **options: object) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = ImageClassifier(**options)
    if seen is not None:
        model.backbone.register_forward_hook(lambda *_: seen.update(switches()))
    trainer = Trainer(
        accelerator="cpu", max_steps=2, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, callbacks=[ArithmeticSetting(arithmetic)],
    )  # fmt: skip
    trainer.fit(model, FashionMNISTSample(batch_size=32))
    return [p.detach().clone() for p in model.parameters()]


def test_a_trainer_takes_an_arithmetic_as_a_callback() -> None:
    torch.backends.cudnn.allow_tf32 = True
    seen: dict[str, object] = {}
    plain, again, ordered = fitted("native", seen), fitted("native"), fitted("sequential")
    assert seen["tf32_cudnn"] is False
    assert torch.backends.cudnn.allow_tf32
    assert all(map(torch.equal, plain, again))
    assert not all(map(torch.equal, plain, ordered))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, ordered, strict=True))


def test_an_arithmetic_by_operation_is_refused_for_a_compiled_network() -> None:
    with pytest.raises(ValueError, match=r"arithmetic=bias_last works operation by operation.*compile=false"):
        fitted("bias_last", compile=True)


def test_half_products_are_one_of_them() -> None:
    x, w = drawn(3, 40).half(), drawn(2, 40, seed=1).half()
    with HalfProducts():
        expected = F.linear(x, w)
    with Arithmetic.parse("half_products").applied():
        assert torch.equal(F.linear(x, w), expected)


def test_a_process_may_have_frozen_its_flags() -> None:
    """torch.backends.disable_global_flags cannot be undone: it is called in a separate process."""
    code = (
        "import torch; torch.backends.disable_global_flags()\n"
        "from nslightning.arithmetic import Arithmetic\n"
        "before = torch.backends.cudnn.allow_tf32\n"
        "with Arithmetic.parse('tf32+cudnn_benchmark').applied():\n"
        "    print(torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark)\n"
        "print(torch.backends.cudnn.allow_tf32 == before, torch.backends.cudnn.benchmark)\n"
        "Arithmetic().switch(); print(torch.backends.cudnn.allow_tf32)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "True", "True", "False", "False"], result.stderr


def test_determinism_lets_cublas_compute(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that the test's end removes what follows
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with Arithmetic(deterministic=True).applied():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with Arithmetic(deterministic=True).applied():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
