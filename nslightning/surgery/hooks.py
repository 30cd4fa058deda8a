"""Forward hooks of a patched model that call functions: they run around ``forward``, and so need their own entrance."""

from __future__ import annotations

from typing import Any

from torch import nn

from nslightning._torch import call_with_hooks, kept_attributes
from nslightning.surgery.entrances import Caller
from nslightning.surgery.methods import Method
from nslightning.surgery.origins import of_library

__all__ = ["REGISTRATIONS", "HookRegistration", "has_own_hooks"]

#: The methods of a module that register a hook around its ``forward``.
REGISTRATIONS = ("register_forward_hook", "register_forward_pre_hook")


class HookRegistration(Method):
    """The method of a patched model that registers a forward hook.

    A hook of the model itself runs outside of ``forward``. Where a hook comes from a model's code, the method that runs
    all hooks becomes an entrance: the choice reaches the functions that the hook calls.
    """

    def __call__(self, hook: Any, *args: Any, **kwargs: Any) -> Any:
        """Register the hook."""
        module, part, name = self.module, self.part, call_with_hooks()
        handle = self.stock(module)(hook, *args, **kwargs)
        if part.undone or name in module.__dict__ or not _is_own(hook):
            return handle
        module.__dict__[name] = entrance = Caller(module, name, part)
        if (kept_by_copies := kept_attributes(module)) is not None:
            kept_by_copies[name] = entrance
        part.methods += (name,)
        part.calls = part.surgery.catching = True
        return handle


def has_own_hooks(module: nn.Module) -> bool:
    """Return whether hooks around the forward of a module come from a model's code: they may call functions.

    Args:
        module: Any module.

    Returns:
        True where one of its forward hooks or pre-hooks is defined outside of the libraries.
    """
    return any(map(_is_own, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def _is_own(hook: Any) -> bool:
    return not of_library(getattr(hook, "__module__", None) or type(hook).__module__)
