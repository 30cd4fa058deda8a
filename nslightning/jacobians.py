"""The vocabulary: which element of the generalised Jacobian a backward pass returns where it is not unique.

The fields are the operations of :mod:`nslightning.ops`: this module stands above it, and knows no operation by name.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Self

from nslightning.ops.record import OPERATIONS, RULES, Operation, Rule, ShareName, follow, known
from nslightning.spelling import did_you_mean

__all__ = ["PRESETS", "Jacobians", "Rule", "ShareName", "unknown_field"]

#: The libraries whose choice has a name.
PRESETS = ("pytorch", "jax", "tensorflow")

_RULE = (
    '``"exact"`` respects the chain rule and leaves the forward alone. ``"published"`` is the arithmetic of the '
    "papers' released code: ReLU's and ReLU6's gradient at a tie *is* alpha instead of alpha times the incoming "
    "gradient, and max pooling computes ``beta * a + (1 - beta) * a`` in floating point, forward and backward. It "
    "exists to tell the effect of the implementation from that of the Jacobian."
)
_DOC = """A Jacobian choice: what the backward pass returns at ties, one entry per nonsmooth operation.

A *tie* is an evaluation at a point where the Jacobian is not unique: ``x == 0`` in ReLU, a pooling window whose
maximum is reached more than once. Everywhere else all choices return the same gradient. Under the exact rule the
forward pass does not depend on the choice. Every default is native, stock PyTorch's choice; ``None`` also means native.
An operation that is registered (:func:`nslightning.ops.register`) is a field afterwards.

Args:
{arguments}

Raises:
    ValueError: If a choice is not a finite number or not a known name.

Example:
    >>> Jacobians(relu=1.0, max_pool="minimal")
    Jacobians(relu=1.0, max_pool='minimal')
    >>> Jacobians.preset("pytorch") == Jacobians()
    True
"""


def unknown_field(names: Iterable[str]) -> str:
    """The message about the first name that is no field of :class:`Jacobians`.

    Args:
        names: The names.

    Returns:
        The message; empty where each name is a field.

    Example:
        >>> unknown_field(["maxpool"])[:57]
        "there is no field 'maxpool'; did you mean 'max_pool'? Fie"
        >>> unknown_field(["relu", "rule"])
        ''
    """
    fields = [*OPERATIONS, "rule"]
    unknown = [name for name in names if name not in fields]
    if not unknown:
        return ""
    return f"there is no field {unknown[0]!r}{did_you_mean(unknown[0], fields)} Fields: {', '.join(fields)}"


@dataclasses.dataclass(frozen=True, repr=False)
class _Fieldless:
    """The methods of a choice; its fields are the operations that are known when the class is made.

    Itself a dataclass without fields: only a class whose bases are dataclasses gets a flag for each field.
    """

    if TYPE_CHECKING:

        @property
        def rule(self) -> str: ...

        def __getattr__(self, operation: str) -> Any: ...

    def __post_init__(self) -> None:
        for name, operation in OPERATIONS.items():
            object.__setattr__(self, name, operation.checked(getattr(self, name)))
        known("rule", self.rule, RULES)

    @classmethod
    def preset(cls, name: str) -> Self:
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
        known("preset", name, PRESETS)
        chosen = {operation: getattr(record, name, None) for operation, record in OPERATIONS.items()}
        return cls(**{operation: choice for operation, choice in chosen.items() if choice is not None})

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain Python values, as stored in configs, reports and checkpoints.

        Returns:
            One entry per field; ``Jacobians(**d)`` gives the choice back.
        """
        return {field: getattr(self, field) for field in (*OPERATIONS, "rule")}

    def __repr__(self) -> str:
        defaults = {name: record.default for name, record in OPERATIONS.items()} | {"rule": "exact"}
        values = {field: getattr(self, field) for field in defaults}
        return f"Jacobians({', '.join(f'{f}={v!r}' for f, v in values.items() if v != defaults[f])})"


if TYPE_CHECKING:

    @dataclasses.dataclass(frozen=True)
    class Jacobians(_Fieldless):
        """The class for type checkers. The import makes its fields of the records."""

        rule: Rule

        def __init__(self, *, rule: Rule = "exact", **choices: Any) -> None: ...
        def __getattr__(self, operation: str) -> Any: ...

else:

    def _made() -> type:
        """A class with a field for each operation."""
        fields = [(name, record.hint, dataclasses.field(default=record.default)) for name, record in OPERATIONS.items()]
        fields.append(("rule", Rule, dataclasses.field(default="exact")))
        entries = [*(f"{name}: {record.choice}" for name, record in OPERATIONS.items()), f"rule: {_RULE}"]
        described = "\n".join(textwrap.fill(entry, 112, subsequent_indent="    ") for entry in entries)
        namespace = {"__doc__": _DOC.format(arguments=textwrap.indent(described, "    "))}
        made = dataclasses.make_dataclass(
            "Jacobians", fields, bases=(_Fieldless,), frozen=True, repr=False, namespace=namespace
        )
        made.__module__ = __name__
        made.__init__ = _naming_fields(made.__init__)  # type: ignore[misc] # the same signature
        return made

    def _naming_fields(init: Callable[..., None]) -> Callable[..., None]:
        """The initialiser, whose error for a field that does not exist names the one that was probably meant."""

        @functools.wraps(init)
        def checked(self: object, *args: Any, **choices: Any) -> None:
            if message := unknown_field(choices):
                raise TypeError(message)
            init(self, *args, **choices)

        return checked

    Jacobians = _made()

    @follow
    def _add(operation: Operation) -> None:
        """Give the class one field more; it stays the same object, and so do the choices that were made of it."""
        made = _made()
        names = ("__init__", "__eq__", "__hash__", "__doc__", "__annotations__", "__match_args__")
        for name in (*names, "__dataclass_fields__", operation.name):
            setattr(Jacobians, name, getattr(made, name))
