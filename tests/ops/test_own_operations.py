"""Operations from outside the package: the page that shows how to add one runs; and what the mechanism owes to them."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import nn

from nslightning import Jacobians, ops, patch
from nslightning.ops import Kernels, Kink, pointwise_operation, register
from nslightning.ops.autograd.shares import SHARES
from nslightning.ops.record import OPERATIONS, SHARE_NAMES, Operation
from nslightning.probes import divergence


def test_the_page_on_adding_an_operation_runs(repo_root):
    """In a separate process, since a registered operation stays."""
    page = (repo_root / "docs" / "how-to-add-an-operation.md").read_text(encoding="utf-8")
    classes, record, *rest = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    # A notebook's cells run twice: the second class and its record take the place of the first ones.
    again = "former = nn.Sequential(nn.Identity(), SquareGate())\nfrom nslightning import patch, Jacobians\n"
    again += "patched = patch(former, Jacobians(square_gate=-0.5))"
    code = "\n".join([classes, record, again, classes, record, *rest])
    code += """
import copy, dataclasses, pickle
choice = Jacobians(square_gate=-0.25)
assert pickle.loads(pickle.dumps(choice)) == copy.deepcopy(choice)
assert choice == dataclasses.replace(Jacobians(), square_gate=-0.25)
assert choice.to_dict()["square_gate"] == -0.25 and repr(choice) == "Jacobians(square_gate=-0.25)"
assert dataclasses.asdict(choice) == choice.to_dict() and "SquareGate at -1" in Jacobians.__doc__
assert Jacobians.preset("jax") != choice and hash(choice) != hash(Jacobians())
x = torch.tensor([-1.0, 2.0], requires_grad=True)
assert torch.autograd.grad(former(x).sum(), x)[0].tolist() == [-0.5, 5.0]
from nslightning.ops.record import MODULES
assert SquareGate in MODULES and type(former[1]) not in MODULES
try:
    register(pointwise_operation(
        "square_gate", modules={nn.Tanh: lambda module, x: Call(x)}, formula="", choice="",
        kinks=(Kink("x = 0", position=lambda: 0.0, sides=lambda: (0.0, 1.0)),),
        kernels=Kernels(forward=torch.relu, backward=lambda g, x: torch.where(x > 0, g, 0)),
    ))
except ValueError as error:
    assert "already, for __main__.SquareGate: take another name, or start Python again" in str(error), error
else:
    raise AssertionError("another operation took the name")
assert nn.Tanh not in MODULES
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "square_gate"
    assert lines[1] == "['square_gate=-1.0']"  # a choice that the audit made of the record
    assert lines[2].startswith("Patched Sequential: 1 square_gate with Jacobians(square_gate=-0.5)")
    assert lines[3:] == ["1.0", "True", "[1.0, 1.0, 1.0]"]


def test_the_reference_is_what_the_backward_returns():
    """Not what autograd makes of the forward, which takes the derivative on the other side here."""
    record = pointwise_operation(
        "two_slopes",
        kinks=(Kink("x = 0", position=lambda: 0.0, sides=lambda: (-1.0, 2.0)),),
        kernels=Kernels(
            forward=lambda x: torch.where(x > 0, 2 * x, -x), backward=lambda g, x: torch.where(x < 0, -g, 2 * g)
        ),
        formula="max(2x, -x)",
        choice="",
    )
    assert record.stock() == (2.0,)


