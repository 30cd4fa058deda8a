"""The CUDA kernels of the C++ nodes, without a GPU: compiled for devices, and run on a CPU.

NVRTC needs no device to compile. To run the kernels, a C++ compiler builds the same source as a library that has the
functions of NVIDIA's driver (``cuda_on_host.cpp``). The nodes then take CPU tensors the way they take CUDA tensors: the
tests see the launches, the arguments as a driver unpacks them, and the bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import shutil
import subprocess
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import WEIGHTS, naive_pool
from test_native_nodes import GRADIENTS, LAYOUTS, POINTWISE, POOLS, assert_same, tied_input
from torch import nn

from nslightning import Jacobians, ops
from nslightning.ops.autograd import native, nodes
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.pooling import pool, regular
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.kernels import cuda, store

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INFINITY = float("nan"), float("inf")
WITHOUT_NVRTC = "NVRTC is not installed: it comes with PyTorch's wheels for CUDA"


@pytest.mark.skipif(not cuda.available(), reason=WITHOUT_NVRTC)
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_a_device_that_is_not_there(architecture):
    binary = cuda.compiled(architecture)
    assert binary.startswith(b"\x7fELF")
    for name in ("relu_forward", "relu_backward", "linear_backward", "replace", "pool_forward", "pool_backward_wide"):
        for dtype in DTYPES:
            assert f".text.{name}_{str(dtype).removeprefix('torch.')}".encode() in binary


@pytest.mark.skipif(not cuda.available(), reason=WITHOUT_NVRTC)
def test_a_compiled_image_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("NSLIGHTNING_NATIVE_DIR", str(tmp_path))
    made = []
    monkeypatch.setattr(cuda, "compiled", lambda architecture: made.append(architecture) or b"binary")
    assert cuda.image(90) == cuda.image(90) == b"binary"
    assert cuda.image(80) == b"binary"
    assert made == [90, 80]
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".cubin"] * 2


@pytest.mark.skipif(not cuda.available(), reason=WITHOUT_NVRTC)
def test_an_architecture_that_nvrtc_does_not_know_says_so():
    with pytest.raises(cuda.CompilationError, match="sm_11"):
        cuda.compiled(11)


def test_nodes_take_cuda_tensors_only_where_asked_for(monkeypatch):
    monkeypatch.setattr(native, "state", lambda: "built")
    monkeypatch.delenv("NSLIGHTNING_NATIVE", raising=False)
    assert native.cuda_state() == "not asked for"
    assert native._connect(0)  # asks no device for anything
    monkeypatch.setenv("NSLIGHTNING_NATIVE", "cuda")
    monkeypatch.setattr(cuda, "available", lambda: True)
    assert native.cuda_state() == "in force"
    monkeypatch.setattr(cuda, "available", lambda: False)
    assert native.cuda_state() == "no NVRTC"
    monkeypatch.setattr(native, "state", lambda: "not built")
    assert native.cuda_state() == "no nodes"


def test_a_device_that_cannot_be_had_is_named_once_and_left_to_the_python_nodes(monkeypatch):
    class Library:
        def load(self, *_):
            raise RuntimeError("NVIDIA's driver cannot be loaded: no file.")

    monkeypatch.setattr(native, "cuda_state", lambda: "in force")
    monkeypatch.setattr(native, "_library", lambda: Library())
    monkeypatch.setattr(cuda, "image", lambda architecture: b"")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not native._connect(0)  # nothing may be loaded now; asked again later
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match="do not take tensors on cuda:0, as NSLIGHTNING_NATIVE=cuda asks: NVIDIA's"):
        assert native._connect(0)


# ------------------------------------------------------------------------------------------- the kernels, run on a CPU
@pytest.fixture(scope="module")
def host_driver(tmp_path_factory):
    if native.state() != "built":
        pytest.skip("the C++ nodes are not built: python -m nslightning.ops.kernels.build")
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ to compile the kernels for a CPU")
    made = tmp_path_factory.mktemp("driver") / "cuda_on_host.so"
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC")
    source = Path(__file__).parents[1] / "cuda_on_host.cpp"
    subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True)
    return made


@pytest.fixture
def driver(host_driver):
    """CPU tensors go the way of CUDA tensors."""
    library = native._library()
    library.load(0, b"an image", str(host_driver), True)
    loaded = ctypes.CDLL(str(host_driver))
    yield loaded
    for name in ("fail", "capturing"):
        ctypes.c_int.in_dll(loaded, name).value = 0
    loaded.forget_graph()
    library.load(0, None, str(host_driver), True)


@pytest.fixture
def python(driver, monkeypatch):
    """Run a function with the Python nodes, composed of PyTorch's operations."""

    def run(function, *args):
        with monkeypatch.context() as patched:
            patched.setattr(native, "_library", lambda: None)
            patched.setattr("nslightning.ops.autograd.fused.kernels_for", lambda device: None)
            return function(*args)

    return run


