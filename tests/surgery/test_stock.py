"""The same call, the same bits, watched or not, also where PyTorch itself takes another path under a mode."""

import ast
import copy
import importlib
import inspect
import itertools
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import Tensor, nn
from torch.overrides import has_torch_function
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.checkpoint import checkpoint
from torch_samples import functions

from nslightning import Jacobians, PatchWarning, patch
from nslightning.ops.record import OPERATIONS
from nslightning.probes import counting
from nslightning.surgery.entrances import Caller
from nslightning.surgery.interception import FORGETFUL
from nslightning.surgery.report import UnreachedError

# Modules of PyTorch's whose functions hand a call to a mode, written in Python.
HANDLED = (
    "torch.nn.functional",
    "torch.functional",
    "torch._tensor",
    "torch.nn.init",
    "torch._linalg_utils",
    "torch._lowrank",
    "torch._lobpcg",
    "torch.autograd",
)


class Calls(nn.Module):
    """A model that calls a function."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def watched(call):
    """A function as a patched model's code calls it."""
    model = Calls(call)
    patch(model, Jacobians(), strict=False)
    return model


# --------------------------------------------------------------------------------- read off PyTorch's source
def handlers(module):
    """Each function of a module that hands a call to a mode, with the parameters that it forgets."""
    for function in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = function.args
        parameters = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
        parameters |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None}
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "handle_torch_function":
                passed = [*call.args[2:], *(k.value for k in call.keywords)]
                names = {n.id for value in passed for n in ast.walk(value) if isinstance(n, ast.Name)}
                yield function.name, ast.unparse(call.args[0]), parameters - names


#: These pass on what they made of their arguments; the wrapper of operators, and what it returns, pass on all of them.
PASS_ON = {"einsum", "backward", "grad", "wrapped", "_handle_torch_function_and_wrap_type_error_to_not_implemented"}


def test_the_functions_whose_handler_forgets_arguments_are_known():
    forgetful = {
        target.rpartition(".")[2]
        for module in HANDLED
        for name, target, forgotten in handlers(module)
        if forgotten and name not in PASS_ON
    }
    assert forgetful == {f.__name__ for f in FORGETFUL}


def test_the_modules_that_ask_for_a_mode_are_known():
    asking = set()
    for name in ("activation", "transformer", "rnn", "linear", "conv", "loss", "pooling", "batchnorm", "sparse"):
        for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(f"torch.nn.modules.{name}")))):
            if isinstance(node, ast.ClassDef) and "has_torch_function" in ast.unparse(node):
                asking.add(node.name)
    assert asking == {cls.__name__ for cls in Caller.FUSED}


