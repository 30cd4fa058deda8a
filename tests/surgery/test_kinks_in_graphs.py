"""What the graph of a forward shows: kinks that no site made, custom backwards, and when it is looked at again."""

import dataclasses
import re
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bits import bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from nslightning import Jacobians, PatchWarning, patch, using
from nslightning.probes import ties
from nslightning.surgery import UnreachedError, checks, report
from nslightning.surgery.kinks import KINKS

HALF = Jacobians(relu=0.5)


class Shift(nn.Module):
    """A function of a parameter, so that a gradient passes."""

    def __init__(self, call, shape=(4, 4), dtype=torch.float32):
        super().__init__()
        self.call, self.w = call, nn.Parameter(torch.zeros(shape, dtype=dtype))

    def forward(self, x):
        return self.call(x + self.w)


# ------------------------------------------------------------------------------------ PyTorch's own formulas
# A formula that compares, selects, or takes a sign or a norm may belong to a kink. These do not:
SMOOTH = {
    "where _where masked_fill masked_scatter masked_select": "the mask is the model's own",
    "nan_to_num": "a jump at infinity",
    "fmod remainder nextafter sgn angle atan2": "a jump, or not defined there: no derivative is near",
    "xlogy special_xlog1py special_entr": "an infinite derivative at 0",
    "sinc mvlgamma special_i1 special_i1e i0 special_i0": "smooth: another formula at 0",
    "pow float_power": "an infinite derivative at 0, or none",
    "prod cumprod": "a polynomial, differentiated without a division by 0",
    "smooth_l1_loss huber_loss": "continuously differentiable for a positive width",
    "log_sigmoid_forward softplus": "smooth: another formula where numbers would overflow",
    "celu soft_margin_loss logsumexp logaddexp logaddexp2 logcumsumexp _logcumsumexp log_softmax": "smooth",
    "fake_quantize _fake_quantize _fused_moving_avg": "a straight-through estimator is a convention everywhere",
}


def formulas():
    yaml = pytest.importorskip("yaml")
    torchgen = pytest.importorskip("torchgen")
    path = Path(torchgen.__file__).parent / "packaged/autograd/derivatives.yaml"
    if not path.exists():
        pytest.skip(f"this build of PyTorch ships no {path.name}")
    for entry in yaml.safe_load(path.read_text()):
        name = re.split(r"[.(]", entry["name"])[0]
        forms = {k: v for k, v in entry.items() if k not in ("name", "dispatch", "output_differentiability", "result")}
        yield name, " ".join(str(v) for v in forms.values())


def camel(name):
    """How PyTorch names the node of an operation."""
    words = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    return re.sub(r"\d[a-z]", lambda match: match[0].upper(), words)


KINKED = re.compile(
    r"\.sgn\(\)|[^_]threshold_backward\(|hard\w+_backward|shrink_backward|relu\w*_backward|(?<![cg])elu_backward|clamp_backward|"
    r"where\(self [<>]|self == (min|max|other|scalar)|evenly_distribute|value_selecting|scale_grad_by_count|"
    r"aminmax_backward|cummaxmin|norm_backward\(|dist_backward|(?<!un)max_pool\dd\w*_backward|_reduce_backward|svd_backward|"
    r"linalg_eig_backward|std_backward|std_mean_backward|margin_loss_backward|renorm_backward|logit_backward|"
    r"embedding_bag_backward|grid_sampler_\w+_backward|grad \* self / result"
)
NOT_A_NORM = re.compile(r"(batch|layer|group|rms|weight)_norm\w*_backward")


def test_every_formula_that_has_a_kink_is_known():
    excused = {name for names in SMOOTH for name in names.split()}
    unknown = set()
    for name, forms in formulas():
        if name.endswith(("_backward", "_backward_data")):  # a second derivative
            continue
        if KINKED.search(NOT_A_NORM.sub("", forms)):
            operation = camel(name.removeprefix("_foreach_").lstrip("_").rstrip("_")).removesuffix("Forward")
            if operation not in KINKS and name.rstrip("_") not in excused and not name.startswith(tuple(excused)):
                unknown.add((name, operation))
    assert not unknown


