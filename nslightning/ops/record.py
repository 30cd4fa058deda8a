"""The records of the nonsmooth operations, one for each, and the tables that are made of the records.

A record stands in the file of its operation's family. :class:`~nslightning.Jacobians`, the surgery, the probes, the
audit and the docs read it; :func:`register` adds one, from inside the package or from outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import BuiltinFunctionType, GenericAlias, MethodDescriptorType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Union, get_args

import numpy as np
import torch
from torch import Tensor, nn

from nslightning._torch import overloads
from nslightning.spelling import did_you_mean, short

if TYPE_CHECKING:
    from nslightning.ops.autograd.selection import Selection

__all__ = [
    "FUNCTIONS",
    "MODULES",
    "OPERATIONS",
    "RULES",
    "Call",
    "Choice",
    "Count",
    "Kernels",
    "Kink",
    "ModuleSpelling",
    "Operation",
    "Rule",
    "follow",
    "known",
    "named",
    "number",
    "only",
    "plain",
    "positional",
    "register",
    "spelled",
]

#: ``"exact"`` respects the chain rule; ``"published"`` is the arithmetic of the papers' released code.
Rule = Literal["exact", "published"]
RULES: tuple[str, ...] = get_args(Rule)

#: A number of evaluations: known, or a 0-d tensor of an integer dtype that waits on its device to be read.
Count = int | Tensor


class Choice(Protocol):
    """A choice: an object with a field for each operation and a rule, such as :class:`~nslightning.Jacobians`."""

    @property
    def rule(self) -> str:
        """One of :data:`RULES`."""

    def __getattr__(self, operation: str) -> Any: ...


class Call(NamedTuple):
    """One evaluation of an operation, whatever spelling it came in.

    Args:
        x: The input, or the first of them.
        parameters: The others, and the operation's own parameters.
        inplace: Overwrite ``x``.
        return_indices: Also return the indices that the operation finds.
        within: Evaluates it where it is part of another function, as the absolute value is part of an L1 loss.
    """

    x: Tensor
    parameters: tuple[Any, ...] = ()
    inplace: bool = False
    return_indices: bool = False
    within: Callable[[Selection, Tensor], Any] | None = None


def _never(*parameters: Any) -> bool:
    return False


@dataclass(frozen=True)
class Kink:
    """A point at which an operation's Jacobian is not unique.

    Args:
        where: The points, as a formula.
        position: The point, a function of the operation's parameters; NaN where these make no kink, and a tensor where
            a parameter is one. None where entries are compared with each other, not with a number.
        sides: The derivatives on the left and on the right, a function of the parameters. A side that differs from
            entry to entry is a tensor, or None.
        jumps: Whether the function jumps there, a function of the parameters: then it has no Clarke Jacobian.
        clarke: The Clarke Jacobian in words, where numbers do not give it.
        stock: The stock choice in words, where it is no number between the two sides.

    Example:
        >>> zero = Kink("x = 0", position=lambda slope: 0.0, sides=lambda slope: (slope, 1.0))
        >>> zero.sides(0.25)
        (0.25, 1.0)
    """

    where: str
    position: Callable[..., Any] | None = None
    sides: Callable[..., tuple[Any, Any]] | None = None
    jumps: Callable[..., bool] = _never
    clarke: str = ""
    stock: str = ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Kernels:
    """The stock kernels of a pointwise operation; :mod:`~nslightning.ops.autograd.pointwise` puts the choice around it.

    Args:
        forward: The stock kernel, ``(x, *parameters) -> y``.
        backward: The stock backward kernel, ``(g, saved, *parameters) -> gradient``.
        saves: The tensor that the backward reads: the output (shared with the next layer) or the input. In place a copy
            of the input is kept, unless there is a ``backward_``.
        forward_: The stock kernel that overwrites ``x``; without one, ``forward``'s result is copied there.
        backward_: The backward that stock takes in place, ``(g, output, *parameters) -> gradient``, where that is
            another one.
        prepare: Converts the input and the parameters before the kernels run, by default to Python's numbers. Tensors
            among the parameters come first; where the backward returns a tuple, its other members are their gradients,
            still of ``x``'s shape.
        published: Whether the published rule drops the incoming gradient at ties.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor | tuple[Tensor, ...]]
    saves: Literal["output", "input"] = "input"
    forward_: Callable[..., Tensor] | None = None
    backward_: Callable[..., Tensor] | None = None
    prepare: Callable[..., tuple[Tensor, tuple[Any, ...]]] = lambda x, *parameters: (x, tuple(map(number, parameters)))
    published: bool = False

    def overwrite(self, x: Tensor, *parameters: Any) -> Tensor:
        """Overwrite a tensor with the stock result.

        Args:
            x: The input.
            *parameters: The operation's own.

        Returns:
            ``x``.
        """
        return x.copy_(self.forward(x, *parameters)) if self.forward_ is None else self.forward_(x, *parameters)


