"""Norms and losses: stock forward bits, stock gradients by default, chosen ones at ties against float64 by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from bits import bits

from nslightning import Jacobians, ops
from nslightning.ops.autograd.routing import ROUTES
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.losses import HINGES, hinge, tied_hinges
from nslightning.ops.norms import absolute, chosen_norm, norm_pool, tied_norms, unit
from nslightning.ops.record import FUNCTIONS

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DIGITS = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-14}
REDUCTIONS = ["mean", "sum", "none"]


def grads(y, inputs, seed=0):
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return torch.autograd.grad(y, inputs, g, retain_graph=True), g


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------------------ norms
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, 1, (0, 2), (-1,)])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3.0])
def test_norms(p, dim, keepdim, dtype):
    x = randn(3, 4, 5, dtype=dtype)
    x[1], x[0, 2], x[2, :, 0], x[:, 3] = 0.0, 0.0, 0.0, 0.0
    if dim is None:
        x = torch.zeros_like(x) if p != 1 else x
    x.requires_grad_()
    want = torch.linalg.vector_norm(x, p, dim, keepdim)
    for c in (None, 0.0, 1.0, -0.5):
        got = chosen_norm(x, Selection(Jacobians(norm=c, abs=c)), p, dim, keepdim)
        assert torch.equal(bits(got), bits(want))
        (gradient,), g = grads(got, (x,))
        (stock,), _ = grads(want, (x,))
        if c is None:
            assert torch.equal(bits(gradient), bits(stock))
        dims = tuple(range(3)) if dim is None else (dim if isinstance(dim, tuple) else (dim,))
        g = (
            g.double()
            if keepdim
            else torch.linalg.vector_norm(x, p, dims, True)
            .detach()
            .copy_(g.reshape(torch.linalg.vector_norm(x, p, dims, True).shape))
            .double()
        )
        zero = (x == 0) if p == 1 else (torch.linalg.vector_norm(x, p, dims, True) == 0).expand_as(x)
        assert zero.any()
        expected = torch.where(zero, (c or 0.0) * g.expand_as(x), stock.double())
        assert torch.allclose(gradient.double(), expected, rtol=DIGITS[dtype], atol=0)


def test_norm_of_special_values_and_none():
    for values in ([math.nan, 0.0], [math.inf, 1.0], [-0.0, 0.0], []):
        x = torch.tensor(values, requires_grad=True)
        got, want = ops.norm(x), torch.linalg.vector_norm(x)
        assert torch.equal(bits(got), bits(want))
        a, b = (torch.autograd.grad(y, x)[0] for y in (got, want))
        assert torch.equal(bits(a), bits(b))
    assert tied_norms(torch.zeros(2, 3), 2.0, 1) == (2, 2)
    assert tied_norms(torch.tensor([0.0, 1.0]), 1) == (1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "dim", "eps"), [(2.0, 1, 1e-12), (2.0, -1, 0.5), (3.0, 0, 0.5), (1.0, 1, 0.5)])
def test_normalize(p, dim, eps, dtype):
    x = randn(4, 4, dtype=dtype)
    x[0], x[:, 0] = 0.0, 0.0
    x[1] = torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=dtype)  # its norm is just 0.5
    x.requires_grad_()
    want = F.normalize(x, p, dim, eps)
    got = unit(x, Selection(Jacobians()), p, dim, eps)
    assert torch.equal(bits(got), bits(want))
    ((a,), _), ((b,), _) = grads(got, (x,)), grads(want, (x,))
    assert torch.equal(bits(a), bits(b))  # NaN where half precision rounds eps to 0, in some versions


@pytest.mark.parametrize("c", [0.0, 1.0, 0.25])
def test_normalize_at_eps(c):
    """y = x / m, dm = c dn at a norm of eps: the gradient is g / eps - c x (g . x) / eps ** 3."""
    x = torch.tensor([[0.3, 0.4], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    y = ops.normalize(x, eps=x.detach()[0].norm().item(), at_eps=c)
    (gradient,), g = grads(y, (x,))
    row, gx = x.detach()[0], g[0]
    assert torch.allclose(gradient[0], gx / 0.5 - c * row * (gx @ row) / 0.125, rtol=1e-14)
    assert torch.equal(gradient[1], grads(F.normalize(x), (x,))[0][0][1])
    (operation,) = FUNCTIONS[F.normalize]  # a zero vector is divided by eps, which is no tie
    rows = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    assert operation.ties(operation.functions[F.normalize](rows, eps=2.0)) == (1, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(2, 2), (3, 2)])
def test_norm_pool(kernel, dtype):
    """Against a loop over windows; versions 1 and 2 of the paper."""
    x = randn(2, 3, 7, 6, dtype=dtype)
    x[:, 0], x[1, 1, :3, :2] = 0.0, 0.0
    x.requires_grad_()
    rows, columns = 7 // kernel[0], 6 // kernel[1]
    for version in (0.0, 1.0):
        y = norm_pool(x, Selection(Jacobians(norm=version)), kernel)
        assert y.shape == (2, 3, rows, columns)
        (gradient,), g = grads(y, (x,))
        expected = torch.zeros(x.shape, dtype=torch.float64)
        for n, c, i, j in itertools.product(range(2), range(3), range(rows), range(columns)):
            at = (n, c, slice(i * kernel[0], (i + 1) * kernel[0]), slice(j * kernel[1], (j + 1) * kernel[1]))
            window, size = x.detach()[at].double(), x.detach()[at].double().pow(2).sum().sqrt()
            assert y[n, c, i, j].item() == pytest.approx(size.item(), rel=2 * DIGITS[dtype])
            expected[at] = g[n, c, i, j].double() * (window / size if size else version)
        assert torch.allclose(gradient.double(), expected, rtol=4 * DIGITS[dtype], atol=DIGITS[dtype])


# ----------------------------------------------------------------------------------------------------------- losses
def cases(function, dtype=torch.float64):
    """Inputs with ties, the loss's tensors first; and its other parameters."""
    x, y = (torch.randint(-2, 3, (6, 4), generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, -1.0], dtype=dtype)
    if function == "hinge_embedding_loss":
        return (x, sign[:, None].expand_as(x)), {"margin": 1.0}
    if function == "margin_ranking_loss":
        return (x, y, sign[:, None].expand_as(x)), {"margin": 1.0}
    if function == "cosine_embedding_loss":
        x[1], y[1] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])
        x[3], y[3] = x[1], y[1]  # not in force
        return (x, y, sign), {"margin": 0.0}
    if function == "triplet_margin_loss":
        z = x.clone()
        y = x.clone()
        z[:, 0] -= torch.tensor([1.0, 1.0, 0.5, 1.0, 3.0, 1.0], dtype=dtype)  # the margin away, nearer and farther
        return (x, y, z), {"margin": 1.0, "eps": 0.0}
    return (x, torch.tensor([0, 1, 2, 3, 0, 1])), {"margin": 1.0}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", list(HINGES))
