"""The C++ autograd nodes: the bits, strides and versions of the stock operation and of the Python nodes."""

import gc
import itertools
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians
from nslightning.ops.autograd import native, nodes
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.pooling import pool, regular
from nslightning.ops.autograd.selection import Selection

pytestmark = pytest.mark.skipif(
    native.state() != "built", reason="the C++ nodes are not built: python -m nslightning.ops.kernels.build"
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN = float("nan")

# Operation: parameters, kinks, choices, the stock function.
POINTWISE = {
    "relu": ((), (0.0,), (0.0, 0.3, 1.0, -2.0), F.relu),
    "relu6": ((), (0.0, 6.0), ((0.0, 0.0), (0.3, 1.0), (0.0, 0.5)), F.relu6),
    "leaky_relu": ((0.1,), (0.0,), (None, 0.1, 0.0, 1.0), lambda x: F.leaky_relu(x, 0.1)),
    "hardtanh": ((-0.5, 2.0), (-0.5, 2.0), (None, (0.3, 1.0), (0.0, 0.7)), lambda x: F.hardtanh(x, -0.5, 2.0)),
    "clamp": ((-0.5, 2.0), (-0.5, 2.0), (None, (0.3, 1.0), (0.0, 0.7)), lambda x: x.clamp(-0.5, 2.0)),
    "clamp below": ((-0.5, None), (-0.5,), (None, (0.3, 1.0)), lambda x: x.clamp(min=-0.5)),
    "clamp above": ((None, 0.3), (0.3,), (None, (0.3, 0.25)), lambda x: x.clamp(max=0.3)),
    "clamp to a point": ((1.0, 1.0), (1.0,), (None, (0.3, 0.25)), lambda x: x.clamp(1.0, 1.0)),
    "hardswish": ((), (-3.0, 3.0), (None, (0.5, 0.25)), F.hardswish),
    "hardsigmoid": ((), (-3.0, 3.0), (None, (0.5, 0.25)), F.hardsigmoid),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "one pixel": lambda x: x[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
    "one pixel as sliced": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:2, 1:2].clone(),
    "one channel": lambda x: x[:, :1].contiguous(memory_format=torch.channels_last),
    "not dense": lambda x: x[:, ::2],
}
GRADIENTS = {
    "as the output": lambda y: torch.randn_like(y, dtype=torch.float32).to(y.dtype),
    "contiguous": lambda y: torch.randn(y.shape).to(y.dtype),
    "permuted": lambda y: torch.randn(y.shape[::-1]).to(y.dtype).permute(3, 2, 1, 0),
    "expanded": lambda y: torch.ones((), dtype=y.dtype).expand(y.shape),
}


def tied_input(kinks, dtype, shape=(2, 6, 5, 7), seed=0):
    """Entries on every kink, beside it, far from it, infinite, NaN and -0.0."""
    values = [
        *kinks,
        *(k + d for k in kinks for d in (-0.25, 0.25)),
        0.0,
        -0.0,
        9.0,
        -9.0,
        NAN,
        float("inf"),
        -float("inf"),
    ]
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(values), shape, generator=generator)
    return torch.tensor(values)[index].to(dtype)


def assert_same(a, b):
    assert a.dtype == b.dtype
    assert a.stride() == b.stride()
    different = ((a != b) & ~(a.isnan() & b.isnan())).nonzero()
    assert len(different) == 0, (a[tuple(different[0])], b[tuple(different[0])])
    assert torch.equal(torch.signbit(a.nan_to_num(1.0)), torch.signbit(b.nan_to_num(1.0)))


@pytest.fixture
def without(monkeypatch):
    """Run a function with the Python nodes."""

    def run(function, *args):
        with monkeypatch.context() as patched:
            patched.setattr(native, "_library", lambda: None)
            return function(*args)

    return run