@dataclass(frozen=True)
class ModuleSpelling:
    """The spelling of an operation by a class of modules.

    Args:
        parse: ``(module, *args, **kwargs) -> call``.
        claims: Whether a module of the class is the operation: a Hardtanh between 0 and 6 is a ReLU6.
    """

    parse: Callable[..., Call | None]
    claims: Callable[[Any], bool]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Call | None:
        """The call that a module makes of its arguments.

        Args:
            module: The module.
            *args: The arguments of its forward.
            **kwargs: The same by name.

        Returns:
            The call; None where the arguments make it another operation.
        """
        return self.parse(module, *args, **kwargs)


def only(claims: Callable[[Any], bool], parse: Callable[..., Call | None]) -> ModuleSpelling:
    """A module class that is an operation under a condition alone.

    Args:
        claims: Whether a module is.
        parse: As in :class:`ModuleSpelling`.

    Returns:
        An entry of :attr:`Operation.modules`.
    """
    return ModuleSpelling(parse, claims)


@dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """All that the package knows of one nonsmooth operation.

    Args:
        name: The field of :class:`~nslightning.Jacobians` that chooses its Jacobian.
        formula: The function.
        kinks: The points where its Jacobian is not unique; a pair of numbers chooses the derivatives of two kinks.
        choice: The meaning of the chosen number, as the field's documentation.
        apply: Evaluates a call under a selection.
        ties: Counts a call's ties: ``(tied evaluations, all evaluations)``. Each is a number or a 0-d tensor, which
            is read only when all sites of a forward are counted, since reading it waits for its device.
        modules: The module classes that spell it, each with a function that turns ``(module, *args)`` into a call; with
            :func:`only`, under a condition.
        functions: The functions and methods that spell it, each with a function that turns its arguments into a call or
            returns None where the arguments make it another operation.
        kernels: The stock kernels of a pointwise operation; None for all others.
        shares: Whether it shares a gradient over several entries: then the choice is a number beta or a name of
            :data:`~nslightning.ops.autograd.shares.SHARES`.
        names: The other choices that have a name.
        default: The field's default; None is the native choice too.
        jax: The choice that JAX makes; None where it agrees with PyTorch, has no such function, or returns NaN.
        tensorflow: The choice that TensorFlow and Keras make; None as for JAX.
        taken: Stock PyTorch's derivative at each kink, as the share of the way from the left to the right derivative:
            probed from the installed version when the record is made. Empty where it is no number.
        corners: Elements of the Clarke Jacobian between which all others lie, ``*parameters -> choices``; without it,
            the derivatives on the two sides. Empty where the choices name no such elements.
        remedy: The advice of an audit where its ties matter.
        rounding_remedy: The same where rounding alone makes the ties that matter.
        note: Further remarks.
        references: Papers that study the choice.
        example: The function as a model writes it, for plots and checks.
        at: The parameters of the example; for an operation that shares, the value of its equal entries.
    """

    name: str
    formula: str
    kinks: tuple[Kink, ...]
    choice: str
    apply: Callable[[Selection, Call], Any]
    ties: Callable[[Call], tuple[Count, Count]]
    modules: Mapping[type[nn.Module], Callable[..., Call | None]] = field(default_factory=dict)
    functions: Mapping[Callable, Callable[..., Call | None]] = field(default_factory=dict)
    kernels: Kernels | None = None
    shares: bool = False
    names: tuple[str, ...] = ()
    default: Any = None
    jax: Any = None
    tensorflow: Any = None
    taken: tuple[float, ...] = ()
    corners: Callable[..., tuple[Any, ...]] | None = None
    remedy: str = ""
    rounding_remedy: str = ""
    note: str = ""
    references: str = ""
    example: Callable[[Tensor], Tensor] | None = None
    at: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return _named, (self.name,)  # each operation exists once: pickles and copies refer to it by name

    def claims(self, module: nn.Module) -> bool:
        """Return whether a module is this operation.

        Args:
            module: Any module.

        Returns:
            True if its class, or the nearest of its base classes that has a record, spells the operation, and the
            module's own settings make it no other one.

        Example:
            >>> [name for name, operation in OPERATIONS.items() if operation.claims(nn.Hardtanh(0, 6))]
            ['relu6']
        """
        cls = next((c for c in type(module).__mro__ if c in MODULES), None)
        if cls is None or cls not in self.modules:
            return False
        spelling = self.modules[cls]
        return spelling.claims(module) if isinstance(spelling, ModuleSpelling) else True

    def positions(self, *parameters: Any) -> list[Any]:
        """The points where a pointwise operation has its kinks.

        Args:
            *parameters: The operation's own.

        Returns:
            A number or a tensor for each kink, NaN where the parameters make none.

        Example:
            >>> OPERATIONS["hardtanh"].positions(-2.0, 3.0)
            [-2.0, 3.0]
        """
        return [kink.position(*parameters) for kink in self.kinks if kink.position is not None]

    def stock(self, *parameters: Any) -> tuple[float | None, ...]:
        """The derivatives that the installed PyTorch returns at the kinks.

        Args:
            *parameters: The operation's own.

        Returns:
            A number for each kink; None where it differs from entry to entry.

        Example:
            >>> OPERATIONS["leaky_relu"].stock(0.25), OPERATIONS["hardswish"].stock()
            ((0.25,), (0.0, 1.0))
        """
        between = []
        for kink, share in zip(self.kinks, self.taken, strict=True):
            assert kink.sides is not None  # a kink without derivatives takes no share of them
            left, right = kink.sides(*parameters)
            taken = left if share == 0 else right if share == 1 else None
            if share not in (0, 1) and isinstance(left, (int, float)) and isinstance(right, (int, float)):
                taken = left + share * (right - left)
            between.append(float(taken) if isinstance(taken, (int, float)) else None)
        return tuple(between)

    def elements(self, *parameters: Any) -> tuple[Any, ...]:
        """Choices between which the whole Clarke Jacobian lies: its ends at a kink, corners for shared gradients.

        Where a function jumps these are the derivatives on its two sides.

        Args:
            *parameters: The operation's own.

        Returns:
            Values of the field; empty where no choices of the field are such elements.

        Example:
            >>> OPERATIONS["hardswish"].elements()
            ((0.0, 1.5), (-0.5, 1.0))
        """
        if self.corners is not None:
            return self.corners(*parameters)
        ends: list[Any] = []
        for side in (0, 1):
            chosen: list[Any] = [kink.sides(*parameters)[side] for kink in self.kinks if kink.sides is not None]
            # A side that differs from entry to entry is no number; where stock takes that side, None names it.
            as_stock = len(chosen) == 1 and self.taken == (side,)
            ends.append(None if as_stock else chosen[0] if len(chosen) == 1 else tuple(chosen))
        return tuple(ends)

    def checked(self, value: Any) -> Any:
        """A choice for this operation, as it is stored.

        Args:
            value: None for native, a number, a pair of numbers for two kinks, or a name.

        Returns:
            The same, with numbers as floats and pairs as tuples.

        Raises:
            ValueError: If the value is no choice of this operation.

        Example:
            >>> OPERATIONS["relu6"].checked([0, 1])
            (0.0, 1.0)
        """
        if value is None:
            return None
        if isinstance(value, str) and self.choices:
            known(self.name, value, (*self.choices, "a number"))
            return value
        if len(self.kinks) == 1:
            return _number(self.name, value)
        if not isinstance(value, (tuple, list)) or len(value) != len(self.kinks):
            count = {2: "two"}.get(len(self.kinks), str(len(self.kinks)))
            raise ValueError(
                f"{self.name} takes {count} numbers, the derivatives at its {count} kinks; given {value!r}"
            )
        return tuple(_number(self.name, v) for v in value)

    def derivative(self, x: Tensor) -> list[float]:
        """The derivative that the installed PyTorch returns at some points, with the parameters :attr:`at`.

        Args:
            x: The points, float64, shape (N,).

        Returns:
            A number for each point.

        Example:
            >>> OPERATIONS["hardswish"].derivative(torch.tensor([-4.0, 0.0, 4.0], dtype=torch.float64))
            [0.0, 0.5, 1.0]
        """
        with torch.inference_mode(False), torch.enable_grad():
            if self.kernels is None:
                assert self.example is not None
                x = x.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(self.example(x).sum(), x)
                return gradient.tolist()
        # Not autograd through the forward: one that is composed may take another derivative than this backward.
        with torch.inference_mode(False), torch.no_grad():
            x, parameters = self.kernels.prepare(x, *self.at)
            saved = self.kernels.forward(x, *parameters) if self.kernels.saves == "output" else x
            gradients = self.kernels.backward(torch.ones_like(x), saved, *parameters)
            return (gradients[0] if isinstance(gradients, tuple) else gradients).tolist()

    def written(self, value: Any) -> str:
        """A choice as every output writes it.

        Args:
            value: A choice as it is stored; a list stands for a pair, as in a file.

        Returns:
            ``"native"`` for stock PyTorch's choice where that is None or beta = 0, else the number, the pair or the
            name.

        Example:
            >>> [OPERATIONS["max_pool"].written(value) for value in (0.0, None, "native", 10.0, "minimal")]
            ['native', 'native', 'native', '10', 'minimal']
            >>> OPERATIONS["relu6"].written([0.0, 1.0]), OPERATIONS["relu"].written(0.0)
            ('[0, 1]', '0')
        """
        return "native" if value is None or (self.shares and value == 0) else short(value)

    @property
    def choices(self) -> tuple[str, ...]:
        """The choices that have a name."""
        return (*SHARE_NAMES, *self.names) if self.shares else self.names

    @property
    def hint(self) -> Any:
        """The type of the field that chooses."""
        types: list[Any] = [float if len(self.kinks) == 1 else GenericAlias(tuple, (float,) * len(self.kinks)), None]
        if self.choices:
            types.insert(1, Literal.__getitem__(self.choices))
        return Union.__getitem__(tuple(types))

    @property
    def advice(self) -> str:
        """The advice of an audit where its ties matter."""
        return self.remedy or (
            f"Look at what brings {self.name} to these points, or fix the choice and record it: "
            f"patch(model, Jacobians({self.name}=...))."
        )

    @property
    def rounding_advice(self) -> str:
        """The advice of an audit where rounding alone makes the ties that matter."""
        return self.rounding_remedy or (
            "Compute what enters these sites in float32, or fix the choice and record it: "
            f"patch(model, Jacobians({self.name}=...))."
        )