def test_hinges(function, reduction):
    """Forward and reference are stock's; at ties each choice adds its multiple of the gradient of u."""
    args, rest = cases(function)
    tied, evaluations = tied_hinges(function, *args, **rest)
    assert 0 < tied < evaluations
    x = args[0].clone().requires_grad_()
    args = (x, *args[1:])
    want = getattr(F, function)(*args, reduction=reduction, **rest)
    (stock,), g = grads(want, (x,))
    native = ROUTES["multi_margin" if function == "multi_margin_loss" else "hinge"].native
    for c in (None, 0.0, 1.0, 0.3):
        got = hinge(function, Selection(Jacobians(hinge=c)), *args, reduction=reduction, **rest)
        assert torch.equal(bits(got), bits(want))
        (gradient,), _ = grads(got, (x,))
        if c is None:
            assert torch.equal(gradient, stock)
            continue
        expected = by_hand(function, args, rest, reduction, g, c)
        assert torch.allclose(gradient, expected, rtol=1e-12, atol=1e-12)
        if c == native:
            assert torch.allclose(gradient, stock, rtol=1e-12, atol=1e-12)
        assert c == native or not torch.allclose(gradient, stock)


def by_hand(function, args, rest, reduction, g, c):
    """The whole loss once more, entry by entry, with a ReLU whose derivative at 0 is c."""
    args = [a.detach() for a in args]
    x = args[0].clone().requires_grad_()
    losses = []

    def relu(u):
        slope = 1.0 if u.item() > 0 else (c if u.item() == 0 else 0.0)
        return slope * u

    m = rest["margin"]
    for i in range(len(x)):
        if function == "hinge_embedding_loss":
            row = [x[i, j] if args[1][i, j] == 1 else relu(m - x[i, j]) for j in range(x.shape[1])]
            losses.append(torch.stack(row))
        elif function == "margin_ranking_loss":
            row = [relu(-args[2][i, j] * (x[i, j] - args[1][i, j]) + m) for j in range(x.shape[1])]
            losses.append(torch.stack(row))
        elif function == "cosine_embedding_loss":
            y = args[1][i]
            cos = (x[i] @ y) / (((x[i] @ x[i]) + 1e-12) * ((y @ y) + 1e-12)).sqrt()
            losses.append(1 - cos if args[2][i] == 1 else relu(cos - m))
        elif function == "triplet_margin_loss":
            near, far = ((x[i] - a[i]).norm() for a in args[1:])
            losses.append(relu(m + near - far))
        else:
            t = int(args[1][i])
            others = [relu(m - x[i, t] + x[i, j]) for j in range(x.shape[1]) if j != t]
            losses.append(sum(others) / x.shape[1])
    loss = torch.stack(losses)
    loss = {"none": loss, "sum": loss.sum(), "mean": loss.mean()}[reduction]
    return torch.autograd.grad(loss, x, g)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", list(HINGES))
