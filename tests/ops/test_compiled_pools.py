"""Compiled max pooling runs eager mode's kernels as operators: one graph, every choice, eager mode's bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nslightning import Jacobians, ops, patch, using
from nslightning.ops.autograd.pooling import adaptive, pool, regular
from nslightning.ops.autograd.selection import Selection

# By name: the shape, the windows and the memory format.
LAST = torch.channels_last
CASES = {
    "2 x 2": ((2, 3, 6, 6), lambda x: regular(2, 2), torch.contiguous_format),
    "overlapping": ((2, 3, 7, 9), lambda x: regular(2, 3, 2, 1), torch.contiguous_format),
    "overlapping, channels_last": ((2, 3, 7, 9), lambda x: regular(2, 3, 2, 1), LAST),
    "rounded up": ((2, 3, 7, 7), lambda x: regular(2, 2, ceil_mode=True), torch.contiguous_format),
    "dilated": ((2, 3, 8, 8), lambda x: regular(2, 2, 2, 0, 2), torch.contiguous_format),
    "large, channels_last": ((2, 3, 8, 8), lambda x: regular(2, 5, 1, 2), LAST),
    "one image": ((3, 6, 6), lambda x: regular(2, 2), torch.contiguous_format),
    "1-d": ((2, 3, 9), lambda x: regular(1, 3, 2, 1), torch.contiguous_format),
    "3-d": ((2, 2, 4, 5, 4), lambda x: regular(3, 2), torch.contiguous_format),
    "adaptive, channels_last": ((2, 3, 5, 8), lambda x: adaptive(2, x, (3, 2)), LAST),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_one_graph_returns_eager_modes_bits_under_every_choice(name, dtype):
    torch._dynamo.reset()
    shape, windows, layout = CASES[name]
    selection, generator = Selection(Jacobians()), torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, shape, generator=generator).to(dtype).contiguous(memory_format=layout).requires_grad_()

    def f(x):
        return pool(x * 1.0, selection, windows(x))

    y = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(y, f(x))
    g = torch.randn(y.shape, generator=generator).to(dtype)
    for choice in ("native", "minimal", 10.0, "last", "sum"):
        selection.set(Jacobians(max_pool=choice))
        (got,) = torch.autograd.grad(y, x, g, retain_graph=True)
        (want,) = torch.autograd.grad(f(x), x, g)
        assert torch.equal(got, want), choice


@pytest.mark.parametrize("windows", [2, 5], ids=["kernels", "composed"])
def test_what_a_compiled_pooling_cannot_do_is_refused(windows):
    torch._dynamo.reset()
    selection = Selection(Jacobians(max_pool="random"))
    x = torch.zeros(1, 1, 6, 6, requires_grad=True)
    y = torch.compile(lambda x: pool(x * 1.0, selection, regular(2, windows)), backend="aot_eager")(x)
    with pytest.raises(RuntimeError, match='choice "random" cannot be taken by a compiled backward'):
        torch.autograd.grad(y.sum(), x)


def test_an_operator_has_no_second_derivative():
    x, g = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 1, 1, requires_grad=True)
    numbers = [2, 2, 2, 2, 0, 0, 1, 1, 0]
    _, reached = torch.ops.nslightning.pool_forward(x, numbers)
    weights = Selection(Jacobians(max_pool="minimal")).pool
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.ops.nslightning.pool_backward(g, reached, weights, numbers, [2, 2])


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=str)
def test_the_operators_say_what_they_return(layout):
    x = torch.randn(2, 3, 7, 9).contiguous(memory_format=layout)
    numbers = [3, 3, 2, 2, 1, 1, 1, 1, 0]
    _, reached = torch.ops.nslightning.pool_forward(x, numbers)
    torch.library.opcheck(
        torch.ops.nslightning.pool_forward.default, (x, numbers), test_utils=("test_schema", "test_faketensor")
    )
    g = torch.randn(reached.shape)
    torch.library.opcheck(
        torch.ops.nslightning.pool_backward.default,
        (g, reached, Selection(Jacobians()).pool, numbers, [7, 9]),
        test_utils=("test_schema", "test_faketensor"),
    )


class Pooled(nn.Module):
    def forward(self, x):
        return ops.max_pool2d(x, 2, jacobian="minimal")


def test_an_exported_program_has_none_of_the_operators():
    program = torch.export.export(Pooled(), (torch.ones(1, 1, 4, 4, requires_grad=True),))
    assert "nslightning" not in program.graph_module.code


@pytest.mark.parametrize("inplace", [False, True])
def test_a_compiled_relu_keeps_one_byte_per_entry(inplace):
    torch._dynamo.reset()
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0, float("nan")], requires_grad=True)
    g = torch.tensor([3.0, 5.0, 7.0, float("inf"), 11.0])
    model = nn.ReLU(inplace)
    patch(model, Jacobians())
    y = torch.compile(lambda x: model(x * 1.0), backend="aot_eager", fullgraph=True)(x)
    for choice in (Jacobians(), Jacobians(relu=0.5), Jacobians(relu=0.5, rule="published")):
        with using(model, choice):
            (got,) = torch.autograd.grad(y, x, g, retain_graph=True)
            (want,) = torch.autograd.grad(model(x * 1.0), x, g)
        assert torch.equal(got, want), choice
    (stock,) = torch.autograd.grad(F.relu(x * 1.0), x, g)
    (got,) = torch.autograd.grad(y, x, g)
    assert torch.equal(got, stock)