def gradient(name, x, g, jacobians):
    """The operation on a non-leaf copy, as in a network."""
    parameters = POINTWISE[name][0]
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = pointwise(name.partition(" ")[0], leaf, Selection(jacobians), *parameters)
    return y, torch.autograd.grad(y, leaf, g)[0]


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise_nodes_have_the_bits_and_strides_of_stock_and_of_the_python_nodes(name, dtype, without):
    _, kinks, choices, stock = POINTWISE[name]
    field = name.partition(" ")[0]
    for layout, incoming in itertools.product(LAYOUTS, GRADIENTS):
        x = LAYOUTS[layout](tied_input(kinks, dtype))
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        want = stock(leaf)
        torch.manual_seed(1)
        g = GRADIENTS[incoming](want)
        (reference,) = torch.autograd.grad(want, leaf, g)
        for choice in choices:
            jacobians = Jacobians(**{field: choice})
            y, ours = gradient(name, x, g, jacobians)
            assert_same(y, want)
            if jacobians == Jacobians():
                assert_same(ours, reference)
            python_y, python = without(gradient, name, x, g, jacobians)
            assert_same(y, python_y)
            assert torch.equal(ours.nan_to_num(123.0), python.nan_to_num(123.0)), (layout, incoming, choice)
            tied = sum(x == torch.tensor(k, dtype=dtype) for k in kinks).bool()
            assert_same(ours[~tied], reference[~tied])


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_the_published_rule_writes_constants(name, without):
    field_choice = 0.5 if name == "relu" else (0.5, 0.25)
    x = tied_input(POINTWISE[name][1], torch.float32)
    for choice in (field_choice, 0.0 if name == "relu" else (0.0, 0.0)):
        jacobians = Jacobians(**{name: choice}, rule="published")
        g = torch.randn_like(x)
        assert_same(gradient(name, x, g, jacobians)[1], without(gradient, name, x, g, jacobians)[1])


def test_the_choice_is_read_when_the_backward_runs():
    selection = Selection(Jacobians(relu=1.0))
    x = torch.zeros(5, requires_grad=True)
    y = pointwise("relu", x, selection)
    assert nodes.operation_of(y.grad_fn) == "relu"
    assert native.describe(y.grad_fn) is not None
    for alpha in (0.0, 0.5, 2.0):
        selection.set(Jacobians(relu=alpha))
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], torch.full((5,), alpha))


def test_where_no_entry_ties_the_node_is_the_stock_one():
    x = torch.ones(5, requires_grad=True)
    assert pointwise("relu", x, Selection(Jacobians(relu=1.0))).grad_fn.name() == "ReluBackward0"
    assert pointwise("hardswish", x, Selection(Jacobians())).grad_fn.name() == "HardswishBackward0"


POOLS = {
    "2x2": (2, 2, 0, 1, False),
    "3x3/2": (3, 2, 1, 1, False),
    "3x3/1": (3, 1, 1, 1, False),
    "2x3 dilated": ((2, 3), (1, 2), 0, (2, 1), False),
    "rounded up": (3, 2, 0, 1, True),
    "rounded up with padding": (2, 2, 1, 1, True),
    "4x4": (4, 4, 0, 1, False),
}


