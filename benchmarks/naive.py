"""The naive peers: the operations written as masked assignments in an autograd.Function, as a first attempt does."""

import torch
from torch import Tensor


class NaiveReLU(torch.autograd.Function):
    """ReLU_alpha: saves its input, and builds each case of the derivative with a mask."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:  # noqa: ANN001 # autograd's context
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001 # autograd's context
        (x,) = ctx.saved_tensors
        gradient = g.clone()
        gradient[x < 0] = 0
        at_zero = x == 0
        gradient[at_zero] = ctx.alpha * g[at_zero]
        return gradient, None


class NaiveMinimalPool(torch.autograd.Function):
    """Square windows that do not overlap, by a six-dimensional view; the gradient shared over the tied entries."""

    @staticmethod
    def forward(ctx, x: Tensor, k: int) -> Tensor:  # noqa: ANN001 # autograd's context
        n, c, h, w = x.shape
        windows = x.reshape(n, c, h // k, k, w // k, k)
        y = windows.amax(dim=(3, 5))
        ctx.save_for_backward(windows, y)
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:  # noqa: ANN001 # autograd's context
        windows, y = ctx.saved_tensors
        n, c, h, k, w, _ = windows.shape
        reached = windows == y[:, :, :, None, :, None]
        count = reached.sum(dim=(3, 5), keepdim=True)
        gradient = torch.zeros_like(windows)
        shared = (g[:, :, :, None, :, None] / count).expand_as(windows)
        gradient[reached] = shared[reached]
        return gradient.reshape(n, c, h * k, w * k), None


def naive_relu(x: Tensor, alpha: float) -> Tensor:
    """ReLU with ReLU'(0) = alpha."""
    return NaiveReLU.apply(x, alpha)


def naive_beta_pool(x: Tensor, beta: float, k: int = 2) -> Tensor:
    """``beta * minimal + (1 - beta) * native`` in floating point, both branches always evaluated."""
    return beta * NaiveMinimalPool.apply(x, k) + (1 - beta) * torch.nn.functional.max_pool2d(x, k)