#: The named ways to share a gradient over entries that tie; :mod:`~nslightning.ops.autograd.shares` says what they do.
ShareName = Literal["native", "first", "last", "minimal", "random", "sum"]
SHARE_NAMES: tuple[str, ...] = get_args(ShareName)

#: Every operation by its name.
OPERATIONS: dict[str, Operation] = {}
#: The operations that a module class, a function or a method may spell; the arguments tell which one.
MODULES: dict[type[nn.Module], tuple[Operation, ...]] = {}
FUNCTIONS: dict[Callable, tuple[Operation, ...]] = {}

_FOLLOWERS: list[Callable[[Operation], None]] = []


def register(operation: Operation) -> Operation:
    """Make an operation known: it becomes a field of ``Jacobians``, ``patch`` reaches it, probes and audits name it.

    Models that were patched before do not take it: patch them again. A notebook cell may run twice: an operation of the
    same name, for functions and classes of the same names and modules, takes the place of the former one.

    Args:
        operation: Its record.

    Returns:
        The same.

    Raises:
        ValueError: If the name is no name of a field, or another operation has it; or if a kink's ``sides`` are not the
            derivatives that the function has on the left and on the right of it.
        TypeError: If something else than an :class:`Operation` is given.
    """
    if not isinstance(operation, Operation):
        raise TypeError(f"register takes an Operation; given {operation!r}")
    name = operation.name
    if not name.isidentifier() or name.startswith("_") or name in ("rule", "preset", "to_dict"):
        raise ValueError(f"{name!r} cannot be a field of Jacobians: take a lowercase name such as 'my_relu'")
    former = OPERATIONS.get(name)
    if former is not None and _spelled_by(former) != _spelled_by(operation):
        raise ValueError(
            f"there is another operation {name!r} already, for {', '.join(sorted(_spelled_by(former)))}: take another "
            "name, or start Python again to replace it"
        )
    for kink in operation.kinks:
        _check_sides(operation, kink)
    tables: list[tuple[dict[Any, tuple[Operation, ...]], Iterable[Any]]]
    tables = [(MODULES, operation.modules), (FUNCTIONS, operation.functions)]
    for table, spellings in tables:
        for key in [key for key, operations in table.items() if former in operations]:
            _replace(table, key, tuple(other for other in table[key] if other is not former))
        for key in spellings:
            _replace(table, key, (*table.get(key, ()), operation))
    OPERATIONS[name] = operation
    for follower in _FOLLOWERS:
        follower(operation)
    return operation


