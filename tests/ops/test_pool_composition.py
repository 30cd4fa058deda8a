"""Max pooling under torch.func, forward mode, double backward, checkpoints, export and the compiler."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, ops
from nslightning.ops.autograd.pooling import adaptive, pool, regular
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.kernels import cpu as cpu_kernels

CHOICES = ["native", "minimal", "last", "sum", 10.0]
POOLS = {
    "max_pool1d": ((2, 3, 8), lambda x, **k: ops.max_pool1d(x, 3, 2, 1, **k)),
    "max_pool2d disjoint": ((2, 3, 6, 8), lambda x, **k: ops.max_pool2d(x, 2, **k)),
    "max_pool2d": ((2, 3, 6, 8), lambda x, **k: ops.max_pool2d(x, 3, 2, 1, **k)),
    "max_pool3d": ((2, 2, 4, 5, 4), lambda x, **k: ops.max_pool3d(x, 3, 2, 1, **k)),
    "adaptive_max_pool2d": ((2, 3, 5, 7), lambda x, **k: ops.adaptive_max_pool2d(x, (3, 2), **k)),
    "adaptive_max_pool3d": ((2, 2, 4, 5, 4), lambda x, **k: ops.adaptive_max_pool3d(x, 3, **k)),
}
every_pool = pytest.mark.parametrize("name", POOLS)


def tied(shape, seed=0):
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def untied(shape):
    n = torch.Size(shape).numel()
    return torch.randperm(n, generator=torch.Generator().manual_seed(0)).double().view(shape) / 10


def normal(shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reverse(f, x, g):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, g)[0]


@every_pool
@pytest.mark.parametrize("choice", [*CHOICES, "random"])
def test_gradcheck_away_from_ties(name, choice):
    shape, f = POOLS[name]
    x = untied(shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: f(x, jacobian=choice), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: f(x, jacobian=choice).square(), (x,))


@every_pool
@pytest.mark.parametrize("choice", CHOICES)
def test_forward_mode_is_the_transpose(name, choice):
    """<u, J v> = <J^T u, v>, at ties."""
    shape, f = POOLS[name]
    x, v = tied(shape), normal(shape, 1)
    with forward_ad.dual_level():
        y, t = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v), jacobian=choice))
    u = normal(y.shape, 2)
    got = reverse(lambda x: f(x, jacobian=choice), x, u)
    torch.testing.assert_close((u * t).sum(), (got * v).sum())
    assert torch.equal(torch.func.jvp(lambda x: f(x, jacobian=choice), (x,), (v,))[1], t)
    if choice == "minimal":
        assert not torch.equal(got, reverse(f, x, u))  # ties were met


@every_pool
@pytest.mark.parametrize("choice", CHOICES)
def test_torch_func(name, choice):
    shape, f = POOLS[name]
    batch = torch.stack([tied(shape, seed) for seed in range(3)])
    up = normal(f(batch[0]).shape, 1)

    def loss(x):
        return (f(x, jacobian=choice) * up).sum()

    want = torch.stack([reverse(lambda x: f(x, jacobian=choice), x, up) for x in batch])
    assert torch.equal(torch.func.grad(loss)(batch[0]), want[0])
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(batch), want)
    together = torch.func.grad(lambda b: torch.func.vmap(loss)(b).sum())(batch)
    assert torch.equal(together, want)
    outputs = torch.func.vmap(lambda x: f(x, jacobian=choice), in_dims=1)(batch.movedim(0, 1))
    assert torch.equal(outputs, torch.stack([f(x) for x in batch]))
    # Cotangents of one input, batched.
    ups = torch.stack([up, 2 * up])
    _, pull = torch.func.vjp(lambda x: f(x, jacobian=choice), batch[0])
    assert torch.equal(torch.func.vmap(pull)(ups)[0], torch.stack([want[0], 2 * want[0]]))


@every_pool
def test_jacobians_forward_and_reverse_agree(name):
    shape, f = POOLS[name]
    x = tied(shape)[:1]
    forward = torch.func.jacfwd(lambda x: f(x, jacobian=10.0))(x)
    torch.testing.assert_close(forward, torch.func.jacrev(lambda x: f(x, jacobian=10.0))(x))


def test_batches_without_a_rule_are_refused():
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    y = ops.max_pool2d(x, 2, jacobian="minimal")
    with pytest.raises(RuntimeError, match=r"Use torch\.func: jacrev"):
        torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True)


@every_pool
@pytest.mark.parametrize("choice", [*CHOICES, "random"])
def test_double_backward(name, choice):
    """The gradient is linear in the incoming one, by the same element of the Jacobian, drawn once if random."""
    shape, f = POOLS[name]
    x = tied(shape).requires_grad_()
    y = f(x, jacobian=choice)
    g = normal(y.shape, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(y, x, g, create_graph=True)
    v = normal(shape, 2)
    (t,) = torch.autograd.grad(gradient, g, v, create_graph=True)
    torch.testing.assert_close((t * g).sum(), (gradient * v).sum())


@every_pool
def test_checkpoint(name):
    shape, f = POOLS[name]
    x = tied(shape).requires_grad_()
    kept = f(x * 2, jacobian="minimal")
    again = checkpoint(lambda x: f(x * 2, jacobian="minimal"), x, use_reentrant=False)
    up = normal(kept.shape, 1)
    assert torch.equal(torch.autograd.grad(again, x, up)[0], torch.autograd.grad(kept, x, up)[0])


@every_pool
def test_export(name):
    shape, f = POOLS[name]

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return f(x * self.scale, jacobian="minimal")

    x = tied(shape)
    exported = torch.export.export(Net(), (x,))
    assert torch.equal(exported.module()(x), f(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((2, 3, 8), lambda x: regular(1, 3, 2, 1)),
        ((2, 3, 8, 7), lambda x: regular(2, 5, 1, 2)),
        ((2, 2, 4, 5, 4), lambda x: regular(3, 2)),
        ((2, 3, 5, 8), lambda x: adaptive(2, x, (3, 2))),
    ],
    ids=["1d", "2d large", "3d", "adaptive"],
)
def test_one_compiled_graph_serves_every_choice(backend, shape, geometry):
    torch._dynamo.reset()
    selection = Selection(Jacobians())

    def f(x):
        return pool(x * 1.0, selection, geometry(x)).square().sum()

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    x = tied(shape).float().requires_grad_()
    loss = compiled(x)
    for choice in ("native", "minimal", 10.0, "last", "sum"):
        selection.set(Jacobians(max_pool=choice))
        (got,) = torch.autograd.grad(loss, x, retain_graph=True)
        (want,) = torch.autograd.grad(f(x), x)
        assert torch.equal(got, want) if choice != 10.0 else torch.allclose(got, want, rtol=1e-6), choice


def test_nothing_is_kept_that_stock_does_not_keep(monkeypatch):
    x = tied((2, 3, 8, 8)).requires_grad_()

    def kept(f):
        gradients = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: gradients.append((t.shape, t.dtype)) or t, lambda t: t):
            f(x)
        return sorted(gradients, key=str)

    stock = kept(lambda x: F.max_pool2d(x, 2))
    if cpu_kernels.available():
        indices = (torch.Size([2, 3, 4, 4]), torch.int64)
        masks = [(shape, torch.int16) if (shape, dtype) == indices else (shape, dtype) for shape, dtype in stock]
        assert kept(lambda x: ops.max_pool2d(x, 2, jacobian="minimal")) == sorted(masks, key=str)
    monkeypatch.setattr("nslightning.ops.autograd.fused.kernels_for", lambda device: None)
    monkeypatch.setattr("nslightning.ops.autograd.native._library", lambda: None)
    assert kept(lambda x: ops.max_pool2d(x, 2, jacobian="minimal")) == stock
