"""The vocabulary: which element of the generalised Jacobian a backward pass returns where it is not unique."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nslightning.spelling import did_you_mean

__all__ = ["NONSMOOTH", "Jacobians", "Kink", "MaxPoolChoice", "Nonsmooth", "ReluChoice", "Rule"]

Rule = Literal["exact", "published"]
ReluChoice = Literal["random"]
MaxPoolChoice = Literal["native", "first", "last", "minimal", "random", "sum"]


@dataclass(frozen=True)
class Kink:
    """A point where an operation's Jacobian is not unique.

    Args:
        where: The points, as a formula.
        clarke: The Clarke Jacobian there.
        pytorch: What stock PyTorch returns there.
    """

    where: str
    clarke: str
    pytorch: str


@dataclass(frozen=True)
class Nonsmooth:
    """A nonsmooth operation in words; the one place that validation, presets, the registry and the docs read.

    Args:
        formula: The function.
        kinks: Where its Jacobian is not unique; a pair of numbers chooses the derivatives of two kinks.
        names: The choices that have a name.
        jax: The choice that JAX makes; None where it agrees with PyTorch, has no such function, or returns NaN.
        tensorflow: The choice that TensorFlow and Keras make; None as for JAX.
        note: What else there is to say.
        paper: Where the choice was studied.
    """

    formula: str
    kinks: tuple[Kink, ...]
    names: tuple[str, ...] = ()
    jax: Any = None
    tensorflow: Any = None
    note: str = ""
    paper: str = ""


_BERTOIN = "Bertoin, Bolte, Gerchinovitz, Pauwels, Numerical influence of ReLU'(0) on backpropagation, NeurIPS 2021"
_BOUSTANY = "Boustany, On the numerical reliability of nonsmooth autodiff: a MaxPool case study, TMLR 2024"
_HULL = "the convex hull of the unit vectors of the tied entries"
_SHARES = get_args(MaxPoolChoice)

# What the libraries return was measured on jax 0.10 and tensorflow 2.21 (eager): docs/conventions.md. Where one of them
# has no such function (hard tanh, PReLU and the hinge loss of tensorflow) it is Keras's, optax's or flax's.
NONSMOOTH: dict[str, Nonsmooth] = {
    "relu": Nonsmooth("max(x, 0)", (Kink("x = 0", "[0, 1]", "0"),), get_args(ReluChoice), paper=_BERTOIN),
    "relu6": Nonsmooth(
        "min(max(x, 0), 6)", (Kink("x = 0", "[0, 1]", "0"), Kink("x = 6", "[0, 1]", "0")), paper=_BERTOIN
    ),
    "leaky_relu": Nonsmooth(
        "x where x > 0, slope x elsewhere", (Kink("x = 0", "between slope and 1", "slope"),), jax=1.0
    ),
    "prelu": Nonsmooth(
        "x where x > 0, a x elsewhere, a learned",
        (Kink("x = 0", "between a and 1", "a"),),
        jax=1.0,
        tensorflow=0.0,
        note="The gradient of the learned slope is unique.",
    ),
    "rrelu": Nonsmooth(
        "x where x > 0, r x elsewhere, r drawn from [lower, upper]",
        (Kink("x = 0", "between r and 1", "r"),),
        note="In evaluation mode r is (lower + upper) / 2.",
    ),
    "hardtanh": Nonsmooth(
        "min(max(x, low), high)",
        (Kink("x = low", "[0, 1]", "0"), Kink("x = high", "[0, 1]", "0")),
        jax=(1.0, 1.0),
        tensorflow=(1.0, 1.0),
        note="Between 0 and 6 it is relu6.",
    ),
    "clamp": Nonsmooth(
        "min(max(x, low), high)",
        (
            Kink("x = low", "[0, 1]", "1 up to torch 2.13, 0 in 2.15"),
            Kink("x = high", "[0, 1]", "1 up to torch 2.13, 0 in 2.15"),
        ),
        jax=(0.5, 0.5),
        tensorflow=(1.0, 1.0),
        note="clamp_min and clamp_max have one bound. Bounds may be tensors: at a tie the bound receives the rest.",
    ),
    "hardswish": Nonsmooth(
        "x min(max(x + 3, 0), 6) / 6", (Kink("x = -3", "[-1/2, 0]", "0"), Kink("x = 3", "[1, 3/2]", "1"))
    ),
    "hardsigmoid": Nonsmooth(
        "min(max(x + 3, 0), 6) / 6", (Kink("x = -3", "[0, 1/6]", "0"), Kink("x = 3", "[0, 1/6]", "0"))
    ),
    "hardshrink": Nonsmooth(
        "x where |x| > lambda, 0 elsewhere",
        (Kink("x = -lambda", "none: a jump", "0"), Kink("x = lambda", "none: a jump", "0")),
        note="It jumps where it kinks; 0 and 1 are the derivatives on the two sides.",
    ),
    "softshrink": Nonsmooth(
        "sign(x) max(|x| - lambda, 0)",
        (Kink("x = -lambda", "[0, 1]", "0"), Kink("x = lambda", "[0, 1]", "0")),
    ),
    "threshold": Nonsmooth(
        "x where x > threshold, value elsewhere",
        (Kink("x = threshold", "[0, 1] where value = threshold, else none: a jump", "0"),),
    ),
    "elu": Nonsmooth(
        "x where x > 0, alpha (exp(x) - 1) elsewhere",
        (Kink("x = 0", "between alpha and 1", "alpha"),),
        note="Smooth for alpha = 1; CELU is smooth for every alpha.",
    ),
    "selu": Nonsmooth(
        "scale x where x > 0, scale alpha (exp(x) - 1) elsewhere",
        (Kink("x = 0", "[scale, scale alpha] = [1.051, 1.758]", "1.758"),),
        tensorflow=1.0507009873554805,
    ),
    "abs": Nonsmooth(
        "|x|",
        (Kink("x = 0", "[-1, 1]", "0"),),
        jax=1.0,
        note="L1 losses and 1-norms take it at each of their entries.",
    ),
    "max_pool": Nonsmooth(
        "the maximum of each window",
        (Kink("k > 1 entries reach the maximum", _HULL, "all to the first"),),
        _SHARES,
        jax="first",
        tensorflow="first",
        paper=_BOUSTANY,
    ),
    "max": Nonsmooth(
        "the maximum, or the minimum, over all entries or along dimensions",
        (
            Kink(
                "k > 1 entries reach the maximum",
                _HULL,
                "max(dim), min(dim): all to the entry that the index names; all others: equal shares",
            ),
        ),
        _SHARES,
        jax="minimal",
        tensorflow="minimal",
    ),
    "maximum": Nonsmooth(
        "the greater, or the smaller, of two entries",
        (Kink("x = y", "(t, 1 - t) for t in [0, 1]", "(1/2, 1/2)"),),
        _SHARES,
        tensorflow="first",
        note="Every number beta gives halves, for these are both native and minimal.",
    ),
    "norm": Nonsmooth(
        "the Euclidean norm of vectors",
        (Kink("x = 0", "the unit ball", "0"),),
        note="A number c gives each entry c g; JAX and TensorFlow return NaN.",
        paper=_BOUSTANY + " (NormPool: version 1 is 0, version 2 is 1)",
    ),
    "hinge": Nonsmooth(
        "max(u, 0) inside the hinge losses",
        (Kink("u = 0", "[0, 1]", "that of clamp_min: 1 up to torch 2.13, 0 in 2.15"),),
        jax=0.5,
        tensorflow=1.0,
    ),
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
            [0, 1] lie in the Clarke Jacobian, others do not and are allowed. ``"random"`` draws alpha from [0, 1]
            for each tie, afresh at each backward pass.
        relu6: The derivatives of ReLU6 at 0 and at 6.
        leaky_relu: The derivative of LeakyReLU at 0; the reference is its negative slope.
        prelu: The derivative of PReLU at 0; the reference is its slope.
        rrelu: The derivative of RReLU at 0; the reference is the slope drawn.
        hardtanh: The derivatives of Hardtanh at its lower and its upper bound (bounds 0 and 6 are ``relu6``).
        clamp: The derivatives of ``clamp`` at its lower and its upper bound; the reference depends on the version of
            torch (1 up to 2.13, 0 in 2.15).
        hardswish: The derivatives of Hardswish at -3 and at 3.
        hardsigmoid: The derivatives of Hardsigmoid at -3 and at 3.
        hardshrink: The derivatives of Hardshrink at minus lambda and at lambda, where it jumps.
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
        max: The same for ``max``, ``min``, ``amax``, ``amin`` and ``aminmax``, over all entries or along dimensions.
            What is native differs: ``max(dim)`` gives all to the entry that its index names, the others share
            equally, so that for them every number beta is the same.
        maximum: The same for ``maximum``, ``minimum``, ``fmax`` and ``fmin``, whose native choice is halves; the
            first entry is the first argument.
        norm: What each entry of a vector whose Euclidean norm is 0 receives, times ``g``; the reference is 0.
        hinge: The derivative of ``max(u, 0)`` at 0 inside the hinge losses; the reference is that of ``clamp_min``.
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

    relu: float | ReluChoice | None = 0.0
    relu6: tuple[float, float] | None = (0.0, 0.0)
    leaky_relu: float | None = None
    prelu: float | None = None
    rrelu: float | None = None
    hardtanh: tuple[float, float] | None = None
    clamp: tuple[float, float] | None = None
    hardswish: tuple[float, float] | None = None
    hardsigmoid: tuple[float, float] | None = None
    hardshrink: tuple[float, float] | None = None
    softshrink: tuple[float, float] | None = None
    threshold: float | None = None
    elu: float | None = None
    selu: float | None = None
    abs: float | None = None
    max_pool: float | MaxPoolChoice | None = 0.0
    max: float | MaxPoolChoice | None = None
    maximum: float | MaxPoolChoice | None = None
    norm: float | None = None
    hinge: float | None = None
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        for name, operation in NONSMOOTH.items():
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, str) and operation.names:
                _known(name, value, (*operation.names, "a number"))
            elif len(operation.kinks) == 2:
                if not isinstance(value, (tuple, list)) or len(value) != 2:
                    raise ValueError(f"{name} takes two numbers, the derivatives at its two kinks; given {value!r}")
                object.__setattr__(self, name, tuple(_number(name, v) for v in value))
            else:
                object.__setattr__(self, name, _number(name, value))
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
        _known("preset", name, ("pytorch", "jax", "tensorflow"))
        chosen = {op: getattr(described, name, None) for op, described in NONSMOOTH.items()}
        return cls(**{op: choice for op, choice in chosen.items() if choice is not None})

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
        hint = did_you_mean(given, allowed)
        raise ValueError(f"{what} {given!r} is not known{hint} Allowed: {', '.join(map(str, allowed))}")
