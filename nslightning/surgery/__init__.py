"""Find, patch, report and unpatch the nonsmooth operations of a model."""

from nslightning.surgery.interception import FORGETFUL, arguments_as_called
from nslightning.surgery.patching import (
    choices,
    chooses,
    patch,
    preview,
    report,
    selections,
    surgeries,
    unpatch,
    using,
)
from nslightning.surgery.plan import AnyChoice, Plan, Rule, Selector, to_choice, to_choices
from nslightning.surgery.report import PatchReport, PatchWarning, Site, UnreachedError

__all__ = [
    "FORGETFUL",
    "AnyChoice",
    "PatchReport",
    "PatchWarning",
    "Plan",
    "Rule",
    "Selector",
    "Site",
    "UnreachedError",
    "arguments_as_called",
    "choices",
    "chooses",
    "patch",
    "preview",
    "report",
    "selections",
    "surgeries",
    "to_choice",
    "to_choices",
    "unpatch",
    "using",
]
