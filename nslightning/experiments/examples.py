"""The smallest programs whose derivative is not that of the function they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nslightning.ops import relu

__all__ = [
    "max_of_library",
    "max_of_relus",
    "max_of_scan",
    "program_difference",
    "program_of_formula",
    "zero_of_relus",
]

Program = Callable[[Sequence[Tensor]], Tensor]


def zero_of_relus(t: Tensor, at_zero: float = 0.0) -> Tensor:
    r"""A program for the function 0 whose derivative at 0 is :math:`1 - 2\alpha`.

    For every real t, :math:`\mathrm{relu}_2(t) = \mathrm{relu}(-t) + t` is relu(t), so their difference is 0. With
    ReLU'(0) = alpha, autodiff gives :math:`1 - \alpha` for the first at 0 and :math:`\alpha` for the second. Only
    alpha = 1/2 returns the derivative of 0. Bertoin et al. 2021, section 1; Bolte and Pauwels 2020.

    Args:
        t: Any shape.
        at_zero: ReLU'(0).

    Returns:
        Zeros.

    Example:
        >>> t = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> torch.autograd.grad(zero_of_relus(t).sum(), t)[0]
        tensor([0., 1., 0.])
        >>> torch.autograd.grad(zero_of_relus(t, at_zero=0.5).sum(), t)[0]
        tensor([0., 0., 0.])
    """
    return relu(-t, at_zero) + t - relu(t, at_zero)


def max_of_scan(x: Sequence[Tensor]) -> Tensor:
    """The maximum by going through the numbers: its derivative goes to the first of those that reach it.

    Args:
        x: 0-d tensors.

    Returns:
        The greatest one.
    """
    greatest = x[0]
    for one in x[1:]:
        if one > greatest:
            greatest = one
    return greatest


def max_of_library(x: Sequence[Tensor]) -> Tensor:
    """The maximum by ``torch.max``: its derivative is shared equally by those that reach it.

    Args:
        x: 0-d tensors.

    Returns:
        The greatest one.
    """
    return torch.stack(list(x)).max()


def max_of_relus(x: Sequence[Tensor], at_zero: float = 0.0) -> Tensor:
    r"""The maximum by ReLUs, pair by pair: :math:`(a+b)/2 + \mathrm{relu}((a-b)/2) + \mathrm{relu}((b-a)/2)`.

    Args:
        x: 0-d tensors, a power of 2 of them.
        at_zero: ReLU'(0) of the first of the two ReLUs; the other's is 0.

    Returns:
        The greatest one.
    """
    while len(x) > 1:
        pairs = zip(x[::2], x[1::2], strict=True)
        x = [(a + b) / 2 + relu((a - b) / 2, at_zero) + relu((b - a) / 2) for a, b in pairs]
    return x[0]


def program_difference(one: Program, other: Program, v: Sequence[float], t: float, dtype: torch.dtype) -> float:
    r"""The derivative at t of ``one(t * v) - other(t * v)``, two programs for the same function.

    Its value is 0 at every t. Where t is 0, all entries tie, and the derivative may be truly another
    (*bifurcation*): :math:`v_1 - \bar v` for a scan against the library. Where all entries of v are equal they tie at
    every t, both derivatives are the same real number, and what is left is rounding (*compensation*), whose
    size depends on the dtype and on the order in which autodiff adds up. Boustany 2024, section 1.

    Args:
        one: A program for the maximum.
        other: Another one.
        v: The direction.
        t: The point on the line along v.
        dtype: The precision of the arithmetic.

    Returns:
        The derivative.

    Example:
        >>> program_difference(max_of_scan, max_of_library, (1, 2, 3, 4), 0.0, torch.float32)
        -1.5
        >>> program_difference(max_of_scan, max_of_library, (1, 2, 3, 4), 0.1, torch.float32)
        0.0
        >>> program_difference(max_of_scan, max_of_library, (1.14,) * 4, 0.1, torch.float32) == 2**-24
        True
    """
    at = torch.tensor(t, dtype=dtype, requires_grad=True)
    # The second program stands first in the graph, so that the engine adds its gradients last.
    second = other([at * float(w) for w in v])
    first = one([at * float(w) for w in v])
    (derivative,) = torch.autograd.grad(first - second, at)
    return float(derivative)


def program_of_formula(clauses: Sequence[Sequence[int]]) -> Callable[[Sequence[Any]], Any]:
    r"""A program that is differentiable at 0 exactly where a formula has no solution.

    The formula is a conjunction of disjunctions of literals, and the program

    .. math:: F(x) = \min_{\text{clauses}} \max_{\text{literals}} \mathrm{relu}(\pm x_k),

    which ReLUs compute with weights -1, 0 and 1, since :math:`\max(a, b) = b + \mathrm{relu}(a - b)`. With variable k
    true where :math:`x_k > 0`, F(x) is above 0 exactly where x solves the formula. F is never below 0, and
    :math:`F(tx) = tF(x)` for t > 0. So F is 0 everywhere where there is no solution, and has a kink at 0 where there
    is one: to tell whether a program is differentiable at a point is as hard as to solve such formulas, which is
    NP-hard. The theorem is that of Bolte, Boustany, Pauwels and Pesquet-Popescu 2023; the reduction is ours.

    Args:
        clauses: Each a list of literals: k for variable k, counted from 1, and -k for its negation.

    Returns:
        The program, of as many inputs as there are variables.

    Example:
        >>> from nslightning.probes import clarke
        >>> clarke(program_of_formula([[1, 2], [-1, -2]]), [0, 0]).differentiable  # x1 and not x2 solves it
        False
        >>> clarke(program_of_formula([[1], [-1]]), [0]).differentiable
        True
    """

    def program(x: Sequence[Any]) -> Any:
        literals = {sign * (k + 1): max(0, sign * v) for k, v in enumerate(x) for sign in (1, -1)}
        return min(max(literals[literal] for literal in clause) for clause in clauses)

    return program