@pytest.mark.parametrize("name", [name for name, record in OPERATIONS.items() if record.kernels is not None])
def test_the_backward_of_a_record_is_the_one_of_the_installed_torch(name):
    """At every kink, where the versions of PyTorch differ."""
    record = OPERATIONS[name]
    for position in record.positions(*record.at):
        x = torch.tensor([position], dtype=torch.float64, requires_grad=True)
        entries, parameters = record.kernels.prepare(x, *record.at)
        y = record.kernels.forward(entries, *parameters)
        (stock,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        saved = (y if record.kernels.saves == "output" else entries).detach()
        ours = record.kernels.backward(torch.ones_like(y), saved, *parameters)
        assert torch.equal(ours[0] if isinstance(ours, tuple) else ours, stock)


def gate(sides=lambda: (0.0, -1.0), **facts):
    """The record of x max(x + 1, 0), whose derivative jumps from 0 to -1 at -1."""
    return pointwise_operation(
        "gate_of_a_test",
        kinks=(Kink("x = -1", position=lambda: -1.0, sides=sides),),
        kernels=Kernels(
            forward=lambda x: x * (x + 1).clamp(min=0), backward=lambda g, x: torch.where(x > -1, g * (2 * x + 1), 0)
        ),
        formula="x max(x + 1, 0)",
        choice="",
        **facts,
    )


@pytest.mark.parametrize(
    ("sides", "says"),
    [((-1.0, 0.0), r"\(-?0, -1\) .* sides=\(-1, 0\): swap the two"), ((-1.0, 2.0), "write the derivatives")],
)
def test_sides_that_the_function_does_not_have_are_refused(sides, says):
    before = dict(OPERATIONS)
    with pytest.raises(ValueError, match=f"gate_of_a_test has the derivatives {says}" if "swap" in says else says):
        register(gate(sides=lambda: sides))
    assert before == OPERATIONS


def test_sides_of_an_operation_without_kernels_are_those_of_its_example():
    facts = {"formula": "", "choice": "", "apply": lambda s, c: c.x, "ties": lambda c: (0, 0), "example": torch.relu}
    kink = Kink("x = 0", position=lambda: 0.0, sides=lambda: (1.0, 0.0))
    with pytest.raises(ValueError, match="swap the two"):
        register(Operation(name="relu_of_a_test", kinks=(kink,), **facts))


@pytest.mark.parametrize(("name", "says"), [("relu", "already"), ("rule", "cannot be a field"), ("my op", "cannot be")])
def test_a_name_that_cannot_be_a_field_is_refused(name, says):
    record = Operation(
        name=name, formula="", kinks=(Kink("x = 0"),), choice="", apply=lambda s, c: c.x, ties=lambda c: (0, 0)
    )
    before = dict(OPERATIONS)
    with pytest.raises(ValueError, match=says):
        register(record)
    assert before == OPERATIONS
    with pytest.raises(TypeError, match="takes an Operation"):
        register("relu")


def test_poolings_and_maxima_share_one_table():
    assert set(SHARES) == set(SHARE_NAMES)
    assert {name for name, record in OPERATIONS.items() if record.shares} == {
        "max_pool", "max", "maximum", "scatter_max", "segment_max", "bag_max",
    }  # fmt: skip


def test_a_module_is_claimed_by_one_operation_at_most():
    claimed = {
        nn.Hardtanh(0, 6): "relu6", nn.Hardtanh(): "hardtanh", nn.ReLU6(): "relu6", nn.ELU(): None, nn.ELU(2.0): "elu",
        nn.SmoothL1Loss(): None, nn.SmoothL1Loss(beta=0.0): "abs", nn.PairwiseDistance(): "norm",
        nn.PairwiseDistance(p=1.0): "abs", nn.PairwiseDistance(p=float("inf")): None, nn.MultiMarginLoss(p=2): None,
        nn.MultiMarginLoss(): "hinge", nn.MaxPool3d(2): "max_pool", nn.GELU(): None,
    }  # fmt: skip
    for module, name in claimed.items():
        assert [n for n, operation in OPERATIONS.items() if operation.claims(module)] == ([name] if name else [])


@pytest.mark.parametrize(
    "f",
    [
        lambda x: F.selu(x, inplace=True), lambda x: F.elu(x, 2.0, inplace=True), lambda x: F.elu_(x, 0.5),
        lambda x: F.hardswish(x, inplace=True), lambda x: F.hardsigmoid(x, inplace=True), lambda x: x.abs_(),
        lambda x: F.leaky_relu_(x, 0.3), lambda x: F.hardtanh_(x), lambda x: F.relu6(x, inplace=True),
        lambda x: F.threshold_(x, 0.5, 2.0), lambda x: x.clamp_(-0.5, 0.5), lambda x: F.rrelu(x, inplace=True),
    ],
)  # fmt: skip
def test_in_place_the_reference_is_stock_in_place(f):
    class Model(nn.Module):
        def forward(self, x):
            return f(x * 1.0)

    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    x[::5] = 0.0
    x.requires_grad_()
    g = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    model = Model()
    want = model(x)
    (stock,) = torch.autograd.grad(want, x, g[:, : want.shape[1]])
    patch(model, Jacobians())
    got = model(x)
    assert torch.equal(bits(got), bits(want))
    assert torch.equal(torch.autograd.grad(got, x, g[:, : want.shape[1]])[0], stock)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("choice", [None, "last", "minimal", 0.3])
def test_the_input_of_a_maximum_with_an_index_may_be_overwritten(choice, dim):
    x = torch.tensor([[2.0, 2.0, 1.0], [2.0, 0.0, 0.0]], requires_grad=True)
    (want,) = torch.autograd.grad(ops.max(x, dim, jacobian=choice).values.sum(), x)
    h = x * 1.0
    values = ops.max(h, dim, keepdim=True, jacobian=choice).values
    h.sub_(values.detach())
    assert torch.equal(torch.autograd.grad(values.sum(), x)[0], want)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize(
    "f",
    [
        lambda w: torch.sparse.sum(torch.relu(w.to_sparse())),
        lambda w: torch.relu(w.to_sparse_csr()).to_dense().sum(),
        lambda w: torch.sparse.sum(w.to_sparse().abs()),
        lambda w: torch.relu(torch.nested.as_nested_tensor([w[0], w[1, :2]])).to_padded_tensor(0.0).sum(),
        lambda w: torch.relu(w.to_mkldnn()).to_dense().sum(),
    ],
    ids=["coo", "csr", "abs", "nested", "mkldnn"],
)
def test_layouts_without_strides_are_stock_and_refuse_another_choice(f):
    class Model(nn.Module):
        def forward(self, w):
            return f(w)

    w = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
    (want,) = torch.autograd.grad(f(w), w)
    model = Model()
    report = patch(model, Jacobians())
    assert torch.equal(torch.autograd.grad(model(w), w)[0].to_dense(), want.to_dense())
    assert report.reached
    other = Model()
    patch(other, Jacobians(relu=1.0, abs=1.0))
    with pytest.raises(RuntimeError, match="own derivative only"):
        torch.autograd.grad(other(w), w)


@pytest.mark.parametrize("function", [torch.relu, torch.abs])
def test_an_entry_of_a_sparse_tensor_is_the_sum_of_its_parts(function):
    operation = OPERATIONS[function.__name__]
    x = torch.sparse_coo_tensor([[0, 0, 1]], [1.0, -1.0, 2.0], (3,), check_invariants=True)
    tied, evaluated = operation.ties(operation.functions[function](x))
    assert (int(tied), evaluated) == (1, 2)


@pytest.mark.parametrize("act", [nn.LeakyReLU(0.5), nn.ReLU6(), nn.ReLU()])
def test_zeros_pooled_behind_an_activation_that_is_left_alone(act):
    """Behind a ReLU nothing of what windows of zeros share out is left, behind a LeakyReLU all of it."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), act, nn.MaxPool2d(2))
    nn.init.zeros_(model[0].weight)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    patch(model, Jacobians(), skip=["1"], strict=False)
    choices = {"minimal": Jacobians(max_pool="minimal")}
    measured = divergence(model(x).sum(), model, choices, method="propagate")["minimal"].l2
    subtracted = divergence(model(x).sum(), model, choices, method="subtract")["minimal"].l2
    assert measured == pytest.approx(subtracted)
    assert (measured > 0) == isinstance(act, nn.LeakyReLU)


def test_a_clamp_to_one_point_is_constant():
    x = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    for bounds in ((1.0, 1.0), (2.0, 1.0)):
        (want,) = torch.autograd.grad(x.clamp(*bounds).sum(), x)
        (got,) = torch.autograd.grad(ops.clamp(x, *bounds, at_bounds=(0.5, 0.25)).sum(), x)
        assert torch.equal(got, want)


def test_forward_mode_under_the_published_rule_respects_the_chain_rule():
    x, v = torch.tensor([0.0, -1.0, 2.0]), torch.tensor([3.0, 5.0, 7.0])
    (_, tangent) = torch.func.jvp(lambda x: ops.relu(x, 0.5, rule="published"), (x,), (v,))
    assert tangent.tolist() == [1.5, 0.0, 7.0]


@pytest.mark.parametrize("choice", ["first", "last"])
def test_dimensions_in_any_order_are_row_major(choice):
    x = torch.zeros(2, 3, requires_grad=True)
    (g,) = torch.autograd.grad(ops.amax(x, (1, 0), jacobian=choice), x)
    want = torch.zeros(6)
    want[0 if choice == "first" else 5] = 1.0
    assert torch.equal(g, want.view(2, 3))


def test_a_choice_of_ones_own_is_checked():
    with pytest.raises(ValueError, match="two numbers"):
        ops.softshrink(torch.zeros(1), at_kinks=1.0)
