"""In place on views whose entries lie apart: stock's bits, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from nslightning import Jacobians
from nslightning.ops.autograd.pointwise import pointwise
from nslightning.ops.autograd.selection import Selection

VIEWS = {
    "every second": lambda x: x[..., ::2],
    "columns": lambda x: x[:, 1:9],
    "transposed": lambda x: x.t()[::2],
    "three in four": lambda x: x.view(12, 8, 4)[:, :, :3],
    "dense": lambda x: x[2:7],
}
OPERATIONS = {
    "elu": ((0.5,), lambda x: F.elu_(x, 0.5)),
    "selu": ((), F.selu_),
    "hardswish": ((), lambda x: F.hardswish(x, inplace=True)),
    "hardsigmoid": ((), lambda x: F.hardsigmoid(x, inplace=True)),
    "relu6": ((), lambda x: F.relu6(x, inplace=True)),
    "leaky_relu": ((0.1,), lambda x: F.leaky_relu_(x, 0.1)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_in_place_on_a_view_is_stock(name, dtype, view):
    parameters, stock = OPERATIONS[name]
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.view(-1)[::3] = 0.0
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def run(function):
        leaf = x.clone().requires_grad_()
        whole = leaf * 1
        version = whole._version
        function(VIEWS[view](whole))
        return whole.detach(), torch.autograd.grad(whole, leaf, g)[0], whole._version > version

    selection = Selection(Jacobians())
    for one, other in zip(
        run(lambda v: pointwise(name, v, selection, *parameters, inplace=True)), run(stock), strict=True
    ):
        assert one == other if isinstance(one, bool) else torch.equal(one, other)
