"""The derivatives of each library at the kinks: the installed torch by a table, jax and tensorflow where installed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, patch
from nslightning.ops.record import OPERATIONS

NEWEST = torch.__version__.split("+")[0]
# `clamp` and what is made of it changed: 1 at the bounds up to torch 2.13, 0 in 2.15.
BOUND = 1.0 if tuple(map(int, NEWEST.split(".")[:2])) < (2, 14) else 0.0

# Inputs on every kink, as float32; the function in torch; what the installed torch returns there, entry by entry.
ZERO = [-0.0, 0.0]
PAIR = [[2.0, 2.0], [2.0, 2.0], [1.0, 2.0]]
THREE = [2.0, 1.0, 2.0, 2.0]
LONG = torch.zeros(4, dtype=torch.long)
TABLE = {
    "relu": (ZERO, torch.relu, [0.0, 0.0]),
    "relu6": ([0.0, 6.0], F.relu6, [0.0, 0.0]),
    "leaky_relu": (ZERO, lambda x: F.leaky_relu(x, 0.25), [0.25, 0.25]),
    "prelu": (ZERO, lambda x: F.prelu(x, torch.tensor([0.25])), [0.25, 0.25]),
    "rrelu": (ZERO, lambda x: F.rrelu(x, 0.25, 0.25), [0.25, 0.25]),
    "hardtanh": ([-1.0, 1.0], F.hardtanh, [0.0, 0.0]),
    "clamp": ([-1.0, 1.0], lambda x: x.clamp(-1, 1), [BOUND, BOUND]),
    "hardswish": ([-3.0, 3.0], F.hardswish, [0.0, 1.0]),
    "hardsigmoid": ([-3.0, 3.0], F.hardsigmoid, [0.0, 0.0]),
    "hardshrink": ([-0.5, 0.5], F.hardshrink, [0.0, 0.0]),
    "softshrink": ([-0.5, 0.5], F.softshrink, [0.0, 0.0]),
    "threshold": ([0.5], lambda x: F.threshold(x, 0.5, 7.0), [0.0]),
    "elu": (ZERO, lambda x: F.elu(x, 0.5), [0.5, 0.5]),
    "selu": (ZERO, F.selu, [1.7580993, 1.7580993]),
    "abs": (ZERO, torch.abs, [0.0, 0.0]),
    "max_pool": (THREE, lambda x: F.max_pool1d(x[None], 4), [1.0, 0.0, 0.0, 0.0]),
    "max": (THREE, lambda x: x.amax(), [1 / 3, 0.0, 1 / 3, 1 / 3]),
    "max, dim": (THREE, lambda x: x.max(0)[0], [1.0, 0.0, 0.0, 0.0]),
    "max, all": (THREE, lambda x: x.max(), [1 / 3, 0.0, 1 / 3, 1 / 3]),
    "scatter_max": (THREE, lambda x: x.new_zeros(1).scatter_reduce(0, LONG, x, "amax"), [1 / 3, 0.0, 1 / 3, 1 / 3]),
    "segment_max": (THREE, lambda x: torch.segment_reduce(x, "max", lengths=LONG[:1] + 4), [1 / 3, 0.0, 1 / 3, 1 / 3]),
    "segment_max, of a negative gradient": (
        THREE,
        lambda x: -torch.segment_reduce(x, "max", lengths=LONG[:1] + 4),
        [-1.0, 0.0, -1.0, -1.0],
    ),
    "bag_max": (
        THREE,
        lambda x: F.embedding_bag(torch.arange(4)[None], x[:, None], mode="max"),
        [1.0, 0.0, 0.0, 0.0],
    ),
    "maximum": (PAIR, lambda x: torch.maximum(x[:, 0], x[:, 1]), [[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]),
    "norm": ([0.0, 0.0], lambda x: x.norm(), [0.0, 0.0]),
    "hinge": ([1.0], lambda x: F.hinge_embedding_loss(x, -torch.ones(1)), [-BOUND]),
}


def gradient(f, x):
    x = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    return torch.autograd.grad(f(x).sum(), x)[0].tolist()


def flat(values):
    return np.asarray(values, dtype=np.float64).ravel().tolist()


@pytest.mark.parametrize("name", TABLE)
def test_what_the_installed_torch_returns(name):
    """When this fails torch has changed: write the version into `Kink.stock` of its record."""
    x, f, want = TABLE[name]
    assert flat(gradient(f, x)) == pytest.approx(flat(want), rel=1e-6, abs=0), f"torch {NEWEST}"


def test_the_table_is_complete():
    assert {name.split(",")[0] for name in TABLE} == set(OPERATIONS)


@pytest.mark.parametrize("name", TABLE)
def test_pytorch_preset_is_the_installed_torch(name):
    """To the bit, through a patched model; and no other preset leaves it unreached."""
    x, f, _ = TABLE[name]
    assert gradient(patched(f, "pytorch"), x) == gradient(f, x)


def patched(f, preset):
    class Model(nn.Module):
        def forward(self, x):
            return f(x)

    model = Model()
    report = patch(model, Jacobians.preset(preset))

    def run(x):
        y = model(x)
        assert report.reached
        return y

    return run


def test_unknown_preset():
    with pytest.raises(ValueError, match="did you mean 'tensorflow'"):
        Jacobians.preset("tensorflo")


# ------------------------------------------------------------------------------------------- the other libraries
def jax_functions():
    jax = pytest.importorskip("jax", reason="the jax preset is compared where jax is installed")
    jnp, nn_ = jax.numpy, jax.nn

    def pool(x):
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (4,), (4,), "VALID")

    functions = {
        "relu": nn_.relu,
        "relu6": nn_.relu6,
        "leaky_relu": lambda x: nn_.leaky_relu(x, 0.25),
        "prelu": lambda x: jnp.where(x >= 0, x, 0.25 * x),  # as flax.linen.PReLU writes it
        "hardtanh": nn_.hard_tanh,
        "clamp": lambda x: jnp.clip(x, -1, 1),
        "hardswish": nn_.hard_swish,
        "hardsigmoid": nn_.hard_sigmoid,
        "elu": lambda x: nn_.elu(x, 0.5),
        "selu": nn_.selu,
        "abs": jnp.abs,
        "max_pool": pool,
        "max": jnp.max,
        "max, dim": lambda x: jnp.max(x, 0),
        "max, all": jnp.max,
        "maximum": lambda x: jnp.maximum(x[:, 0], x[:, 1]),
        "hinge": lambda x: jnp.maximum(0, 1 - x),  # as optax.hinge_loss writes it
    }
    return functions, lambda f, x: jax.grad(lambda x: f(x).sum())(np.asarray(x, np.float32))


def tensorflow_functions():
    tf = pytest.importorskip("tensorflow", reason="the tensorflow preset is compared where tensorflow is installed")
    keras = tf.keras

    functions = {
        "relu": tf.nn.relu,
        "relu6": tf.nn.relu6,
        "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.25),
        "prelu": lambda x: keras.layers.PReLU(keras.initializers.Constant(0.25))(x[None])[0],
        "hardtanh": keras.ops.hard_tanh,
        "clamp": lambda x: tf.clip_by_value(x, -1.0, 1.0),
        "hardswish": keras.ops.hard_swish,
        "hardsigmoid": keras.ops.hard_sigmoid,
        "hardshrink": keras.ops.hard_shrink,
        "softshrink": keras.ops.soft_shrink,
        "threshold": lambda x: keras.ops.threshold(x, 0.5, 7.0),
        "elu": lambda x: keras.ops.elu(x, 0.5),
        "selu": tf.nn.selu,
        "abs": tf.abs,
        "max_pool": lambda x: tf.nn.max_pool2d(tf.reshape(x, (1, 1, 4, 1)), (1, 4), 4, "VALID"),
        "max": tf.reduce_max,
        "max, dim": lambda x: tf.reduce_max(x, 0),
        "max, all": tf.reduce_max,
        "maximum": lambda x: tf.maximum(x[:, 0], x[:, 1]),
        "hinge": lambda x: keras.losses.hinge(tf.ones(1), x),
    }

    def grad(f, x):
        x = tf.constant(x, tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(f(x))
        return tf.convert_to_tensor(tape.gradient(y, x)).numpy()

    return functions, grad


# Values that a choice cannot express, or functions that the library does not have.
WITHOUT = {
    "jax": {"rrelu", "hardshrink", "softshrink", "threshold", "norm"},
    "tensorflow": {"rrelu", "norm"},
}


@pytest.mark.slow
@pytest.mark.parametrize("library", ["jax", "tensorflow"])
def test_preset_is_the_library(library):
    """A patched torch function takes the other library's gradient at every kink."""
    functions, grad = {"jax": jax_functions, "tensorflow": tensorflow_functions}[library]()
    assert set(functions) == set(TABLE) - WITHOUT[library]
    for name, f in functions.items():
        x, ours, _ = TABLE[name]
        got, want = flat(gradient(patched(ours, library), x)), flat(grad(f, x))
        assert got == pytest.approx(want, rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("library", ["jax", "tensorflow"])
@pytest.mark.parametrize("pool", [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_pools_of_images(library, pool):
    """Overlapping windows and padding, integers with many ties."""
    images = np.random.default_rng(0).integers(-2, 2, (2, 9, 9, 3)).astype(np.float32)
    (k, s, p), padding = pool, [[0, 0], [pool[2]] * 2, [pool[2]] * 2, [0, 0]]
    if library == "jax":
        jax = pytest.importorskip("jax", reason="the jax preset is compared where jax is installed")
        window = ((1, k, k, 1), (1, s, s, 1), padding)
        f = lambda x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, *window)  # noqa: E731 # one of two
    else:
        tf = pytest.importorskip("tensorflow", reason="the tensorflow preset is compared where tensorflow is installed")
        f = lambda x: tf.nn.max_pool2d(x, k, s, padding)  # noqa: E731 # one of two
    _, grad = {"jax": jax_functions, "tensorflow": tensorflow_functions}[library]()
    mine = patched(lambda x: F.max_pool2d(x.permute(0, 3, 1, 2), k, s, p), library)
    assert np.array_equal(np.asarray(gradient(mine, images)), np.asarray(grad(f, images)))


@pytest.mark.slow
@pytest.mark.parametrize("library", ["jax", "tensorflow"])
def test_norms_have_no_gradient_at_zero(library):
    """NaN, which is no choice of ours: the presets leave PyTorch's 0."""
    _, grad = {"jax": jax_functions, "tensorflow": tensorflow_functions}[library]()
    norm = __import__("jax").numpy.linalg.norm if library == "jax" else __import__("tensorflow").norm
    assert np.isnan(grad(norm, [0.0, 0.0])).all()
