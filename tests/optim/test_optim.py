"""INNA and INNAprop against published numbers, naive numpy recursions and torch's AdamW."""

import copy
import io
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from nslightning.optim import INNA, INNAprop
from nslightning.optim import _velocity as velocity_form

Schedule = Callable[[int], float]


# ------------------------------------------------------------------------------------------------------------
# Two problems and the numbers that the released INNAprop optimizer gives on them in float64.
QUADRATIC = (
    np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]]),
    np.array([1.0, -2.0, 0.5]),
)
STARTS = {"quadratic": [1.0, -1.5, 2.0], "rosenbrock": [-1.2, 1.0]}
SETTINGS = {
    "S1": {"lr": 1e-3, "alpha": 0.1, "beta": 0.9, "sigma": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "S2": {"lr": 1e-2, "alpha": 2.0, "beta": 2.0, "sigma": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "S3": {"lr": 1e-2, "alpha": 1.0, "beta": 1.0, "sigma": 0.99, "eps": 1e-8, "weight_decay": 0.0},
    "S4": {"lr": 1e-2, "alpha": 0.5, "beta": 0.3, "sigma": 0.9, "eps": 1e-3, "weight_decay": 0.1},
}
# (problem, setting) -> {step: (theta, psi, v)}
RELEASED: dict[tuple[str, str], dict[int, tuple[list[float], list[float], list[float]]]] = {
    ("quadratic", "S1"): {
        1: (
            [0.9990899899068889, -1.5008849848243333, 1.9990799797897778],
            [0.909999989888889, -1.3649999848333334, 1.819999979777778],
            [0.0002500000000000002, 0.0010000000000000009, 0.0005625000000000005],
        ),
        3: (
            [0.9972770663099807, -1.5026533613122384, 1.997239633243612],
            [0.9099972127711335, -1.3650026374479025, 1.8199971496303067],
            [0.0007384816438093902, 0.0029782233194155373, 0.001679693321970188],
        ),
        10: (
            [0.9910085447020313, -1.5088255093071177, 1.9907954442313245],
            [0.9099589068358668, -1.3650399313885146, 1.8199580501076666],
            [0.002331131423928441, 0.009676878301046916, 0.005508588274797136],
        ),
        100: (
            [0.924104270422587, -1.585246814141863, 1.907861110062008],
            [0.9060635340720128, -1.3691715986183546, 1.8155486915792611],
            [0.011366933359857775, 0.06926868846025996, 0.04440964413624859],
        ),
    },
    ("quadratic", "S2"): {
        1: (
            [0.9799015004000001, -1.5198522498, 1.979803000266667],
            [-2.9999985, 4.49999775, -5.999997],
            [0.0002500000000000002, 0.0010000000000000009, 0.0005625000000000005],
        ),
        3: (
            [0.9461297752982843, -1.5564707947752043, 1.941548928909124],
            [-2.999124397434865, 4.500869512958472, -5.999094565078523],
            [0.0005460668108969635, 0.0026100000762373805, 0.0015565481277344821],
        ),
        10: (
            [0.8946662950194616, -1.6557856359046024, 1.8283708993917271],
            [-2.990468751918003, 4.511444548487893, -5.987749656933902],
            [0.0007355207107790562, 0.0056588237916637, 0.003984667566110737],
        ),
        100: (
            [0.9403988974660991, -1.8195172275783706, 1.4912533259913654],
            [-2.921325152629832, 4.8334246083329875, -5.525503890549807],
            [0.000674524304585336, 0.0075902688492193605, 0.007452270955134344],
        ),
    },
    ("quadratic", "S3"): {
        1: (
            [0.9900000002, -1.5099999999, 1.9900000001333333],
            [0.0, -0.0, 0.0],
            [0.0025000000000000022, 0.010000000000000009, 0.005625000000000005],
        ),
        3: (
            [0.9712875850990028, -1.5294625425440087, 1.9703033618037373],
            [0.0, -0.0, 0.0],
            [0.006321271775275117, 0.02768459235045542, 0.016048032282878117],
        ),
        10: (
            [0.9210452133871422, -1.5918922077917816, 1.9045798620117824],
            [0.0, -0.0, 0.0],
            [0.011674794738039385, 0.06990932786821337, 0.0448452029729463],
        ),
        100: (
            [0.9492005117293741, -1.8468871311638042, 1.472055954863711],
            [0.0, -0.0, 0.0],
            [0.005240487736491986, 0.05700780997655014, 0.056105953278739594],
        ),
    },
    ("quadratic", "S4"): {
        1: (
            [0.9959776546906188, -1.501454502997003, 1.9949473280071017],
            [0.8499716666666667, -1.2749575, 1.6999433333333334],
            [0.024999999999999994, 0.09999999999999998, 0.05624999999999999],
        ),
        3: (
            [0.9877268427453513, -1.5044455874309406, 1.9844681677371232],
            [0.849578068967567, -1.2749996205049896, 1.6994077835901091],
            [0.06389598166881175, 0.2655216181778177, 0.14991909850008345],
        ),
        10: (
            [0.9569904774945234, -1.5157064011567587, 1.944005359890646],
            [0.8448551034839713, -1.276415194828443, 1.6932221554178362],
            [0.11826528635475429, 0.584142409302088, 0.33499277303320085],
        ),
        100: (
            [0.8921130852959154, -1.704105286470699, 1.2113893215041727],
            [0.7394589493045767, -1.3958276722452987, 1.2095644463501873],
            [0.0030276470219941618, 0.024343191460730756, 0.012320090292703386],
        ),
    },
    ("rosenbrock", "S1"): {
        1: (
            [-1.1990879878667084, 1.0008899898887866],
            [-1.0919999878666669, 0.909999989888889],
            [46.48336000000004, 7.744000000000004],
        ),
        3: (
            [-1.1972715507374594, 1.002663139377798],
            [-1.091997200808959, 0.910002666012322],
            [137.20822393931283, 22.88608966528768],
        ),
        10: (
            [-1.1909949374094608, 1.0087959340655728],
            [-1.0919588141564527, 0.9100399955993049],
            [432.1641757069093, 72.3778815706875],
        ),
        100: (
            [-1.1229705249089459, 1.07557476210071],
            [-1.0880393527996686, 0.9138808989891939],
            [2139.1683582007363, 369.51553130297776],
        ),
    },
    ("rosenbrock", "S2"): {
        1: (
            [-1.179881800000928, 1.0199014999977274],
            [3.5999982, -2.9999985],
            [46.48336000000004, 7.744000000000004],
        ),
        3: (
            [-1.1461160213914325, 1.0536105239407567],
            [3.5991235171809692, -3.0008590272704563],
            [101.1149720784171, 17.16684352568046],
        ),
        10: (
            [-1.0844714779902562, 1.114705058638535],
            [3.5901874677054813, -3.0097476062902158],
            [143.82899868823975, 24.750162490477948],
        ),
        100: (
            [-1.0334508473231725, 1.0688972335418792],
            [3.4315256270297767, -3.1146943324314753],
            [137.0668200498691, 23.115233134792998],
        ),
    },
    ("rosenbrock", "S3"): {
        1: (
            [-1.1900000000004638, 1.0099999999988636],
            [-0.0, 0.0],
            [464.8336000000004, 77.44000000000004],
        ),
        3: (
            [-1.1713254748479667, 1.0287716839958565],
            [-0.0, 0.0],
            [1169.6467413141906, 197.11048990040922],
        ),
        10: (
            [-1.1200041264488594, 1.0809151107183024],
            [-0.0, 0.0],
            [2199.7543386739953, 378.84160770709116],
        ),
        100: (
            [-1.0442947328397976, 1.096858631466196],
            [-0.0, 0.0],
            [1027.0348132908396, 177.06682302244477],
        ),
    },
    ("rosenbrock", "S4"): {
        1: (
            [-1.195766013914592, 1.001971632576145],
            [-1.019966, 0.8499716666666667],
            [4648.335999999998, 774.3999999999996],
        ),
        3: (
            [-1.1870897765120358, 1.0059571651745622],
            [-1.0195438393074914, 0.8500837813756515],
            [11797.488889149552, 1977.3414266743607],
        ),
        10: (
            [-1.1548104731935511, 1.0201171811068193],
            [-1.014555703877466, 0.8520912372950455],
            [21353.798753998475, 3660.2405831616575],
        ),
        100: (
            [-0.8828190452814465, 0.788513714976396],
            [-0.8134366165524425, 0.7763964920032704],
            [15.23768265160544, 10.007136544583709],
        ),
    },
}


def gradient(problem: str, theta: Tensor) -> Tensor:
    """Written by hand, so that no autograd rounding enters."""
    if problem == "quadratic":
        matrix, vector = (torch.from_numpy(array) for array in QUADRATIC)
        return matrix @ theta - vector
    u, v = theta
    return torch.stack([-2 * (1 - u) - 400 * u * (v - u * u), 200 * (v - u * u)])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("problem", STARTS)
def test_released_trajectories(problem: str, setting: str) -> None:
    hyper = SETTINGS[setting]
    theta = nn.Parameter(torch.tensor(STARTS[problem], dtype=torch.float64))
    optimizer = INNAprop([theta], **hyper)
    expected = RELEASED[problem, setting]
    for step in range(1, 101):
        theta.grad = gradient(problem, theta.detach())
        optimizer.step()
        if step in expected:
            weights, psi, moment = (torch.tensor(row, dtype=torch.float64) for row in expected[step])
            state = optimizer.state[theta]
            torch.testing.assert_close(theta.detach(), weights, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(state["exp_avg_sq"], moment, rtol=1e-12, atol=1e-12)
            product = hyper["alpha"] * hyper["beta"]
            assert ("velocity" in state) == (product != 1)
            w = state.get("velocity", torch.zeros_like(weights))
            torch.testing.assert_close((1 - product) * theta.detach() - hyper["beta"] * w, psi, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Naive recursions in numpy, in the papers' variables (theta, psi).
def naive_innaprop(start, gradients, schedule, alpha, beta, sigma, eps, weight_decay):
    """The five lines of the released optimizer, with their division by beta - lr."""
    theta, v = start.copy(), np.zeros_like(start)
    psi = (1 - alpha * beta) * theta
    for t, g in enumerate(gradients, 1):
        lr = schedule(t - 1)
        theta = (1 - lr * weight_decay) * theta
        v = sigma * v + (1 - sigma) * g * g
        d = g / (np.sqrt(v) / math.sqrt(1 - sigma**t) + eps)
        psi = (1 - lr / beta) * psi + lr * (1 / beta - alpha) * theta
        theta = (1 + lr * (1 - alpha * beta) / (beta - lr)) * theta - lr / (beta - lr) * psi - lr * beta * d
    return theta


def naive_inna(start, gradients, schedule, alpha, beta, weight_decay):
    """Explicit Euler in (theta, psi); the decay enters theta only, with the step."""
    theta = start.copy()
    psi = (1 - alpha * beta) * theta
    for t, g in enumerate(gradients, 1):
        lr = schedule(t - 1)
        q = lr * ((1 / beta - alpha) * theta - psi / beta)
        psi, theta = psi + q, theta + q - lr * beta * g - lr * weight_decay * theta
    return theta


def schedules(lr: float) -> dict[str, Schedule]:
    return {
        "constant": lambda t: lr,
        "cosine": lambda t: 0.5 * lr * (1 + math.cos(math.pi * t / 200)),
        "warm-up": lambda t: lr * min(1.0, (t + 1) / 50),
    }


def replay(optimizer: torch.optim.Optimizer, param: Tensor, gradients: np.ndarray, schedule: Schedule) -> np.ndarray:
    for t, g in enumerate(gradients):
        for group in optimizer.param_groups:
            group["lr"] = schedule(t)
        param.grad = torch.from_numpy(g)
        optimizer.step()
    return param.detach().numpy()


@pytest.fixture
def problem() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(5, 4)), rng.normal(size=(200, 5, 4)) + 0.3


@pytest.mark.parametrize("kind", ["constant", "cosine", "warm-up"])
@pytest.mark.parametrize(
    "hyper",
    [
        {"lr": 1e-3, "alpha": 0.1, "beta": 0.9, "sigma": 0.999, "eps": 1e-8, "weight_decay": 0.01},
        {"lr": 1e-2, "alpha": 2.0, "beta": 2.0, "sigma": 0.999, "eps": 1e-8, "weight_decay": 0.1},
        {"lr": 5e-2, "alpha": 0.5, "beta": 0.1, "sigma": 0.9, "eps": 1e-6, "weight_decay": 0.1},
        {"lr": 1e-2, "alpha": 0.0, "beta": 1.0, "sigma": 0.99, "eps": 1e-8, "weight_decay": 0.01},
        {"lr": 0.2, "alpha": 0.5, "beta": 0.13, "sigma": 0.99, "eps": 1e-8, "weight_decay": 0.0},  # lr > beta
    ],
)
def test_innaprop_against_the_released_recursion(hyper, kind, problem) -> None:
    start, gradients = problem
    hyper = dict(hyper)
    schedule = schedules(hyper["lr"])[kind]
    param = nn.Parameter(torch.from_numpy(start.copy()))
    ours = replay(INNAprop([param], **hyper), param, gradients, schedule)
    del hyper["lr"]
    np.testing.assert_allclose(ours, naive_innaprop(start, gradients, schedule, **hyper), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["constant", "cosine", "warm-up"])
@pytest.mark.parametrize("pair", [(0.5, 0.1), (0.1, 0.1), (2.0, 2.0), (0.0, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_inna_against_its_recursion(pair, kind, weight_decay, problem) -> None:
    start, gradients = problem
    alpha, beta = pair
    schedule = schedules(0.1)[kind]
    param = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = INNA([param], lr=0.1, alpha=alpha, beta=beta, weight_decay=weight_decay)
    ours = replay(optimizer, param, gradients, schedule)
    expected = naive_inna(start, gradients, schedule, alpha, beta, weight_decay)
    np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lr", [0.5, 0.7])
def test_lr_at_and_above_beta(lr, problem) -> None:
    """At lr == beta the released form divides by zero; INNA along d does not and is the reference."""
    start, gradients = problem
    alpha, beta, sigma, eps = 0.3, 0.5, 0.9, 1e-8
    theta, v = start.copy(), np.zeros_like(start)
    psi = (1 - alpha * beta) * theta
    for t, g in enumerate(gradients, 1):
        v = sigma * v + (1 - sigma) * g * g
        d = g / (np.sqrt(v) / math.sqrt(1 - sigma**t) + eps)
        q = lr * ((1 / beta - alpha) * theta - psi / beta)
        psi, theta = psi + q, theta + q - lr * beta * d
    param = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = INNAprop([param], lr=lr, alpha=alpha, beta=beta, sigma=sigma, eps=eps, weight_decay=0.0)
    np.testing.assert_allclose(replay(optimizer, param, gradients, lambda t: lr), theta, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------
SHAPES = [(33, 7), (), (5,), (16, 3, 3, 3), (129, 700), (0, 4)]


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def gradients_at(step: int, params: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)


def run(build, steps: int = 20, dtype: torch.dtype = torch.float32, schedule: Schedule | None = None) -> list[Tensor]:
    params = parameters(dtype)
    optimizer = build(params)
    for step in range(steps):
        gradients_at(step, params)
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(step)
        optimizer.step()
    return [param.detach() for param in params]


def assert_equal(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", ["constant", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_of_adamw_where_alpha_beta_is_one(foreach, kind, dtype) -> None:
    schedule = schedules(1e-2)[kind]
    ours = run(
        lambda p: INNAprop(p, lr=1e-2, alpha=1.0, beta=1.0, sigma=0.99, weight_decay=0.1, foreach=foreach),
        200,
        dtype,
        schedule,
    )
    adamw = run(
        lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.0, 0.99), weight_decay=0.1, foreach=False),
        200,
        dtype,
        schedule,
    )
    assert_equal(ours, adamw)
    # alpha = 1 / beta is AdamW too, at another learning rate and decay (powers of two scale exactly)
    ours = run(lambda p: INNAprop(p, lr=1e-2, alpha=0.5, beta=2.0, weight_decay=0.1, foreach=foreach), 50, dtype)
    adamw = run(
        lambda p: torch.optim.AdamW(p, lr=2e-2, betas=(0.0, 0.999), weight_decay=0.05, foreach=False),
        50,
        dtype,
    )
    assert_equal(ours, adamw)


BUILDERS = {
    "INNAprop": lambda p, **kw: INNAprop(p, lr=1e-2, weight_decay=0.1, **kw),
    "INNAprop decoupled": lambda p, **kw: INNAprop(p, lr=1e-2, weight_decay=0.1, decay="decoupled", **kw),
    "INNAprop without velocity": lambda p, **kw: INNAprop(p, lr=1e-2, alpha=1.0, beta=1.0, **kw),
    "INNA": lambda p, **kw: INNA(p, lr=0.05, weight_decay=0.1, **kw),
}


@pytest.fixture(params=BUILDERS)
def build(request: pytest.FixtureRequest):
    return BUILDERS[request.param]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that every larger tensor is cut, unevenly."""
    monkeypatch.setattr(velocity_form, "BLOCK_PER_THREAD", 50)


def test_one_by_one_and_together_have_the_same_bits(build) -> None:
    assert_equal(run(lambda p: build(p, foreach=False)), run(lambda p: build(p, foreach=True)))


def test_cutting_into_blocks_changes_no_bit(build, monkeypatch) -> None:
    monkeypatch.setattr(velocity_form, "BLOCK_PER_THREAD", 10**9)
    whole = run(build)
    for size in (1, 50, 1000):
        monkeypatch.setattr(velocity_form, "BLOCK_PER_THREAD", size)
        for foreach in (False, True):
            assert_equal(run(lambda p, f=foreach: build(p, foreach=f)), whole)


@pytest.mark.usefixtures("small_blocks")
def test_any_memory_layout(build) -> None:
    """Channels-last and transposed parameters, and gradients of another layout than their parameter."""
    dense = parameters()
    strided = [nn.Parameter(p.detach().clone()) for p in dense]
    strided[0] = nn.Parameter(dense[0].detach().t().contiguous().t())
    strided[3] = nn.Parameter(dense[3].detach().to(memory_format=torch.channels_last))
    for params in (dense, strided):
        optimizer = build(params)
        for step in range(5):
            gradients_at(step, params)
            optimizer.step()
    assert not strided[0].is_contiguous()
    assert_equal([p.detach() for p in dense], [p.detach() for p in strided])


def test_maximize_is_minimize_of_minus(build) -> None:
    up = parameters()
    down = parameters()
    climbing, descending = build(up, maximize=True), build(down)
    for step in range(10):
        gradients_at(step, up)
        gradients_at(step, down)
        for param in down:
            param.grad.neg_()
        before = [param.grad.clone() for param in up]
        climbing.step()
        descending.step()
        assert_equal(before, [param.grad for param in up])
    assert_equal([p.detach() for p in up], [p.detach() for p in down])


@pytest.mark.parametrize("foreach", [False, True])
def test_complex_is_two_reals(build, foreach) -> None:
    generator = torch.Generator().manual_seed(0)
    z = nn.Parameter(torch.randn(6, 5, dtype=torch.complex128, generator=generator))
    x = nn.Parameter(torch.view_as_real(z.detach()).clone())
    complex_, real = build([z], foreach=foreach), build([x], foreach=foreach)
    for _ in range(20):
        z.grad = torch.randn(6, 5, dtype=torch.complex128, generator=generator)
        x.grad = torch.view_as_real(z.grad).clone()
        complex_.step()
        real.step()
    assert torch.equal(torch.view_as_real(z.detach()), x.detach())


# ------------------------------------------------------------------------------------------------------------
# Tensors as hyperparameters, capture, compilation.
def test_tensor_hyperparameters_have_the_bits_of_numbers() -> None:
    def tensors(p):
        return INNAprop(
            p,
            lr=torch.tensor(1e-2, dtype=torch.float64),
            alpha=torch.tensor([0.1], dtype=torch.float64),
            beta=torch.tensor(0.9, dtype=torch.float64),
            weight_decay=torch.tensor(0.1, dtype=torch.float64),
        )

    numbers = run(lambda p: INNAprop(p, lr=1e-2, alpha=0.1, beta=0.9, weight_decay=0.1))
    assert_equal(run(tensors), numbers)


class NoReading(TorchDispatchMode):
    """Refuses what would make a CUDA stream wait: reading a number from a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("the step reads a tensor back")
        return func(*args, **(kwargs or {}))


def hyper_tensors(names: tuple[str, ...]) -> dict[str, Tensor]:
    values = {"lr": 1e-2, "alpha": 0.1, "beta": 0.9, "weight_decay": 0.1}
    return {name: torch.tensor(values[name], dtype=torch.float64) for name in names}


@pytest.mark.parametrize("cls", [INNA, INNAprop])
@pytest.mark.parametrize("names", [(), ("lr",), ("lr", "alpha", "beta", "weight_decay")])
@pytest.mark.parametrize("foreach", [False, True])
def test_capturable_reads_nothing_back(cls, names, foreach) -> None:
    numbers = {name: value.item() for name, value in hyper_tensors(("lr", "alpha", "beta", "weight_decay")).items()}
    reference, captured = parameters(torch.float64), parameters(torch.float64)
    plain = cls(reference, **numbers)
    optimizer = cls(captured, **{**numbers, **hyper_tensors(names)}, capturable=True, foreach=foreach)
    for step in range(20):
        gradients_at(step, reference)
        gradients_at(step, captured)
        plain.step()
        with NoReading():
            optimizer.step()
    for a, b in zip(reference, captured, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # float32 step counts, as torch keeps them
    with pytest.raises(AssertionError, match="reads a tensor back"), NoReading():
        INNAprop(captured, **{**numbers, **hyper_tensors(("lr",))}).step()  # the mode does see a reading


def test_capturable_lr_is_live() -> None:
    param = nn.Parameter(torch.zeros(3))
    lr = torch.tensor(1.0)
    optimizer = INNA([param], lr=lr, capturable=True)
    param.grad = torch.ones(3)
    lr.zero_()
    optimizer.step()
    assert torch.equal(param.detach(), torch.zeros(3))


def compiled_trajectory(build, backend: str, compiled: bool) -> list[Tensor]:
    params = parameters()[:4]
    optimizer = build(params)
    step = torch.compile(optimizer.step, backend=backend) if compiled else optimizer.step
    for t in range(6):
        gradients_at(t, params)
        step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("foreach", [False, True])
def test_compiled_step(build, foreach) -> None:
    """Traced, the bias correction is a float32 tensor, so the last bits may differ from eager's floats."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager = compiled_trajectory(lambda p: build(p, foreach=foreach), "eager", False)
    traced = compiled_trajectory(lambda p: build(p, foreach=foreach), counter, True)
    assert counter.frame_count >= 1  # the arithmetic was compiled, not skipped
    assert counter.op_count > 5
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_compiled_step_inductor(build) -> None:
    """Inductor contracts multiply-adds, so the last bits may differ."""
    torch._dynamo.reset()
    lr = {"foreach": True}
    eager = compiled_trajectory(lambda p: build(p, **lr), "inductor", False)
    traced = compiled_trajectory(lambda p: build(p, **lr), "inductor", True)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-7)


# ------------------------------------------------------------------------------------------------------------
# What the velocity form promises.
def test_overwritten_weights_stay_where_they_are_put(build) -> None:
    """With zero gradient and decay, replaced weights must not drift (the released code's do)."""
    params = parameters(torch.float64)
    optimizer = build(params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    with torch.no_grad():
        for param in params:
            param.add_(1.0)
    placed = [param.detach().clone() for param in params]
    for _ in range(100):
        optimizer.step()
    assert_equal(placed, [param.detach() for param in params])


def test_overwriting_mid_run_is_a_translation() -> None:
    """Updates do not depend on where the weights are: moved weights follow the moved trajectory."""
    for cls in (INNA, INNAprop):
        reference, moved = parameters(torch.float64), parameters(torch.float64)
        first, second = cls(reference, lr=1e-2, weight_decay=0.0), cls(moved, lr=1e-2, weight_decay=0.0)
        for step in range(40):
            gradients_at(step, reference)
            gradients_at(step, moved)
            if step == 20:
                for param in moved:
                    param.data.add_(1.0)
            first.step()
            second.step()
        for a, b in zip(reference, moved, strict=True):
            torch.testing.assert_close(b - a, torch.ones_like(a), rtol=0, atol=1e-13)


def test_scheduling_alpha_and_beta_moves_nothing_by_itself() -> None:
    param = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = INNAprop([param], lr=1e-2, weight_decay=0.0)
    param.grad = torch.zeros_like(param)
    for step in range(50):
        optimizer.param_groups[0].update(alpha=0.1 + 0.02 * step, beta=0.9 + 0.01 * step)
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(4, dtype=torch.float64))


def test_velocity_survives_a_schedule_through_alpha_beta_one() -> None:
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = INNA([param], lr=0.1, alpha=0.0, beta=1.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["velocity"].tolist() == [-0.1, -0.1]
    optimizer.param_groups[0]["alpha"] = 1.0
    param.grad = torch.zeros_like(param)
    optimizer.step()
    np.testing.assert_allclose(param.detach().numpy(), -0.1 - 0.01, rtol=1e-15)
    np.testing.assert_allclose(optimizer.state[param]["velocity"].numpy(), -0.09, rtol=1e-15)
    late = nn.Parameter(torch.zeros(2))
    optimizer = INNAprop([late], alpha=1.0, beta=1.0)
    late.grad = torch.ones(2)
    optimizer.step()
    assert "velocity" not in optimizer.state[late]
    optimizer.param_groups[0]["alpha"] = 0.5
    optimizer.step()
    assert "velocity" in optimizer.state[late]


def test_published_decay_oscillates_and_decoupled_decay_does_not() -> None:
    """Zero gradient, (0.1, 0.9), decay 0.1: the released optimizer's values every 5000 steps."""
    ends = {}
    for decay in ("published", "decoupled"):
        param = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = INNAprop([param], lr=1e-3, weight_decay=0.1, decay=decay)
        param.grad = torch.zeros_like(param)
        values = []
        for step in range(1, 10_001):
            optimizer.step()
            if step % 5000 == 0:
                values.append(param.item())
        ends[decay] = values
    np.testing.assert_allclose(ends["published"], [-0.012, -0.368], atol=5e-4)
    np.testing.assert_allclose(ends["decoupled"], [(1 - 1e-4) ** 5000, (1 - 1e-4) ** 10_000], rtol=1e-10)


@pytest.mark.parametrize("decay", ["published", "decoupled"])
def test_inna_decay(decay) -> None:
    """One step from rest by hand: theta loses lr * wd * theta; the published decay enters the velocity."""
    param = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = INNA([param], lr=0.1, alpha=0.5, beta=0.4, weight_decay=0.3, decay=decay)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.item() == pytest.approx(2 - 0.1 * 0.3 * 2, rel=1e-15)
    pushed = -0.1 * 0.3 * 2 * (1 - 0.5 * 0.4) / 0.4
    assert optimizer.state[param]["velocity"].item() == pytest.approx(
        pushed if decay == "published" else 0.0, rel=1e-14
    )


@pytest.mark.parametrize("cls", [INNA, INNAprop])
@pytest.mark.parametrize("pair", [(0.1, 0.9), (1.0, 1.0), (2.0, 2.0), (0.5, 0.1)])
def test_converges_on_a_convex_quadratic(cls, pair) -> None:
    matrix, vector = (torch.from_numpy(array) for array in QUADRATIC)
    param = nn.Parameter(torch.tensor(STARTS["quadratic"], dtype=torch.float64))
    lr = 0.1
    optimizer = cls([param], lr=lr, alpha=pair[0], beta=pair[1], weight_decay=0.0)
    for step in range(4000):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / 4000)
        param.grad = matrix @ param.detach() - vector
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.linalg.solve(matrix, vector), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("cls", "lr", "alpha", "beta"),
    [(INNAprop, 1e-2, 0.5, 0.3), (INNAprop, 1e-2, 1.0, 1.0), (INNA, 2e-2, 0.5, 0.1)],
)
def test_converges_on_rosenbrock(cls, lr, alpha, beta) -> None:
    param = nn.Parameter(torch.tensor(STARTS["rosenbrock"], dtype=torch.float64))
    optimizer = cls([param], lr=lr, alpha=alpha, beta=beta, weight_decay=0.0)
    for step in range(6000):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / 6000)
        param.grad = gradient("rosenbrock", param.detach())
        optimizer.step()
    torch.testing.assert_close(param.detach(), torch.ones(2, dtype=torch.float64), rtol=0, atol=2e-2)


# ------------------------------------------------------------------------------------------------------------
# State.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_resume_is_bit_exact(build, dtype) -> None:
    params = parameters(dtype)
    optimizer = build(params)
    for step in range(10):
        gradients_at(step, params)
        optimizer.step()
    file = io.BytesIO()
    torch.save((params, optimizer.state_dict()), file)
    for step in range(10, 20):
        gradients_at(step, params)
        optimizer.step()
    file.seek(0)
    resumed, state = torch.load(file, weights_only=True)
    resumed = [nn.Parameter(param.detach()) for param in resumed]
    other = build(resumed)
    other.load_state_dict(state)
    for step in range(10, 20):
        gradients_at(step, resumed)
        other.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in resumed])
    for a, b in zip(params, resumed, strict=True):
        assert optimizer.state[a].keys() == other.state[b].keys()
        for key in optimizer.state[a]:
            assert torch.equal(optimizer.state[a][key], other.state[b][key])
            assert optimizer.state[a][key].dtype == other.state[b][key].dtype


def test_pickle_and_deepcopy(build) -> None:
    params = parameters()
    optimizer = build(params)
    gradients_at(0, params)
    optimizer.step()
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        copies = other.param_groups[0]["params"]
        gradients_at(1, copies)
        other.step()
    gradients_at(1, params)
    optimizer.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in copies])


def test_a_users_load_hook_is_respected() -> None:
    param = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = INNA([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    other = INNA([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))])

    def double(_, state):
        state["state"] = {0: {**state["state"][0], "velocity": 2 * state["state"][0]["velocity"]}}

    other.register_load_state_dict_pre_hook(double)
    other.load_state_dict(saved)
    loaded = other.state[other.param_groups[0]["params"][0]]["velocity"]
    assert torch.equal(loaded, 2 * optimizer.state[param]["velocity"])
    assert loaded.dtype == torch.float32


def test_state_of_another_optimizer_is_refused() -> None:
    params = parameters()
    with pytest.raises(ValueError, match="no alpha and no beta"):
        INNAprop(params).load_state_dict(torch.optim.AdamW(params).state_dict())


def test_state_is_as_large_as_adamws() -> None:
    def numbers(optimizer, params):
        gradients_at(0, params)
        optimizer.step()
        return sum(t.numel() for state in optimizer.state.values() for t in state.values())

    params = parameters()
    adamw = numbers(torch.optim.AdamW(params), params)
    assert numbers(INNAprop(params), params) == adamw
    total = sum(param.numel() for param in params)
    assert numbers(INNA(params), params) == total
    assert numbers(INNAprop(params, alpha=1.0, beta=1.0), params) == adamw - total
    assert numbers(INNA(params, alpha=2.0, beta=0.5), params) == 0


# ------------------------------------------------------------------------------------------------------------
# Half precision.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_follow_the_float32_trajectory(build, dtype) -> None:
    """With the same gradients the masters are the float32 weights, and the parameters are those, rounded."""
    half = parameters(dtype)
    full = [nn.Parameter(param.detach().float()) for param in half]
    first, second = build(half), build(full)
    for group in [*first.param_groups, *second.param_groups]:
        group["lr"] = 1e-4  # steps far below the spacing of half-precision numbers near 1
    start = [param.detach().clone() for param in half]
    for step in range(200):
        gradients_at(step, half)
        for a, b in zip(half, full, strict=True):
            a.grad.add_(0.5)
            b.grad = a.grad.float()
        first.step()
        second.step()
    assert_equal([param.detach() for param in half], [param.detach().to(dtype) for param in full])
    assert_equal([first.state[param]["master"] for param in half], [param.detach() for param in full])
    assert any(not torch.equal(a, b) for a, b in zip(start, half, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_overwritten_half_parameters_stay(dtype) -> None:
    """The parameter is the truth: pruned weights stay pruned, the others keep their master."""
    param = nn.Parameter(torch.full((4,), 1.0, dtype=dtype))
    optimizer = INNAprop([param], lr=1e-5, weight_decay=0.0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["velocity"].zero_()
    master = optimizer.state[param]["master"].clone()
    assert torch.equal(param.detach(), torch.ones_like(param))
    assert (master < 1).all()
    with torch.no_grad():
        param[:2] = torch.tensor([0.0, 3.0])
    param.grad.zero_()
    optimizer.step()
    assert param.tolist() == [0.0, 3.0, 1.0, 1.0]
    assert torch.equal(optimizer.state[param]["master"][2:], master[2:])
    assert optimizer.state[param]["master"][:2].tolist() == [0.0, 3.0]


def test_state_moves_between_precisions() -> None:
    """A float32 run continued in bfloat16 gets a master; the way back drops it."""
    full = nn.Parameter(torch.ones(3))
    optimizer = INNAprop([full])
    full.grad = torch.ones(3)
    optimizer.step()
    half = nn.Parameter(full.detach().bfloat16())
    other = INNAprop([half])
    other.load_state_dict(optimizer.state_dict())
    assert other.state[half]["exp_avg_sq"].dtype == torch.float32
    half.grad = torch.ones_like(half)
    other.step()
    assert other.state[half]["master"].dtype == torch.float32
    optimizer.load_state_dict(other.state_dict())
    assert "master" not in optimizer.state[full]
    optimizer.step()


def test_one_group_of_mixed_precisions() -> None:
    mixed = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    for foreach in (True, False):
        optimizer = INNAprop(mixed, foreach=foreach)
        for param in mixed:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert [optimizer.state[p]["velocity"].dtype for p in mixed] == [
            torch.float32,
            torch.float32,
            torch.float64,
        ]


def test_grad_scaler_skips_overflow() -> None:
    layer = nn.Linear(3, 1)
    optimizer = INNAprop(layer.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reference = copy.deepcopy(layer)
    plain = INNAprop(reference.parameters(), lr=1e-2)
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        optimizer.zero_grad()
        loss = layer(data).square().mean()
        scaler.scale(loss).backward()
        if step == 1:
            layer.weight.grad[0, 0] = math.inf  # overflow: this step must be skipped
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            plain.zero_grad()
            reference(data).square().mean().backward()
            plain.step()
    assert scaler.get_scale() == 512.0
    assert optimizer.state[layer.weight]["step"] == 3
    assert_equal([p.detach() for p in layer.parameters()], [p.detach() for p in reference.parameters()])


# ------------------------------------------------------------------------------------------------------------
# The interface of a torch optimizer.
def test_groups_have_their_own_hyperparameters() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = INNA([{"params": [first]}, {"params": [second], "lr": 1.0, "beta": 0.5}], lr=0.1, alpha=0.5, beta=0.1)
    first.grad = second.grad = torch.ones(1)
    optimizer.step()
    assert first.item() == pytest.approx(-0.01)
    assert second.item() == pytest.approx(-0.5)


def test_named_parameters_and_schedulers() -> None:
    layer = nn.Linear(2, 2)
    optimizer = INNAprop(layer.named_parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    for _ in range(4):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


def test_closure_and_missing_gradients() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = INNAprop([used, unused], weight_decay=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert torch.equal(unused.detach(), torch.ones(2))  # no gradient, no step, no decay
    assert unused not in optimizer.state
    assert (used < 1).all()
    assert INNAprop([unused]).step() is None


def test_sparse_gradients_are_refused() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    layer(torch.tensor([1])).sum().backward()
    before = layer.weight.detach().clone()
    for cls in (INNA, INNAprop):
        optimizer = cls(layer.parameters())
        with pytest.raises(RuntimeError, match=rf"{cls.__name__} does not support sparse.*sparse=False"):
            optimizer.step()
        assert torch.equal(layer.weight.detach(), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, r"lr=-1.0 is outside its range: lr >= 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"lr": math.inf}, "lr=inf"),
        ({"lr": torch.tensor(-1.0)}, "lr >= 0"),
        ({"lr": torch.ones(2)}, "2 elements"),
        ({"alpha": -0.1}, "alpha >= 0"),
        ({"beta": 0.0}, "beta > 0"),
        ({"beta": -1.0}, "beta > 0"),
        ({"sigma": 1.0}, "0 <= sigma < 1"),
        ({"sigma": torch.tensor(0.9)}, "must be a number"),
        ({"eps": -1e-8}, "eps >= 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
        ({"decay": "decoupld"}, "did you mean 'decoupled'"),
        ({"differentiable": True}, "does not support differentiable"),
    ],
)
def test_wrong_values_are_refused(wrong, message) -> None:
    param = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=message):
        INNAprop([param], **wrong)
    if not wrong.keys() & {"sigma", "eps"}:
        with pytest.raises(ValueError, match=message):
            INNA([param], **wrong)
    if "differentiable" not in wrong:
        optimizer = INNAprop([param])
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **wrong})
        assert len(optimizer.param_groups) == 1


# ------------------------------------------------------------------------------------------------------------
# The fused path: other last bits, the same numbers.
FUSED_SETTINGS = [
    {},
    {"decay": "decoupled", "weight_decay": 0.1},
    {"weight_decay": 0.0, "maximize": True},
    {"alpha": 1.0, "beta": 1.0, "weight_decay": 0.1},
    {"alpha": 0.5, "beta": 2.0, "weight_decay": 0.1, "maximize": True},
    {"alpha": 2.0, "beta": 2.0, "weight_decay": 0.1},
    {"lr": 0.1, "alpha": 0.5, "beta": 0.07},  # lr > beta
    {"alpha": torch.tensor(0.1), "lr": torch.tensor(1e-2)},
]


@pytest.mark.parametrize("setting", FUSED_SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.usefixtures("small_blocks")
def test_fused_follows_the_other_paths(setting, dtype, tolerance) -> None:
    fused, plain = parameters(dtype), parameters(dtype)
    first, second = INNAprop(fused, fused=True, **setting), INNAprop(plain, foreach=False, **setting)
    for step in range(50):
        gradients_at(step, fused)
        gradients_at(step, plain)
        first.step()
        second.step()
        assert_equal([p.grad for p in fused], [p.grad for p in plain])  # the gradients are left alone
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for key in second.state[b]:
            torch.testing.assert_close(
                first.state[a][key], second.state[b][key], rtol=tolerance, atol=tolerance, check_dtype=False
            )


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16])
def test_fused_with_complex_and_half_parameters(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, dtype=dtype, generator=generator)
    fused, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    first, second = INNAprop([fused], fused=True), INNAprop([plain])
    for _ in range(20):
        fused.grad = torch.randn(6, 5, dtype=dtype, generator=generator)
        plain.grad = fused.grad.clone()
        first.step()
        second.step()
    key = "master" if dtype == torch.bfloat16 else "velocity"
    torch.testing.assert_close(first.state[fused][key], second.state[plain][key], rtol=1e-5, atol=1e-6)


def test_fused_resumes_bit_exactly() -> None:
    params = parameters()
    optimizer = INNAprop(params, fused=True)
    gradients_at(0, params)
    optimizer.step()
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    other = INNAprop(copies, fused=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for tensors, stepped in ((params, optimizer), (copies, other)):
        gradients_at(1, tensors)
        stepped.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in copies])


def test_fused_and_foreach_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        INNAprop(parameters(), fused=True, foreach=True)


# ------------------------------------------------------------------------------------------------------------
# The lists that accelerators and sharded parameters get: grouped by device and precision, never cut.
class OwnParameter(nn.Parameter):
    """A parameter class that the optimizer knows nothing about."""


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameter_subclasses(build, foreach, dtype) -> None:
    plain = parameters(dtype)
    own = [OwnParameter(param.detach().clone()) for param in plain]
    own.append(OwnParameter(torch.ones(3)))  # another precision in the same group
    first, second = build(plain), build(own, foreach=foreach)
    for step in range(5):
        gradients_at(step, plain)
        gradients_at(step, own)
        first.step()
        second.step()
    assert all(type(param) is OwnParameter for param in second.param_groups[0]["params"])
    assert_equal([p.detach() for p in plain], [p.detach() for p in own[:-1]])


def test_fully_sharded_parameters(build, tmp_path) -> None:
    """FSDP2's parameters are DTensors; on one process they must take the plain parameters' steps."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        sharded = copy.deepcopy(plain)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(sharded, mesh=mesh)
        first, second = build(plain.parameters()), build(sharded.parameters())
        data = torch.randn(6, 4)
        for _ in range(3):
            for model, optimizer in ((plain, first), (sharded, second)):
                optimizer.zero_grad()
                model(data).square().sum().backward()
                optimizer.step()
        whole = [param.full_tensor().detach() for param in sharded.parameters()]
        assert_equal([param.detach() for param in plain.parameters()], whole)
        set_optimizer_state_dict(sharded, second, get_optimizer_state_dict(sharded, second))
        assert_equal(whole, [param.full_tensor().detach() for param in sharded.parameters()])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("on_cuda", "foreach", "fused"),
    [(True, None, True), (False, None, False), (True, True, False), (True, False, False)],
)
def test_fused_is_the_default_on_cuda_alone(monkeypatch, on_cuda, foreach, fused) -> None:
    monkeypatch.setattr(nn.Parameter, "is_cuda", on_cuda, raising=False)
    assert INNAprop(parameters(), foreach=foreach).param_groups[0]["fused"] is fused


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_default_path_follows_the_others() -> None:
    default, plain = [[p.detach().cuda().requires_grad_() for p in parameters()] for _ in range(2)]
    first, second = INNAprop(default), INNAprop(plain, foreach=False)
    for step in range(5):
        gradients_at(step, default)
        gradients_at(step, plain)
        first.step()
        second.step()
    for a, b in zip(default, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