# ------------------------------------------------------------------------------------------- forgotten arguments
def test_forgotten_arguments_are_passed():
    x, w = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([10.0, 100.0])
    for kwargs in ({"reduction": "sum", "weight": w}, {"weight": w}, {"reduction": "none"}):
        stock, ours = (f(x, torch.zeros(2), **kwargs) for f in (F.l1_loss, watched(F.l1_loss)))
        assert torch.equal(stock, ours)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (stock, ours)))
    out = torch.empty(2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of linalg.multi_dot
        made = watched(torch.chain_matmul)(torch.ones(2, 2), torch.ones(2, 2), out=out)
    assert made is out
    wide = torch.ones(2, 1, 3)
    assert watched(Tensor.dim_order)(wide) == wide.dim_order()
    with pytest.raises(RuntimeError, match="unique dim order"):
        watched(Tensor.dim_order)(torch.empty(1, 1), ambiguity_check=True)


# --------------------------------------------------------------------------------- spellings of the arguments
NUMBERS = {
    "leaky_relu": lambda x, n: F.leaky_relu(x, n(0.25)),
    "leaky_relu_": lambda x, n: F.leaky_relu_(x * 1, n(0.25)),
    "LeakyReLU": lambda x, n: nn.LeakyReLU(n(0.25))(x),
    "rrelu": lambda x, n: F.rrelu(x, n(0.25), n(0.5), training=True),
    "elu": lambda x, n: F.elu(x, n(2)),
    "hardtanh": lambda x, n: F.hardtanh(x, n(-1), n(1)),
    "relu6": lambda x, n: F.hardtanh(x, n(0), n(6)),
    "threshold": lambda x, n: F.threshold(x, n(0), n(1)),
    "softshrink": lambda x, n: F.softshrink(x, n(0.5)),
    "hardshrink": lambda x, n: F.hardshrink(x, n(0.5)),
    "clamp": lambda x, n: x.clamp(n(-1), n(1)),
    "clamp_min": lambda x, n: x.clamp_min(n(0)),
    "norm": lambda x, n: x.norm(n(2)),
    "vector_norm": lambda x, n: torch.linalg.vector_norm(x, n(3)),
    "normalize": lambda x, n: F.normalize(x[None], n(2)),
}
WHOLE = {
    "max_pool1d": lambda x, n: F.max_pool1d(x[None], n(2)),
    "max_pool2d": lambda x, n: F.max_pool2d(x.view(1, 2, 3), (n(2), n(2)), n(1)),
    "MaxPool2d": lambda x, n: nn.MaxPool2d(n(2), n(1), n(1))(x.view(1, 2, 3)),
    "adaptive": lambda x, n: F.adaptive_max_pool1d(x[None], n(2)),
    "fractional": lambda x, n: F.fractional_max_pool2d(x.view(1, 2, 3), n(2), output_size=n(1)),
    "max": lambda x, n: x.view(2, 3).max(n(1))[0],
    "amax": lambda x, n: x.view(2, 3).amax((n(0), n(1))),
    "norm along": lambda x, n: torch.linalg.norm(x.view(2, 3), dim=n(0)),
    "normalize along": lambda x, n: F.normalize(x.view(2, 3), dim=n(0)),
}


def calls_alike(call, x=None):
    """Compare a call in a patched and in a stock model: results and gradients, to the bit."""
    seen = []
    for model in (Calls(call), Calls(call)):
        if seen:
            patch(model, Jacobians())
        torch.manual_seed(0)
        leaf = (torch.tensor([-1.0, 0.0, 0.5, 0.5, 1.0, 3.0]) if x is None else x).requires_grad_()
        result = model(leaf)
        seen.append((result.detach(), *torch.autograd.grad(result.sum(), leaf)))
    return all(map(torch.equal, *seen))


@pytest.mark.parametrize("cls", [np.float32, np.float16, np.int64, torch.tensor], ids=["f4", "f2", "i8", "tensor"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy_s_and_of_tensors_are_taken_as_stock_takes_them(name, cls):
    if (name, cls) != ("clamp", torch.tensor):  # that one is another function
        assert calls_alike(lambda x: NUMBERS[name](x, cls))


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_of_numpy_s_are_taken_as_stock_takes_them(name):
    assert calls_alike(lambda x: WHOLE[name](x, np.int64))


@pytest.mark.parametrize("call", [F.max_pool1d, F.adaptive_max_pool1d, lambda x, n: nn.MaxPool1d(n)(x)])
def test_a_size_of_a_window_that_is_no_whole_number_is_refused_in_pytorch_s_words(call):
    with pytest.raises(TypeError, match="must be tuple of ints, not float"):
        watched(call)(torch.zeros(1, 4, requires_grad=True), 2.0)


OF_NUMPY = {
    "vector_norm": lambda x: torch.linalg.vector_norm(x.view(2, 3), axis=1, keepdims=True),
    "norm": lambda x: torch.linalg.norm(x.view(2, 3), axis=1),
    "max": lambda x: torch.max(x.view(2, 3), axis=1, keepdims=True)[0],
    "amax": lambda x: torch.amax(a=x.view(2, 3), axis=1),
    "maximum": lambda x: torch.maximum(x1=x, x2=x.flip(0)),
    "dist": lambda x: torch.dist(x, x2=x.flip(0)),
    "relu": lambda x: torch.relu(a=x),
    "segment_reduce": lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([2, 4]), axis=0),
}


@pytest.mark.parametrize("name", OF_NUMPY)
def test_names_of_numpy_s_for_arguments_are_those_of_stock(name):
    assert calls_alike(OF_NUMPY[name])


LOSSES = {
    "hinge_embedding_loss": lambda x, *how: torch.hinge_embedding_loss(x, -torch.ones(6), 0.5, *how),
    "margin_ranking_loss": lambda x, *how: torch.margin_ranking_loss(x, x.flip(0), torch.ones(6), 0.5, *how),
    "cosine_embedding_loss": lambda x, *how: torch.cosine_embedding_loss(
        x.view(2, 3), x.view(2, 3).flip(0), torch.tensor([1, -1]), 0.5, *how
    ),
    "triplet_margin_loss": lambda x, *how: torch.triplet_margin_loss(
        x.view(2, 3), x.view(2, 3).flip(0), x.view(2, 3) * 2, 1.0, 2.0, 1e-6, False, *how
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_torch_reduce_as_they_do_by_themselves(name):
    """Torch 2.15 says that they return the mean, and returns each entry where no reduction is given."""
    for how in ((), (0,), (1,), (2,)):
        assert calls_alike(lambda x, how=how: LOSSES[name](x, *how))


def test_arguments_that_the_patch_cannot_read_are_named(monkeypatch):
    """A later PyTorch may have a spelling that the record does not know."""

    def unread(x):
        raise TypeError("an argument more")

    monkeypatch.setitem(OPERATIONS["relu"].functions, torch.relu, unread)
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    model = Calls(torch.relu)
    report = patch(model, Jacobians(), strict=False)
    with pytest.warns(PatchWarning, match="nothing to patch"):
        assert torch.equal(model(x), torch.relu(x))
    assert [(site.operation, site.decided) for site in report.unreached] == [
        ("relu", "with arguments that the patch cannot read")
    ]
    strict = Calls(torch.relu)
    patch(strict, Jacobians())
    with pytest.raises(UnreachedError, match=r"calls relu with arguments that the patch cannot read\. Name its arg"):
        strict(x)
    with torch.no_grad():
        assert torch.equal(strict(x), torch.relu(x))


# ------------------------------------------------------------------------------------------------- all functions
def samples(kind):
    """PyTorch's own samples of arguments for its functions, two for each: the first, and the fullest."""
    for op in functions():
        if torch.float32 not in op.dtypes or op.name.startswith("nn.functional.") != (kind == "functional"):
            continue
        try:
            samples = list(itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=False), 20))
        except Exception:  # a sample may need a library that is not installed
            continue
        if samples:
            fullest = max(samples, key=lambda s: len(s.kwargs) + len(s.args))
            for sample in {id(s): s for s in (samples[0], fullest)}.values():
                yield op, sample


def outcome(call, args, kwargs):
    """What a call returns or raises, to the bit."""
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
    torch.manual_seed(0)
    try:
        result = call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
    leaves, spec = tree_flatten(result)
    shown = []
    for x in leaves:
        if isinstance(x, Tensor):
            dense = x.to_dense() if x.layout != torch.strided else x
            shown.append((x.dtype, tuple(x.shape), x.stride() if x.layout == torch.strided else (), x.requires_grad))
            dense = dense.resolve_conj().resolve_neg()
            shown.append(dense.to(torch.complex64) if dense.dtype == torch.complex32 else dense)
        else:
            shown.append(x if isinstance(x, (int, float, bool, str, type(None))) else type(x))
    return str(spec), shown


def alike(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    if a[0] != b[0] or len(a[1]) != len(b[1]):
        return False
    for x, y in zip(a[1], b[1], strict=True):
        if isinstance(x, Tensor):
            if not (torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)):
                return False
        elif x != y and not (isinstance(x, float) and x != x):
            return False
    return True


# They return memory that is not initialised.
UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_as_")


@pytest.mark.parametrize(
    ("kind", "least"),
    [("functional", 120), pytest.param("other", 500, marks=pytest.mark.slow)],
    ids=["functional", "all"],
)
def test_every_function_returns_the_same_bits(kind, least):
    different, compared = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op, sample in samples(kind):
            if op.name in UNDEFINED:
                continue
            args = (sample.input, *sample.args)
            stock = outcome(op.op, args, sample.kwargs)
            if not alike(stock, outcome(op.op, args, sample.kwargs)):
                continue  # it differs from call to call
            compared += 1
            if not alike(stock, outcome(watched(op.op), args, sample.kwargs)):
                different.append((op.name, op.variant_test_name))
    assert compared > least
    assert different == []


# ------------------------------------------------------------------------------------------------- fused modules
def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2)


FUSED = {
    "encoder": lambda: encoder(),
    "normed first": lambda: encoder(norm_first=True),
    "layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    "inside": lambda: nn.Sequential(nn.Linear(16, 16), encoder(), nn.ReLU()),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # PyTorch, of a layer that normalises first
@pytest.mark.filterwarnings("ignore:.* has nothing to patch")  # nothing but fused kernels
def test_fused_kernels_stay_where_no_gradient_passes(name, dtype, training):
    torch.manual_seed(0)
    stock = FUSED[name]().to(dtype).requires_grad_(False).train(training)
    model = nn.Sequential(copy.deepcopy(stock), nn.Linear(16, 2).to(dtype))
    head = copy.deepcopy(model[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchWarning)
        patch(model, Jacobians())
    x = torch.randn(2, 5, 16, dtype=dtype)
    for enabled in (True, False):
        for watch in (False, True):
            with torch.set_grad_enabled(enabled):
                torch.manual_seed(1)
                want = head(stock(x))
                torch.manual_seed(1)
                if watch:
                    with counting(model):
                        out = model(x)
                else:
                    out = model(x)
            assert torch.equal(bits(out), bits(want))


@pytest.mark.filterwarnings("ignore:.* has nothing to patch")  # attention has no kink
def test_attention_alone_and_with_weights():
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    model = Calls(copy.deepcopy(stock)).eval()
    patch(model, Jacobians(), strict=False)
    x = torch.randn(2, 5, 16)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            for a, b in zip(stock(x, x, x), model(x, x, x), strict=True):
                assert torch.equal(bits(a), bits(b))


# ------------------------------------------------------------------------------------------ other modes, subclasses
class Tagged(Tensor):
    pass


class Logging(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_subclasses_come_back_and_modes_of_others_go_on():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Calls(F.relu), nn.MaxPool1d(2))
    patch(model, Jacobians(relu=0.5))
    out = model(torch.ones(1, 2).as_subclass(Tagged))
    assert type(out) is Tagged
    with Logging() as mode:
        model(torch.ones(1, 2))
    assert F.linear in mode.seen
    with torch.device("meta"):
        assert nn.Linear(2, 2).weight.is_meta
        assert not model(torch.ones(1, 2, device="cpu")).is_meta
    assert not has_torch_function((torch.ones(1),))


class Leaky(torch.overrides.TorchFunctionMode):
    """Puts another function in ReLU's place, and notes what it sees."""

    def __init__(self, other=None):
        super().__init__()
        self.seen, self.other = [], other

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return (self.other if func is F.relu and self.other is not None else func)(*args, **(kwargs or {}))


class Within(nn.Module):
    """Runs a module under a mode."""

    def __init__(self, part, mode):
        super().__init__()
        self.part, self.mode = part, mode

    def forward(self, x):
        with self.mode:
            return self.part(x)


@pytest.mark.parametrize(
    ("calls", "inside"),
    [(True, False), (False, False), (True, True)],
    ids=["functions", "modules", "functions in the model's code"],
)
def test_a_mode_of_others_sees_each_call_first(calls, inside):
    relu = [Calls(F.relu) if calls else nn.ReLU() for _ in range(2)]
    part = nn.Sequential(nn.Linear(2, 2), relu[0], Calls(partial(F.max_pool1d, kernel_size=2)), relu[1])
    nn.init.zeros_(part[0].bias)
    x = torch.zeros(1, 2, requires_grad=True)

    def run(mode, choice):
        mine = copy.deepcopy(part)
        model = Within(mine, mode) if inside else mine
        if choice is not None:
            report = patch(model, choice)
            model(x)
            assert {site.calls for site in report.sites} == {1}
        mode.seen.clear()
        for _ in range(3):
            if inside:
                y = model(x)
            else:
                with mode:
                    y = model(x)
        return y, mode.seen, torch.autograd.grad(y.sum(), x)[0]

    for name, other in {
        "relu": None,
        "leaky": partial(F.leaky_relu, negative_slope=0.25),
        "smooth": lambda x, **_: F.gelu(x),
    }.items():
        stock, seen, g = run(Leaky(other), None)
        ours, ours_seen, h = run(Leaky(other), Jacobians())
        assert torch.equal(stock, ours)
        assert torch.equal(g, h)
        assert ours_seen == seen
        chosen = run(Leaky(other), Jacobians(relu=1.0, leaky_relu=1.0))[2]
        assert torch.equal(chosen, g) is (name == "smooth")


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        return checkpoint(self.act, x, use_reentrant=False)


def test_a_checkpointed_module_under_a_mode_of_others_takes_the_choice():
    """It was refused: the call that the mode sees passed for one that the checkpoint made without the module."""
    model, x = Checkpointed(), torch.zeros(2, requires_grad=True)
    patch(model, Jacobians(relu=0.25))
    with Logging() as mode:
        (g,) = torch.autograd.grad(model(x).sum(), x)
    assert F.relu in mode.seen
    assert torch.equal(g, torch.full_like(g, 0.25))


class Seeing(Tensor):
    """A tensor whose class decides what functions do with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_tensor_whose_class_decides_is_named():
    model = Calls(lambda x, w: F.relu(x * w))
    w = nn.Parameter(torch.zeros(2))
    patch(model, Jacobians())
    with pytest.raises(ValueError, match="relu on a Seeing, whose class sees the call first"):
        model(torch.ones(2).as_subclass(Seeing), w)


# ------------------------------------------------------------------------------------- kinds that the fuzzer showed
def test_out_is_written_as_in_stock():
    x = torch.tensor([-1.0, 0.0, 2.0])
    for function in (torch.abs, partial(torch.clamp, min=0.0), partial(torch.maximum, other=-x), torch.amax):
        into = torch.empty(0)
        with torch.no_grad():
            made = watched(lambda x, into=into, function=function: function(x, out=into))(x.clone().requires_grad_())
        assert made is into
        assert torch.equal(into, function(x))
        with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
            watched(lambda x, function=function: function(x, out=torch.empty(0)))(x.clone().requires_grad_())
    assert torch.equal(watched(lambda x: torch.abs(x, out=None))(x), x.abs())


REFUSED = {
    "a scalar": lambda x: F.adaptive_max_pool2d(x.sum(), 2),
    "one dimension": lambda x: F.max_pool1d(x[0, 0], 2),
    "no entries": lambda x: F.max_pool1d(x[:, :, :0], 2),
    "no window": lambda x: F.max_pool1d(x, 9),
    "no window of 2": lambda x: F.max_pool2d(x[None], 9),
}


@pytest.mark.parametrize("differentiated", [True, False])
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_what_pools_refuse_is_refused_in_their_words(call, differentiated):
    x = torch.zeros(2, 3, 5, requires_grad=differentiated)
    with pytest.raises(RuntimeError) as stock:
        call(x)
    with pytest.raises(RuntimeError) as ours:
        watched(call)(x)
    assert str(ours.value) == str(stock.value)


EMPTY = {
    "max_pool1d": lambda x: F.max_pool1d(x.flatten(1, 2), 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool3d": lambda x: F.max_pool3d(x[:, None], 2),
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x.flatten(1, 2), 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(input=x[:, None], output_size=2),
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, 2, 2),
    "MaxPool2d": nn.MaxPool2d(2),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "FractionalMaxPool2d": nn.FractionalMaxPool2d(2, 2),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_batch_without_images_is_pooled_as_in_stock(name):
    """A detector may have found nothing: its graph has the nodes of poolings in which nothing can tie."""

    class Pools(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = copy.deepcopy(EMPTY[name])

        def forward(self, x):
            return self.pool(x * 1)

    model, x = Pools(), torch.zeros(0, 2, 8, 8, requires_grad=True)
    want = model(x)
    patch(model, Jacobians(max_pool="minimal"))
    result = model(x)
    assert result.shape == want.shape
    assert torch.autograd.grad(result.sum(), x)[0].shape == x.shape
    tied = torch.zeros(1, 2, 8, 8, requires_grad=True)
    gradient = torch.autograd.grad(model(tied).sum(), tied)[0]
    assert gradient.max() < 1 or name.startswith(("Fractional", "fractional"))  # the windows may overlap


def test_one_dimensional_pools_without_gradients_are_stock_s():
    x = torch.randn(3, 20, 4).transpose(1, 2)
    stock, ours = F.max_pool1d(x, 2), watched(lambda x: F.max_pool1d(x, 2))(x)
    assert torch.equal(stock, ours)
    assert (ours.stride(), ours._is_view()) == (stock.stride(), stock._is_view())


IN_PLACE = {
    "relu": F.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu, "elu": partial(F.elu, alpha=2.0), "selu": F.selu,
    "hardtanh": F.hardtanh, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
    "threshold": lambda x, inplace: F.threshold(x, 1.0, 0.0, inplace), "abs": lambda x, inplace: x.abs_(),
    "clamp": lambda x, inplace: x.clamp_(-1, 1),
}  # fmt: skip
TIED = torch.tensor([-3.0, -1.0, 0.0, 0.3, 1.0, 3.0, 6.0, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("call", [partial(f, inplace=True) for f in IN_PLACE.values()], ids=list(IN_PLACE))
def test_overwriting_is_counted_once_keeps_the_bits_and_the_second_derivative(call):
    for prepare in (torch.clone, lambda x: torch.stack((x, x), -1)[..., 0]):
        seen = []
        for f in (call, watched(call)):
            x = TIED.clone().requires_grad_()
            y = prepare(x)
            f(y)
            (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            try:
                (second,) = torch.autograd.grad(g.sum(), x)
            except RuntimeError as error:  # PyTorch has no second derivative of hardsigmoid
                assert str(error) == "derivative for aten::hardsigmoid_backward is not implemented"  # noqa: PT017 # on one of two paths only
                second = torch.zeros(())
            seen.append((y._version, y.detach().clone(), g.detach(), second))
        (version, *stock), (counted, *ours) = seen
        assert counted == version
        assert torch.equal(bits(stock[0]), bits(ours[0]))
        assert all(map(torch.equal, stock, ours))


def test_the_second_derivative_goes_through_what_is_overwritten():
    # d/dx of (x^2 / 6 + x / 2)' is 1/3 between the kinks; 3 is one of them, so that the package's own node runs
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    (g,) = torch.autograd.grad(watched(partial(F.hardswish, inplace=True))(x * 1).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g[0], x)
    assert torch.allclose(second, torch.tensor([1 / 3, 0.0]))


@pytest.mark.parametrize("call", [partial(f, inplace=True) for f in IN_PLACE.values()], ids=list(IN_PLACE))
def test_a_leaf_is_not_overwritten_before_it_is_refused(call):
    x = TIED.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        watched(call)(x)
    assert (torch.equal(x, TIED), x._version) == (True, 0)
