"""The presets against the libraries whose name they bear; needs these to be installed beside torch."""

import numpy as np
import pytest
import torch

from nslightning import Jacobians
from nslightning.ops import leaky_relu, max_pool2d, relu, relu6

KINKS = np.array([-1.0, -0.0, 0.0, 3.0, 6.0, 7.0], dtype=np.float32)
POOLS = [(2, 2, 0), (3, 2, 1), (3, 1, 1)]
IMAGES = np.random.default_rng(0).integers(-2, 2, (2, 9, 9, 3)).astype(np.float32)


def ours(name, x, preset, pool=None):
    choice = Jacobians.preset(preset)
    x = torch.tensor(x, requires_grad=True)
    y = {
        "relu": lambda: relu(x, choice.relu),
        "relu6": lambda: relu6(x, choice.relu6),
        "leaky_relu": lambda: leaky_relu(x, 0.25, choice.leaky_relu),
        "max_pool": lambda: max_pool2d(x.permute(0, 3, 1, 2), *(pool or ()), jacobian=choice.max_pool),
    }[name]()
    return torch.autograd.grad(y.sum(), x)[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_jax_pointwise(name):
    jax = pytest.importorskip("jax", reason="the jax preset is compared where jax is installed")
    functions = {"relu": jax.nn.relu, "relu6": jax.nn.relu6, "leaky_relu": lambda x: jax.nn.leaky_relu(x, 0.25)}
    want = np.asarray(jax.grad(lambda x: functions[name](x).sum())(KINKS))
    assert np.array_equal(ours(name, KINKS, "jax"), want)


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_jax_max_pool(pool):
    jax = pytest.importorskip("jax", reason="the jax preset is compared where jax is installed")
    k, s, p = pool

    def f(x):
        padding = ((0, 0), (p, p), (p, p), (0, 0))
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, k, k, 1), (1, s, s, 1), padding).sum()

    assert np.array_equal(ours("max_pool", IMAGES, "jax", pool), np.asarray(jax.grad(f)(IMAGES)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_tensorflow_pointwise(name):
    tf = pytest.importorskip("tensorflow", reason="the tensorflow preset is compared where tensorflow is installed")
    functions = {"relu": tf.nn.relu, "relu6": tf.nn.relu6, "leaky_relu": lambda x: tf.nn.leaky_relu(x, 0.25)}
    x = tf.constant(KINKS)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(functions[name](x))
    assert np.array_equal(ours(name, KINKS, "tensorflow"), tape.gradient(y, x).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_tensorflow_max_pool(pool):
    tf = pytest.importorskip("tensorflow", reason="the tensorflow preset is compared where tensorflow is installed")
    k, s, p = pool
    x = tf.constant(IMAGES)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(tf.nn.max_pool2d(x, k, s, [[0, 0], [p, p], [p, p], [0, 0]]))
    assert np.array_equal(ours("max_pool", IMAGES, "tensorflow", pool), tape.gradient(y, x).numpy())


def test_pytorch_preset_is_the_installed_torch():
    """Against stock operations, to the bit; the choice of `Jacobians()`."""
    stock = {
        "relu": torch.relu,
        "relu6": torch.nn.functional.relu6,
        "leaky_relu": lambda x: torch.nn.functional.leaky_relu(x, 0.25),
    }
    for name, f in stock.items():
        x = torch.tensor(KINKS, requires_grad=True)
        assert np.array_equal(ours(name, KINKS, "pytorch"), torch.autograd.grad(f(x).sum(), x)[0].numpy())


def test_unknown_preset():
    with pytest.raises(ValueError, match="did you mean 'tensorflow'"):
        Jacobians.preset("tensorflo")
