"""Surgery on what models are made of elsewhere: counts against ATen calls, other libraries' models, wrappers, hooks."""

import copy
import importlib
import pickle
import warnings
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from bits import bits
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from nslightning import Jacobians, PatchWarning, patch, unpatch, using
from nslightning.surgery import UnreachedError, report, selections

ALT = Jacobians(relu=0.75, relu6=(0.5, 0.25), leaky_relu=0.5, max_pool="minimal")

# What the operations of a patch report are in ATen.
ATEN = {
    "relu": "relu", "relu_": "relu", "threshold": "threshold", "hardtanh": "hardtanh", "hardtanh_": "hardtanh",
    "leaky_relu": "leaky_relu", "leaky_relu_": "leaky_relu", "max_pool2d_with_indices": "max_pool", "abs": "abs",
    "hardswish": "hardswish", "hardswish_": "hardswish", "hardsigmoid": "hardsigmoid", "hardsigmoid_": "hardsigmoid",
}  # fmt: skip
AS_ATEN = {"relu6": "hardtanh"}


class AtenCalls(TorchDispatchMode):
    """Counts nonsmooth kernels that run with gradients, below every Python layer of PyTorch."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ATEN:
            self.counts[ATEN[name]] += 1
        return func(*args, **(kwargs or {}))


def outputs(out):
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]


def gradients(model, out):
    wanted = [p for p in model.parameters() if p.requires_grad]
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs(out))
    return torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=True)


def same(a, b):
    return all((x is y) if x is None or y is None else torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def kill(model):
    """Make one channel behind every normalisation exactly zero: a tie wherever it meets a kink at 0."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)):
                m.weight[0] = m.bias[0] = 0


# --------------------------------------------------------------------------- counts, planted ties, equal bits
MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=4),
    "googlenet": lambda: torchvision.models.googlenet(num_classes=4, init_weights=False, aux_logits=False),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=4, width_mult=0.25),
    "timm xception": lambda: timm.create_model("legacy_xception", num_classes=4),
    "timm dla": lambda: timm.create_model("dla46_c", num_classes=4),
    "segmentation": lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ),
    "video": lambda: torchvision.models.video.r3d_18(num_classes=4),
}


def example(name):
    torch.manual_seed(1)
    return torch.randn(1, 3, 4, 32, 32) if name == "video" else torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_the_nonsmooth_kernels_that_run(name):
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), example(name)
    kill(model)
    with AtenCalls() as ran:
        stock = model(x)
    wanted = gradients(model, stock)
    report = patch(model, Jacobians(), example=x)
    counted = Counter()
    for site in report.reached:
        counted[AS_ATEN.get(site.operation, site.operation)] += site.calls
    assert counted == ran.counts
    assert not report.unreached
    out = model(x)
    assert same(outputs(stock), outputs(out))
    assert same(wanted, gradients(model, out))
    with using(model, ALT):
        other = gradients(model, out)
    assert not same(wanted, other)