def _replace(table: dict[Any, tuple[Operation, ...]], key: Any, operations: tuple[Operation, ...]) -> None:
    """Set an entry of :data:`MODULES` or :data:`FUNCTIONS`; an empty one goes."""
    if operations:
        table[key] = operations
    else:
        del table[key]


def _spelled_by(operation: Operation) -> set[str]:
    """The names of the classes and functions that spell an operation, with their modules."""
    spellings = (*operation.modules, *operation.functions)
    return {f"{getattr(s, '__module__', '')}.{getattr(s, '__qualname__', s)}" for s in spellings}


_BESIDE = 1e-4  # distance from a kink at which its sides are probed: a backward in float32 tells it from the kink, too
_CLOSE = 1e-2  # a derivative may change by so much on that way


def _check_sides(operation: Operation, kink: Kink) -> None:
    """Raise unless the derivatives beside a kink are those that its record names.

    The backward of the record's kernels returns them, or autograd for the example of an operation without kernels; an
    operation that has neither is not checked.
    """
    if kink.position is None or kink.sides is None or (operation.kernels is None and operation.example is None):
        return
    position, named = kink.position(*operation.at), kink.sides(*operation.at)
    if isinstance(position, Tensor) or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in named):
        return
    step = _BESIDE * max(1.0, abs(position))
    x = torch.tensor([position - step, position + step], dtype=torch.float64, device="cpu")
    left, right = named
    beside = operation.derivative(x)
    allowed = _CLOSE * max(1.0, abs(left), abs(right))
    if all(abs(slope - side) <= allowed for slope, side in zip(beside, named, strict=True)):
        return
    there = ", ".join(f"{slope:.3g}" for slope in beside)
    swapped = all(abs(slope - side) <= allowed for slope, side in zip(beside, (right, left), strict=True))
    raise ValueError(
        f"{operation.name} has the derivatives ({there}) on the left and on the right of {kink.where}, and its record "
        f"has sides=({as_words(left)}, {as_words(right)}): {'swap the two' if swapped else 'write the derivatives'}"
    )