def test_hinges_in_every_precision(function, dtype):
    args, rest = cases(function, dtype)
    x = args[0].clone().requires_grad_()
    args = (x, *args[1:])
    try:
        want = getattr(F, function)(*args, **rest)
    except RuntimeError as error:  # multi_margin_loss has no half precision on a CPU
        with pytest.raises(RuntimeError, match="not implemented"):
            hinge(function, Selection(Jacobians(hinge=1.0)), *args, **rest)
        assert "not implemented" in str(error)  # noqa: PT017 # both raise, and both say so
        return
    for c in (None, 1.0):
        got = hinge(function, Selection(Jacobians(hinge=c)), *args, **rest)
        assert torch.equal(bits(got), bits(want))
    reference = torch.autograd.grad(hinge(function, Selection(Jacobians()), *args, **rest), x)[0]
    assert torch.equal(reference, torch.autograd.grad(want, x)[0])


def test_hinge_options():
    """Class weights, one of them negative, swapped triplets, single samples."""
    x, t = randn(5, 3, dtype=torch.float64).requires_grad_(), torch.tensor([0, 1, 2, 0, 1])
    weight = torch.tensor([-0.5, 2.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        x[:, 1] = x[:, 0] - 1.0  # ties wherever the class is 0
    for c, reduction in itertools.product((0.0, 1.0), REDUCTIONS):
        got = ops.multi_margin_loss(x, t, weight=weight, reduction=reduction, at_zero=c)
        (gradient,), g = grads(got, (x,))
        (stock,), _ = grads(F.multi_margin_loss(x, t, weight=weight, reduction=reduction), (x,))
        g = (g / 5 if reduction == "mean" else g).expand(5)
        extra = torch.zeros_like(x)
        for i in torch.nonzero((1 - x[:, 0] + x[:, 1] == 0) & (t == 0)).flatten().tolist():
            extra[i] = c * g[i] * -0.5 / 3 * torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
        assert extra.count_nonzero() > 0 or c == 0
        assert torch.allclose(gradient, stock + extra, rtol=1e-13, atol=1e-15)
    one = torch.tensor([1.0, 0.0], requires_grad=True)
    ops.multi_margin_loss(one, torch.tensor(0), at_zero=1.0).backward()
    assert one.grad.tolist() == [-0.5, 0.5]
    a = torch.zeros(1, 1, requires_grad=True)
    for swap, want in ((False, -1.0), (True, -1.0)):
        loss = ops.triplet_margin_loss(a, torch.ones(1, 1), torch.full((1, 1), -2.0), eps=0.0, swap=swap, at_zero=0.5)
        assert torch.equal(
            loss, F.triplet_margin_loss(a, torch.ones(1, 1), torch.full((1, 1), -2.0), eps=0.0, swap=swap)
        )
        assert torch.autograd.grad(loss, a)[0].item() == want
    # The negative is less far from the positive than from the anchor, and only with that distance u is 0.
    near, far = torch.ones(1, 1), torch.full((1, 1), 2.5)
    for swap, want in ((False, 0.0), (True, -0.5)):
        loss = ops.triplet_margin_loss(a, near, far, margin=0.5, eps=0.25, swap=swap, at_zero=0.5)
        assert torch.autograd.grad(loss, a)[0].item() == want


def test_a_target_that_is_neither_has_no_hinge():
    """The cosine embedding loss is 0 there, on both sides."""
    x, y = torch.tensor([[1.0, 0.0]] * 3, requires_grad=True), torch.tensor([[0.0, 1.0]] * 3)
    target = torch.tensor([-1.0, 0.0, 1.0])
    loss = ops.cosine_embedding_loss(x, y, target, reduction="none", at_zero=1.0)
    (gradient,) = torch.autograd.grad(loss[:2].sum(), x)
    assert gradient.tolist() == [[0, 1], [0, 0], [0, 0]]
    assert tied_hinges("cosine_embedding_loss", x, y, target) == (1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_l1(reduction, weighted, dtype):
    x, t = cases("margin_ranking_loss", dtype)[0][:2]
    x.requires_grad_()
    weight = torch.rand(6, 4, generator=torch.Generator().manual_seed(3)).to(dtype) if weighted else None
    want = F.l1_loss(x, t, reduction=reduction, weight=weight)
    (stock,), g = grads(want, (x,))
    w = torch.ones(6, 4, dtype=torch.float64) if weight is None else weight.double()
    scale = w / w.sum() if reduction == "mean" else w
    for c in (None, 0.0, 1.0, -0.5):
        got = absolute(x, t, Selection(Jacobians(abs=c)), reduction, weight)
        assert torch.equal(bits(got), bits(want))
        (gradient,), _ = grads(got, (x,))
        if c is None:
            assert torch.equal(gradient, stock)
        expected = torch.where(x == t, (c or 0.0) * g.double() * scale, stock.double())
        assert torch.allclose(gradient.double(), expected, rtol=4 * DIGITS[dtype], atol=DIGITS[dtype] / 10)
    both = torch.autograd.grad(ops.l1_loss(x, t.requires_grad_(), at_zero=1.0), (x, t))
    assert torch.equal(both[0], -both[1])


def test_smooth_losses_have_nothing_to_choose():
    """Smooth L1 and Huber: the derivative from the left is the one from the right."""
    for f in (F.smooth_l1_loss, F.huber_loss):
        for at in (-1.0, 0.0, 1.0):
            slopes = []
            for h in (-1e-6, 1e-6):
                x = torch.tensor(at + h, dtype=torch.float64, requires_grad=True)
                slopes.append(torch.autograd.grad(f(x, torch.zeros((), dtype=torch.float64)), x)[0].item())
            assert slopes[0] == pytest.approx(slopes[1], abs=1e-5)
    (operation,) = FUNCTIONS[F.multi_margin_loss]
    x, target = torch.zeros(1, 2), torch.tensor([0])
    assert operation.functions[F.multi_margin_loss](x, target) is not None
    assert operation.functions[F.multi_margin_loss](x, target, p=2) is None  # squares of the hinges


def test_twice_and_transformed():
    x = randn(3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ops.norm(x, 1, at_zero=1.0), x)
    with torch.no_grad():
        x[1] = 0.0
    gradient = torch.func.grad(lambda x: ops.norm(x, 1, at_zero=1.0).sum())(x.detach())
    assert torch.equal(gradient[1], torch.ones(4, dtype=torch.float64))
    rows = torch.func.vmap(torch.func.grad(lambda row: ops.norm(row, at_zero=1.0)))(x.detach())
    assert torch.equal(rows, gradient)
    t = x.detach().clone()
    loss = torch.func.grad(lambda x: ops.l1_loss(x, t, "sum", at_zero=0.5))(x.detach())
    assert torch.equal(loss, torch.full_like(t, 0.5))


def test_compiled_backward_serves_every_choice():
    selection = Selection(Jacobians())
    args, rest = cases("margin_ranking_loss", torch.float32)

    def f(x):
        ranked = hinge("margin_ranking_loss", selection, x, *args[1:], **rest)
        return ranked + chosen_norm(x, selection, 2.0, 1).sum() + absolute(x, args[1], selection)

    x = args[0].clone()
    x[2] = 0.0
    x.requires_grad_()
    y, z = torch.compile(f, backend="aot_eager", fullgraph=True)(x), f(x)
    assert torch.equal(y, z)
    seen = set()
    for c in (None, 0.0, 1.0, 0.3):
        selection.set(Jacobians(hinge=c, norm=c, abs=c))
        got, want = (torch.autograd.grad(r, x, retain_graph=True)[0] for r in (y, z))
        assert torch.allclose(got, want, rtol=1e-6, atol=1e-7)
        seen.add(tuple(want.flatten().tolist()))
    zero = torch.zeros((), requires_grad=True)
    (stock,) = torch.autograd.grad(zero.clamp_min(0), zero)
    assert len(seen) == (4 if stock else 3)  # None is 0 where the installed clamp_min's is
