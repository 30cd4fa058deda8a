"""The pointwise operations under torch.func, forward mode, double backward, checkpoints, export, copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, ops, patch, using

# Each operation with its kinks among the inputs; the derivative there is the mean of the sides where finite
# differences are to agree with it.
X = torch.tensor([-3.0, -2.0, -1.0, 0.0, 0.5, 2.0, 3.0, 6.0, 0.0], dtype=torch.float64)
SLOPES = torch.tensor([0.25], dtype=torch.float64)
SELU = 1.0507009873554805
MEANS = {
    "relu": lambda x, **k: ops.relu(x, 0.5, **k),
    "relu6": lambda x, **k: ops.relu6(x, (0.5, 0.5), **k),
    "leaky_relu": lambda x, **k: ops.leaky_relu(x, 0.25, 0.625, **k),
    "prelu": lambda x: ops.prelu(x, SLOPES, 0.625),
    "rrelu": lambda x, **k: ops.rrelu(x, 0.25, 0.25, False, 0.625, **k),
    "hardtanh": lambda x, **k: ops.hardtanh(x, -3, 2, (0.5, 0.5), **k),
    "clamp": lambda x, **k: ops.clamp(x, -3, 2, (0.5, 0.5), **k),
    "clamp_min": lambda x, **k: ops.clamp_min(x, -2, 0.5, **k),
    "clamp_max": lambda x, **k: ops.clamp_max(x, 6, 0.5, **k),
    "hardswish": lambda x, **k: ops.hardswish(x, (-0.25, 1.25), **k),
    "hardsigmoid": lambda x, **k: ops.hardsigmoid(x, (1 / 12, 1 / 12), **k),
    "softshrink": lambda x: ops.softshrink(x, 2.0, (0.5, 0.5)),
    "threshold": lambda x, **k: ops.threshold(x, 2.0, 2.0, 0.5, **k),
    "elu": lambda x, **k: ops.elu(x, 0.5, 0.75, **k),
    "selu": lambda x, **k: ops.selu(x, SELU * (1 + 1.6732632423543772) / 2, **k),
    "abs": lambda x, **k: ops.abs(x, 0.0, **k),
}
INPLACE = [name for name in MEANS if name not in ("prelu", "softshrink")]


def forward_derivative(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize("name", MEANS)
def test_finite_differences_in_both_modes_at_kinks_too(name):
    assert torch.autograd.gradcheck(
        MEANS[name],
        X.clone().requires_grad_(),
        eps=1e-6,
        atol=2e-6,  # ELU is curved on one side
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch.fx, of graphs that it folds
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.vmap has no rule for rrelu
def test_every_way_to_differentiate_takes_the_same_derivatives(name):
    f = MEANS[name]
    x = X.clone().requires_grad_()
    v = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(0))
    (want,) = torch.autograd.grad(f(x), x, v)
    assert torch.equal(forward_derivative(f, X, v), want)  # the Jacobian is diagonal
    y, tangent = torch.func.jvp(f, (X,), (v,))
    assert torch.equal(y, f(X))
    assert torch.equal(tangent, want)
    if name != "rrelu":  # the tracer's fallback for its kernel asks for a value
        y, linear = torch.func.linearize(f, X)
        assert torch.equal(y, f(X))
        assert torch.equal(linear(v), want)
    assert torch.equal(torch.func.vjp(f, X)[1](v)[0], want)
    assert torch.equal(torch.func.grad(lambda x: (f(x) * v).sum())(X), want)
    ones = torch.autograd.grad(f(x).sum(), x)[0]
    assert torch.equal(torch.func.jacrev(f)(X), ones.diag())
    if name != "rrelu":  # which stock does not batch either
        assert torch.equal(torch.func.jacfwd(f)(X), ones.diag())
        rows = torch.stack([X, X.flip(0), X + 1])
        assert torch.equal(torch.func.vmap(f)(rows), f(rows))
        batched = torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(rows)
        (want,) = torch.autograd.grad(f(rows.requires_grad_()).sum(), rows)
        assert torch.equal(batched, want)


@pytest.mark.parametrize("name", INPLACE)
def test_in_place_too(name):
    f = MEANS[name]
    v = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(0))
    want = forward_derivative(f, X, v)
    assert torch.equal(forward_derivative(lambda x: f(x * 1.0, inplace=True), X, v), want)
    assert torch.equal(torch.func.grad(lambda x: (f(x * 1.0, inplace=True) * v).sum())(X), want)


@pytest.mark.parametrize("name", [n for n in MEANS if n != "hardsigmoid"])  # stock has no second one either
def test_a_second_backward_sees_the_chosen_derivative_as_a_constant(name):
    x = X.clone().requires_grad_()
    v = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (first,) = torch.autograd.grad(MEANS[name](x), x, v, create_graph=True)
    (wrt_v,) = torch.autograd.grad(first.sum(), v, retain_graph=True)
    torch.testing.assert_close(wrt_v * v, first)  # linear in the incoming gradient
    (plain,) = torch.autograd.grad(MEANS[name](x), x, v.detach())
    assert torch.equal(first, plain)


def test_forward_mode_in_the_weight_of_prelu():
    x = torch.tensor([[-1.0, 0.0, 2.0], [-3.0, -2.0, 0.0]], dtype=torch.float64)
    w, dw = (torch.tensor(t, dtype=torch.float64) for t in ([0.1, 0.2, 0.3], [1.0, -1.0, 2.0]))
    assert torch.autograd.gradcheck(
        lambda x, w: ops.prelu(x, w, 0.5),
        (x.add(0.1).requires_grad_(), w.requires_grad_()),
        check_forward_ad=True,
    )
    with forward_ad.dual_level():
        y = ops.prelu(x, forward_ad.make_dual(w.detach(), dw), 0.5)
        assert torch.equal(forward_ad.unpack_dual(y).tangent, x.clamp(max=0) * dw)


class Net(nn.Module):
    """One of each kind of site: modules, functions, in place."""

    def __init__(self):
        super().__init__()
        self.prelu, self.relu, self.rrelu, self.shrink = nn.PReLU(3), nn.ReLU(), nn.RReLU(), nn.Hardshrink(1.0)

    def forward(self, x):
        x = self.relu(x) + x.clamp(-1, 1) + torch.clamp_min(x, 0.0)
        return self.shrink(self.rrelu(self.prelu(x))) + nn.functional.leaky_relu(x * 1.0, 0.25, inplace=True)


CHOICE = Jacobians(
    relu=0.5, prelu=0.75, rrelu=0.625, hardshrink=(0.1, 0.2), clamp=(0.25, 0.75), leaky_relu=0.375
)  # fmt: skip
INPUT = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, -2.0], [2.0, 1.0, 0.0]])


def gradients(net, x=None):
    torch.manual_seed(0)
    x = INPUT.clone().requires_grad_() if x is None else x
    return torch.autograd.grad(net(x).sum(), [x, *net.parameters()])


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_checkpointing_without_reentry():
    net = Net()
    patch(net, CHOICE)
    want = gradients(net)
    assert not same(want, gradients(Net()))
    wrapped = nn.Module()
    wrapped.net = net
    wrapped.forward = lambda x: checkpoint(net, x, use_reentrant=False)
    assert same(gradients(wrapped), want)


def test_the_choice_of_the_backward_reaches_through_a_checkpoint():
    net = Net()
    patch(net, Jacobians())
    x = INPUT.clone().requires_grad_()
    torch.manual_seed(0)
    loss = checkpoint(net, x, use_reentrant=False).sum()
    with using(net, CHOICE):
        got = torch.autograd.grad(loss, [x, *net.parameters()])
    with using(net, CHOICE):
        assert same(got, gradients(net))


def test_compiled_whole_with_the_same_gradients():
    torch._dynamo.reset()
    net = Net()
    patch(net, CHOICE)
    for mode in (True, False):
        net.train(mode)
        want = gradients(net)
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert same(gradients(compiled), want)


def test_export_of_a_patched_models_forward():
    net = Net().eval()
    patch(net, CHOICE)
    program = torch.export.export(net, (INPUT,))
    assert torch.equal(program.module()(INPUT), net(INPUT))


def test_deepcopy_and_pickle_keep_choice_and_gradients():
    net = Net()
    patch(net, CHOICE)
    want = gradients(net)
    assert same(gradients(copy.deepcopy(net)), want)
    assert same(gradients(pickle.loads(pickle.dumps(net))), want)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = Net()
    fresh.load_state_dict(torch.load(file))
    patch(fresh, CHOICE)
    assert same(gradients(fresh), want)
