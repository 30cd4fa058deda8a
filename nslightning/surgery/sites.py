"""The ``forward`` of a patched module that is a nonsmooth operation, and its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nslightning._torch import disable_function_modes
from nslightning.ops.autograd import native
from nslightning.ops.record import positional
from nslightning.surgery.interception import evaluate, running
from nslightning.surgery.methods import UNSET, Method, accessor
from nslightning.surgery.origins import name_stray
from nslightning.surgery.state import Part
from nslightning.surgery.tracing import refuse_tracing

__all__ = ["SiteForward", "SiteText"]


class SiteForward(Method):
    """The ``forward`` of a module that is a nonsmooth operation.

    Attributes:
        fast: The fast path. It exists once the report has the site, and runs first if a call outside the compiler has
            one positional argument. If it returns ``NotImplemented``, the ordinary path runs.
    """

    fast: Callable[[Tensor], Any] | None = None

    def __init__(self, module: nn.Module, name: str, part: Part, replaced: Any = UNSET) -> None:
        super().__init__(module, name, part, replaced)
        self.settled = False  # whether `fast` was asked for
        part.surgery.sites.add(self)

    def __call__(self, x: Any = UNSET, /, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the operation under the choice."""
        if not (args or kwargs or torch.compiler.is_compiling()):
            fast = self.fast
            if fast is not None:
                result = fast(x)
                if result is not NotImplemented:
                    return result
        return self.ordinary(args if x is UNSET else (x, *args), kwargs)

    def retire(self) -> None:
        """Run the stock method from now on, without the fast path."""
        super().retire()
        self.fast, self.settled = None, True

    def ordinary(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The ordinary path, which takes every call.

        Args:
            args: The positional arguments of the module's forward.
            kwargs: Its keyword arguments.

        Returns:
            The stock module's result, bit for bit.
        """
        part = self.part
        surgery, (site, operation, cls) = part.surgery, part.reached
        if part.undone:
            return self.stock(self.module)(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            refuse_tracing()
        module = self.module if compiling else accessor(self, 3)
        run = None if compiling else running(surgery)
        if run is not None and run.others and run.part is not part:  # the call that stock makes is theirs to see
            return run.inside(part, self.stock(module), *args, **kwargs)
        try:
            with disable_function_modes():
                call = operation.modules[cls](module, *args, **positional(kwargs))
                elsewhere = call is None or not call.x.is_floating_point()
        except Exception:
            if not compiling:
                self.stock(module)(*args, **kwargs)  # raises in PyTorch's words
            raise
        if elsewhere:  # integers and quantised values have no gradient
            return self.stock(module)(*args, **kwargs)
        assert call is not None
        if run is not None and (run.recording or run.others or surgery.counted):  # the fast path shows no call
            return run.evaluate(part, operation, call, site.kind, "module")
        selection = surgery.selections[surgery.decide(part, operation.name, None)]
        if compiling:
            return evaluate(operation, selection, call)
        if run is None and part.names[0] == "" and torch.is_grad_enabled():  # the model is this operation alone
            site.calls, surgery.report.traced = site.calls or 1, True
        if not (self.settled or surgery.counted) and site.calls and surgery.report.traced:
            self.settled = True
            self.fast = native.site(operation.name, module, selection)
        if run is not None:
            return run.evaluate(part, operation, call, site.kind, "module")
        if torch.is_grad_enabled():  # without gradients a patched method is no run
            name_stray(surgery)
        if selection.observer is not None:
            selection.observer(part.names[0], operation, call)
        return evaluate(operation, selection, call)


class SiteText(Method):
    """The ``extra_repr`` of a site: the module's own text, followed by the choice."""

    def __call__(self) -> str:
        """The text between the parentheses."""
        module, part = self.module, self.part
        base = self.stock(module)()
        selection = part.surgery.selections[part.first or ()]
        value = getattr(selection.jacobians, part.reached[1].name)
        return f"{base}{', ' if base else ''}jacobian={part.reached[1].written(value)}"
