"""Models called under ``torch.no_grad`` that differentiate all the same: in a part of their code, or forward."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, PatchWarning, ops, patch
from nslightning.surgery import UnreachedError
from nslightning.surgery.interception import FunctionalCalls

HALF = Jacobians(relu=0.5)
X, ONES = torch.zeros(3), torch.ones(3)


class Inside(nn.Module):
    """Switches gradients on in a part of its code, as networks do whose forces are a derivative of their energy."""

    def __init__(self, derivative):
        super().__init__()
        self.act, self.derivative = nn.Tanh(), derivative

    def forward(self, x, on=True):
        return self.derivative(lambda k: F.relu(k), x) if on else F.relu(x)


def _by_grad(function, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]


def _by_switch(function, x):
    torch.set_grad_enabled(True)
    try:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]
    finally:
        torch.set_grad_enabled(False)


INSIDE = {
    "enable_grad": _by_grad,
    "set_grad_enabled": _by_switch,
    "func.grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "func.jacrev": lambda f, x: torch.func.jacrev(f)(x).diagonal(),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (ONES,))[1],
    "functional.jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x).diagonal(),
}


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.no_grad():
            y = self.inner(x)
        return F.relu(x) * 0 + y


@pytest.mark.parametrize("way", INSIDE)
def test_a_part_with_gradients_in_a_call_without(way):
    model = Inside(INSIDE[way])
    patch(model, HALF)
    for _ in range(3):
        with torch.no_grad():
            assert model(X).tolist() == [0.5] * 3
    assert [(site.name, site.kind, site.how) for site in model.__dict__["_nonsmooth_part"].surgery.report.sites] == [
        ("", "relu", "functional")
    ]
    around = Around(Inside(INSIDE[way]))
    patch(around, HALF)
    assert around(X).tolist() == [0.5] * 3  # inside a call with gradients


def test_such_a_part_is_strict():
    model = Inside(lambda _, x: _by_grad(lambda k: k.topk(2)[0].relu() + k.median(), x))
    patch(model, HALF)
    with torch.no_grad(), pytest.raises(UnreachedError, match="median"):
        model(X)


def test_a_call_without_gradients_has_no_mode_after_the_first(monkeypatch):
    seen = []
    function = FunctionalCalls.__torch_function__
    monkeypatch.setattr(
        FunctionalCalls,
        "__torch_function__",
        lambda self, func, *args: (seen.append(func), function(self, func, *args))[1],
    )
    model = Around(Inside(_by_grad))
    model.forward = lambda x: F.relu(model.inner(x, False))
    patch(model, HALF)
    with torch.no_grad():
        model(X)
        assert seen.count(F.relu) == 2
        seen.clear()
        model(X)
    assert seen == []
    assert not [site for site in model.__dict__["_nonsmooth_part"].surgery.report.sites if site.calls]


def test_a_new_path_that_differentiates_is_named_and_then_taken():
    model = Inside(_by_grad)
    patch(model, HALF)
    with torch.no_grad():
        for _ in range(3):
            model(X, False)
        assert model(X).tolist() == [0.0] * 3  # no mode looks at it
        with pytest.warns(PatchWarning, match="an earlier call kept PyTorch's derivative there"):
            assert model(X).tolist() == [0.5] * 3
        for on in (False, True, False, True):
            assert model(X, on).tolist() == [0.5 * on] * 3


def test_custom_functions_without_gradients_are_looked_at_a_few_times():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

    model = Inside(lambda f, x: f(Doubled.apply(x)))
    patch(model, HALF)
    surgery = model.__dict__["_nonsmooth_part"].surgery
    with torch.no_grad():
        for _ in range(300):
            model(X)
    assert set(surgery.waking.values()) == {(False, 64)}


def test_a_generator_made_without_gradients():
    class Streams(nn.Module):
        def forward(self, x):
            return x

        def stream(self, x):
            yield F.relu(x)
            yield F.relu(x) * 2

    model, x = Streams(), torch.zeros(3, requires_grad=True)
    patch(model, HALF)
    for _ in range(3):
        with torch.no_grad():
            stream = model.stream(x)
        assert [torch.autograd.grad(y.sum(), x)[0][0].item() for y in stream] == [0.5, 1.0]


# ------------------------------------------------------------------------------------------------ forward mode
class Functional(nn.Module):
    def forward(self, x):
        return F.relu(x) * 1.0


def _dual(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, ONES))).tangent


FORWARD = {
    "jvp": lambda model: torch.func.jvp(model, (X,), (ONES,))[1],
    "jacfwd": lambda model: torch.func.jacfwd(model)(X).diagonal(),
    "linearize": lambda model: torch.func.linearize(model, X)[1](ONES),
    "dual level": _dual,
    "compiled inside": lambda model: torch.func.jvp(torch.compile(model, backend="aot_eager"), (X,), (ONES,))[1],
}


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_forward_mode_needs_no_gradients(way, context):
    model = Functional()
    patch(model, HALF)
    with context():
        assert FORWARD[way](model).tolist() == [0.5] * 3


def test_forward_mode_is_strict():
    class Ranked(nn.Module):
        def forward(self, x):
            return x.relu().median()

    model = Ranked()
    patch(model, HALF)
    for context in (torch.enable_grad, torch.no_grad):
        for way in ("jvp", "dual level"):
            with context(), pytest.raises(UnreachedError, match="median"):
                FORWARD[way](model)


TRACED = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (ONES,))[1],
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(X),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(X[None]),
}


@pytest.mark.parametrize("way", TRACED)
def test_the_compiler_refuses_forward_mode_around_a_choice(way):
    """Without the refusal the compiled function returns PyTorch's derivative: 0 in place of 0.5."""
    model = Functional()
    patch(model, HALF)
    for function in (model, lambda x: ops.relu(x, at_zero=0.5)):
        torch.compiler.reset()
        compiled = torch.compile(lambda function=function: TRACED[way](function), backend="eager")
        with pytest.raises(Exception, match=r"compile the model, and call the transform outside"):
            compiled()