def launches(driver):
    return ctypes.c_longlong.in_dll(driver, "launches").value


def last(driver):
    return (ctypes.c_char * 64).in_dll(driver, "launched").value.decode()


def gradient(name, x, g, jacobians):
    parameters = POINTWISE[name][0]
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = pointwise(name.partition(" ")[0], leaf, Selection(jacobians), *parameters)
    return y, torch.autograd.grad(y, leaf, g)[0]


def same_as_stock_on_cuda(name, x, y, want):
    """Stock's ReLU of -0.0 is 0.0 on CUDA, and -0.0 on a CPU."""
    if name == "relu":
        want = torch.where(x == 0, torch.zeros_like(want), want)
    assert_same(y, want)


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pointwise_kernels_have_the_bits_and_strides_of_stock_and_of_the_composition(name, dtype, driver, python):
    _, kinks, choices, stock = POINTWISE[name]
    field = name.partition(" ")[0]
    for layout, incoming in itertools.product(LAYOUTS, GRADIENTS):
        x = LAYOUTS[layout](tied_input(kinks, dtype))
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        want = stock(leaf)
        torch.manual_seed(1)
        g = GRADIENTS[incoming](want)
        (reference,) = torch.autograd.grad(want, leaf, g)
        strides = reference.stride()
        if name == "leaky_relu":  # of NaN: the slope times the gradient, on CUDA and in the last entries on a CPU
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            reference = torch.where(x.isnan(), (g.to(wide) * 0.1).to(dtype), reference)
        if name in ("relu6", "hardtanh"):  # of NaN: the gradient
            reference = torch.where(x.isnan(), g, reference)
        for choice in choices:
            jacobians = Jacobians(**{field: choice})
            before = launches(driver)
            y, ours = gradient(name, x, g, jacobians)
            assert (launches(driver) > before) == launched_for(name, jacobians)
            same_as_stock_on_cuda(name, x, y, want)
            tied = sum(x == torch.tensor(k, dtype=dtype) for k in kinks).bool()
            composed = python(gradient, name, x, g, jacobians)[1]
            assert torch.equal(ours[tied].nan_to_num(123.0), composed[tied].nan_to_num(123.0)), (
                layout,
                incoming,
                choice,
            )
            assert ours.stride() == strides
            assert_same(ours[~tied], reference[~tied])


def launched_for(name, jacobians):
    """Whether a kernel of ours runs in the forward or the backward."""
    if name in ("relu", "relu6", "leaky_relu", "hardtanh"):
        return True
    return jacobians != Jacobians() and name != "clamp to a point"


