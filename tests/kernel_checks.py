"""The checks that the fused kernels of every device must pass: see test_cpu_kernels.py and triton_interpreted.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nslightning import Jacobians
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.pooling import pool, regular
from nslightning.ops.autograd.selection import Selection, pool_difference_coefficients

LAYOUTS = [torch.contiguous_format, torch.channels_last]
GEOMETRIES = [
    ((2, 2), (2, 2), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 2), (1, 2), (1, 0), (2, 1)),
    ((2, 3), (3, 1), (1, 1), (1, 2)),
    ((4, 3), (4, 4), (2, 1), (1, 1)),
]
WEIGHTS = {
    "native": (0, 1, 0, 0), "last": (0, 1, 0, 1), "minimal": (1, 0, 0, 0), "beta10": (10, -9, 0, 0), "sum": (0, 0, 1, 0)
}  # fmt: skip


def bits_of(t) -> torch.Tensor:
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.dtype.itemsize])


def disjoint(geometry) -> bool:
    return all(s > d * (k - 1) for k, s, _, d in zip(*geometry, strict=True))


def close(dtype) -> dict[str, float]:
    """How close a result is to one in float64: half precisions are rounded once."""
    return dict.fromkeys(("rtol", "atol"), max(1e-5, 2 * torch.finfo(dtype).eps))


def check_relu(kernels, dtype, layout, constant) -> None:
    """Bit for bit against PyTorch's forward and a masked assignment."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (3, 5, 7, 19), generator=generator).to(dtype)
    x.view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    x = x.contiguous(memory_format=layout)
    y, bits = kernels.relu_forward(x)
    torch.testing.assert_close(y, torch.relu(x), rtol=0, atol=0, equal_nan=True)
    assert sum(int(b).bit_count() for b in bits) == int((x == 0).sum())
    g = torch.randn(x.shape, generator=generator).to(dtype)  # contiguous: laid out another way than channels_last
    g.view(-1)[10:12] = torch.tensor([float("nan"), float("inf")])
    at_zero = torch.full_like(g, -2.5) if constant else g * 0.5
    expected = torch.where(x == 0, at_zero, torch.where(x < 0, 0, g))
    ours = kernels.relu_backward(g, y, bits, -2.5 if constant else 0.5, constant=constant)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def naive_pool(x, g, geometry, weights, target=None) -> torch.Tensor:
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
            if coefficient:
                gradient[n, c, h, w] += incoming * coefficient
    return gradient


def tied_images(layout, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 3, (2, 3, 9, 8), generator=generator).to(dtype)
    x[0, 0, 1, :2], x[1, 1] = float("nan"), -float("inf")
    return x.contiguous(memory_format=layout)


