"""How a module is patched: its class stays, its methods are stood for, and whoever looks at it sees what it was."""

import asyncio
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import typing
import warnings
import weakref
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from types import MethodType

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torchvision.models.feature_extraction import create_feature_extractor

from nslightning import Jacobians, PatchWarning, Plan, Rule, patch, unpatch, using
from nslightning.surgery import report, sites

HALF = Jacobians(relu=0.5)


class Net(nn.Module):
    """A parameter at 0 on both sides of its ways."""

    def __init__(self):
        super().__init__()
        self.k, self.act, self.lin = nn.Parameter(torch.zeros(3)), nn.ReLU(), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """Adds a kink at 0."""
        return self.act(F.relu(self.k)) * scale + x

    def encode(self, x):
        return F.relu(self.k) + x

    def encode_in_thread(self, x):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(self.work, x).result()

    def thread(self, x):
        results = []
        threads = [threading.Thread(target=lambda: results.append(F.relu(self.k) + x)) for _ in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return results[0]

    def work(self, x):
        return torch.relu(self.k) + x

    def stream(self, n):
        received = None
        for i in range(n):
            received = yield F.relu(self.k) * (1 if received is None else received) + i
        return F.relu(self.k)

    @wraps(work)
    def decorated(self, *args):
        return Net.work(self, *args)

    def _hidden(self, x):
        return self.k.clamp(min=0) + x

    @staticmethod
    def static(x):
        return x.relu()


def slope(y, model):
    return torch.autograd.grad(y.sum(), model.k)[0].tolist()


X = torch.zeros(3)


# ---------------------------------------------------------------------------------------------------- identity
def test_the_method_passes_for_the_one_it_stands_for():
    stock, model = Net(), Net()
    patch(model, HALF)
    for m, n in ((stock, model), (stock.act, model.act)):
        assert type(m) is type(n)
        assert type(m).forward is type(n).forward
        a, b = m.forward, n.forward
        assert inspect.signature(a) == inspect.signature(b)
        assert inspect.getfullargspec(a) == inspect.getfullargspec(b)
        assert inspect.ismethod(b)
        assert typing.get_type_hints(a) == typing.get_type_hints(b)
        assert (a.__doc__, a.__name__, a.__qualname__, a.__module__) == (
            b.__doc__,
            b.__name__,
            b.__qualname__,
            b.__module__,
        )
        assert b.__wrapped__ == n.__class__.forward.__get__(n)
        assert (b.__self__, b.__func__) == (n, a.__func__)
        assert inspect.getsource(b) == inspect.getsource(a)
        assert repr(b).startswith("<patched <bound method")
    assert list(inspect.signature(model.encode).parameters) == ["x"]
    assert inspect.isgeneratorfunction(model.stream)
    assert set(model.state_dict()) == set(stock.state_dict())
    assert "stream" not in dir(nn.Module)


def test_a_patched_model_is_freed_like_any_other():
    gc.disable()  # from before the patch on, which leaves no cycle either
    try:
        model = Net()
        patch(model, HALF)
        model(X).sum().backward()
        parameter = weakref.ref(model.k)
        del model
        assert parameter() is None  # without the collector of cycles
    finally:
        gc.enable()


def test_a_method_without_its_module_says_what_to_keep():
    model = Net()
    before = dict(vars(Net))
    patch(model, HALF)
    encode, of_site = model.encode, model.act.forward
    with pytest.raises(
        ReferenceError, match=r"keep the module in a variable, such as `model`, and call `model\.encode`"
    ):
        copy.deepcopy(model).encode(X)
    assert dict(vars(Net)) == before  # the class of the user gets no finaliser
    del model
    for gone in (encode, of_site):
        with pytest.raises(ReferenceError, match="keep the module"):
            gone(X)


class Handlers(typing.NamedTuple):
    first: typing.Any


@dataclasses.dataclass
class Heads:
    head: typing.Any


class Tables(Net):
    """Keeps its bound methods in every kind of container, as tables of handlers do."""

    def __init__(self):
        super().__init__()
        self.table = {"encode": self.encode, "static": self.static, "part": self.act.forward}
        self.nested = [OrderedDict(a=(self.encode, 1)), deque([self.encode])]
        self.direct, self.named, self.heads = self.encode, Handlers(self.encode), Heads(self.encode)
        self.partials = {"x": functools.partial(self.encode, x=X)}
        self.keyed = {self.encode: "encode", self.act: "act"}


KEPT_IN = {
    "dict": lambda m: m.table["encode"](X),
    "static method": lambda m: m.table["static"](m.k),
    "method of a part": lambda m: m.table["part"](m.k),
    "tuple in a dict in a list": lambda m: m.nested[0]["a"][0](X),
    "deque in a list": lambda m: m.nested[1][0](X),
    "attribute": lambda m: m.direct(X),
    "named tuple": lambda m: m.named.first(X),
    "dataclass": lambda m: m.heads.head(X),
    "partial": lambda m: m.partials["x"](),
}
COPIES = {"itself": lambda m: m, "copy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("which", COPIES)
def test_methods_kept_in_tables_are_entrances(which):
    original = Tables()
    before = {name: str(value) for name, value in vars(original).items()}
    patch(original, HALF)
    model = COPIES[which](original)
    slopes = {name: slope(call(model), model)[0] for name, call in KEPT_IN.items()}
    assert slopes == dict.fromkeys(KEPT_IN, 0.5)
    assert model.direct == model.table["encode"] == model.encode
    assert model.encode != model.work
    if which != "pickle":  # a stock model's bound method is another key after pickling, too
        assert model.keyed[model.encode] == "encode"
    unpatch(model)
    stock = Tables()
    slopes = {name: slope(call(model), model)[0] for name, call in KEPT_IN.items()}
    assert slopes == {name: slope(call(stock), stock)[0] for name, call in KEPT_IN.items()}
    assert type(model.table["encode"]) is type(model.heads.head) is type(model.direct) is MethodType
    assert model.table["encode"].__self__ is model
    if model is original:
        assert {name: str(value) for name, value in vars(model).items()} == before


def test_a_table_that_changed_after_the_patch_stays_changed():
    model = Tables()
    patch(model, HALF)
    model.table["encode"], model.nested[1] = len, None
    del model.table["static"]
    unpatch(model)
    assert model.table["encode"] is len
    assert "static" not in model.table


def test_a_compiler_takes_methods_from_tables():
    class Routed(Tables):
        def forward(self, x):
            return self.table["encode"](x) + self.direct(x)

    model = Routed()
    patch(model, HALF)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert slope(compiled(X), model) == [1.0] * 3


WAYS_TO_KEEP_A_METHOD = {
    "copied": copy.copy,
    "copied with its module": copy.deepcopy,
    "pickled": lambda method: pickle.loads(pickle.dumps(method)),
    "weakly referred to": lambda method: weakref.WeakMethod(method)(),
    "partial": functools.partial,
    "partial and pickled": lambda method: pickle.loads(pickle.dumps(functools.partial(method))),
    "partial and copied": lambda method: copy.deepcopy(functools.partial(method)),
    "of a dict": lambda method: copy.deepcopy({"method": method})["method"],
}


@pytest.mark.parametrize("way", WAYS_TO_KEEP_A_METHOD)
def test_a_bound_method_is_kept_by_itself(way):
    model = Net()
    patch(model, HALF)
    for method in (model.forward, model.encode, model.act.forward):
        kept = WAYS_TO_KEEP_A_METHOD[way](method)
        gc.collect()
        of = getattr(kept, "func", kept).__self__
        assert (of is method.__self__) == (way in ("copied", "weakly referred to", "partial"))
        k = torch.zeros(3, requires_grad=True) if method is model.act.forward else of.k
        y = kept(k if method is model.act.forward else X)
        assert torch.autograd.grad(y.sum(), k)[0].tolist() == [0.25 if method is model.forward else 0.5] * 3
    assert copy.copy(model.forward) == model.forward
    reference = weakref.WeakMethod(model.forward)
    del model, method, of, kept
    gc.collect()
    assert reference() is None


def test_a_weak_method_of_a_module_with_a_partial_function():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = functools.partial(F.relu, inplace=False)

        def encode(self, x):
            return F.relu(x)

    model, x = Partial(), torch.zeros(1, requires_grad=True)
    patch(model, HALF)
    assert torch.autograd.grad(weakref.WeakMethod(model.encode)()(x), x)[0].item() == 0.5


def test_a_pickled_method_and_its_module_stay_one():
    model = Net()
    patch(model, HALF)
    for pair in ([model.encode, model], [model, model.encode]):
        for ways in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
            one, other = ways(pair)
            of, method = (other, one) if isinstance(other, nn.Module) else (one, other)
            assert method is of.encode
            assert method.__self__ is of


def test_a_method_kept_after_unpatch_is_the_stock_one():
    model = Net()
    patch(model, HALF)
    kept, of_site = model.encode, model.act.forward
    assert slope(kept(X), model) == [0.5] * 3
    model(X)
    for _ in range(3):  # the later ones take the quick way
        of_site(torch.zeros(3, requires_grad=True))
    unpatch(model)
    stock = Net()
    assert slope(kept(X), model) == slope(stock.encode(X), stock) == [0.0] * 3
    for call in (of_site, torch.compile(of_site, backend="aot_eager")):
        x = torch.zeros(3, requires_grad=True)
        assert torch.autograd.grad(call(x).sum(), x)[0].tolist() == [0.0] * 3
    copied, loaded = copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))
    for method in (copied, loaded):
        assert type(method) is type(stock.encode)
        assert method.__self__ is not model
    patch(model, Jacobians(relu=1.0))
    assert slope(model.encode(X), model) == [1.0] * 3


