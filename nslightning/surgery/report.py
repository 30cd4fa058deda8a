"""The report of a patch: a table for people, and plain data for files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nslightning.files import write_text
from nslightning.jacobians import Jacobians
from nslightning.ops.record import OPERATIONS
from nslightning.ops.unreached import UNREACHED
from nslightning.surgery.plan import Plan
from nslightning.text_table import aligned

__all__ = ["PatchReport", "PatchWarning", "Site", "TracedUnreachedError", "UnreachedError"]


class PatchWarning(UserWarning):
    """A warning that a patch does less than its caller may expect."""


_NODE = re.compile(r"\w+Backward\d+\w*")


@dataclass
class Site:
    """One place of a model where a nonsmooth operation is evaluated.

    Args:
        name: Qualified name of the module, or of the module whose code makes the call.
        operation: Field of :class:`~nslightning.Jacobians`, or the function's own name where it has no choice
            yet.
        choice: The value chosen there; None is the reference.
        how: ``"module"`` (the module is the operation), ``"functional"`` (a call caught while the model runs) or
            ``"unreached"`` (it keeps PyTorch's own derivative).
        kind: The module's class, or the function as it is called.
        aliases: The other names under which the same module is registered.
        inplace: Whether the operation overwrites its input.
        calls: Evaluations in the first forward, in eager mode, that reached it.
        decided: The rule of a plan that decided and the rules that it overrides, if more than one choice was possible.
    """

    name: str
    operation: str
    choice: Any
    how: Literal["module", "functional", "unreached"]
    kind: str
    aliases: tuple[str, ...] = ()
    inplace: bool = False
    calls: int = 0
    decided: str = ""


class UnreachedError(ValueError):
    """The patch cannot reach an operation, which would keep PyTorch's own derivative.

    Args:
        model: Class name of the model.
        sites: The sites that are not reached.
        way: What makes them reachable, a sentence without its full stop; by default what suits their operations.

    Attributes:
        sites: The sites that are not reached.
    """

    def __init__(self, model: str, sites: Sequence[Site], way: str = "") -> None:
        shown = "; ".join(f"{_phrase(site)}" for site in sites[:5])
        more = f"; and {len(sites) - 5} more" if len(sites) > 5 else ""
        ways = way or "; ".join(dict.fromkeys(_way_out(site) for site in sites))
        names = ", ".join(repr(site.name) for site in sites[:5])
        super().__init__(
            f"{model} has operations that no Jacobian choice reaches: {shown}{more}. {ways}. Or leave their derivative "
            f"to PyTorch: skip=[{names}] for these modules, or strict=False (--model.strict=false) for every such "
            "operation; the report names them."
        )
        self.model, self.sites, self.way = model, list(sites), way

    def __reduce__(self) -> Any:
        return type(self), (self.model, self.sites, self.way)

    @classmethod
    def of(cls, model: str, name: str, operation: str, kind: str) -> UnreachedError:
        """The error of a single site.

        Args:
            model: Class name of the model.
            name: The site's module.
            operation: The operation.
            kind: The function or the class.

        Returns:
            The error.
        """
        return cls(model, [Site(name, operation, None, "unreached", kind)])


class TracedUnreachedError(UnreachedError, AssertionError):
    """An :class:`UnreachedError` while the compiler traces. The compiler lets only some error classes through.

    It catches others, and runs the code without compiling it.
    """


def _phrase(site: Site) -> str:
    """The part of a sentence that names a site which is not reached."""
    where = site.name or "the model"
    match site.operation:
        case "scripted":
            return f"{where} is scripted"
        case "custom":
            return f"{where} runs {site.kind}, whose backward is its own"
    if site.decided:
        return f"{where} calls {site.kind} {site.decided}"
    if _NODE.fullmatch(site.kind):
        return f"the graph of {where} has a {site.kind}, a kink that no caught call made"
    why = f" ({UNREACHED[site.operation]})" if site.operation in UNREACHED else ""
    return f"{where} {'calls' if site.kind[:1].islower() else 'is a'} {site.kind}, which has no choice{why}"


def _way_out(site: Site) -> str:
    """The way to make a site reachable, as a sentence without its full stop."""
    match site.operation:
        case "scripted":
            return "Use the eager module that it was made from"
        case "custom":
            return "Write it with PyTorch's own operations"
    return "Write it with operations that have one: docs/surgery.md"


@dataclass
class PatchReport:
    """The sites of a patched model.

    ``str(report)`` is a table. The report lists functional calls after the
    first forward with gradients, or at once if :func:`~nslightning.patch` is given an example input.

    Args:
        model: Class name of the patched model.
        jacobians: The choice for all sites, where no rule for some of them decides otherwise.
        sites: The sites, in the order of the model's modules, then of its calls.
        traced: Whether a forward with gradients has been seen, so that functional calls are known.
        only: The selectors that the sites were limited to, as text.
        skip: The selectors of sites left alone, as text.
        plan: The choice for every site.
    """

    model: str
    jacobians: Jacobians
    sites: list[Site] = field(default_factory=list)
    traced: bool = False
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    plan: Plan = field(default_factory=lambda: Plan([]))

    @property
    def reached(self) -> list[Site]:
        """The sites that take the choice."""
        return [site for site in self.sites if site.how != "unreached"]

    @property
    def unreached(self) -> list[Site]:
        """The sites that keep PyTorch's own derivative."""
        return [site for site in self.sites if site.how == "unreached"]

    @property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits for choice, selectors and module sites, the same in every process.

        Functional sites are left out: they are known only after a forward.
        """
        modules = sorted({(s.name, s.operation, s.aliases) for s in self.sites if s.how == "module"})
        # Only fields that differ from the reference: a version with more operations gives the same digits.
        changed = {k: v for k, v in self.jacobians.to_dict().items() if v != getattr(Jacobians(), k)}
        rules = [rule.to_dict() for rule in self.plan.sites]
        text = json.dumps([changed, rules, self.only, self.skip, modules], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data.

        Returns:
            JSON-ready values: model, jacobians, rules (those for some sites), fingerprint, traced, only, skip, sites.
        """
        return {
            "model": self.model,
            "jacobians": self.jacobians.to_dict(),
            "rules": [rule.to_dict() for rule in self.plan.sites],
            "fingerprint": self.fingerprint,
            "traced": self.traced,
            "only": list(self.only),
            "skip": list(self.skip),
            "sites": [asdict(site) for site in self.sites],
        }

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, or as CSV with one row per site.

        Args:
            path: A file ending in ``.json`` or ``.csv``; its folder is created.

        Returns:
            The path written.

        Raises:
            ValueError: If the ending is another one.
        """
        path = Path(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        elif path.suffix == ".csv":
            out = io.StringIO()
            rows = csv.DictWriter(out, list(Site.__dataclass_fields__))
            rows.writeheader()
            rows.writerows(asdict(site) | {"aliases": " ".join(site.aliases)} for site in self.sites)
            text = out.getvalue()
        else:
            raise ValueError(f"a patch report is saved as .json or .csv; given {path.name!r}")
        write_text(path, text)
        return path

    def summary(self) -> str:
        """One line: how many sites of each kind.

        Returns:
            Such as ``"Patched ResNet: 17 relu, 1 max_pool with Jacobians(relu=1.0) [a1b2c3d4e5f6]"``.
        """
        counts: dict[str, int] = {}
        for site in self.reached:
            counts[site.operation] = counts.get(site.operation, 0) + 1
        operations = ", ".join(f"{n} {operation}" for operation, n in counts.items()) or "nothing"
        left = f"; {len(self.unreached)} sites keep PyTorch's own derivative" if self.unreached else ""
        n = len(self.plan.sites)
        rules = f" and {n} rule{'s' * (n > 1)} for some sites" if n else ""
        return f"Patched {self.model}: {operations} with {self.jacobians!r}{rules} [{self.fingerprint}]{left}"

    def __str__(self) -> str:
        header = ("site", "operation", "choice", "reached by", "kind", "notes")
        rows = [header, *(_row(site) for site in self.sites)]
        lines = aligned(rows, texts=len(header))
        if not self.traced:
            lines.append("Functional calls are listed after the first forward with gradients.")
        return "\n".join([self.summary(), "", *lines])


def _row(site: Site) -> tuple[str, ...]:
    notes = [f"shared with {', '.join(site.aliases)}"] if site.aliases else []
    notes += ["in place"] if site.inplace else []
    notes += [f"{site.calls} calls"] if site.calls > 1 else []
    notes += [site.decided] if site.decided else []
    choice = OPERATIONS[site.operation].written(site.choice) if site.how != "unreached" else "native"
    how = {"unreached": "NOT REACHED"}.get(site.how, site.how)
    return (site.name or "(model)", site.operation, choice, how, site.kind, "; ".join(notes))