@pytest.mark.parametrize("name", ["relu", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_published_rule_writes_constants(name, dtype, driver, python):
    x = tied_input(POINTWISE[name][1], dtype)
    g = torch.randn(x.shape).to(dtype)
    for choice in (0.3, 0.0) if name == "relu" else ((0.3, 0.25), (0.0, 0.0)):
        jacobians = Jacobians(**{name: choice}, rule="published")
        ours, composed = gradient(name, x, g, jacobians)[1], python(gradient, name, x, g, jacobians)[1]
        assert torch.equal(ours[~x.isnan()], composed[~x.isnan()])
        assert torch.equal(ours[x.isnan()], g[x.isnan()])


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 255, 8 * 256, 8 * 256 + 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_and_places_that_are_no_multiple_of_a_vector(size, dtype, driver, python):
    """Entries at the end, and memory that does not begin at 16 bytes: nothing behind the end is touched."""
    for offset in (0, 1):
        memory = tied_input((0.0,), dtype, (size + offset + 3,)).nan_to_num(1.0, 1.0, 1.0)
        before = memory.clone()
        leaf = memory[offset : offset + size].detach().requires_grad_()
        y = pointwise("relu", leaf, Selection(Jacobians(relu=0.3)))
        g = torch.randn(size + offset).to(dtype)[offset:]
        (ours,) = torch.autograd.grad(y, leaf, g)
        assert torch.equal(y, F.relu(leaf))
        assert torch.equal(memory, before)
        expected = python(gradient, "relu", leaf.detach(), g, Jacobians(relu=0.3))[1]
        assert torch.equal(ours, expected)
        inside = memory.clone().requires_grad_() * 1
        pointwise("relu", inside, Selection(Jacobians(relu=0.3)), inplace=True)
        assert torch.equal(inside, F.relu(memory))


@pytest.mark.parametrize("geometry", [*POOLS, "2x2 far apart", "4x4 overlapping"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["32 bits", "64 bits"])
def test_pooling_kernels_have_the_bits_and_strides_of_stock_and_of_the_composition(
    geometry, dtype, wide, driver, python
):
    arguments = {"2x2 far apart": (2, 5, 1, 1, False), "4x4 overlapping": (4, 3, 2, 1, True)}.get(
        geometry, POOLS.get(geometry)
    )
    windows = regular(2, *arguments)
    library = native._library()
    limit = library.count_in_64_bits(0) if wide else library.count_in_64_bits(2**31 - 2**16)

    def run(x, g, jacobian):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = pool(leaf, Selection(Jacobians(max_pool=jacobian)), windows)
        return y, torch.autograd.grad(y, leaf, g)[0]

    for layout, special in itertools.product(("contiguous", "channels_last", "one channel"), (False, True)):
        x = torch.randint(-1, 3, (2, 6, 9, 8), generator=torch.Generator().manual_seed(2)).to(dtype)
        if special:
            x[0, 0, 2, :2], x[0, 1] = NAN, -INFINITY
        x = LAYOUTS[layout](x)
        # Else the composition adds up in another order: large windows dimension by dimension, tied windows last.
        in_order = windows.disjoint(x.shape[2:]) or not (special or geometry == "4x4 overlapping")
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        want = F.max_pool2d(leaf, *arguments)
        # A device adds up halves as float32 and rounds once; a CPU rounds each sum.
        float_x = x if dtype == torch.float64 else x.float()
        float_leaf = float_x.clone(memory_format=torch.preserve_format).requires_grad_()
        float_y = F.max_pool2d(float_leaf, *arguments)
        for incoming in GRADIENTS.values():
            g = incoming(want)
            (stock,) = torch.autograd.grad(float_y, float_leaf, g.to(float_x.dtype), retain_graph=True)
            for jacobian in (0.0, "minimal", "last", "sum", 10.0, 0.3):
                y, ours = run(x, g, jacobian)
                assert last(driver).startswith("pool_backward_wide" if wide else "pool_backward_")
                assert ("wide" in last(driver)) == wide
                assert_same(y, want)
                assert ours.stride() == torch.autograd.grad(want, leaf, g, retain_graph=True)[0].stride()
                composed = python(run, float_x, g.to(float_x.dtype), jacobian)[1]
                if jacobian == 0.0:
                    assert torch.equal(ours, stock.to(dtype))
                if in_order:
                    assert torch.equal(ours, composed.to(dtype)), (layout, jacobian)
                else:
                    torch.testing.assert_close(ours, composed.to(dtype))
    library.count_in_64_bits(limit)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_pooling_kernels_against_sums_window_by_window(weights, driver):
    choice = {"native": 0.0, "last": "last", "minimal": "minimal", "beta10": 10.0, "sum": "sum"}[weights]
    x = torch.randint(0, 2, (2, 2, 7, 6), generator=torch.Generator().manual_seed(3)).float().requires_grad_()
    for arguments in ((3, 2, 1, 1, False), (2, 2, 0, 1, False), ((3, 2), (1, 2), (0, 0), (2, 1), False)):
        y = pool(x, Selection(Jacobians(max_pool=choice)), windows := regular(2, *arguments))
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
        geometry = (windows.kernel, windows.stride, windows.padding, windows.dilation)
        expected = naive_pool(x, g, geometry, WEIGHTS[weights])
        torch.testing.assert_close(torch.autograd.grad(y, x, g)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_an_infinite_gradient_of_a_window_without_ties_reaches_its_entry_alone(driver):
    x = torch.arange(81.0).view(1, 1, 9, 9)
    x[0, 0, 0, :3] = 100.0  # a tie in the first row of windows
    x.requires_grad_()
    for choice in ("minimal", "sum", 10.0, "last", 0.0):
        y = pool(x, Selection(Jacobians(max_pool=choice)), regular(2, 3, 2))
        g = torch.ones_like(y)
        g[0, 0, :, -1] = INFINITY
        (ours,) = torch.autograd.grad(y, x, g)
        assert not ours.isnan().any(), choice
        assert ours.isinf().sum() == 4


def test_nothing_is_looked_at(driver):
    """Where no entry ties, a device is not asked: there is a node of ours, and it says that entries may tie."""
    for operation in ("relu", "relu6", "hardswish"):
        x = torch.full((3,), 7.5, requires_grad=True)
        described = native.describe(pointwise(operation, x, Selection(Jacobians())).grad_fn)
        assert described.operation == operation
        assert described.tied
    x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    assert native.describe(pool(x, Selection(Jacobians()), regular(2, 2)).grad_fn).tied


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "clamp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(name, dtype, driver, python):
    parameters, kinks, choices, _ = POINTWISE[name]
    x = tied_input(kinks, dtype).nan_to_num(1.0, 8.0, -8.0)
    leaf = x.clone().requires_grad_()
    g = torch.randn(x.shape).to(dtype)
    in_place = {
        "relu": F.relu_, "relu6": lambda x: F.relu6(x, True), "leaky_relu": lambda x: F.leaky_relu_(x, 0.1),
        "hardtanh": lambda x: F.hardtanh_(x, -0.5, 2.0), "hardswish": lambda x: F.hardswish(x, True),
        "hardsigmoid": lambda x: F.hardsigmoid(x, True), "clamp": lambda x: x.clamp_(-0.5, 2.0),
    }[name]  # fmt: skip
    jacobians = Jacobians(**{name: choices[1]})

    def run():
        inside = leaf * 1
        version = inside._version
        y = pointwise(name, inside, Selection(jacobians), *parameters, inplace=True)
        assert y is inside
        return y, torch.autograd.grad(y, leaf, g, retain_graph=True)[0], y._version - version

    before = launches(driver)
    y, ours, versions = run()
    assert native.describe(y.grad_fn).operation == name
    assert launches(driver) > before
    stock_inside = leaf * 1
    version = stock_inside._version
    assert torch.equal(y, in_place(stock_inside))
    assert versions == stock_inside._version - version
    assert torch.equal(ours, python(run)[1])


def test_the_choice_is_read_when_the_backward_runs(driver):
    selection = Selection(Jacobians(relu=1.0))
    x = torch.zeros(5, requires_grad=True)
    y = pointwise("relu", x, selection)
    for alpha in (0.0, 0.5, 2.0):
        selection.set(Jacobians(relu=alpha))
        assert torch.equal(torch.autograd.grad(y.sum(), x, retain_graph=True)[0], torch.full((5,), alpha))


def test_second_derivatives_random_choices_and_recorders_go_the_python_way(driver):
    x = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    y = pointwise("relu", x * 1, Selection(Jacobians(relu=0.5)))
    (first,) = torch.autograd.grad((y * x.exp()).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    slope = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64)
    assert torch.allclose(second, (2 * slope + x.relu()).detach() * x.exp().detach())
    zeros = torch.zeros(40, requires_grad=True)
    drawn = torch.autograd.grad(pointwise("relu", zeros, Selection(Jacobians(relu="random"))).sum(), zeros)[0]
    assert len(drawn.unique()) == 40
    met = []
    selection = Selection(Jacobians(max_pool=0.0))
    selection.recorder = lambda node, vjp, *difference: met.append((node, vjp, difference))
    z = torch.zeros(1, 1, 2, 2, requires_grad=True)
    pool(z, selection, regular(2, 2)).sum().backward()
    ((node, vjp, (difference,)),) = met
    minimal = Selection(Jacobians(max_pool="minimal"))
    assert nodes.operation_of(node) == "max_pool"
    assert torch.equal(vjp(minimal), torch.full_like(z, 0.25))
    with torch.no_grad():
        assert torch.equal(difference(minimal, selection), torch.tensor([-0.75, 0.25, 0.25, 0.25]).view(1, 1, 2, 2))


def test_a_patched_network_trains_on_the_kernels(driver, python):
    from nslightning import patch

    def run():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(4, 4, 2), nn.ReLU6(inplace=True),
            nn.Flatten(), nn.Linear(16, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3), nn.Hardswish(),
        )  # fmt: skip
        nn.init.zeros_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        patch(model, Jacobians(relu=1.0, max_pool="minimal", relu6=(0.5, 0.25)))
        model(torch.randn(4, 1, 8, 8)).square().sum().backward()
        return [p.grad for p in model.parameters()]

    before = launches(driver)
    ours = run()
    assert launches(driver) == before + 6  # both ways of ReLU and pooling, the gradients of ReLU6 and LeakyReLU
    for one, other in zip(ours, python(run), strict=True):
        assert torch.equal(one, other)


def test_a_launch_has_its_devices_context_and_leaves_the_threads_own(driver):
    x = torch.zeros(5, requires_grad=True)
    driver.use_other_context()
    pointwise("relu", x, Selection(Jacobians(relu=0.5)))
    driver.other_context_is_current.restype = ctypes.c_bool
    assert driver.other_context_is_current()
    driver.use_no_context()
    pointwise("relu", x, Selection(Jacobians(relu=0.5)))


def test_a_failed_launch_says_what_the_driver_says(driver):
    ctypes.c_int.in_dll(driver, "fail").value = 700
    x = torch.zeros(5, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"relu_forward: a failure that a test asked for \(700\)"):
        pointwise("relu", x, Selection(Jacobians(relu=0.5)))


def test_a_library_that_is_no_driver_is_refused(driver, host_driver):
    library = native._library()
    with pytest.raises(RuntimeError, match=r"driver cannot be loaded: .*no_such"):
        library.load(1, b"an image", "libno_such.so", False)
    with pytest.raises(RuntimeError, match="has no function cuInit"):
        library.load(1, b"an image", str(store.library()), False)
    with pytest.raises(RuntimeError, match=r"cuModuleLoadData: .*\(200\)"):
        library.load(1, b"another image", str(host_driver), False)


@pytest.mark.parametrize("captured", [False, True])
def test_triton_launches_on_the_tensor_s_device_and_may_load_a_kernel_there(driver, host_driver, captured, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(place):
        entered.append(place)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured and entered[-1] == x.device)
    monkeypatch.setattr(cuda, "DRIVER", str(host_driver))
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"))
    with cuda.launching(x):
        assert entered == [x.device]
        assert driver.mode_of_captures() == (2 if captured else 0)
    assert entered == [x.device, None]
    assert driver.mode_of_captures() == 0
    with cuda.launching(torch.zeros(2)):  # which Triton interprets
        assert len(entered) == 2
    ctypes.c_int.in_dll(driver, "fail").value = 201
    if captured:
        with pytest.raises(RuntimeError, match="cuThreadExchangeStreamCaptureMode: CUDA error 201"):
            cuda.launching(x).__enter__()


def test_division_by_multiplication(driver):
    driver.divides.restype = ctypes.c_bool
    for value in [*range(1, 300), 1023, 1024, 1025, 50176, 65535, 65537, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1]:
        assert driver.divides(value), value


def test_graphs_are_freed(driver):
    selection = Selection(Jacobians(relu6=(0.5, 0.5)))
    y = pointwise("relu6", torch.zeros(2, requires_grad=True), selection)
    gone = weakref.ref(selection)
    del selection
    assert gone() is not None  # the graph reads it
    y.sum().backward()
    del y
    assert gone() is None


# ------------------------------------------------------------------------------------------------------ captured steps
@pytest.fixture
def graphs(driver, monkeypatch):
    """CPU tensors have their own memory for a choice, as CUDA tensors have, and a capture that the test begins."""
    capturing = ctypes.c_int.in_dll(driver, "capturing")
    monkeypatch.setattr("nslightning.ops.autograd.selection._has_own_memory", lambda device: True)
    monkeypatch.setattr("nslightning.ops.autograd.selection._has_graphs", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing.value))

    pool = []  # keeps what the captured launches write to, as a graph's memory pool does

    @contextlib.contextmanager
    def capture():
        capturing.value = 1
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: pool.append(t.detach()) or t, lambda t: t):
                yield
        finally:
            capturing.value = 0

    return capture


#: An operation, the entries at which it kinks, and the choices between replays; the first is in force at the capture.
CAPTURED = {
    "relu": ((0.0,), (None, 1.0, 0.0, 0.25)),
    "relu6": ((0.0, 6.0), (None, (0.5, 0.25), (0.0, 0.0), (1.0, 1.0))),
    "leaky_relu": ((0.0,), (None, 0.5, 0.1, 0.0)),
    "hardtanh": ((-1.0, 2.0), (None, (0.5, 0.25), (0.0, 1.0))),
    "hardswish": ((-3.0, 3.0), (None, (0.5, 0.25), (0.0, 1.0))),
    "hardsigmoid": ((-3.0, 3.0), (None, (0.5, 0.25))),
    "clamp": ((-0.5, 2.0), (None, (0.5, 0.25), (1.0, 1.0))),
}


@pytest.mark.parametrize("rule", ["exact", "published"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CAPTURED)
def test_a_replayed_backward_takes_the_choice_in_force_then(name, dtype, rule, driver, graphs):
    kinks, choices = CAPTURED[name]
    parameters = POINTWISE[name][0]
    selection = Selection(Jacobians())
    leaf = tied_input(kinks, dtype).nan_to_num(1.0).requires_grad_()
    y = pointwise(name, leaf, selection, *parameters)  # the forward before the capture makes the memory
    torch.manual_seed(3)
    g = torch.randn(y.shape).to(dtype)
    g.view(-1)[::7] = INFINITY  # which times 0 is NaN, where stock writes 0
    with graphs():
        (result,) = torch.autograd.grad(y, leaf, g, retain_graph=True)
    for choice in (*choices, *reversed(choices)):
        jacobians = Jacobians(**{name: choice}, rule=rule)
        selection.set(jacobians)
        if name in ("hardswish", "hardsigmoid", "clamp"):  # stock's own kernel, which ran at the capture, is replayed
            (stock,) = torch.autograd.grad(pointwise(name, leaf, Selection(Jacobians()), *parameters), leaf, g)
            result.copy_(stock)
        else:
            result.fill_(NAN)
        driver.replay()
        (want,) = torch.autograd.grad(pointwise(name, leaf, Selection(jacobians), *parameters), leaf, g)
        assert torch.equal(result.nan_to_num(123.0), want.nan_to_num(123.0)), choice
        if choice == choices[1] and rule == "exact":
            assert not torch.equal(want.nan_to_num(123.0), torch.autograd.grad(
                pointwise(name, leaf, Selection(Jacobians()), *parameters), leaf, g
            )[0].nan_to_num(123.0))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", ["2x2", "3x3 overlapping"])
def test_a_replayed_pooling_takes_the_choice_in_force_then(geometry, dtype, driver, graphs):
    windows = regular(2, *((2,) if geometry == "2x2" else (3, 2, 1)))
    x = torch.randint(0, 2, (2, 3, 8, 8), generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    selection = Selection(Jacobians(max_pool="minimal"))
    y = pool(x, selection, windows)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    with graphs():
        (result,) = torch.autograd.grad(y, x, g, retain_graph=True)
    different = set()
    for choice in ("minimal", None, "last", 10.0, "sum", 0.3):
        selection.set(Jacobians(max_pool=choice))
        result.fill_(NAN)
        driver.replay()
        (want,) = torch.autograd.grad(pool(x, Selection(Jacobians(max_pool=choice)), windows), x, g)
        assert torch.equal(result, want), choice
        different.add(tuple(want.flatten().tolist()))
    assert len(different) == 6


def test_a_whole_captured_step_follows_the_choice(driver, graphs):
    """Forward and backward are captured together; the graph outlives the selection."""
    selection = Selection(Jacobians(relu=1.0))
    x, g = torch.tensor([-1.0, 0.0, 2.0, 0.0], requires_grad=True), torch.tensor([1.0, 2.0, 3.0, 4.0])
    pointwise("relu", x, selection)
    with graphs():
        y = pointwise("relu", x, selection)
        (result,) = torch.autograd.grad(y, x, g)
    for alpha in (0.5, 0.0, 1.0):
        selection.set(Jacobians(relu=alpha))
        driver.replay()
        assert torch.equal(result, torch.tensor([0.0, 2.0 * alpha, 3.0, 4.0 * alpha]))
    gone = weakref.ref(selection)
    del selection, y
    assert gone() is None
    torch.full((1000,), 77.0)  # would take freed memory
    result.fill_(NAN)
    driver.replay()
    assert torch.equal(result, torch.tensor([0.0, 2.0, 3.0, 4.0]))


def test_what_cannot_be_captured_is_refused(driver, graphs):
    x = torch.zeros(3, requires_grad=True)
    selection = Selection(Jacobians(relu=1.0))
    with graphs(), pytest.raises(RuntimeError, match="run one step before the capture"):
        pointwise("relu", x, selection).sum().backward()
    y = pointwise("relu", x, selection)
    with graphs(), pytest.raises(RuntimeError, match="changes inside a captured step"):
        selection.set(Jacobians(relu=0.0))
    selection.set(Jacobians(relu="random"))
    with graphs(), pytest.raises(RuntimeError, match="captured in a CUDA graph"):
        torch.autograd.grad(y.sum(), x)


def test_a_call_that_names_its_choice_is_captured_with_it(driver, graphs):
    """It never changes, so that no memory and no step before is needed."""
    x = torch.zeros(3, requires_grad=True)
    with graphs():
        g = torch.ones(3)
        (result,) = torch.autograd.grad(ops.relu(x, 0.5), x, g)
    driver.replay()
    assert torch.equal(result, torch.full((3,), 0.5))
