"""INNAprop's step as one kernel over all tensors of a group, in Triton: each number is read once and written once.

A table on the device holds the tensors' addresses, so that one launch serves them all. It is copied there, without
waiting, when an address has changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nslightning.ops.autograd.layouts import is_dense
from nslightning.ops.kernels import cuda

__all__ = ["Coefficients", "fits", "step"]

_BLOCK = 4096


class Coefficients(NamedTuple):
    """The coefficients of a step; each is rounded to float32.

    Args:
        sigma: The decay of the running mean of squared gradients.
        eps: Term added to the denominator.
        keep: Share of the weights that the decay leaves.
        push: Factor of the weights in the velocity's decay term.
        lr: Factor of the velocity in the step of the weights.
        to_weights: Factor of the scaled gradient in the step of the weights.
        friction: Share of the velocity that the friction leaves.
        to_velocity: Factor of the scaled gradient in the step of the velocity.
    """

    sigma: float
    eps: float
    keep: float
    push: float
    lr: float
    to_weights: float
    friction: float
    to_velocity: float


@triton.jit
def _load(address, at, n, FULL: tl.constexpr):
    if FULL:
        return tl.load(address + at)
    return tl.load(address + at, mask=at < n, other=0.0)


@triton.jit
def _store(address, at, n, value, FULL: tl.constexpr):
    if FULL:
        tl.store(address + at, value)
    else:
        tl.store(address + at, value, mask=at < n)


@triton.jit
def _advance(
    weight, gradient, velocity, square, at, n, correction, sigma, rest, eps, keep, push, lr, to_weights, friction,
    to_velocity, VELOCITY: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    x = _load(weight, at, n, FULL)
    g = _load(gradient, at, n, FULL)
    v = _load(square, at, n, FULL) * sigma + rest * g * g
    scale = tl.div_rn(tl.sqrt_rn(v), correction) + eps  # rounded to the nearest, as PyTorch divides
    moved = x * keep
    if VELOCITY:
        w = _load(velocity, at, n, FULL) + push * x
        moved = moved + lr * w
        _store(velocity, at, n, w * friction + tl.div_rn(to_velocity * g, scale), FULL)
    _store(weight, at, n, moved + tl.div_rn(to_weights * g, scale), FULL)
    _store(square, at, n, v, FULL)


@triton.jit
def _step(
    tensors, blocks, log_sigma, log_sigma_rest, sigma, rest, eps, keep, push, lr, to_weights, friction, to_velocity,
    VELOCITY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tensors + tl.load(blocks + 2 * tl.program_id(0)) * 6
    start = tl.load(blocks + 2 * tl.program_id(0) + 1) * BLOCK
    weight = tl.load(row).to(tl.pointer_type(tl.float32))
    gradient = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    velocity = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    square = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    count = tl.load(tl.load(row + 4).to(tl.pointer_type(tl.float32))).to(tl.float64)
    n = tl.load(row + 5)
    if ALIGNED:  # then four numbers are moved at once
        weight = tl.multiple_of(weight, 16)
        gradient = tl.multiple_of(gradient, 16)
        velocity = tl.multiple_of(velocity, 16)
        square = tl.multiple_of(square, 16)
    # sqrt(1 - sigma^t), in float64: in float32 the difference loses half of its digits for small t.
    correction = tl.sqrt(1.0 - tl.exp(count * log_sigma + count * log_sigma_rest)).to(tl.float32)
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:
        _advance(weight, gradient, velocity, square, at, n, correction, sigma, rest, eps, keep, push, lr, to_weights,
                 friction, to_velocity, VELOCITY, True)  # fmt: skip
    else:
        _advance(weight, gradient, velocity, square, at, n, correction, sigma, rest, eps, keep, push, lr, to_weights,
                 friction, to_velocity, VELOCITY, False)  # fmt: skip


def fits(weights: Sequence[Tensor], steps: Sequence[Tensor]) -> bool:
    """Return whether the kernel takes a group of tensors.

    Args:
        weights: The parameters, or their master weights, real and of one device and precision.
        steps: Their step counts.

    Returns:
        True for dense float32 tensors on a CUDA device whose stream no CUDA graph captures: the addresses are copied
        from memory of the host.
    """
    return (
        weights[0].is_cuda
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and is_dense(t) for t in weights)
        and all(t.is_cuda and t.dtype == torch.float32 for t in steps)
        and not torch.cuda.is_current_stream_capturing()
    )


def step(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    velocities: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    coefficients: Coefficients,
) -> None:
    """Move weights, velocities and running means in place.

    Args:
        weights: Dense float32 tensors of one device.
        grads: Their gradients, of any layout.
        velocities: Their velocities, laid out as they are; empty where these stay zero.
        exp_avg_sqs: Their running means of squared gradients, laid out alike.
        steps: Their step counts, 0-d, float32, on the device.
        coefficients: See there.
    """
    alike = [
        g if g.stride() == w.stride() else torch.empty_like(w).copy_(g) for w, g in zip(weights, grads, strict=True)
    ]
    addresses = [[t.data_ptr() for t in column] for column in (weights, alike, velocities, exp_avg_sqs)]
    addresses[2] = addresses[2] or [0] * len(weights)
    device = weights[0].device
    rows = tuple(zip(*addresses, (t.data_ptr() for t in steps), (t.numel() for t in weights), strict=True))
    aligned = all(address % 16 == 0 for column in addresses for address in column)
    stream = torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0
    blocks = _blocks(tuple(t.numel() for t in weights), device, stream)
    sigma, log_sigma = coefficients.sigma, math.log(coefficients.sigma) if coefficients.sigma else -math.inf
    rounded = torch.tensor(log_sigma, dtype=torch.float32, device="cpu").item()
    beyond = log_sigma - rounded if math.isfinite(log_sigma) else 0.0
    with cuda.launching(weights[0]):
        _step[(len(blocks),)](
            _table(rows, device, stream), blocks, rounded, beyond, sigma, 1 - sigma, *coefficients[1:],
            VELOCITY=bool(velocities), ALIGNED=aligned, BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


@lru_cache(maxsize=32)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Addresses and sizes of the tensors, on the device."""
    return _sent(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


@lru_cache(maxsize=32)
def _blocks(sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """By program of the launch, which tensor it works on, and on which of its blocks."""
    counts = torch.tensor([triton.cdiv(size, _BLOCK) for size in sizes], device="cpu")
    which = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), counts)
    first = (counts.cumsum(0) - counts)[which]
    return _sent(torch.stack((which, torch.arange(len(which), device="cpu") - first), 1), device)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