@pytest.mark.parametrize("geometry", POOLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_nodes_have_the_bits_and_strides_of_stock_and_of_the_python_nodes(geometry, dtype, without):
    arguments = POOLS[geometry]
    windows = regular(2, *arguments)
    for layout in ("contiguous", "channels_last", "permuted", "one channel"):
        x = LAYOUTS[layout](torch.randint(-1, 3, (2, 6, 9, 8), generator=torch.Generator().manual_seed(2)).to(dtype))
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        want = F.max_pool2d(leaf, *arguments)
        for incoming in GRADIENTS.values():
            g = incoming(want)
            (reference,) = torch.autograd.grad(want, leaf, g, retain_graph=True)

            def run(jacobian, x=x, g=g):
                leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
                y = pool(leaf, Selection(Jacobians(max_pool=jacobian)), windows)
                return y, torch.autograd.grad(y, leaf, g)[0]

            for jacobian in (0.0, "minimal", "last", "sum", 10.0):
                y, ours = run(jacobian)
                assert_same(y, want)
                if jacobian == 0.0:
                    assert_same(ours, reference)
                assert torch.equal(ours, without(run, jacobian)[1]), (layout, jacobian)


def test_an_infinite_gradient_of_a_window_without_ties_reaches_its_entry_alone():
    x = torch.arange(81.0).view(1, 1, 9, 9)
    x[0, 0, 0, :3] = 100.0  # a tie in the first row of windows
    x.requires_grad_()
    for choice in ("minimal", "sum", 10.0, "last", 0.0):
        y = pool(x, Selection(Jacobians(max_pool=choice)), regular(2, 3, 2))
        g = torch.ones_like(y)
        g[0, 0, :, -1] = float("inf")
        (ours,) = torch.autograd.grad(y, x, g)
        assert not ours.isnan().any(), choice
        assert ours.isinf().sum() == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slope_of_zero_multiplies_infinite_gradients_as_stock(dtype):
    x = torch.tensor([-1.0, 0.0, 1.0, -2.0], dtype=dtype, requires_grad=True)
    g = torch.tensor([-float("inf"), 1.0, 3.0, -5.0], dtype=dtype)
    for choice in (None, 0.5):
        y = pointwise("leaky_relu", x, Selection(Jacobians(leaky_relu=choice)), 0.0)
        assert native.describe(y.grad_fn) is not None
        ours, stock = torch.autograd.grad(y, x, g)[0], torch.autograd.grad(F.leaky_relu(x, 0.0), x, g)[0]
        others = torch.arange(4) != 1
        assert_same(ours[others], stock[others])
        assert ours[1] == (choice or 0.0)


def test_what_the_nodes_do_not_take_goes_the_python_way():
    selection = Selection(Jacobians(relu=0.5, max_pool=0.5))
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    for source, inplace in ((x, True), (x.detach(), False), (torch.zeros(3, dtype=torch.int64), False)):
        if source is x:
            with pytest.raises(RuntimeError, match="leaf"):
                pointwise("relu", source, selection, inplace=inplace)
    with torch.inference_mode():
        assert torch.equal(pointwise("relu", torch.zeros(3), selection), torch.zeros(3))
    (tangent,) = torch.func.jvp(lambda x: pointwise("relu", x, selection), (torch.zeros(3),), (torch.ones(3),))[1:]
    assert torch.equal(tangent, torch.full((3,), 0.5))
    jacobian = torch.func.jacrev(lambda x: pool(x, selection, regular(2, 2)))(torch.zeros(1, 1, 2, 2))
    assert torch.equal(jacobian.flatten(), torch.tensor([0.625, 0.125, 0.125, 0.125]))
    big = torch.zeros(1, 1, 10, 10, requires_grad=True)
    assert native.describe(pool(big, selection, regular(2, 5)).grad_fn) is None  # 25 entries do not fit 16 bits


def test_second_derivatives():
    x = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = pointwise("relu", x * 1, Selection(Jacobians(relu=0.5)))
    assert native.describe(y.grad_fn) is not None
    (first,) = torch.autograd.grad((y * x.exp()).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    # d/dx of relu(x) e^x is (relu'(x) + relu(x)) e^x, and once more (2 relu'(x) + relu(x)) e^x.
    slope = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(second, (2 * slope + x.relu()).detach() * x.exp().detach())
    z = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    pooled = pool(z.exp(), Selection(Jacobians(max_pool="minimal")), regular(2, 2))
    (g,) = torch.autograd.grad(pooled, z, torch.ones_like(pooled), create_graph=True)
    assert torch.equal(torch.autograd.grad(g.sum(), z)[0], torch.full_like(z, 0.25))


def test_a_random_choice_is_drawn_from_the_stream_of_the_python_node(without):
    def draw():
        x = torch.zeros(40, requires_grad=True)
        return torch.autograd.grad(pointwise("relu", x, Selection(Jacobians(relu="random"), 3)).sum(), x)[0]

    assert torch.equal(draw(), without(draw))
    assert len(draw().unique()) == 40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype):
    x = tied_input((0.0,), dtype)
    leaf = x.clone().requires_grad_()
    inside = leaf * 1
    version = inside._version
    y = pointwise("relu", inside, Selection(Jacobians(relu=0.5)), inplace=True)
    stock_inside = leaf * 1
    stock = F.relu_(stock_inside)
    assert y is inside
    assert native.describe(y.grad_fn) is not None
    assert inside._version - version == stock_inside._version - version
    assert_same(y, stock)
    g = torch.ones_like(x)
    ours, reference = (torch.autograd.grad(out, leaf, g)[0] for out in (y, stock))
    assert torch.equal(ours[x == 0], torch.full_like(ours[x == 0], 0.5))
    assert_same(ours[x != 0], reference[x != 0])


def test_in_place_on_a_view_shows_its_ties_to_a_graph():
    base = torch.zeros(4, requires_grad=True) * 1
    pointwise("relu", base[:2], Selection(Jacobians(relu=0.5)), inplace=True)
    stack, seen = [base.grad_fn], []
    while stack:
        if (node := stack.pop()) is not None:
            seen.append(nodes.operation_of(node))
            stack += [below for below, _ in node.next_functions]
    assert "relu" in seen


def test_an_overwritten_output_is_refused_as_in_stock():
    x = torch.zeros(3, requires_grad=True)
    y = pointwise("relu", x, Selection(Jacobians(relu=0.5)))
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_that_was_freed_says_so():
    x = torch.zeros(3, requires_grad=True)
    y = pointwise("relu", x, Selection(Jacobians(relu=0.5))).sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    z = pointwise("relu", x, Selection(Jacobians(relu=0.5)))
    assert nodes.release(z.grad_fn)
    assert not nodes.release(z.sum().grad_fn)
    with pytest.raises(RuntimeError, match="second time"):
        z.sum().backward()


def test_a_recorder_sees_what_the_backward_meets():
    met = []
    selection = Selection(Jacobians(relu=0.0, max_pool=0.0))
    flags = []

    def record(node, vjp, *difference, ties=None):
        met.append((node, vjp, difference))
        flags.append(None if ties is None else ties())

    selection.recorder = record
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    y = pool(pointwise("relu", x, selection), selection, regular(2, 2))
    y.sum().backward()
    (pool_node, pool_vjp, (difference,)), (relu_node, relu_vjp, ()) = met
    assert nodes.operation_of(pool_node) == "max_pool"
    assert nodes.operation_of(relu_node) == "relu"
    assert pool_node == y.grad_fn
    minimal = Selection(Jacobians(max_pool="minimal"))
    assert torch.equal(pool_vjp(minimal), torch.full_like(x, 0.25))
    quarter = torch.tensor([-0.75, 0.25, 0.25, 0.25]).view(1, 1, 2, 2)
    with torch.no_grad():
        assert torch.equal(difference(minimal, selection), quarter)
    assert torch.equal(relu_vjp(Selection(Jacobians(relu=1.0))), torch.tensor([1.0, 0, 0, 0]).view(1, 1, 2, 2))
    assert flags == [None, True]  # of max pooling ties alone do not say whether a choice matters
    selection.recorder = None
    pool(pointwise("relu", x, selection), selection, regular(2, 2)).sum().backward()
    assert len(met) == 2


@pytest.mark.parametrize("nodes_of", ["C++", "Python"])
@pytest.mark.parametrize("name", POINTWISE)
def test_a_recorder_is_offered_whether_there_was_a_tie(name, nodes_of, monkeypatch):
    """As on a device, where an operation does not look before its backward."""
    if nodes_of == "Python":
        monkeypatch.setattr(native, "_library", lambda: None)
        monkeypatch.setattr("nslightning.ops.autograd.pointwise.data_dependent", lambda x: False)
        monkeypatch.setattr("nslightning.ops.kernels.cpu.any_zero", lambda x: True)
    parameters, kinks, choices, _ = POINTWISE[name]
    for tied in (True, False):
        x = torch.full((9,), 0.123)
        x[2:4] = kinks[-1] if tied else 0.321
        selection, flags = Selection(Jacobians(**{name.partition(" ")[0]: choices[-1]})), []
        selection.recorder = lambda node, vjp, *difference, ties, flags=flags: flags.append(ties())
        pointwise(name.partition(" ")[0], x.requires_grad_(), selection, *parameters).sum().backward()
        if nodes_of == "C++" and not flags:
            assert not tied or name == "clamp to a point"  # it is stock's node
        else:
            assert flags == [torch.tensor(tied and name != "clamp to a point")]


def test_windows_of_zeros_behind_a_relu_that_met_no_tie_matter_to_no_choice():
    selection = Selection(Jacobians(max_pool="minimal"))
    windows = regular(2, 2)
    negative = torch.full((1, 1, 2, 2), -1.0, requires_grad=True)
    behind = lambda f: nodes.kept_ties(pool(f(negative), selection, windows).grad_fn)  # noqa: E731 # one line reads better
    assert not behind(torch.relu)
    assert behind(lambda x: F.leaky_relu(x, 0.5))  # an unpatched LeakyReLU passes gradients below 0 on
    assert behind(lambda x: torch.relu(x + 2))  # ties above 0
    assert behind(lambda x: x * 0)


def test_gradients_under_another_choice():
    selection = Selection(Jacobians(relu=0.0))
    y = pointwise("relu", torch.zeros(3, requires_grad=True), selection)
    g = torch.ones(3, requires_grad=True)
    (under,) = nodes.gradients_under(y.grad_fn, Jacobians(relu=0.25), g)[:1]
    assert torch.equal(under, torch.full((3,), 0.25))
    assert torch.equal(torch.autograd.grad(under.sum(), g)[0], torch.full((3,), 0.25))
    assert selection.jacobians.relu == 0.0


def test_hooks_threads_and_undefined_gradients():
    selection = Selection(Jacobians(relu=0.5))
    x = torch.zeros(3, requires_grad=True)
    y = pointwise("relu", x, selection)
    y.grad_fn.register_hook(lambda below, above: (below[0] * 2, *below[1:]))
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(torch.autograd.grad(y.sum(), x, retain_graph=True)[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, torch.ones(3)) for r in results)
    assert len(results) == 4


SITES = {
    "relu": (nn.ReLU(), Jacobians(relu=0.5)),
    "relu6": (nn.ReLU6(), Jacobians(relu6=(0.5, 0.25))),
    "leaky_relu": (nn.LeakyReLU(0.1), Jacobians(leaky_relu=0.5)),
    "hardtanh": (nn.Hardtanh(-0.5, 2.0), Jacobians(hardtanh=(0.5, 0.25))),
    "hardswish": (nn.Hardswish(), Jacobians(hardswish=(0.5, 0.25))),
    "hardsigmoid": (nn.Hardsigmoid(), Jacobians(hardsigmoid=(0.5, 0.25))),
    "max_pool": (nn.MaxPool2d(2), Jacobians(max_pool="minimal")),
}


@pytest.mark.parametrize("operation", SITES)
def test_a_site_takes_a_modules_calls(operation):
    module, jacobians = SITES[operation]
    kinks = POINTWISE[operation][1] if operation in POINTWISE else (0.0,)
    x = tied_input(kinks, torch.float32, (1, 2, 6, 6)).nan_to_num(1.0).requires_grad_()
    fast = native.site(operation, module, Selection(jacobians))
    y = fast(x)
    assert torch.equal(y, module(x))
    assert native.describe(y.grad_fn).operation == operation
    assert fast(x.detach().to(torch.complex64)) is NotImplemented
    assert fast(nn.UninitializedParameter()) is NotImplemented
    assert fast(x, x) is NotImplemented
    assert fast("x") is NotImplemented


def test_a_site_reads_its_modules_attributes_at_each_call():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    pooling = nn.MaxPool2d(2)
    fast = native.site("max_pool", pooling, Selection(Jacobians()))
    for name, value in (("kernel_size", 3), ("stride", (1, 2)), ("padding", 1), ("ceil_mode", True)):
        setattr(pooling, name, value)
        assert torch.equal(fast(x), pooling(x))
    pooling.return_indices = True
    assert fast(x) is NotImplemented
    act = nn.ReLU()
    fast = native.site("relu", act, Selection(Jacobians()))
    assert fast(x * 1) is not None
    act.inplace = True
    inside = x * 1
    assert fast(inside) is inside
    slope = nn.LeakyReLU(0.5)
    fast = native.site("leaky_relu", slope, Selection(Jacobians()))
    slope.negative_slope = 0.25
    assert torch.equal(fast(x), F.leaky_relu(x, 0.25))
    slope.negative_slope = "no number"
    assert fast(x) is NotImplemented


def test_a_site_leaves_observed_calls_to_python():
    selection = Selection(Jacobians())
    fast = native.site("relu", nn.ReLU(), selection)
    x = torch.zeros(2, requires_grad=True)
    assert fast(x) is not NotImplemented
    selection.observer = lambda *_: None
    assert fast(x) is NotImplemented
    selection.observer = None
    assert fast(x) is not NotImplemented


def test_sites_and_graphs_are_freed():
    module, selection = nn.ReLU(), Selection(Jacobians(relu=0.5))
    module.fast = native.site("relu", module, selection)  # a circle through the module's attributes
    y = module.fast(torch.zeros(2, requires_grad=True))
    gone = [weakref.ref(module), weakref.ref(selection)]
    del module, selection
    gc.collect()
    assert gone[0]() is None
    assert gone[1]() is not None  # the graph reads it
    y.sum().backward()
    del y
    gc.collect()
    assert gone[1]() is None


@pytest.mark.parametrize("surrounding", ["inference", "device", "fake", "transform"])
def test_a_selection_is_the_same_wherever_it_was_made(surrounding):
    from torch._subclasses.fake_tensor import FakeTensorMode

    made = []

    def make(x):
        made.append(Selection(Jacobians(relu=0.5)))
        return x.sum()

    if surrounding == "transform":
        torch.func.grad(make)(torch.ones(2))
    else:
        modes = {"inference": torch.inference_mode, "device": lambda: torch.device("meta"), "fake": FakeTensorMode}
        with modes[surrounding]():
            made.append(Selection(Jacobians(relu=0.5)))
    x = torch.zeros(3, requires_grad=True)
    y = pointwise("relu", x, made[0])
    assert native.describe(y.grad_fn) is not None
    made[0].set(Jacobians(relu=0.25))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 0.25))