def test_subclass_hooks_and_parametrisations_know_nothing_of_it():
    class Registered(nn.Module):
        known: typing.ClassVar[dict[str, type]] = {}

        def __init_subclass__(cls, **kwargs):
            assert cls.__name__ not in Registered.known
            Registered.known[cls.__name__] = cls

    class Own(Registered):
        def __init__(self):
            super().__init__()
            self.k, self.lin = nn.Parameter(torch.zeros(3)), nn.Linear(3, 3)

        def forward(self, x):
            return torch.relu(self.k) + x + 0 * self.lin(x)

    model = Own()
    parametrizations.weight_norm(model.lin)
    patch(model, HALF)
    assert Registered.known == {"Own": Own}
    assert slope(model(X), model) == [0.5] * 3
    parametrize.remove_parametrizations(model.lin, "weight")
    assert slope(model(X), model) == [0.5] * 3
    unpatch(model)
    assert slope(model(X), model) == [0.0] * 3


def test_what_dispatches_on_the_class_finds_it():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.MaxPool1d(3))
    patch(model, HALF)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.MaxPool1d]
    assert {nn.ReLU: "kink"}[type(model[1])] == "kink"


def test_a_shallow_copy_runs_its_own_attributes():
    model = nn.PReLU(init=0.5)
    patch(model, Jacobians())
    twin = copy.copy(model)
    twin._parameters = {"weight": nn.Parameter(torch.tensor([0.25]))}  # as nn.DataParallel makes its replicas
    assert twin(torch.tensor([-1.0])).item() == -0.25
    assert model(torch.tensor([-1.0])).item() == -0.5


