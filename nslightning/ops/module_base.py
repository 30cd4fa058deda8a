"""The base classes of the operations as modules, each of which chooses its Jacobian itself.

An operation that PyTorch has as a module is a subclass of that module. It takes one more argument, the choice, named as
in the function. The other modules keep the arguments that their function takes beside the input. ``rule`` and ``seed``
are as in
:class:`~nslightning.Jacobians` and :func:`~nslightning.patch`. A patch around them leaves them alone.

Example:
    >>> from nslightning import ops
    >>> import torch
    >>> layers = torch.nn.Sequential(ops.ReLU(at_zero=0.5), ops.MaxPool1d(2, jacobian="minimal"))
    >>> x = torch.zeros(1, 2, requires_grad=True)
    >>> layers(x).sum().backward()
    >>> x.grad, layers[1]
    (tensor([[0.2500, 0.2500]]), MaxPool1d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False, ...))
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from nslightning.ops.autograd.selection import OwnChoice, Selection
from nslightning.ops.record import MODULES, Rule, positional

__all__ = ["ChosenFunction", "ChosenModule"]


class ChosenModule(nn.Module):
    """A stock module with one more argument, the choice; the operation's record evaluates its forward."""

    choice: ClassVar[str]  # that argument's name
    fields: ClassVar[tuple[str, ...]]  # the fields of Jacobians that the choice sets
    _stock: ClassVar[type[nn.Module]]

    def __init_subclass__(cls, choice: str = "", fields: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if choice:
            cls.choice, cls._stock = choice, cls.__mro__[2]
            cls.fields = fields or tuple(op.name for op in MODULES[cls._stock])

    def __init__(self, *args: Any, rule: Rule = "exact", seed: int = 0, **kwargs: Any) -> None:
        choice = kwargs.pop(self.choice, None)
        super().__init__(*args, **kwargs)
        self.selection = Selection(OwnChoice(self.fields, choice, rule), seed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the operation.

        Args:
            *args: As for the stock module.
            **kwargs: As for the stock module.

        Returns:
            The stock module's result, bit for bit under the exact rule.
        """
        for operation in MODULES[self._stock]:
            if operation.claims(self):
                call = operation.modules[self._stock](self, *args, **positional(kwargs))
                if call is not None and call.x.is_floating_point():
                    return operation.apply(self.selection, call)
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        """The stock module's, and the choice."""
        chosen, jacobians = getattr(self.selection.jacobians, self.fields[0]), self.selection.jacobians
        parts = [super().extra_repr(), f"{self.choice}={'native' if chosen is None else chosen}"]
        return ", ".join(filter(None, (*parts, "" if jacobians.rule == "exact" else "rule=published")))


class ChosenFunction(nn.Module):
    """An operation that PyTorch has only as a function: keeps its arguments beside the inputs, and the choice."""

    fields: ClassVar[tuple[str, ...]]  # the fields of Jacobians that the choice sets

    def __init__(self, choice: Any, seed: int = 0, **arguments: Any) -> None:
        super().__init__()
        self.selection = Selection(OwnChoice(self.fields, choice), seed)
        self.arguments = arguments

    def extra_repr(self) -> str:
        """The arguments, and the choice."""
        return ", ".join(f"{name}={value}" for name, value in self.arguments.items())