def test_planted_ties_move_exactly_their_channels():
    """Behind a batch norm whose channels 0 and 2 are dead, another alpha reaches these and no other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1)
    ).double()
    with torch.no_grad():
        for i in (0, 2):
            model[1].weight[i] = model[1].bias[i] = 0
        model[4].weight[3] = model[4].bias[3] = 0
    patch(model, Jacobians())
    out = model(torch.randn(2, 3, 9, 9, dtype=torch.float64))
    base = gradients(model, out)
    for choice, layer, moved in ((Jacobians(relu=1.0), 1, [0, 2]), (Jacobians(leaky_relu=1.0), 4, [3])):
        with using(model, choice):
            other = gradients(model, out)
        names = [n for n, _ in model.named_parameters()]
        change = {n: (b - a).abs() for n, a, b in zip(names, base, other, strict=True)}
        for kind in ("weight", "bias"):
            assert change[f"{layer}.{kind}"].nonzero().flatten().tolist() == moved
        above = [n for n in names if int(n[0]) > layer]
        assert all(not change[n].any() for n in above)


# ------------------------------------------------------------------------------- models of other kinds, tasks
def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "bert":
        config = transformers.BertConfig(**small, vocab_size=50, hidden_act="relu")
        return transformers.BertForSequenceClassification(config), {"input_ids": torch.arange(12).view(2, 6)}
    if name == "vit":
        config = transformers.ViTConfig(**small, image_size=32, patch_size=8, hidden_act="relu")
        return transformers.ViTForImageClassification(config), pixels
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config), pixels


@pytest.mark.parametrize(
    ("name", "sites"), [("bert", {"relu": 2}), ("vit", {"relu": 2}), ("resnet", {"relu": 5, "max_pool": 1})]
)
def test_hugging_face_models(name, sites):
    torch.manual_seed(0)
    model, x = hugging_face(name)
    model.eval()
    for module in model.modules():  # the inner layer's first unit is always at 0
        if isinstance(module, nn.Linear) and module.out_features == 32:
            with torch.no_grad():
                module.weight[0] = module.bias[0] = 0
    kill(model)
    with AtenCalls() as ran:
        stock = model(**x)
    wanted = gradients(model, stock)
    report = patch(model, Jacobians(), example=x)
    assert Counter(s.operation for s in report.reached) == sites == ran.counts
    out = model(**x)
    assert same(outputs(stock), outputs(out))
    assert same(wanted, gradients(model, out))
    with using(model, Jacobians(relu=1.0)):
        assert not same(wanted, gradients(model, out))
    assert sorted(type(model)(model.config).state_dict()) == sorted(model.state_dict())


DETECTION = ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTION)
def test_detection_models_train_bit_for_bit(name):
    sizes = {"min_size": 64, "max_size": 96}
    stock = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=3, **sizes)
    model = copy.deepcopy(stock)
    report = patch(model, Jacobians(), strict=False)
    x = [torch.rand(3, 64, 64)] * 2
    y = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    results = []
    for m in (stock, model):
        torch.manual_seed(0)  # which anchors are sampled
        losses = m(x, y)
        results.append((list(losses.values()), gradients(m, losses)))
    assert same(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])
    assert len(report.reached) > 20
    for site in report.unreached:  # each one with the module that runs it
        assert site.calls > 0
        assert site.name in dict(model.named_modules())


# -------------------------------------------------------------------------- what is found and cannot be reached
class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Calls(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.lin, self.call = nn.Conv2d(2, 2, 1), call

    def forward(self, x):
        return self.call(self.lin(x))


@torch.library.custom_op("nslightning_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


twice.register_autograd(lambda ctx, g: g * 2)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: Cube.apply(x), r"the model runs test_reach\.Cube, whose backward is its own"),
        (lambda x: twice(x), r"the model runs nslightning_tests_twice_default, whose"),
        (lambda x: x.topk(1)[0], "the model calls topk, which has no choice"),
        (lambda x: x.flatten().median() * x, "the model calls median, which has no choice"),
    ],
    ids=["autograd function", "operator", "topk", "median"],
)
@pytest.mark.parametrize("now", [False, True])
def test_what_cannot_be_reached_raises(call, named, now):
    model, x = Calls(call), torch.randn(1, 2, 2, 2)
    types = [type(m) for m in model.modules()]
    if now:
        with pytest.raises(UnreachedError, match=rf"{named}.*strict=False"):
            patch(model, ALT, example=x)
        assert [type(m) for m in model.modules()] == types  # all or nothing
    else:
        patch(model, ALT)
        for _ in range(2):  # it goes on raising
            with pytest.raises(UnreachedError, match=named) as caught:
                model(x)
        assert torch._C._len_torch_function_stack() == 0
        with torch.no_grad():
            model(x)  # nobody asks for a derivative
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        unpatch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchWarning)  # nothing else is there
        report = patch(model, ALT, strict=False, example=x)
        model(x)
    (site,) = report.unreached
    assert (site.name, site.calls, site.choice) == ("", 1, None)
    assert "NOT REACHED" in str(report)


def test_bookkeeping_is_nobodys_concern():
    model = Calls(lambda x: F.relu(x) * x.detach().topk(1)[0].sum() + x.argmax() + (x > 0).sum())
    assert not patch(model, ALT, example=torch.randn(1, 2, 2, 2)).unreached


def test_a_function_below_the_model_is_not_the_models():
    model = Calls(F.relu)
    patch(model, ALT)
    model(Cube.apply(torch.randn(1, 2, 2, 2, requires_grad=True)))


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")  # the refusal reads the graph
def test_unreached_operations_are_refused_when_compiled_too():
    torch._dynamo.reset()
    model = Calls(lambda x: x.topk(1)[0])
    patch(model, ALT)
    with pytest.raises(Exception, match="topk, which has no choice"):
        torch.compile(model, backend="aot_eager")(torch.randn(1, 2, 2, 2))
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------ identity under wrappers
class Body(nn.Module):
    """A module and a function; unit 0 is always at 0."""

    def __init__(self):
        super().__init__()
        self.lin, self.act = nn.Linear(3, 4), nn.ReLU()
        with torch.no_grad():
            self.lin.weight[0] = self.lin.bias[0] = 0

    def forward(self, x, scale=1.0):
        return F.relu(self.act(self.lin(x)) * scale)


def bias(model, out):
    """The gradient at the tied unit."""
    return torch.autograd.grad(out.sum(), model.lin.bias, retain_graph=True)[0][0].item()


HALF = Jacobians(relu=0.5)
X = torch.ones(1, 3)


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


def test_parametrisations_before_and_after():
    for first in (True, False):
        model = Body()
        keys = None
        if first:
            parametrize.register_parametrization(model.lin, "bias", Double())
            keys = list(model.state_dict())
        patch(model, HALF)
        if first:
            assert list(model.state_dict()) == keys
        else:
            parametrize.register_parametrization(model.lin, "bias", Double())
        out = model(X)
        original = model.lin.parametrizations.bias.original
        assert torch.autograd.grad(out.sum(), original)[0][0].item() == 2 * 0.25
        parametrize.remove_parametrizations(model.lin, "bias")
        assert bias(model, model(X)) == 0.25
        unpatch(model)
        assert type(model) is Body
        assert bias(model, model(X)) == 0


def test_a_parametrised_patched_module_is_undone_in_any_order():
    class Own(Body):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return super().forward(x) * self.gain

    model = Own()
    patch(model, HALF)
    parametrize.register_parametrization(model, "gain", Double())
    assert bias(model, model(X)) == 2 * 0.25
    unpatch(model)
    assert bias(model, model(X)) == 0
    parametrize.remove_parametrizations(model, "gain")
    assert type(model) is Own


@pytest.mark.parametrize(
    "normed",
    [nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm, parametrizations.spectral_norm],
)
def test_normed_weights_train_bit_for_bit(normed):
    def make():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            normed(net[0])
        return net

    stock, model = make(), make()  # the old weight norm does not let itself be copied
    keys = list(model.state_dict())
    patch(model, Jacobians(), example=torch.randn(2, 4))
    assert list(model.state_dict()) == keys
    for _ in range(3):
        x = torch.randn(8, 4)
        for m in (stock, model):  # spectral norm's buffers move
            m.zero_grad()
            m(x).square().sum().backward()
            with torch.no_grad():
                for p in m.parameters():
                    p -= 0.1 * p.grad
    assert same(stock.state_dict().values(), model.state_dict().values())


def test_quantisation_aware_training():
    quantization = importlib.import_module("torch.ao.quantization")
    stock = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), quantization.DeQuantStub()
    ).train()
    stock.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        stock = quantization.prepare_qat(stock)
    model = copy.deepcopy(stock)
    report = patch(model, Jacobians())
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        a, b = stock(x), model(x)
        assert same([a], [b])
        assert same(gradients(stock, a), gradients(model, b))
    assert [(s.operation, s.how) for s in report.sites] == [("relu", "module"), ("max_pool", "module")]
    assert same(
        [v for v in stock.state_dict().values() if v.is_floating_point()],
        [v for v in model.state_dict().values() if v.is_floating_point()],
    )
    unpatch(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]


@pytest.mark.parametrize("where", ["before", "after", "inside"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # a module whose inputs need no gradient
def test_hooks_that_call_functions(where):
    """A hook's call counts as the module's on which it is."""
    model = nn.Sequential(Body()) if where == "inside" else Body()
    body = model[0] if where == "inside" else model
    seen = []

    def doubled(module, args, kwargs):
        seen.append(sorted(kwargs))
        return (F.relu(0 * args[0]) + args[0],), kwargs

    def clipped(module, args, kwargs, out):
        seen.append(sorted(kwargs))
        return F.relu(0 * out) + out

    def hook():
        body.register_forward_pre_hook(doubled, with_kwargs=True)
        body.register_forward_hook(clipped, with_kwargs=True)
        body.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))

    if where != "after":
        hook()
    report = patch(model, HALF)
    if where == "after":
        hook()
    out = model(X) if where == "inside" else model(X, scale=1.0)
    out.sum().backward()
    assert seen == [[], [], "backward"] if where == "inside" else seen == [["scale"], ["scale"], "backward"]
    calls = {s.name: s.calls for s in report.sites if s.how == "functional"}
    assert calls == {"0" if where == "inside" else "": 3}
    unpatch(model)
    assert type(body) is Body
    assert len(body._forward_hooks) == len(body._forward_pre_hooks) == 1


def test_closures_lambdas_and_shared_activations():
    act = nn.ReLU()

    def twice_through(x):
        return act(act(x))  # a module of the closure, registered elsewhere

    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.a, self.b = nn.Linear(3, 4), act, nn.Sequential(act)
            self.calls = [twice_through, lambda x: F.relu(x), torch.relu]
            with torch.no_grad():
                self.lin.weight[0] = self.lin.bias[0] = 0

        def forward(self, x):
            x = self.b(self.a(self.lin(x)))
            for call in self.calls:
                x = call(x)
            return x

    model = Shares()
    report = patch(model, HALF, example=X)
    assert [(s.name, s.aliases, s.how, s.calls) for s in report.sites] == [
        ("a", ("b.0",), "module", 4),
        ("", (), "functional", 2),
    ]
    assert bias(model, model(X)) == 0.5**6
    assert model.a is model.b[0] is act
    unpatch(model)
    assert type(act) is nn.ReLU


@pytest.mark.parametrize("how", ["torch", "timm"])
def test_an_average_of_weights_follows_and_is_unpatched_alone(how):
    model = Body()
    patch(model, HALF)
    copied = torch.optim.swa_utils.AveragedModel(model) if how == "torch" else timm.utils.ModelEmaV3(model, decay=0.0)
    with torch.no_grad():
        model.lin.bias[1:] += 1
    copied.update_parameters(model) if how == "torch" else copied.update(model)
    average = copied.module.train().requires_grad_()
    assert average.lin.bias[1] != 0
    assert bias(average, average(X)) == 0.25
    assert bias(model, model(X)) == 0.25
    assert [s.kind for s in report(average).sites] == [s.kind for s in report(model).sites] == ["ReLU", "relu"]
    unpatch(average)
    assert bias(average, average(X)) == 0
    assert bias(model, model(X)) == 0.25


def test_fully_sharded_after(tmp_path):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = Body()
    patch(model, HALF)
    sharded = fsdp.fully_shard(model, mesh=mesh)
    sharded(X).sum().backward()
    assert sharded.lin.bias.grad.to_local()[0].item() == 0.25
    sharded.zero_grad()
    with using(sharded, Jacobians(relu=2.0)):
        sharded(X).sum().backward()
    assert sharded.lin.bias.grad.to_local()[0].item() == 4.0
    unpatch(sharded)
    sharded.zero_grad()
    sharded(X).sum().backward()
    assert sharded.lin.bias.grad.to_local()[0].item() == 0
    with pytest.raises(TypeError, match="FSDPModule already"):
        patch(fsdp.fully_shard(Body(), mesh=mesh), HALF)


def test_unpatch_after_an_exception_half_way():
    def burst(x):
        y = F.relu(x)
        raise ZeroDivisionError(str(y.shape))

    model = nn.Sequential(nn.ReLU(), Calls(burst))
    before = [(type(m), sorted(m.__dict__)) for m in model.modules()]
    patch(model, HALF)
    with pytest.raises(ZeroDivisionError), using(model, ALT):
        model(torch.randn(1, 2, 2, 2))
    assert selections(model)[""].jacobians == HALF
    unpatch(model)
    assert [(type(m), sorted(m.__dict__)) for m in model.modules()] == before


# ------------------------------------------------------------------------------------- indices without a gradient
RANKED = {
    "topk": lambda k: k.topk(2),
    "sort": lambda k: torch.sort(k),
    "kthvalue": lambda k: k.kthvalue(2),
    "median": lambda k: k.median(0),
    "cummax": lambda k: k.cummax(0),
}


class _Ranked(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.k, self.rank, self.values = nn.Parameter(torch.zeros(3)), rank, False

    def forward(self, x):
        values, indices = self.rank(self.k)
        y = torch.relu(self.k)[indices].sum() + x
        return y + values.sum() if self.values else y


@pytest.mark.parametrize("name", RANKED)
def test_what_is_called_for_indices_only_is_not_refused(name):
    model = _Ranked(RANKED[name])
    patch(model, Jacobians(relu=0.5))
    for _ in range(2):
        model(torch.zeros(())).backward()
    assert not report(model).unreached
    model.values = True
    y = model(torch.zeros(()))  # neither the method nor the structure is new
    with pytest.raises(UnreachedError, match=f"calls {name}"):
        y.backward()
    fresh = _Ranked(RANKED[name])
    fresh.values = True
    patch(fresh, Jacobians(relu=0.5))
    with pytest.raises(UnreachedError, match=f"calls {name}"):
        fresh(torch.zeros(()))
    lenient = _Ranked(RANKED[name])
    lenient.values = True
    patch(lenient, Jacobians(relu=0.5), strict=False)
    lenient(torch.zeros(())).backward()
    assert [(site.operation, site.kind, site.calls) for site in report(lenient).unreached] == [(name, name, 1)]


# ------------------------------------------------------------------------------------ code that a backward runs
class Manual(nn.Module):
    """Runs its backward in a method, as manual optimisation does; a checkpoint calls another method again in it."""

    def __init__(self, reentrant, module):
        super().__init__()
        self.w, self.act = nn.Parameter(torch.zeros(3)), nn.ReLU() if module else None
        self.reentrant = reentrant

    def part(self, x):
        return F.relu(x) if self.act is None else self.act(x)

    def forward(self, x):
        return checkpoint(lambda y: self.part(y), self.w + x, use_reentrant=self.reentrant)

    def step(self, x, way):
        self.w.grad = None
        loss = self(x).sum()
        if way == "backward":
            loss.backward()
        elif way == "autograd.backward":
            torch.autograd.backward(loss)
        else:
            return torch.autograd.grad(loss, self.w)[0]
        return self.w.grad


@pytest.mark.parametrize("module", [True, False], ids=["module", "function"])
@pytest.mark.parametrize(
    ("way", "reentrant"),  # PyTorch's reentrant checkpoints refuse torch.autograd.grad
    [
        ("backward", True),
        ("autograd.backward", True),
        *((way, False) for way in ("backward", "autograd.backward", "grad")),
    ],
)
def test_a_checkpoint_in_a_backward_that_a_method_runs(way, reentrant, module):
    model = Manual(reentrant, module)
    patch(model, Jacobians(relu=0.5))
    for _ in range(3):
        assert model.step(torch.zeros(3), way).tolist() == [0.5] * 3


@pytest.mark.filterwarnings("ignore")  # of the compiler, which traces the branches
def test_branches_of_torch_cond_are_named():
    model = Calls(lambda x: torch.cond(x.sum() >= 0, lambda y: y.relu(), lambda y: y.sin(), (x * 1,)))
    patch(model, ALT)
    with pytest.raises(UnreachedError, match="CondAutogradOp"):
        model(torch.zeros(1, 2, 2, 2))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
@pytest.mark.parametrize("of", ["0", "1", ""])
def test_hooks_of_a_model_without_code(of, kind):
    """No module of it calls functions; a hook does, also where the module with the hook is called alone."""
    model, x = nn.Sequential(nn.Flatten(), nn.ReLU()), torch.zeros(2, 3, requires_grad=True)
    module = model.get_submodule(of)
    if kind == "hook":
        module.register_forward_hook(_rectified)
    else:
        module.register_forward_pre_hook(_rectified_first)
    patch(model, Jacobians(relu=0.5))
    assert torch.autograd.grad(model(x).sum(), x)[0].tolist() == [[0.25] * 3] * 2
    if of == "0":
        assert torch.autograd.grad(model[0](x).sum(), x)[0].tolist() == [[0.5] * 3] * 2


@pytest.mark.parametrize("model", [nn.Sequential(nn.Flatten(), nn.ReLU()), nn.ReLU(), nn.Flatten()], ids=repr)
@pytest.mark.parametrize("before", ["hook", "patch", "forward"])
def test_hooks_of_the_model_itself_take_the_choice_whenever_they_come(model, before):
    """A hook may come before the patch, after it, or after the first forward; copies and pickles keep its entrance."""
    model, x, choice = copy.deepcopy(model), torch.zeros(2, 3, requires_grad=True), Jacobians(relu=0.5)
    slopes = 0.5 ** sum(isinstance(module, nn.ReLU) for module in model.modules())

    def slope(of):
        return torch.autograd.grad(of(x).sum(), x)[0].unique().tolist()

    def register(of):
        return [of.register_forward_hook(_rectified), of.register_forward_pre_hook(_rectified_first)]

    if before == "hook":
        handles = register(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has nothing to patch")  # Flatten, before its hooks come
        report = patch(model, choice)
        if before == "forward":
            assert slope(model) == [slopes]
    if before != "hook":
        handles = register(model)
    assert slope(model) == [slopes / 4]
    assert sum(site.how == "functional" for site in report.sites) == (not isinstance(model, nn.ReLU))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert slope(other) == [slopes / 4]
    for handle in handles:
        handle.remove()
    assert slope(model) == [slopes]
    register(model)
    unpatch(model)
    assert slope(model) == [0.0]
    assert not {"_call_impl", "register_forward_hook", "register_forward_pre_hook"} & set(vars(model))


def _rectified(module, args, result):
    return F.relu(result) + 0


def _rectified_first(module, args):
    return F.relu(args[0]) + 0
