"""Find, patch, report and unpatch the nonsmooth operations of a model."""

from nslightning.surgery.patching import PatchWarning, Selector, patch, report, selections, unpatch, using
from nslightning.surgery.report import PatchReport, Site

__all__ = [
    "PatchReport",
    "PatchWarning",
    "Selector",
    "Site",
    "patch",
    "report",
    "selections",
    "unpatch",
    "using",
]
