"""Train any backbone with a chosen derivative at the points where it is not unique, and measure what it changes.

The names below load their modules on first use, so that ``import nslightning`` costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nslightning.jacobians import Jacobians
    from nslightning.surgery import PatchReport, PatchWarning, Plan, Rule, UnreachedError, patch, unpatch, using

__all__ = [
    "Jacobians",
    "PatchReport",
    "PatchWarning",
    "Plan",
    "Rule",
    "UnreachedError",
    "__version__",
    "patch",
    "unpatch",
    "using",
]

_HOME = {
    "Jacobians": "nslightning.jacobians",
    "PatchReport": "nslightning.surgery",
    "PatchWarning": "nslightning.surgery",
    "Plan": "nslightning.surgery",
    "Rule": "nslightning.surgery",
    "UnreachedError": "nslightning.surgery",
    "patch": "nslightning.surgery",
    "unpatch": "nslightning.surgery",
    "using": "nslightning.surgery",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("nslightning")
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'nslightning' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