def test_every_known_kink_is_an_operation_of_pytorch():
    names = {camel(name.lstrip("_")).removesuffix("Forward") for name, _ in formulas()}
    versions = {"Aminmax", "MaxPool2D", "Prelu"}  # of other versions and devices
    assert set(KINKS) - names <= versions


# --------------------------------------------------------------------------------------------- what is named
@torch.jit.script
def scripted(x):
    return torch.relu(x)


INDEX = torch.tensor([0, 0, 1, 1])
UNSEEN = {
    "scripted": (scripted, "ReluBackward0"),
    "private relu6": (lambda x: torch._C._nn.relu6(x), "HardtanhBackward0"),
    "private leaky": (lambda x: torch._C._nn.leaky_relu(x), "LeakyReluBackward0"),
    "segment_reduce with a constant": (
        lambda x: torch.segment_reduce(x, "max", lengths=torch.tensor([2, 2]), initial=1.0),
        "SegmentReduceBackward0",
    ),
    "the bag's kernel": (
        lambda x: torch.embedding_bag(x, INDEX, torch.tensor([0, 2]), mode=2)[0],
        "EmbeddingBagBackward0",
    ),
    "sort": (lambda x: x.sort(1)[0], "sort"),
    "stable sort": (lambda x: torch.sort(x, stable=True)[0], "sort"),
    "msort": (lambda x: torch.msort(x), "msort"),
    "sort's operator": (lambda x: torch.ops.aten.sort.default(x)[0], "SortBackward0"),
    "quantile": (lambda x: x.quantile(0.5, 1), "quantile"),
    "nanquantile": (lambda x: torch.nanquantile(x, 0.5), "nanquantile"),
    "matrix norm": (lambda x: torch.linalg.matrix_norm(x), "LinalgVectorNormBackward0"),
    "cosine": (lambda x: F.cosine_similarity(x, x.flip(0)), "Backward0"),
    "logit": (lambda x: x.logit(0.3), "LogitBackward0"),
    "foreach abs": (lambda x: torch._foreach_abs([x])[0], "AbsBackward0"),
    "foreach clamp": (lambda x: torch._foreach_clamp_min([x], 0)[0], "ClampMinBackward0"),
    "hypot": (lambda x: torch.hypot(x, 2 * x), "HypotBackward0"),
    "copysign": (lambda x: torch.copysign(x, torch.ones(4, 4)), "CopysignBackward0"),
    "copysign by a number": (lambda x: x.copysign(-1.0), "CopysignBackward"),
    "i0e": (lambda x: torch.special.i0e(x), "SpecialI0EBackward0"),
    "complex abs": (lambda x: torch.complex(x, x).abs(), "AbsBackward0"),
    "grid": (lambda x: F.grid_sample(torch.ones(1, 1, 4, 4), x.view(1, 2, 4, 2), align_corners=False), "GridSampler"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_kink_that_no_call_shows_is_named(name):
    call, node = UNSEEN[name]
    x = torch.arange(16.0).view(4, 4) / 8
    with pytest.raises(UnreachedError, match=node):
        patch(Shift(call), Jacobians(), example=x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchWarning)
        report = patch(nn.Sequential(nn.Identity(), Shift(call)), Jacobians(), example=x, strict=False)
    (site, *_) = report.unreached
    assert site.name == "1"  # the module whose code made it
    assert node in site.kind
    assert not patch(nn.Sequential(nn.ReLU(), Shift(call)), Jacobians(), skip="1", example=x).unreached


LEFT_CALLS = {
    "svdvals": (lambda x: torch.linalg.svdvals(x), "LinalgSvdBackward0"),
    "nuclear norm": (lambda x: torch.linalg.matrix_norm(x, "nuc"), "LinalgSvdBackward0"),
    "eigvalsh": (lambda x: torch.linalg.eigvalsh(x + x.T), "LinalgEighBackward0"),
    "std": (lambda x: x.std(0), "StdBackward0"),
    "std_mean": (lambda x: torch.std_mean(x)[0], "StdMeanBackward0"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", LEFT_CALLS)
def test_where_there_is_nothing_to_choose_a_kink_is_named_and_is_no_error(name, strict):
    call, node = LEFT_CALLS[name]
    model, x = nn.Sequential(nn.ReLU(), Shift(call)), torch.arange(16.0).view(4, 4) / 8
    with pytest.warns(PatchWarning, match=f"the {node} in 1 is left to PyTorch"):
        report = patch(model, Jacobians(), example=x, strict=strict)
    (site,) = report.unreached
    assert (site.name, site.kind, site.choice) == ("1", node, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough, in another mode too
        model.train()(x).sum().backward()
        model.eval()(x).sum().backward()
    assert f"NOT REACHED  {node}" in str(report)


def test_the_derivative_of_a_standard_deviation_that_treats_equal_entries_alike_is_zero():
    """An element of the Clarke Jacobian is a direction of the ball without its mean: alike for all entries, it is 0."""
    x = torch.full((5,), 2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(x.std(), x)[0].tolist() == [0.0] * 5
    model = Shift(
        lambda x: (x - x.mean()).norm() / 2, (5,), torch.float64
    )  # the same function, of an operation that has a choice
    patch(model, Jacobians(norm=0.7))
    assert torch.autograd.grad(model(x), x)[0].abs().max() < 1e-15


SMOOTH_CALLS = {
    "elu": lambda x: F.elu(x),
    "celu": lambda x: F.celu(x, 0.3),
    "gelu": lambda x: F.gelu(x),
    "softsign, made of an absolute value": lambda x: nn.Softsign()(x - 1) + F.softsign(x),
    "logit": lambda x: (x / 4 + 0.1).logit(),
    "scatter sum": lambda x: x.new_zeros(2, 4).scatter_reduce(0, INDEX[:, None].expand(4, 4), x, "sum"),
    "bag of means": lambda x: F.embedding_bag(INDEX.view(2, 2), x, mode="mean"),
    "grid of images": lambda x: F.grid_sample(x.view(1, 1, 4, 4), torch.zeros(1, 2, 4, 2), align_corners=False),
    "grid of cubics": lambda x: F.grid_sample(
        torch.ones(1, 1, 4, 4), x.view(1, 2, 4, 2), mode="bicubic", align_corners=False
    ),
    "grid of the nearest": lambda x: F.grid_sample(
        torch.ones(1, 1, 4, 4), x.view(1, 2, 4, 2), mode="nearest", align_corners=False
    ),
    "where": lambda x: torch.where(x > 0, x, 0 * x),
    "huber": lambda x: F.huber_loss(x, torch.zeros(4, 4)),
    "copysign of a constant": lambda x: x * torch.copysign(torch.ones(4, 4), x),
    "i1e": lambda x: torch.special.i1e(x),
    "indices": lambda x: x * x.detach().sort(1)[1],
}


@pytest.mark.parametrize("name", SMOOTH_CALLS)
def test_smooth_nodes_are_passed_over(name):
    with pytest.warns(PatchWarning, match="nothing to patch"):
        report = patch(Shift(SMOOTH_CALLS[name]), Jacobians(), example=torch.arange(16.0).view(4, 4) / 8)
    assert report.sites == []


@torch.library.custom_op("nslightning_tests::doubled", mutates_args=())
def doubled(xs: list[torch.Tensor]) -> torch.Tensor:
    return xs[0] * 2


@torch.library.custom_op("nslightning_tests::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@pytest.mark.parametrize("call", [lambda x: doubled([x]), tripled], ids=["of a list", "of a tensor"])
@pytest.mark.parametrize("module", ["torch.nn.modules.linear_cross_entropy", "torchnet"])
@pytest.mark.filterwarnings("ignore:.* has nothing to patch")
def test_an_operator_whose_formula_is_pytorch_s_own_is_no_custom_one(call, module):
    def backward(ctx, g):
        return [g * 2] if call is not tripled else g * 3

    backward.__module__ = module
    (tripled if call is tripled else doubled).register_autograd(backward)
    model = Shift(call)
    patch(model, Jacobians())
    if module == "torchnet":
        with pytest.raises(UnreachedError, match="whose backward is its own"):
            model(torch.ones(4, 4))
    else:
        assert model(torch.ones(4, 4)).requires_grad


@pytest.mark.filterwarnings("ignore:.* has nothing to patch")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_chunked_loss_of_a_classifier_is_no_custom_operator(compiled):
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("this PyTorch has no such loss")
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    model = Shift(lambda x: F.linear_cross_entropy(x, x, torch.arange(4), options=options))
    patch(model, Jacobians())
    if compiled:
        torch.compiler.reset()  # the compiler gives up on code that it has compiled eight times, for other tests too
        model.compile(backend="aot_eager")
    (g,) = torch.autograd.grad(model(torch.eye(4)), model.w)
    assert g.count_nonzero()


def test_what_lies_below_the_model_is_not_the_models():
    model = Shift(F.relu)
    patch(model, Jacobians())
    x = torch.zeros(4, 4, requires_grad=True)
    model(torch.linalg.svdvals(x).expand(4, 4))


# ----------------------------------------------------------------------------------------- recurrent networks
def rnn_grads(model, out, wanted):
    return [bits(g) for g in torch.autograd.grad([o.sum() for o in out], wanted, retain_graph=True)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"num_layers": 3, "dropout": 0.5}],
    ids=str,
)
def test_relu_inside_a_recurrent_network(options, batch_first, packed):
    torch.manual_seed(0)
    stock = nn.RNN(3, 4, nonlinearity="relu", batch_first=batch_first, **options)
    model = nn.RNN(3, 4, nonlinearity="relu", batch_first=batch_first, **options)
    model.load_state_dict(stock.state_dict())
    x = torch.randn(5, 5, 3)
    batch = pack_padded_sequence(x, [5, 4, 4, 2, 1], batch_first) if packed else x
    report = patch(model, Jacobians(), strict=True)
    outs = []
    for m in (stock, model):
        torch.manual_seed(1)
        out, hidden = m(batch)
        outs.append((out.data if packed else out, hidden))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*outs, strict=True))
    a, b = (rnn_grads(m, out, list(m.parameters())) for m, out in zip((stock, model), outs, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert [(s.operation, s.how) for s in report.sites] == [("relu", "functional")]


def test_the_choice_inside_a_recurrent_network():
    rnn, cell = nn.RNN(2, 3, nonlinearity="relu"), nn.RNNCell(2, 3, nonlinearity="relu")
    x = torch.ones(3, 2)
    for module in (rnn, cell):
        for p in module.parameters():
            nn.init.zeros_(p)
    patch(rnn, HALF), patch(cell, HALF)
    # Three steps of three units at 0 with no weight between the steps.
    assert torch.autograd.grad(rnn(x)[0].sum(), rnn.bias_ih_l0)[0].tolist() == [1.5] * 3
    out = cell(x)
    assert torch.autograd.grad(out.sum(), cell.bias_hh, retain_graph=True)[0].tolist() == [1.5] * 3
    with using(cell, Jacobians(relu=1.0)):
        assert torch.autograd.grad(out.sum(), cell.bias_hh)[0].tolist() == [3.0] * 3
    assert sum(row.tied for row in ties(rnn, x).values()) == 9
    smooth = nn.RNN(2, 3)  # tanh
    with pytest.warns(PatchWarning, match="nothing to patch"):
        patch(smooth, HALF, example=x)


@pytest.mark.parametrize("cell", [False, True])
def test_a_compiled_recurrent_network_keeps_the_choice_or_is_refused(cell):
    """The kernel has no graph for the compiler: dynamo hands it to eager mode, which reaches it."""
    torch.compiler.reset()
    module = nn.RNNCell(2, 3, nonlinearity="relu") if cell else nn.RNN(2, 3, nonlinearity="relu")
    for p in module.parameters():
        nn.init.zeros_(p)
    x = torch.ones(3, 2)
    model = nn.Sequential(module)
    patch(model, HALF)
    fast = torch.compile(model, backend="aot_eager")
    for run in (model, fast):
        out = run(x) if cell else run(x)[0]
        bias = module.bias_ih if cell else module.bias_ih_l0
        assert torch.autograd.grad(out.sum(), bias)[0].tolist() == [1.5] * 3


# -------------------------------------------------------------------------------------------- looking again
class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


@dataclasses.dataclass
class Output:
    y: torch.Tensor


class Holder:
    def __init__(self, y):
        self.inside = {"deep": [y]}


class Slotted:
    __slots__ = "y"

    def __init__(self, y):
        self.y = y


class SlottedToo(Slotted):
    __slots__ = ()


class Sometimes(nn.Module):
    """Runs a custom function, or not."""

    def __init__(self, how):
        super().__init__()
        self.lin, self.how = nn.Linear(2, 3), how

    def forward(self, x, extra=False):
        x = self.lin(x).relu()
        y = (
            Square.apply(x)
            if extra or (self.how not in ("argument", "flag") and (self.training or self.how != "training"))
            else x
        )
        if self.how == "attribute":
            self.aux = y.sum()
            return x
        if self.how == "private attribute":
            self._aux = y.sum()
            return x
        if self.how == "distribution":
            return torch.distributions.Normal(y, 1.0)
        if self.how == "flag":
            return y if extra else x
        if self.how == "object":
            return Holder(y)
        if self.how == "slots":
            return SlottedToo(y)
        if self.how == "namespace":
            return SimpleNamespace(y=y)
        if self.how == "argument":
            return (x, y) if extra else x
        return Output(y) if self.how == "dataclass" else y


@pytest.mark.parametrize(
    "how", ["plain", "dataclass", "attribute", "private attribute", "object", "slots", "namespace", "distribution"]
)
def test_custom_functions_are_found_wherever_their_result_goes(how):
    model = Sometimes(how)
    patch(model, Jacobians())
    with pytest.raises(UnreachedError, match="Square, whose backward is its own"):
        model(torch.ones(1, 2))


def test_a_new_mode_and_a_new_structure_are_looked_at():
    model = Sometimes("training")
    patch(model, Jacobians(), example=torch.ones(1, 2))  # in evaluation mode
    model.eval()(torch.ones(1, 2))
    with pytest.raises(UnreachedError, match="Square"):
        model.train()(torch.ones(1, 2))
    for how in ("argument", "flag"):
        model = Sometimes(how)
        patch(model, Jacobians(), example=torch.ones(1, 2))
        model.eval()(torch.ones(1, 2), extra=False)
        with pytest.raises(UnreachedError, match="Square"):
            model(torch.ones(1, 2), extra=True)


class Mapped(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


LEAVES = {  # what a method returns, and the loss of it
    "closure": (lambda h, y, into: lambda: y.sum(), lambda out, into: out()),
    "partial": (lambda h, y, into: partial(torch.add, y.sum()), lambda out, into: out(1)),
    "iterator": (lambda h, y, into: iter([y.sum()]), lambda out, into: next(out)),
    "argument": (lambda h, y, into: (into.append(y.sum()), h)[1], lambda out, into: into[0]),
    "attribute of a tensor": (lambda h, y, into: h.__dict__.update(y=y) or h, lambda out, into: out.y.sum()),
    "gradient inside": (
        lambda h, y, into: h + torch.autograd.grad(y.sum(), h, retain_graph=True)[0],
        lambda out, into: out.sum(),
    ),
    "backward inside": (lambda h, y, into: (y.sum().backward(retain_graph=True), h)[1], lambda out, into: out.sum()),
    "Jacobian inside": (lambda h, y, into: h + torch.func.jacrev(Mapped.apply)(h).sum(), lambda out, into: out.sum()),
}


class Leaving(nn.Module):
    def __init__(self, leave):
        super().__init__()
        self.lin, self.leave = nn.Linear(2, 3), leave

    def forward(self, x, into):
        h = self.lin(x).relu()
        return self.leave(h, Square.apply(h), into)


@pytest.mark.parametrize("way", LEAVES)
def test_a_custom_function_whose_result_leaves_unseen_is_named_where_a_gradient_comes_to_it(way):
    leave, loss = LEAVES[way]
    model, into = Leaving(leave), []
    patch(model, Jacobians())
    with pytest.raises(UnreachedError, match=r"(Square|Mapped), whose backward is its own"):
        loss(model(torch.ones(1, 2), into), into).backward()
    loose, into = Leaving(leave), []
    report = patch(loose, Jacobians(), strict=False)
    loss(loose(torch.ones(1, 2), into), into).backward()
    assert ("custom", "unreached") in [(site.operation, site.how) for site in report.unreached]


def test_a_custom_function_through_which_no_gradient_passes_is_left_alone():
    model = Leaving(lambda h, y, into: h + y.detach())
    report = patch(model, Jacobians())
    for _ in range(3):
        model(torch.ones(1, 2), None).sum().backward()
    assert not report.unreached
    assert "__init__" not in vars(torch.autograd.function.BackwardCFunction)


TRANSFORMS = {
    "vmap": torch.vmap(Mapped.apply),
    "vmap twice": torch.vmap(torch.vmap(Mapped.apply)),
    "grad": torch.func.grad(lambda x: Mapped.apply(x).square().sum()),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_custom_function_under_a_transform_is_named(transform):
    model = Shift(TRANSFORMS[transform])
    patch(model, Jacobians())
    with pytest.raises(UnreachedError, match="Mapped, whose backward is its own"):
        model(torch.ones(4, 4))


class Later(nn.Module):
    """Takes a branch when its first input exceeds 1000, and counts its runs."""

    def __init__(self, branch, otherwise=lambda x: x):
        super().__init__()
        self.lin, self.runs, self.branches = nn.Linear(2, 3), 0, (otherwise, branch)
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return self.branches[bool(x[0, 0] > 1e3)](self.lin(x).relu())


def run(model, inputs):
    for x in inputs:
        model(torch.full((1, 2), x))


BRANCHES = {
    "custom backward": (Square.apply, "Square, whose backward is its own"),
    "kink that no call shows": (torch._C._nn.hardswish, "HardswishBackward0"),
}


def test_a_branch_of_the_second_forward_is_looked_at_though_it_makes_as_many_nodes():
    model = Later(Square.apply, torch.square)
    patch(model, Jacobians())
    run(model, [1.0])
    with pytest.raises(UnreachedError, match="Square"):
        run(model, [1e4])


def test_a_branch_that_evaluates_other_sites_is_looked_at_at_once():
    model = Later(Square.apply, lambda x: F.leaky_relu(x, 0.5))
    patch(model, Jacobians())
    run(model, [1.0] * 10)
    with pytest.raises(UnreachedError, match="Square"):
        run(model, [1e4])


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_that_is_taken_later_is_looked_at(name, every):
    """The new path makes another number of nodes. The next run that takes it tells its kinks from the sites."""
    branch, text = BRANCHES[name]
    model = Later(branch)
    patch(model, Jacobians())
    run(model, [1.0] * 40)
    with pytest.raises(UnreachedError, match=text):
        run(model, [1e4, *[1.0] * (every - 1), 1e4])


def test_a_branch_of_the_same_number_of_nodes_is_looked_at_soon():
    model = Later(Square.apply, torch.square)
    patch(model, Jacobians())
    run(model, [1.0] * 10)
    with pytest.raises(UnreachedError, match="Square"):
        run(model, [1e4] * 10)
    assert model.runs == 16


class Flagged(nn.Module):
    """A flag swaps one operation for another: the number of nodes and the result's structure stay."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 3)

    def forward(self, x, how):
        custom = how in (True, "custom", ["custom"], {"how": "custom"})
        return (Square.apply if custom else torch.square)(self.lin(x).relu())


FLAGS = [(False, True), ("square", "custom"), (["square"], ["custom"]), ({"how": "square"}, {"how": "custom"})]


@pytest.mark.parametrize(("before", "after"), FLAGS, ids=repr)
def test_a_new_value_of_a_flag_is_looked_at_at_once(before, after):
    model = Flagged()
    patch(model, Jacobians())
    for _ in range(10):
        model(torch.ones(1, 2), before)
    with pytest.raises(UnreachedError, match="Square"):
        model(torch.ones(1, 2), after)


def test_what_is_refused_is_refused_each_time():
    model = Later(torch._C._nn.hardswish)
    patch(model, Jacobians())
    for _ in range(5):
        with pytest.raises(UnreachedError, match="HardswishBackward0"):
            model(torch.full((1, 2), 1e4))


def test_looking_ends():
    """A path that is taken once does not slow the others down for ever."""
    model = Later(lambda x: x.square().square())
    patch(model, Jacobians())
    run(model, [*[1.0] * 5, 1e4])
    surgery = model._nonsmooth_part.surgery
    assert len(surgery.awaited) == 1
    for _ in range(16):
        assert surgery.awaited
        model(torch.ones(1, 2))
    assert not surgery.awaited
    model(torch.full((1, 2), 1e4))
    assert not surgery.awaited


class Steps(nn.Module):
    """Makes another number of nodes for each number that it gets, and one kink of PyTorch's after some."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, x, steps, kink=False):
        x = self.lin(x).relu()
        for _ in range(int(steps)):
            x = x * 2
        return torch._C._nn.hardswish(x) if kink else x


def test_a_model_of_a_new_path_at_each_step_is_looked_at_now_and_then(monkeypatch):
    """Looking costs as much as a step of a small model: not at each step, and not never."""
    looks = []
    monkeypatch.setattr(checks, "_look", lambda *args, look=checks._look: (looks.append(1), look(*args)))
    model = Steps()
    patch(model, Jacobians())
    for steps in range(1_000):
        model(torch.ones(1, 2), torch.tensor(steps % 300))
    assert 64 <= len(looks) <= 64 + 1_000 // 128 + 9  # and those of the forwards 2, 4, 8, ..., 512

    def kinked():
        for steps in range(300):
            model(torch.ones(1, 2), torch.tensor(steps % 3), torch.tensor(True))

    with pytest.raises(UnreachedError, match="HardswishBackward0"):
        kinked()


def test_a_graph_of_an_earlier_run_is_not_looked_at_again():
    def kept(x):
        model.kept = getattr(model, "kept", x)
        return x

    model = Later(None, kept)
    patch(model, Jacobians())
    nn.init.constant_(model.lin.bias, 10.0)  # without a tie the node is PyTorch's own
    run(model, [1.0] * 20)
    assert not model._nonsmooth_part.surgery.report.unreached


@pytest.mark.parametrize("runs", [0, 1])
def test_a_kink_that_was_made_before_the_patch_is_named(runs):
    """No call of a run made it, so that it keeps PyTorch's derivative, at the first path and at a later one."""
    model = Later(lambda x: x * kept)
    kept = F.relu(model.lin.bias)
    patch(model, Jacobians(relu=1.0))
    run(model, [1.0] * runs)
    with pytest.raises(UnreachedError, match="the graph of the model has a ReluBackward0"):
        run(model, [1e4] * 2)


def test_a_graph_of_a_run_that_broke_off_is_not_refused():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.kept = nn.Parameter(torch.ones(3)), None

        def forward(self, x):
            if self.kept is None:
                self.kept = F.relu(x * self.w)  # without a tie the node is PyTorch's own
                raise KeyError
            return F.relu(self.kept)

    model = Breaks()
    patch(model, Jacobians(relu=1.0))
    with pytest.raises(KeyError):
        model(torch.ones(3))
    model(torch.ones(3))
    assert not model._nonsmooth_part.surgery.report.unreached


def test_custom_functions_are_found_in_buffers():
    model = Later(torch.square)

    def kept(x):
        model.last = Square.apply(x).sum()
        return x

    model.branches = (kept, kept)
    patch(model, Jacobians())
    with pytest.raises(UnreachedError, match="Square"):
        model(torch.ones(1, 2))


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}], ids=str)
def test_custom_functions_in_compiled_code_are_found(options):
    torch._dynamo.reset()
    model = Sometimes("plain")
    patch(model, Jacobians())
    compiled = torch.compile(model, backend="aot_eager", **options)
    for _ in range(2):
        with pytest.raises(Exception, match=r"no Jacobian choice reaches.*Square") as caught:
            compiled(torch.ones(1, 2))
    assert options or isinstance(caught.value, UnreachedError)
    loose = Sometimes("plain")
    report = patch(loose, Jacobians(), strict=False)
    torch.compile(loose, backend="aot_eager")(torch.ones(1, 2))
    assert [(s.operation, s.how) for s in report.unreached] == [("custom", "unreached")]
    torch._dynamo.reset()


def test_a_part_that_is_compiled_by_itself_is_named_and_takes_the_choice():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.leaky_relu(x, 0.25, inplace=True) * 2, backend="aot_eager")
    x = torch.zeros(4, 4, requires_grad=True)
    compiled(x * 1).sum().backward()  # compiled before it is a part of a patched model
    assert torch.equal(x.grad, torch.full((4, 4), 0.5))
    for choice in (0.5, 0.75):
        model = Shift(compiled)
        report = patch(model, Jacobians(leaky_relu=choice))
        x.grad = None
        model(x).sum().backward()
        assert torch.equal(x.grad, torch.full((4, 4), 2 * choice))
        assert [site.operation for site in report.reached] == ["leaky_relu"]


def test_a_smooth_part_that_is_compiled_by_itself_is_not_said_to_have_nothing_to_patch():
    torch._dynamo.reset()
    model = Shift(torch.compile(torch.sin, backend="aot_eager"))
    patch(model, Jacobians(leaky_relu=0.5))
    with pytest.warns(PatchWarning, match="compiled by themselves: they take the choice"):
        model(torch.zeros(4, 4, requires_grad=True))


@pytest.mark.parametrize("overwrite", [torch._C._nn.hardswish_, lambda x: x.copy_(Square.apply(x))])
def test_what_overwrites_the_input_is_looked_at(overwrite):
    class Overwrites(nn.Module):
        def forward(self, x):
            overwrite(x)
            return x

    model, leaf = Overwrites(), torch.zeros(2, requires_grad=True)
    patch(model, Jacobians())
    with pytest.raises(UnreachedError, match=r"Hardswish|Square"):
        model(leaf * 1)


def test_calls_are_those_of_the_first_forward():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.act, self.times = nn.Parameter(torch.zeros(2)), nn.ReLU(), 1

        def forward(self):
            x = self.w
            for _ in range(self.times):
                x = F.relu(self.act(x))
            return x

    model = Again()
    patch(model, HALF)
    for model.times in (1, 2, 3):
        model().sum().backward()
    assert [(s.how, s.calls) for s in report(model).sites] == [("module", 1), ("functional", 1)]


def test_ties_are_counted_without_gradients_where_a_checkpoint_calls_a_function():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda y: F.relu(self.lin(y) * 0), x, use_reentrant=False)

    model = Checkpointed()
    patch(model, HALF)
    with torch.no_grad():  # nothing is computed again
        counts = ties(model, torch.ones(1, 2))
    assert [row.tied for row in counts.values()] == [2]