def follow(follower: Callable[[Operation], None]) -> None:
    """Have a function called with every operation that is registered from now on.

    Modules above this one use it for tables that they make of the records.

    Args:
        follower: Takes the operation.
    """
    _FOLLOWERS.append(follower)


def _named(name: str) -> Operation:
    return OPERATIONS[name]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} takes finite numbers; given {value!r}")
    return float(value)


def known(kind: str, name: str, allowed: Iterable[Any]) -> None:
    """Raise unless a name is one of those that are allowed.

    Args:
        kind: The kind of thing that the name names, for the message.
        name: The name.
        allowed: The allowed names.

    Raises:
        ValueError: If the name is unknown; the message suggests the one that was probably meant.
    """
    allowed = tuple(allowed)
    if name not in allowed:
        raise ValueError(
            f"{kind} {name!r} is not known{did_you_mean(name, allowed)} Allowed: {', '.join(map(str, allowed))}"
        )


# ------------------------------------------------------------------------------------------------------- spellings
def positional(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments as the records take them: PyTorch's functions and modules call the input ``input``.

    Args:
        kwargs: Keyword arguments of a function or a module.

    Returns:
        The same under our name for the input, without ``out``, which is no argument of the operation.
    """
    return {("x" if k in ("input", "self") else k): v for k, v in kwargs.items() if k != "out"}


#: The names that NumPy has for arguments; PyTorch's native functions take these, too.
_OF_NUMPY = {"a": "input", "x1": "input", "x2": "other", "axis": "dim", "keepdims": "keepdim"}
_NATIVE = (BuiltinFunctionType, MethodDescriptorType)


def named(function: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a function as the records take them: as :func:`positional`, and without NumPy's names.

    Args:
        function: The function that was called.
        kwargs: Its keyword arguments.

    Returns:
        The same under our names.
    """
    if isinstance(function, _NATIVE) and any(name in _OF_NUMPY for name in kwargs):
        kwargs = {_OF_NUMPY.get(k, k): v for k, v in kwargs.items()}
    return positional(kwargs)


def number(value: Any) -> Any:
    """A parameter as ATen's operators take it; PyTorch's functions also take NumPy's numbers, and tensors of one.

    Args:
        value: What a function of PyTorch's received for a number.

    Returns:
        Python's number for these two; anything else as it is.
    """
    one = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad)
    return value.item() if one else value