def check_max_pool(kernels, geometry, weights, layout, dtype=torch.float32) -> None:
    """The forward and the reference choice bit for bit against PyTorch's, every choice against the naive one."""
    x = tied_images(layout, dtype).requires_grad_()
    stock = F.max_pool2d(x, *geometry)
    y, mask, tied = kernels.pool_forward(x.detach(), geometry, tuple(stock.shape[2:]))
    torch.testing.assert_close(y, stock, rtol=0, atol=0, equal_nan=True)
    assert tied
    g = torch.randn(stock.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    g[:, :, 0] = -0.0
    infinite = g.index_fill(3, torch.tensor([1]), float("inf"))
    for incoming in (g, infinite) if min(weights) >= 0 else (g,):  # else infinities may cancel
        ours = kernels.pool_backward(incoming, mask, geometry, tuple(x.shape[2:]), weights)
        expected = naive_pool(x, incoming, geometry, weights)
        # Where windows overlap, a CPU rounds each sum in half precision: up to nine of them.
        tolerance = {name: value * (9 if dtype.itemsize == 2 else 1) for name, value in close(dtype).items()}
        torch.testing.assert_close(ours.double(), expected, **tolerance, equal_nan=True)
        if weights == (0, 1, 0, 0):  # added up in the stock order
            assert torch.equal(bits_of(ours), bits_of(torch.autograd.grad(stock, x, incoming, True)[0]))


def check_pool_difference(kernels, geometry, layout, dtype=torch.float32) -> None:
    """The differences of all pairs of choices against those of the naive gradients; exact zeros where none ties."""
    x = tied_images(layout, dtype)
    x[:, 2] = torch.arange(9 * 8).view(9, 8).to(dtype)  # no two are the same
    size = tuple(F.max_pool2d(x, *geometry).shape[2:])
    _, mask, _ = kernels.pool_forward(x, geometry, size)
    g = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    g[:, 2, 0, 0] = float("inf")  # arrives at no tie
    naive = {name: naive_pool(x, g.nan_to_num(posinf=7.0), geometry, w) for name, w in WEIGHTS.items()}
    refused = []
    for name, weights in WEIGHTS.items():
        for other, less in WEIGHTS.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            coefficients = pool_difference_coefficients(weights, less, wide)
            if coefficients is None:
                refused.append({name, other})
                continue
            ours = kernels.pool_shares(g, mask, geometry, tuple(x.shape[2:]), *coefficients)
            torch.testing.assert_close(ours.double(), naive[name] - naive[other], **close(dtype))
            assert not ours[:, 2].any()
            assert ours.any() == (name != other)
    assert refused
    assert all("last" in pair and pair & {"native", "beta10"} for pair in refused)


def check_strides() -> None:
    """Gradients lie in memory as stock's, also where the result does not tell how its input lies."""
    for layout in LAYOUTS:
        leaf = tied_images(layout)[:, :, :2, :3].contiguous(memory_format=layout).requires_grad_()
        stock, ours = (
            F.max_pool2d(leaf, (2, 3)),
            pool(leaf, Selection(Jacobians(max_pool="minimal")), regular(2, (2, 3))),
        )
        assert "_MaxPool2d" in str(ours.grad_fn)
        assert ours.stride() == stock.stride()
        g = torch.ones(stock.shape)
        strides = [torch.autograd.grad(y, leaf, g)[0].stride() for y in (ours, stock)]
        assert strides[0] == strides[1]
    for shape, strides_of_x in (((1, 5), (1, 1)), ((3, 1), (1, 3)), ((3, 4), (1, 3)), ((2, 1, 3), (3, 7, 1))):
        leaf = torch.empty_strided(shape, strides_of_x).zero_().requires_grad_()
        for g in (torch.arange(1.0, 1 + leaf.numel()).view(shape), torch.ones(()).expand(shape)):
            stock, ours = torch.relu(leaf), pointwise("relu", leaf, Selection(Jacobians(relu=0.5)))
            assert "_ReLU" in str(ours.grad_fn)
            assert ours.stride() == stock.stride()
            gradient = torch.autograd.grad(ours, leaf, g)[0]
            assert gradient.stride() == torch.autograd.grad(stock, leaf, g)[0].stride()
            assert torch.equal(gradient, 0.5 * g)


def both_ways(operation, x, g, monkeypatch, kernels) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output, gradient and second derivative of an operation, by the kernels and composed."""
    gradients = []
    for used in (kernels, None):
        with monkeypatch.context() as patched:
            patched.setattr("nslightning.ops.autograd.fused.kernels_for", lambda device, used=used: used)
            patched.setattr("nslightning.ops.autograd.native._library", lambda: None)
            leaf, incoming = x.clone().requires_grad_(), g.clone().requires_grad_()
            y = operation(leaf)
            assert ("_ReLU" in str(y.grad_fn) or "_MaxPool2d" in str(y.grad_fn)) == (used is not None)
            (gradient,) = torch.autograd.grad(y, leaf, incoming.detach(), retain_graph=True)
            (again,) = torch.autograd.grad(y, leaf, incoming, create_graph=True)
            (second,) = torch.autograd.grad(again.square().sum(), incoming)
            gradients.append([y.detach(), gradient, again.detach(), second])
    return gradients[0], gradients[1]