class Owner(nn.Module):
    """Calls methods of its own and of its part; each reads an attribute that a copy may have otherwise."""

    def __init__(self, part=None):
        super().__init__()
        self.k, self.scale, self.part = nn.Parameter(torch.zeros(3)), 1.0, part

    def encode(self, x):
        return F.relu(self.k) * self.scale + x

    def forward(self, x):
        return self.encode(x) + (0 if self.part is None else self.part.encode(x))


def replicated(model, value):
    """A replica as nn.DataParallel makes it, with other parameters."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in module.named_parameters(recurse=False):
            setattr(replica, name, torch.full_like(parameter, value, requires_grad=True))
    return replicas[model]


@pytest.mark.parametrize("call", [Owner.encode, Owner.__call__], ids=["method", "call"])
def test_the_methods_of_a_shallow_copy_read_the_copy(call):
    call = call.__name__
    model = Owner()
    patch(model, HALF)
    twin = copy.copy(model)
    twin.scale = 3.0
    assert slope(getattr(twin, call)(X), model) == [1.5] * 3
    assert slope(getattr(model, call)(X), model) == [0.5] * 3
    unpatch(model)
    assert slope(getattr(twin, call)(X), model) == slope(getattr(model, call)(X), model) == [0.0] * 3


def test_the_methods_of_a_replica_run_with_its_own_parameters():
    model = Owner(Owner())
    stock = copy.deepcopy(model)
    patch(model, HALF)
    for value in (0.0, 2.0, 0.0):
        replica = replicated(model, value)
        assert torch.equal(replica(X), replicated(stock, value)(X))
        assert slope(replica(X), replica) == slope(replica(X), replica.part) == [0.5 if value == 0 else 1.0] * 3
    assert slope(model(X), model) == [0.5] * 3


def test_a_forward_that_is_set_after_the_patch_takes_the_choice():
    """Accelerate takes the function of the method, wraps it, and makes it the forward."""
    model, x = Net(), X
    patch(model, HALF)
    function = model.forward.__func__
    model.forward = MethodType(lambda self, x: function(self, x), model)
    assert slope(model(x), model) == [0.25] * 3
    model.forward = lambda x: F.relu(model.k) + x
    assert slope(model(x), model) == [0.5] * 3


def test_a_call_that_a_class_overrides_takes_the_choice():
    class Calling(Net):
        def _call_impl(self, *args, **kwargs):
            return F.relu(self.k) + super()._call_impl(*args, **kwargs)

    model = Calling()
    patch(model, HALF)
    assert slope(model(X), model) == [0.75] * 3


def test_unpatch_keeps_the_order_of_the_attributes():
    model = Net()
    model.forward = functools.partial(Net.forward, model, scale=2.0)
    model.last = 1
    before = list(vars(model).items())
    patch(model, HALF)
    unpatch(model)
    assert list(vars(model).items()) == before


def test_a_part_that_a_model_without_code_gets_later_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    patch(model, HALF)
    for _ in range(20):
        model(X)
    model.append(nn.ReLU())
    with pytest.raises(ValueError, match="ReluBackward0"):
        [model(X) for _ in range(2)]


def test_lambdas_in_a_shared_table_stay_its_own():
    class Lambdas(Net):
        def __init__(self, table):
            super().__init__()
            self.table = table

        def forward(self, x):
            return self.table["one"](x)

    one = lambda x: F.relu(x)  # noqa: E731 # what is tested
    table = {"one": one}
    stock, model = Lambdas(table), Lambdas(table)
    patch(model, HALF)
    assert slope(model(model.k), model)[0] == 0.5
    assert slope(stock(stock.k), stock)[0] == 0.0  # another model's
    assert table["one"] is one
    del model
    assert one(X) is not None


# ---------------------------------------------------------------------------------------------------- entrances
ENTRANCES = {
    "forward": lambda m: m(X) - m.act(m.k) + m.act(m.k),
    "encode": lambda m: m.encode(X),
    "decorated": lambda m: m.decorated(X),
    "in a pool of threads": lambda m: m.encode_in_thread(X),
    "in threads": lambda m: m.thread(X),
    "generator": lambda m: next(m.stream(1)),
    "of a part": lambda m: nn.ModuleList([m])[0].encode(X),
}


@pytest.mark.parametrize("name", ENTRANCES)
def test_every_method_is_an_entrance(name):
    model = Net()
    stock = copy.deepcopy(model)
    patch(model, HALF)
    want = 0.25 if name == "forward" else 0.5
    assert torch.equal(ENTRANCES[name](model), ENTRANCES[name](stock))
    assert slope(ENTRANCES[name](model), model) == [want] * 3
    assert slope(ENTRANCES[name](stock), stock) == [0.0] * 3
    assert torch._C._len_torch_function_stack() == 0
    assert threading.Thread.start.__module__ == "threading"  # as before
    assert ThreadPoolExecutor.submit.__module__ == "concurrent.futures.thread"


def test_a_thread_that_outlives_its_method_leaves_the_run():
    """What it calls later need not belong to the model."""
    ends, slopes = threading.Event(), []

    class Starts(nn.Module):
        def forward(self, x):
            self.thread = threading.Thread(target=self.later)
            self.thread.start()
            return F.relu(x)

    def later():
        ends.wait(60)
        x = torch.zeros(3, requires_grad=True)
        slopes.extend(torch.autograd.grad(F.relu(x).sum(), x)[0].tolist())

    model, x = Starts(), torch.zeros(3, requires_grad=True)
    model.later = later
    patch(model, HALF)
    assert torch.autograd.grad(model(x).sum(), x)[0].tolist() == [0.5] * 3
    ends.set()
    model.thread.join()
    assert slopes == [0.0] * 3


def test_private_methods_and_those_of_several_models():
    model, other = Net(), Net()
    patch(model, Jacobians(clamp=(0.25, 0.25))), patch(other, HALF)
    assert slope(model._hidden(X), model) == [0.25] * 3
    stock = Net()
    assert slope(other._hidden(X), other) == slope(stock._hidden(X), stock)
    both = model.encode(X) + other.encode(X)
    assert torch.autograd.grad(both.sum(), [model.k, other.k])[1].tolist() == [0.5] * 3


def test_a_generator_is_driven_as_it_was():
    model, stock = Net(), Net()
    patch(model, HALF)
    for make in (lambda: model.stream(3), lambda: stock.stream(3)):
        generator = make()
        assert inspect.isgenerator(generator)
        values = [next(generator), generator.send(2.0), generator.send(3.0)]
        with pytest.raises(StopIteration) as stop:
            generator.send(0.0)
        assert stop.value.value.tolist() == [0.0] * 3
        assert [v[0].item() for v in values] == [0, 1, 2]
    generator = model.stream(3)
    next(generator)
    assert slope(generator.send(2.0), model) == [1.0] * 3  # 2 * 0.5
    with pytest.raises(KeyError):
        generator.throw(KeyError("thrown"))
    generator = model.stream(3)
    next(generator)
    generator.close()
    assert torch._C._len_torch_function_stack() == 0


class Lit(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.zeros(3))

    def training_step(self, batch, index):
        return (F.relu(self.k) + batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def test_a_lightning_step():
    model = Lit()
    patch(model, HALF)
    assert slope(model.training_step(X, 0), model) == [0.5] * 3
    assert is_overridden("training_step", model)
    assert not is_overridden("validation_step", model)
    trainer = L.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, torch.utils.data.DataLoader(torch.zeros(1, 3)))
    assert model.k.tolist() == [-0.5] * 3


# ------------------------------------------------------------------------------------- tracers, graphs, exporters
def test_graph_modules_keep_the_patch():
    graph = torch.fx.symbolic_trace(Net())
    patch(graph, HALF)
    meta = dict(graph.meta)
    for module in (graph, copy.deepcopy(graph), torch.optim.swa_utils.AveragedModel(graph).module):
        assert slope(module(X), module) == [0.25] * 3
    graph.recompile()
    assert slope(graph(X), graph) == [0.25] * 3
    twin = copy.deepcopy(graph)
    with using(twin, Jacobians(relu=1.0)):
        assert slope(twin(X), twin) == [1.0] * 3
        assert slope(graph(X), graph) == [0.25] * 3
    with pytest.raises(pickle.PicklingError, match="unpatch the model first"):
        pickle.dumps(graph)
    unpatch(graph), unpatch(twin)
    for module in (graph, twin):
        assert slope(module(X), module) == [0.0] * 3
    assert meta
    assert graph.meta == {}
    pickle.loads(pickle.dumps(graph))


def test_symbolic_tracing_keeps_the_choice_or_says_what_to_do():
    inside = nn.Sequential(Net())
    patch(inside, HALF)
    traced = torch.fx.symbolic_trace(inside)
    out = traced(X)
    assert slope(out, inside[0]) == [0.25] * 3
    model = Net()
    patch(model, HALF)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unpatch the model first"):
            torch.fx.symbolic_trace(model)
        torch.compile(lambda x: x + 1, backend="eager")(X)  # the compiler wraps the tracer's method
    assert "Net(" in repr(model)
    modules = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    patch(modules, HALF)
    nn.init.zeros_(modules[0].weight), nn.init.zeros_(modules[0].bias)
    traced = torch.fx.symbolic_trace(modules)
    assert torch.autograd.grad(traced(X).sum(), modules[0].bias)[0].tolist() == [0.5] * 3


def test_torchvisions_feature_extractor():
    model = torchvision.models.resnet18(num_classes=2).eval()
    patch(model, HALF)
    with pytest.raises(RuntimeError, match="unpatch the model first"):
        create_feature_extractor(model, ["layer1"])
    x = torch.randn(1, 3, 32, 32)
    unpatch(model)
    patch(model, HALF, example=x)  # now it is known that only modules have kinks
    features = create_feature_extractor(model, ["layer1"])
    with using(model, Jacobians(relu=1.0)):
        assert torch.equal(features(x)["layer1"], model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x))))))
    assert any("jacobian" in repr(m) for m in features.modules())


def test_scripting_says_what_to_do():
    for model in (Net(), nn.Sequential(nn.ReLU())):
        patch(model, HALF)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(
                Exception, match=r"torch\.jit\.script drops the Jacobian choice: unpatch the model first"
            ):
                torch.jit.script(model)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        return F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)


def layers():
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, 2, 1), bn=nn.BatchNorm2d(2), relu=nn.ReLU(), pool=nn.MaxPool2d(2))
    )


@pytest.mark.parametrize("make", [Calls, layers])
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")  # what is tested goes with it
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean")  # tracing reads sizes
def test_tracing_for_training_says_what_to_do(make):
    model, x = make().eval(), torch.ones(1, 1, 4, 4)
    patch(model, HALF)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace drops the Jacobian choice: unpatch the model first"):
        torch.jit.trace(model, x)
    with torch.no_grad(), pytest.warns(PatchWarning, match="no Jacobian choice"):
        traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), model(x))
    unpatch(model)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize("make", [Calls, layers])
@pytest.mark.filterwarnings("ignore")
def test_fx_quantisation_says_what_to_do(make):
    fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    settings, x = torch.ao.quantization.get_default_qconfig_mapping(), torch.ones(1, 1, 4, 4)
    for training, convert in (
        (False, lambda m: fx.prepare_fx(m, settings, (x,))), (True, lambda m: fx.prepare_qat_fx(m, settings, (x,))),
    ):  # fmt: skip
        model = make().train(training)
        patch(model, HALF)
        with pytest.raises(RuntimeError, match="unpatch the model first"):
            convert(model)
        unpatch(model)
        converted = convert(model)
        patch(converted, HALF, strict=False)
        assert converted(x).shape == (1, 2, 2, 2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_fused_and_quantisation_aware_modules_keep_the_choice(training):
    """The fused module holds the patched relu, or calls one inside the patched model."""
    quantization = pytest.importorskip("torch.ao.quantization")
    gradients = []
    for choice in (HALF, Jacobians(relu=1.0)):
        model, x = Fusable().train(training), torch.ones(1, 1, 4, 4)
        patch(model, choice)
        fuse = quantization.fuse_modules_qat if training else quantization.fuse_modules
        fused = fuse(model, [["conv", "bn", "relu"]])
        if training:
            fused.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            fused = quantization.prepare_qat(fused)
        biases = [p for name, p in fused.named_parameters() if name.endswith("bias")]
        gradients.append(torch.autograd.grad(fused(x).sum(), biases))
    assert any((a != b).any() for a, b in zip(*gradients, strict=True))


class Fusable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()
        for p in (self.conv.weight, self.conv.bias, self.bn.bias):
            nn.init.zeros_(p)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.slope = nn.PReLU()
        nn.init.zeros_(self.conv.weight), nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        x = self.slope(self.pool(self.act(self.conv(x))))
        return x + F.hardtanh(x, -2.0, 2.0) + x.clamp(min=0) + torch.maximum(x, torch.zeros(()))


def test_export_keeps_the_choice_now_in_force():
    model, x = Pooled(), torch.ones(1, 1, 2, 2)
    stock = Pooled()
    stock.load_state_dict(model.state_dict())
    patch(model, Jacobians(relu=1.0, max_pool="minimal", prelu=0.25, clamp=(0.5, 0.5), maximum="first"))
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), stock(x))
    grads = [
        torch.autograd.grad(m(x).square().sum() + m(x).sum(), [p for _, p in sorted(m.named_parameters())])
        for m in (model, exported, stock)
    ]
    for a, b in zip(*grads[:2], strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(*grads[1:], strict=True))


def test_export_refuses_what_a_graph_cannot_keep():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return F.l1_loss(self.k, x)

    model = Loss()
    patch(model, Jacobians(abs=1.0))
    with pytest.raises(Exception, match=r"with strict=False; or unpatch the model first"):
        torch.export.export(model, (X,), strict=True)
    with pytest.raises(Exception, match=r"torch\.export does not keep .* abs: unpatch the model first"):
        torch.export.export(model, (X,))


# ------------------------------------------------------------------------------------------------- the quick way
def test_the_quick_way_is_tried_first_once_the_report_is_complete(monkeypatch):
    asked, made = [], []

    def make(operation, module, selection):
        made.append((module, selection))

        def fast(x):
            asked.append(x)
            return x * 2 if x.numel() == 1 else NotImplemented

        return fast

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    patch(model, HALF)
    one = torch.ones(1)
    monkeypatch.setattr(sites.native, "site", make)
    assert model[1].forward.fast is None
    with torch.no_grad():
        model(X)
    assert model[1].forward.fast is None
    for _ in range(2):
        model(X)
        assert made == []
    model(X)
    assert [(m, s.jacobians) for m, s in made] == [(model[1], HALF)]
    assert model[1](one).item() == 2
    assert torch.equal(model[1](torch.ones(3)), torch.ones(3))  # not taken
    n = len(asked)
    model[1](input=one)
    torch.compile(model[1], backend="eager", fullgraph=True)(one)
    assert len(asked) == n
    assert copy.deepcopy(model)[1].forward.fast is None
    counted = nn.Sequential(nn.ReLU())
    patch(counted, Plan([{"call": 0, "relu": 1}]))
    for _ in range(3):
        counted(torch.ones(1, requires_grad=True))
    assert counted[0].forward.fast is None


# ------------------------------------------------------------------------------------------------ nothing global
def test_patch_neither_imports_the_compiler_nor_changes_the_process():
    code = (
        "import sys, threading, torch; from torch import nn; from nslightning import *;"
        "start, relu, dynamo = threading.Thread.start, torch.nn.functional.relu, 'torch._dynamo' in sys.modules;"
        "m = nn.Sequential(nn.Linear(2, 2), nn.ReLU()); patch(m, Jacobians(relu=1.0), example=torch.ones(1, 2));"
        "m(torch.ones(1, 2)).sum().backward();"
        "assert threading.Thread.start is start and torch.nn.functional.relu is relu;"
        "assert dynamo or 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("where", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"])
def test_where_a_model_is_patched_does_not_matter(where):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    with where():
        patch(model, HALF)
    for run in (model, torch.compile(model, backend="aot_eager")):
        with using(model, Jacobians(relu=1.0)):
            assert torch.autograd.grad(run(torch.ones(1, 2)).sum(), model[0].bias)[0].tolist() == [1.0, 1.0]
    with where(), using(model, Jacobians(relu=1.0)):
        pass
    torch._dynamo.reset()


@pytest.mark.parametrize("nodes", ["C++", "Python"])
def test_compiled_autograd(nodes, monkeypatch):
    if nodes == "Python":
        monkeypatch.setattr(sites.native, "_library", lambda: None)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias), nn.init.ones_(model[2].weight)
    patch(model, HALF)
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True):
        for _ in range(2):
            model.zero_grad()
            model(torch.ones(3, 2)).sum().backward()
            assert model[0].bias.grad.tolist() == [1.5] * 4
    torch._dynamo.reset()


def test_a_method_replaced_after_the_patch_is_undone_first():
    model = Net()
    patch(model, HALF)
    inner = model.forward
    model.forward = lambda x: inner(x) + 1
    assert slope(model(X), model) == [0.25] * 3
    with pytest.raises(ValueError, match="forward of the model was replaced after the patch: undo that first"):
        unpatch(model)
    model.forward = inner
    unpatch(model)
    assert "forward" not in vars(model)


def test_a_setup_method_is_no_forward():
    model = Lit()
    patched = patch(model, HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatchWarning)
        model.configure_optimizers()
    assert not patched.traced
    model.training_step(X, 0)
    assert report(model).traced


# ------------------------------------------------------------------------------------------- later and elsewhere
class Elsewhere(nn.Module):
    """Code that does not run while a plain method does."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.zeros(3))
        self.kink = lambda x: F.relu(x)
        self.leaky = functools.partial(F.leaky_relu, negative_slope=0.25)

    def forward(self, x):
        return self.kink(self.k) + self.static(self.k) + x

    async def one(self, x):
        await asyncio.sleep(0)
        return F.relu(self.k) + x

    async def two(self, x):
        first, second = await asyncio.gather(self.one(x), self.one(x))
        return first + second + torch.relu(self.k)

    async def stream(self, n):
        for i in range(n):
            await asyncio.sleep(0)
            received = yield F.relu(self.k) + i
            assert received is None

    async def ranked(self):
        await asyncio.sleep(0)
        return self.k.sort()[0]

    def closure(self):
        def later(x):
            return F.relu(self.k) + x

        return later

    def partly(self):
        return functools.partial(lambda k, x: F.relu(k) + x, self.k)

    def partly_of_torch(self):
        return functools.partial(F.relu, inplace=False)

    def partly_by_keyword(self):
        return functools.partial(F.leaky_relu, negative_slope=0.25)

    def partly_of_a_method(self):
        return functools.partial(self.add, 0.0)

    def add(self, a, x):
        return F.relu(self.k) + a + x

    def expression(self):
        return (F.relu(self.k) for _ in range(2))

    def several(self):
        return (lambda: F.relu(self.k)), [lambda: F.relu(self.k)], {"one": lambda: F.relu(self.k)}

    @contextlib.contextmanager
    def context(self):
        yield F.relu(self.k)

    @functools.lru_cache  # noqa: B019 # what is tested
    def kept(self):
        return F.relu(self.k)

    @functools.singledispatchmethod
    def dispatched(self, x):
        return F.relu(self.k) + x

    doubled = functools.partialmethod(lambda self, n: n * F.relu(self.k), 2)

    @staticmethod
    def static(x):
        return F.relu(x)

    @classmethod
    def of_class(cls, x):
        assert cls is Elsewhere
        return F.relu(x)