def spelled(call: Callable[..., Call | None], *functions: Callable) -> dict[Callable, Callable[..., Call | None]]:
    """Functions that take the same arguments; an ATen operator also by its overloads, as graphs call it.

    Args:
        call: Turns their arguments into a call.
        *functions: The functions.

    Returns:
        A mapping for ``functions`` of :class:`Operation`.
    """
    return dict.fromkeys((*functions, *(overload for f in functions for overload in overloads(f))), call)


def plain(name: str) -> dict[Callable, Callable[..., Call | None]]:
    """The spellings of an operation without parameters, in torch's three homes and ATen.

    Args:
        name: The name of its functions and methods; in place with an underscore.

    Returns:
        A mapping for ``functions`` of :class:`Operation`.
    """
    homes = (nn.functional, torch, Tensor, torch.ops.aten)
    functions = [f for home in homes if (f := getattr(home, name, None)) is not None]
    overwriting = [f for home in homes if (f := getattr(home, f"{name}_", None)) is not None]
    return spelled(lambda x, inplace=False: Call(x, inplace=inplace), *functions) | spelled(
        lambda x: Call(x, inplace=True), *overwriting
    )


def as_words(value: float) -> str:
    """A derivative as one writes it.

    Args:
        value: A number.

    Returns:
        A whole number or a small fraction where it is one, else four digits.

    Example:
        >>> as_words(-0.5), as_words(1 / 6), as_words(1.7580993408473766)
        ('-1/2', '1/6', '1.758')
    """
    near = Fraction(value).limit_denominator(12)
    return str(near) if math.isclose(near, value, rel_tol=1e-12, abs_tol=1e-12) else f"{value:.4g}"
