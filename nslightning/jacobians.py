"""The vocabulary: which element of the generalised Jacobian a backward pass returns where it is not unique."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

__all__ = ["Jacobians", "MaxPoolChoice", "Rule"]

Rule = Literal["exact", "published"]
MaxPoolChoice = Literal["native", "first", "last", "minimal", "random", "sum"]

# Where the libraries differ from PyTorch at the kinks, as measured on jax 0.10 and tensorflow 2.21 (eager; hard tanh is
# Keras's, tensorflow itself has none): docs/conventions.md.
_PRESETS: dict[str, dict[str, Any]] = {
    "pytorch": {},
    "jax": {"leaky_relu": 1.0, "hardtanh": (1.0, 1.0), "abs": 1.0, "max_pool": "first"},
    "tensorflow": {"hardtanh": (1.0, 1.0), "selu": 1.0507009873554805, "max_pool": "first"},
}


@dataclass(frozen=True)
class Jacobians:
    """A Jacobian choice: what the backward pass returns at ties, one entry per nonsmooth operation.

    A *tie* is an evaluation at a point where the Jacobian is not unique: ``x == 0`` in ReLU, a pooling window whose
    maximum is reached more than once. Everywhere else all choices return the same gradient, and the forward pass
    never depends on the choice. Every default is the reference choice, what stock PyTorch does; ``None`` also means
    the reference.

    Args:
        relu: ReLU'(0) = alpha; the gradient at a tie is ``alpha * g`` (Bertoin et al. 2021, section 2). Values in
            [0, 1] lie in the Clarke Jacobian, others do not and are allowed.
        relu6: The derivatives of ReLU6 at 0 and at 6.
        leaky_relu: The derivative of LeakyReLU at 0; the reference is its negative slope.
        hardtanh: The derivatives of Hardtanh at its lower and its upper bound (bounds 0 and 6 are ``relu6``).
        hardswish: The derivatives of Hardswish at -3 and at 3.
        hardsigmoid: The derivatives of Hardsigmoid at -3 and at 3.
        softshrink: The derivatives of Softshrink at minus lambda and at lambda.
        threshold: The derivative of Threshold at its threshold.
        elu: The derivative of ELU at 0, where its alpha is not 1; the reference is that alpha.
        selu: The derivative of SELU at 0; the reference is the left one, about 1.758.
        abs: The derivative of the absolute value at 0.
        max_pool: How a pooling window shares its gradient ``g`` over the ``k > 1`` entries that reach the maximum.
            A number ``beta`` gives ``beta * minimal + (1 - beta) * native`` (Boustany 2024, section 3): each tied
            entry gets ``g * beta / k`` and the native one ``g * (1 - beta)`` more; beta in [0, 1] stays in the Clarke
            Jacobian. By name: ``"native"`` (beta = 0: all to the entry PyTorch picks, the first in row-major
            order), ``"first"``, ``"last"``, ``"minimal"`` (beta = 1: equal shares, the element of least norm),
            ``"random"`` (all to one tied entry, drawn afresh at each backward pass) and ``"sum"`` (``g`` to each tied
            entry; outside the Clarke Jacobian).
        rule: ``"exact"`` respects the chain rule and leaves the forward alone. ``"published"`` is the arithmetic of
            the papers' released code: ReLU's and ReLU6's gradient at a tie *is* alpha instead of alpha times the
            incoming gradient, and max pooling computes ``beta * a + (1 - beta) * a`` in floating point, forward and
            backward. It exists to tell the effect of the implementation from that of the Jacobian.

    Raises:
        ValueError: If a choice is not a finite number or not a known name.

    Example:
        >>> Jacobians(relu=1.0, max_pool="minimal")
        Jacobians(relu=1.0, max_pool='minimal')
        >>> Jacobians.preset("pytorch") == Jacobians()
        True
    """

    relu: float | None = 0.0
    relu6: tuple[float, float] | None = (0.0, 0.0)
    leaky_relu: float | None = None
    hardtanh: tuple[float, float] | None = None
    hardswish: tuple[float, float] | None = None
    hardsigmoid: tuple[float, float] | None = None
    softshrink: tuple[float, float] | None = None
    threshold: float | None = None
    elu: float | None = None
    selu: float | None = None
    abs: float | None = None
    max_pool: float | MaxPoolChoice | None = 0.0
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        for name in ("relu", "leaky_relu", "threshold", "elu", "selu", "abs"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _number(name, value))
        for name in ("relu6", "hardtanh", "hardswish", "hardsigmoid", "softshrink"):
            values = getattr(self, name)
            if values is not None:
                if not isinstance(values, (tuple, list)) or len(values) != 2:
                    raise ValueError(f"{name} takes two numbers, the derivatives at its two kinks; given {values!r}")
                object.__setattr__(self, name, tuple(_number(name, v) for v in values))
        if isinstance(self.max_pool, str):
            _known("max_pool", self.max_pool, (*get_args(MaxPoolChoice), "a number beta"))
        elif self.max_pool is not None:
            object.__setattr__(self, "max_pool", _number("max_pool", self.max_pool))
        _known("rule", self.rule, get_args(Rule))

    @classmethod
    def preset(cls, name: str) -> Jacobians:
        """The choice that a library makes.

        Args:
            name: ``"pytorch"``, ``"jax"`` or ``"tensorflow"``.

        Returns:
            The choice under which a patched PyTorch model takes that library's gradients at its ties.

        Raises:
            ValueError: If the name is unknown.

        Example:
            >>> Jacobians.preset("jax").leaky_relu
            1.0
        """
        _known("preset", name, tuple(_PRESETS))
        return cls(**_PRESETS[name])

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain Python values, as stored in configs, reports and checkpoints.

        Returns:
            One entry per field; ``Jacobians(**d)`` gives the choice back.
        """
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        default = type(self).__dataclass_fields__
        changed = (f"{n}={getattr(self, n)!r}" for n, f in default.items() if getattr(self, n) != f.default)
        return f"Jacobians({', '.join(changed)})"


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} takes finite numbers; given {value!r}")
    return float(value)


def _known(what: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        close = difflib.get_close_matches(str(given), allowed, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what} {given!r} is not known{hint} Allowed: {', '.join(map(str, allowed))}")