async def _last(generator):
    return [value async for value in generator][-1]


def _entered(context):
    with context as value:
        return value


LATER = {
    "coroutine": (lambda m: asyncio.run(m.one(X)), 0.5),
    "coroutines side by side": (lambda m: asyncio.run(m.two(X)), 1.5),
    "asynchronous generator": (lambda m: asyncio.run(_last(m.stream(3))), 0.5),
    "closure": (lambda m: m.closure()(X), 0.5),
    "partial of a closure": (lambda m: m.partly()(X), 0.5),
    "partial of torch's": (lambda m: m.partly_of_torch()(m.k), 0.5),
    "partial by keyword, at a tie": (lambda m: m.partly_by_keyword()(m.k), 0.5),
    "partial by keyword, beside it": (lambda m: m.partly_by_keyword()(m.k - 1), 0.25),
    "partial of a method": (lambda m: m.partly_of_a_method()(X), 0.5),
    "lambda as an attribute": (lambda m: m.kink(m.k), 0.5),
    "partial as an attribute": (lambda m: m.leaky(m.k), 0.5),
    "static method": (lambda m: m.static(m.k), 0.5),
    "class method": (lambda m: m.of_class(m.k), 0.5),
    "generator expression": (lambda m: next(m.expression()), 0.5),
    "functions in containers": (lambda m: (f := m.several()) and f[0]() + f[1][0]() + f[2]["one"](), 1.5),
    "context manager": (lambda m: _entered(m.context()), 0.5),
    "cached method": (lambda m: (m.kept.cache_clear(), m.kept())[1], 0.5),
    "single dispatch": (lambda m: m.dispatched(1.0), 0.5),
    "partial method": (lambda m: m.doubled(), 1.0),
    "forward": (lambda m: m(X), 1.0),
}


