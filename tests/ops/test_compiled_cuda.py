"""A patched network is traced for a CUDA device, without one: its tensors are fake, they have a device and no values.

Dynamo traces the forward and the backward of each patched operation into the graph, so both are seen here. (PyTorch's
engine asks for a real device, so nothing below Dynamo can differentiate fake CUDA tensors.) The kernels that the
operators run there are interpreted in triton_interpreted.py.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nslightning import Jacobians, patch, using
from nslightning._torch import outside_every_mode
from nslightning.ops.autograd import selection

pytest.importorskip("triton", reason="the kernels for CUDA devices are Triton's")
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # numbers are found by it

LAST = torch.channels_last
CUDA = torch.device("cuda", 0)
POOLS = ((3, 2, 1), (2, 2))  #: Those of the network below; the first has its input, in the layout that it has.


@pytest.fixture
def fake(monkeypatch):
    """Tensors are fake; the choice's memory on a device, which is made outside every mode, is fake, too."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def inside():
        with mode:
            yield

    monkeypatch.setattr(selection, "outside_every_mode", inside)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # asks the driver
    torch._dynamo.reset()
    with mode:
        yield mode
    torch._dynamo.reset()


def network(dtype=torch.float32):
    place = {"device": CUDA, "dtype": dtype}
    return nn.Sequential(
        nn.MaxPool2d(*POOLS[0]), nn.Conv2d(3, 4, 3, **place), nn.ReLU(), nn.MaxPool2d(*POOLS[1]),
        nn.Conv2d(4, 4, 1, **place), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 2, **place),
    )  # fmt: skip


def traced(model, x):
    """Dynamo's graphs, of which each has those of the operations' forwards and backwards inside."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, backend=backend, fullgraph=True), graphs


def nodes(graph):
    return [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]


def tensors(node):
    return [t for t in tree_leaves(node.meta.get("example_value")) if isinstance(t, torch.Tensor)]


def named(graph, name):
    return [node for node in nodes(graph) if getattr(node.target, "__name__", node.target) == f"{name}.default"]


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_stays_on_the_device_with_stocks_shapes_and_strides(dtype, layout, fake):
    model = network(dtype)
    patch(model, Jacobians(relu=0.5, max_pool="minimal"))
    x = torch.empty(2, 3, 16, 15, device=CUDA, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    compiled, graphs = traced(model, x)
    y = compiled(x)
    assert (y.device, y.shape, y.dtype) == (CUDA, (2, 2), dtype)
    for choice in (Jacobians(), Jacobians(relu=1.0), Jacobians(max_pool="last"), Jacobians(max_pool=10.0)):
        with using(model, choice):
            compiled(x)
    (graph,) = graphs

    # Everything lies on the device: nothing is copied from or to the host, and the choice is read there.
    assert all(t.device == CUDA for node in nodes(graph) for t in tensors(node))
    for node in named(graph, "read_now"):
        assert [t.device for argument in node.args for t in tensors(argument)] == [CUDA, CUDA]
    assert len(named(graph, "read_now")) == 4  # for two ReLUs a derivative and the rule

    # Shapes, strides and dtypes of the pools, by stock's own on the host.
    forwards, backwards = named(graph, "pool_forward"), named(graph, "pool_backward")
    assert len(forwards) == len(backwards) == len(POOLS)
    assert tensors(forwards[0].args[0])[0].is_contiguous(memory_format=layout)
    for arguments, forward, backward in zip(POOLS, forwards, backwards, strict=True):
        (images,) = tensors(forward.args[0])
        with outside_every_mode():
            leaf = torch.empty_strided(images.shape, images.stride(), dtype=dtype).zero_().requires_grad_()
            stock = F.max_pool2d(leaf, *arguments)
            (gradient,) = torch.autograd.grad(stock, leaf, torch.ones_like(stock))
        output, reached = tensors(forward)
        assert described(output) == described(stock)
        assert described(reached) == (*described(stock)[:2], torch.int16)
        assert [described(t) for t in tensors(backward)] == [described(gradient)]


def described(tensor):
    return tensor.shape, tensor.stride(), tensor.dtype


class Watch(TorchDispatchMode):
    """Notes the devices of each operation's tensors. Fake tensors refuse to be asked for values by themselves."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.devices |= {t.device for t in tensors if t.dim()}  # a number may be the host's: it is no transfer
        return result


def test_the_backwards_run_on_the_device_and_ask_for_no_values(fake):
    model = network()
    patch(model, Jacobians(relu=0.5, max_pool="minimal"))
    x = torch.empty(2, 3, 16, 15, device=CUDA, requires_grad=True)
    compiled, graphs = traced(model, x)
    compiled(x)
    parts = [part for name, part in graphs[0].named_children() if name.startswith("bwd_body")]
    assert len(parts) == 4  # two ReLUs, two pools
    for part in parts:
        placeholders = part.graph.find_nodes(op="placeholder")
        if not all(map(tensors, placeholders)):
            pytest.skip(f"Dynamo of torch {torch.__version__} keeps no example of the tensors that a body closes over")
        inputs = [torch.empty_like(t) for node in placeholders for t in tensors(node)]
        with Watch() as watch:
            results = part(*inputs)
        assert watch.devices == {CUDA}
        gradient = tree_leaves(results)[0]
        assert gradient.device == CUDA


def test_the_operators_that_run_there_form_their_table_on_the_device(fake, monkeypatch):
    """What :func:`pool_backward` runs on a CUDA device, up to the launch of its kernel."""
    from nslightning.ops.autograd import pool_operators
    from nslightning.ops.kernels import triton as kernels

    launches = []
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, entries, *tensors, **numbers: launches.append((tensors, numbers))
    )
    numbers = [3, 3, 2, 2, 1, 1, 1, 1, 0]
    x = torch.empty(2, 3, 9, 8, device=CUDA).contiguous(memory_format=LAST)
    weights = torch.empty(4, dtype=torch.float64, device=CUDA)
    with Watch() as watch:
        y, reached = pool_operators._forward(x, numbers)
        g = torch.empty_like(y)
        monkeypatch.setattr(pool_operators, "refuse_random", lambda weights: None)  # looks on the host, by the address
        gradient = pool_operators._backward(g, reached, weights, numbers, [9, 8])
    assert watch.devices - {torch.device("meta")} == {CUDA}  # shapes come from tensors without memory
    assert described(y) == described(pool_operators._fake_forward(x, numbers)[0])
    assert described(reached) == described(pool_operators._fake_forward(x, numbers)[1])
    assert described(gradient) == described(pool_operators._fake_backward(g, reached, weights, numbers, [9, 8]))
    forward, backward = launches
    assert (forward[1]["LAST"], backward[1]["LAST"], backward[1]["MEMORY"]) == (True, True, True)
    coefficients, last = backward[0][2:4]
    assert (coefficients.shape, coefficients.dtype, last.device) == ((2, 17), torch.float32, CUDA)