@pytest.mark.parametrize("name", LATER)
def test_code_that_runs_later_or_elsewhere_takes_the_choice(name):
    call, want = LATER[name]
    model = Elsewhere()
    attributes = dict(vars(model))
    patch(model, Jacobians(relu=0.5, leaky_relu=0.5))
    for _ in range(2):  # the first call is looked at, the second is not
        assert slope(call(model), model) == [want] * 3
    assert torch._C._len_torch_function_stack() == 0
    assert (model.leaky.func, isinstance(model.leaky, functools.partial)) == (F.leaky_relu, True)
    assert inspect.isfunction(model.static)
    assert not inspect.ismethod(model.static)
    assert inspect.ismethod(model.of_class)
    assert model.of_class.__self__ is Elsewhere
    assert inspect.iscoroutinefunction(model.one)
    assert inspect.isasyncgenfunction(model.stream)
    assert model.closure().__name__ == "later"
    copied = copy.deepcopy(model)
    assert slope(call(copied), copied) == [want] * 3
    unpatch(model)
    assert dict(vars(model)) == attributes


def test_a_coroutine_is_driven_as_it_was():
    class Waiting(nn.Sequential):
        async def work(self):
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                log.append("cancelled")
                raise

        async def fails(self):
            await asyncio.sleep(0)
            raise KeyError("mine")

        async def stream(self):
            try:
                yield 1
                yield 2
            finally:
                log.append("closed")

    async def use(model):
        task = asyncio.create_task(model.work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(KeyError, match="mine"):
            await model.fails()
        generator = model.stream()
        assert await generator.asend(None) == 1
        with pytest.raises(OSError, match="thrown"):
            await generator.athrow(OSError("thrown"))
        generator = model.stream()
        assert await anext(generator) == 1
        await generator.aclose()
        assert [x async for x in model.stream()] == [1, 2]

    for patched in (False, True):
        log, model = [], Waiting(nn.ReLU())
        if patched:
            patch(model, HALF)
        asyncio.run(use(model))
        assert log == ["cancelled", "closed", "closed", "closed"]
    assert torch._C._len_torch_function_stack() == 0


def test_a_coroutine_is_strict():
    model = Elsewhere()
    patch(model, HALF)
    with pytest.raises(ValueError, match="sort"):
        asyncio.run(model.ranked())


def test_a_closure_keeps_its_model():
    model = Elsewhere()
    patch(model, HALF)
    later, k = model.closure(), model.k
    del model
    gc.collect()
    assert torch.autograd.grad(later(X).sum(), k)[0].tolist() == [0.5] * 3


def test_a_callable_attribute_may_be_set_after_the_patch():
    model = Elsewhere()
    patch(model, HALF)
    model.kink = new = torch.tanh
    unpatch(model)
    assert model.kink is new


class Named(nn.Module):
    @property
    def gap(self):
        return self.kinked()

    def kinked(self):
        return F.relu(self.k)


class Lazy:
    """A descriptor that computes a value."""

    def __init__(self, function):
        self.function = function

    def __get__(self, module, owner=None):
        return self if module is None else self.function(module)


class Checked(Lazy):
    """A descriptor that sees the attribute being set."""

    def __set__(self, module, value):
        vars(module)["checked_"] = F.relu(module.k) * value


class Decorated:
    """What a decorator returns: an object that makes the methods itself."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __get__(self, module, owner=None):
        return self if module is None else MethodType(self, module)


class LookedUp(Named):
    """Code that Python looks up on the class."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.zeros(3))

    @property
    def gap(self):
        """The gap."""
        return 2 * super().gap

    @gap.setter
    def gap(self, value):
        vars(self)["gap_"] = F.relu(self.k) * value

    @Decorated
    def decorated(self, x):
        return F.relu(self.k) + x

    lazy = Lazy(lambda self: F.relu(self.k))
    checked = Checked(lambda self: self.checked_)

    @functools.cached_property
    def bound(self):
        return F.relu(self.k)

    @property
    def width(self):
        return max(self.k.numel(), 1)

    @property
    def named(self):
        return self.k

    def __getitem__(self, index):
        return F.relu(self.k)[index]

    def __matmul__(self, x):
        return F.relu(self.k) @ x

    def __iter__(self):
        for _ in range(2):
            yield F.relu(self.k)

    def __call__(self, x):
        return F.relu(super().__call__(x))

    def forward(self, x):
        return self.k + x


LOOKED_UP = {
    "property over another": (lambda m: m.gap, 2.0),
    "setter": (lambda m: setattr(m, "gap", 3.0) or vars(m).pop("gap_"), 3.0),
    "descriptor": (lambda m: m.lazy, 1.0),
    "setter of a descriptor": (lambda m: setattr(m, "checked", 3.0) or m.checked, 3.0),
    "object of a decorator": (lambda m: m.decorated(X), 1.0),
    "cached property": (lambda m: m.bound, 1.0),
    "index": (lambda m: m[:], 1.0),
    "operator": (lambda m: m @ torch.eye(3), 1.0),
    "iteration": (lambda m: sum(m), 2.0),
    "__call__": (lambda m: m(torch.zeros(3)), 1.0),
    "compiled": (lambda m: torch.compile(lambda: m.gap, backend="aot_eager")(), 2.0),
}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")  # where it breaks the graph
@pytest.mark.parametrize("name", LOOKED_UP)
def test_what_python_looks_up_on_the_class_takes_the_choice(name):
    call, times = LOOKED_UP[name]
    stock, model = LookedUp(), LookedUp()
    classes = {cls: dict(vars(cls)) for cls in (Named, LookedUp)}
    patch(model, HALF)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for one in (model, *copies):
        assert slope(call(one), one) == [0.5 * times] * 3
    assert slope(call(stock), stock) == [0.0] * 3
    assert (LookedUp.gap.__doc__, inspect.signature(LookedUp.__matmul__)) == (
        "The gap.",
        inspect.signature(classes[LookedUp]["__matmul__"]),
    )
    assert isinstance(vars(LookedUp)["lazy"], Lazy)
    assert LookedUp.lazy.function is classes[LookedUp]["lazy"].function
    vars(model).pop("bound", None)
    unpatch(model)
    assert slope(call(model), model) == [0.0] * 3
    del copies, one
    gc.collect()
    assert {cls: dict(vars(cls)) for cls in classes} == classes


def test_a_property_without_a_kink_tells_nothing_of_the_model():
    model = LookedUp()
    patch(model, HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (model.width, model.named) == (3, model.k)
    assert not report(model).traced
    model(torch.zeros(3))
    assert [site.operation for site in report(model).sites] == ["relu"]


class OfAContainer(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Identity())
        self.k = nn.Parameter(torch.zeros(3))

    def encode(self):
        return F.relu(self.k)


class OfASite(nn.ReLU):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.zeros(3))

    def encode(self):
        return F.relu(self.k)


class OfALinear(nn.Linear):
    def __init__(self):
        super().__init__(3, 3)
        self.k = nn.Parameter(torch.zeros(3))

    def encode(self):
        return F.relu(self.k)


class WithoutForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.zeros(3))

    def encode(self):
        return F.relu(self.k)


class OfAList(nn.ModuleList):
    def __init__(self):
        super().__init__([nn.Identity()])
        self.k = nn.Parameter(torch.zeros(3))

    def encode(self):
        return F.relu(self.k)


@pytest.mark.parametrize("cls", [OfAContainer, OfASite, OfALinear, WithoutForward, OfAList], ids=lambda c: c.__name__)
def test_methods_that_a_model_adds_to_a_class_of_torchs_take_the_choice(cls):
    model, whole = cls(), nn.ModuleDict({"part": cls()})
    patch(model, HALF)
    patch(whole, HALF)
    assert slope(model.encode(), model) == [0.5] * 3
    assert slope(whole["part"].encode(), whole["part"]) == [0.5] * 3
    unpatch(model)
    assert slope(model.encode(), model) == [0.0] * 3


def test_what_runs_later_and_cannot_be_followed_is_named():
    class Mapping(WithoutForward):
        def encode(self):
            return map(F.relu, [self.k])

    model = Mapping()
    patch(model, HALF)
    with pytest.warns(PatchWarning, match="encode returns a map, whose code runs later"):
        model.encode()


def test_a_step_of_a_part_s_generator_is_over_when_the_root_goes_on():
    class Part(nn.Module):
        def steps(self, x):
            yield F.relu(x)
            yield F.relu(x)

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Part()

        def forward(self, x):
            first, second = (F.relu(x) + step for step in self.part.steps(x))
            return first, second

    model, x = Root(), torch.zeros(1, requires_grad=True)
    patch(model, Plan([Rule({"relu": 0.25}), Rule({"relu": 8.0}, stage="part")]))
    slopes = [torch.autograd.grad(y, x, retain_graph=True)[0].item() for y in model(x)]
    assert slopes == [8.25, 8.25]
