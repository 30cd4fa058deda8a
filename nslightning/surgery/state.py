"""The state of one patch of one model: the surgery, which the patched modules share, and one part for each module."""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nslightning._torch import sequence_number, while_compiling
from nslightning.ops.autograd import native
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.record import OPERATIONS, Operation
from nslightning.surgery.kinks import LEFT
from nslightning.surgery.plan import Plan, Selector, matches, selectors, text
from nslightning.surgery.report import PatchReport, PatchWarning, Site, TracedUnreachedError, UnreachedError

__all__ = ["CHECKPOINT", "PART", "Part", "Surgery", "this_thread"]

PART = "_nonsmooth_part"
_RUNS = 16  # runs that are recorded for a new path, unless the model takes the path again earlier
# The surgery checks the graph of an entrance 64 times for new paths, and once more for each 128 runs: a model may take
# a new path at each step, and each check costs time.
_LOOKS, _ONE_OF = 64, 128
CHECKPOINT: CodeType = inspect.unwrap(checkpoint).__code__


class _Thread(threading.local):
    def __init__(self) -> None:
        self.mark = object()


_thread = _Thread()


def this_thread() -> object:
    """Return a mark of the running thread. No later thread has it, as one may have an ended thread's number.

    Returns:
        An object, to be compared by identity.
    """
    return _thread.mark


class Surgery:
    """The state of one :func:`patch` of one model; the modules that it changed share it.

    Args:
        model: The model to be patched.
        plan: The choice for every site.
        only: Reach only these sites.
        skip: Leave these sites alone.
        seed: Seeds the ``"random"`` choice.
        strict: Raise if the model evaluates an operation that cannot be reached.

    Attributes:
        selections: One per combination of the plan's rules that holds somewhere, by their indices.
        everywhere: By operation, the selection of all functional calls; None if they have several selections,
            which a compiler cannot distinguish.
        counted: Whether a rule depends on the number of a call.
        catching: Whether some module has code that may call functions: a mode catches calls only if it is true.
        fused: Whether some module takes another kernel where a mode is active and no gradient passes.
        looked: The entrances and the paths whose graph was checked.
        awaited: Paths that a run took while nodes were not recorded, and how many runs are still recorded for each.
        begun: Number of runs with gradients of each entrance.
        looks: Number of checks of the graph of each entrance.
        counts: Numbers of backward nodes that checked runs made.
        waking: By entrance, whether its next run that is called without gradients has a mode, to see whether its code
            switches them on, and how often this was looked at; None once it was seen to do so.
        sites: The objects that run the module sites.
        classes: The classes of the model's modules; empty in a copy.
        stack_looks: How often the stack may still be looked through for a method that runs outside the patch.
        thread: The thread that patched the model; None in a copy.
        first: The number of this thread's next autograd node then, by which a loss that was computed before is known; 0
            in a copy.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, only: Selector | None, skip: Selector | None, seed: int, strict: bool
    ) -> None:
        self.plan, self.seed, self.strict = plan, seed, strict
        self.only, self.skip = selectors("only", only), selectors("skip", skip)
        self.report = PatchReport(
            type(model).__name__,
            plan.base,
            plan=plan,
            only=tuple(map(text, self.only)),
            skip=tuple(map(text, self.skip)),
        )
        self.selections: dict[tuple[int, ...], Selection] = {}
        self.everywhere: dict[str, Selection | None] = {}
        self.fused = False
        self.counted = any(rule.call is not None for rule in plan.rules)
        self.catching = True
        self.looked: set[Any] = set()
        self.awaited: dict[Any, int] = {}
        self.begun: dict[Any, int] = {}
        self.looks: dict[Any, int] = {}
        self.counts: set[int] = set()
        self.waking: dict[Any, tuple[bool, int | None]] = {}
        self.sites: WeakSet[Any] = WeakSet()
        self.classes = {type(module) for module in model.modules()}
        self.stack_looks = _LOOKS
        self.thread: object = this_thread()
        self.first = sequence_number()
        self._rows: dict[tuple[str, str, bool, tuple[int, ...]], Site] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copied site adds itself to `sites`; the others refer to parts or a thread by identity: no copy keeps them.
        fresh = ("sites", "looked", "awaited", "begun", "looks", "counts", "waking", "thread", "classes")
        return {name: value for name, value in self.__dict__.items() if name not in fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, sites=WeakSet(), looked=set(), counts=set(), classes=set(), thread=None, first=0)
        self.__dict__.update(awaited={}, begun={}, looks={}, waking={})

    def look_at_next(self, entrance: Any) -> None:
        """Have the next run of an entrance checked, if its graph was checked less often than it may be.

        Args:
            entrance: As in :meth:`records`.
        """
        if self.looks_again(entrance):
            self.looked.discard(entrance)

    @property
    def first_node(self) -> int:
        """The number of the first autograd node that this thread made after the patch; 0 where that is not known."""
        return self.first if self.thread is this_thread() else 0

    def records(self, entrance: Any) -> bool:
        """Return whether the run that begins has to note the nodes that it makes, so that its graph can be checked.

        Args:
            entrance: The method that begins with gradients, and its module's mode.

        Returns:
            True until the graph of a run of the entrance was checked, for its runs 2, 4, 8, 16, ..., and while a path
            awaits its check and :meth:`looks_again` allows it.
        """
        number = self.begun[entrance] = self.begun.get(entrance, 0) + 1
        again = number & (number - 1) == 0
        return again or entrance not in self.looked or (bool(self.awaited) and self.looks_again(entrance))

    def looks_again(self, entrance: Any) -> bool:
        """Return whether a new path of an entrance is to be checked now: there may be a new one at each run.

        Args:
            entrance: As in :meth:`records`.

        Returns:
            Whether its graph was checked less often than it may be.
        """
        return self.looks.get(entrance, 0) < _LOOKS + self.begun.get(entrance, 0) // _ONE_OF

    def may_wake(self, entrance: Any) -> bool:
        """Return whether a run that is called without gradients needs a mode: its code may switch them on.

        Args:
            entrance: As in :meth:`records`.

        Returns:
            True for the first run, for the run after :meth:`made_nodes`, and once the code was seen to do so.
        """
        return self.waking.get(entrance, (True, 0))[0]

    def woke(self, entrance: Any, woken: bool) -> None:
        """Note whether a run that was called without gradients, and had a mode, needed it.

        Args:
            entrance: As in :meth:`records`.
            woken: Whether its code switched gradients on for a call that may matter.
        """
        before, looks = self.waking.get(entrance, (True, 0))
        if woken and looks:
            warnings.warn(
                f"{entrance[1]} switches gradients on where it is called without: an earlier call kept PyTorch's "
                "derivative there, and all calls from this one on take the choice",
                PatchWarning,
                stacklevel=4,
            )
        self.waking[entrance] = (woken or (before and looks is None), None if woken or looks is None else looks + 1)

    def made_nodes(self, entrance: Any) -> None:
        """Note that a run without gradients made autograd nodes: its code may have switched gradients on.

        Args:
            entrance: As in :meth:`records`.
        """
        _, looks = self.waking[entrance]
        self.waking[entrance] = (looks is None or looks < _LOOKS, looks)

    def checked(self, entrance: Any, path: Any, recorded: bool) -> None:
        """Note that the graph of a run was checked.

        Args:
            entrance: As in :meth:`records`.
            path: The path that the run took.
            recorded: Whether the run noted its nodes. A run that did not can name custom backwards alone.
        """
        self.looks[entrance] = self.looks.get(entrance, 0) + 1
        if not recorded:
            self.awaited[path] = _RUNS
            return
        self.looked |= {entrance, path}
        self.awaited.pop(path, None)
        for other, left in list(self.awaited.items()):  # it may never be taken again
            self.awaited[other] = left - 1
            if left == 1:
                self.looked.add(other)
                del self.awaited[other]

    def begin(self, parts: Sequence[Part]) -> None:
        """Make each selection that a call of these parts may need, so that observers can be set on all of them now."""
        native.load()
        for name in OPERATIONS:
            rules_of = {self.plan.covering(part.rules, name, i) for part in parts for i in self.plan.calls}
            for rules in sorted(rules_of):
                if rules not in self.selections:
                    self.selections[rules] = Selection(self.plan.choice(rules), self.seed)
            one = len(rules_of) == 1 and not self.only and not self.skip
            self.everywhere[name] = self.selections[min(rules_of)] if one else None

    @property
    def watched(self) -> bool:
        """Return whether calls matter without gradients: for an observer, or a rule that changes the forward."""
        return any(s.observer is not None or s.jacobians.rule == "published" for s in self.selections.values())

    def chosen(self, names: Sequence[str], module: nn.Module) -> bool:
        """Return whether ``only`` and ``skip`` let the choice reach a module of these qualified names."""
        if self.only and not any(matches(s, names, module) for s in self.only):
            return False
        return not any(matches(s, names, module) for s in self.skip)

    def part(self, module: nn.Module) -> Part | None:
        """The part that this surgery keeps with a module; None if the module belongs to no part of it."""
        part: Part | None = module.__dict__.get(PART)
        return part if part is not None and part.surgery is self else None

    def operations(self, part: Part) -> Iterable[str]:
        """The operations that a module evaluates; before the first forward, those that it may evaluate."""
        if not self.report.traced and part.site is None and part.calls:
            return OPERATIONS
        return {site.operation for site in self.report.reached if site.name == part.names[0]}

    def decide(self, part: Part, operation: str, number: Callable[[Part, str], int] | None) -> tuple[int, ...]:
        """The rules that hold for the call of an operation that a module now makes.

        Args:
            part: The surgery's record of the module.
            operation: The field of :class:`~nslightning.Jacobians`.
            number: Returns the number of the call; None if no patched forward is running.

        Raises:
            RuntimeError: If they depend on the call's number, which cannot be known here.
        """
        if not self.counted or not part.by_call(operation):
            return self.plan.covering(part.rules, operation, 0)
        where = f"{part.names[0] or 'the model'} takes its Jacobian of {operation} by the number of the call, which"
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{where} is not known under torch.compile: do not compile, or drop `call` from the rule"
            )
        if _in_checkpoint():
            raise RuntimeError(
                f"{where} torch.utils.checkpoint counts again in the backward: do not checkpoint, or drop `call` from "
                "the rule"
            )
        return self.plan.covering(part.rules, operation, 0 if number is None else number(part, operation))

    def row(self, part: Part, operation: str, kind: str, inplace: bool, how: Any, rules: tuple[int, ...] = ()) -> Site:
        """The report's row for one module's calls of one function, made at the first call."""
        if part.site is not None and part.site.operation == operation and (how == "unreached" or rules == part.first):
            return part.site  # the row that the module's class gave
        key = (part.names[0], kind, inplace, rules)
        if (known := self._rows.get(key)) is not None:
            return known
        new = Site(
            name=part.names[0],
            operation=operation,
            choice=None if how == "unreached" else getattr(self.plan.choice(rules), operation),
            how=how,
            kind=kind,
            aliases=part.names[1:],
            inplace=inplace,
            decided=self.plan.explain(rules, operation),
        )
        # `setdefault` is one step also when several threads run the model.
        site = self._rows.setdefault(key, new)
        if site is new:
            self.report.sites.append(new)
        return site

    def unreached(self, part: Part, operation: str, kind: str, inplace: bool = False) -> Site:
        """The row of calls that keep PyTorch's own derivative.

        Raises:
            UnreachedError: If the surgery is strict, and there is something to choose.
        """
        site = self.row(part, operation, kind, inplace, "unreached")
        if operation in LEFT:
            if not site.decided:
                site.decided = LEFT[operation]
                where = site.name or self.report.model
                warnings.warn(f"the {kind} in {where} is left to PyTorch: {site.decided}", PatchWarning, stacklevel=2)
        elif self.strict:
            raise UnreachedError(self.report.model, [site])
        return site

    @while_compiling
    def idle(self, model: nn.Module) -> Iterator[str]:
        """The rules that decide on no site, though they match modules, once all sites are known.

        Args:
            model: The patched model.

        Yields:
            A sentence for each.
        """
        parts = [part for module in model.modules() if (part := self.part(module)) is not None]
        for i, rule in enumerate(self.plan.rules):
            names = {part.names[0] for part in parts if i in part.rules}
            if rule.unconditional or rule.call is not None or not names:
                continue
            fields = [field for field in rule.changes if field in OPERATIONS and rule.covers(field, 0)]
            evaluated = sorted({site.operation for site in self.report.reached if site.name in names})
            if not set(fields) & set(evaluated):
                about = ", ".join(fields) if len(fields) <= 3 else f"{len(fields)} operations"
                others = f"; they evaluate {', '.join(evaluated)}" if evaluated else ""
                yield (
                    f"rule {self.plan.number(i)} ({rule.where}) decides nothing: it is about {about}, which "
                    f"the modules that it matches do not evaluate{others}"
                )

    def refuse_traced(self, operation: str, kind: str) -> bool:
        """Refuse a call that the compiler traces.

        Raises:
            UnreachedError: Always.
        """
        raise TracedUnreachedError.of(self.report.model, "", operation, kind)


@dataclass(eq=False)
class Part:
    """The record that a surgery keeps with one module of the model.

    Args:
        surgery: The surgery.
        names: The qualified names under which the model has the module; the patched model itself is ``""``.
        rules: The plan's rules that are for some calls of the module.
        chosen: Whether ``only`` and ``skip`` let the choice reach it.
        calls: Whether its code may call functions that cannot be known from its class.
        site: The module's row in the report, if it has one.
        operation: The operation that reaches the site, if one does.
        cls: The registered class that says how the operation reads the module.
        methods: The names under which the module has methods of the surgery's.
        lookups: The surgery's replacements for the module's properties, descriptors and special methods, by the class
            that defines them, their names, and when Python runs them.
        kept: The places in the module's attributes where the surgery replaced a bound method: the container (None for
            the module itself), the key or index, the value before and the value after.
        undone: Whether the patch was undone; a method object that code has kept then runs the stock method.
    """

    surgery: Surgery
    names: tuple[str, ...]
    rules: tuple[int, ...] = ()
    chosen: bool = True
    calls: bool = False
    site: Site | None = None
    operation: Operation | None = None
    cls: type[nn.Module] | None = None
    methods: tuple[str, ...] = ()
    lookups: dict[tuple[type, str, str], Any] = field(default_factory=dict)
    kept: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    undone: bool = False

    @property
    def reached(self) -> tuple[Site, Operation, type[nn.Module]]:
        """Site, operation and class of a module that is a site: it has all three."""
        assert self.site is not None
        assert self.operation is not None
        assert self.cls is not None
        return self.site, self.operation, self.cls

    @property
    def first(self) -> tuple[int, ...] | None:
        """The rules that hold for the site's first call."""
        return None if self.operation is None else self.surgery.plan.covering(self.rules, self.operation.name, 0)

    @property
    def may_call(self) -> bool:
        """Return whether the module's code calls functions that take a choice, as far as that is known."""
        report = self.surgery.report
        if not report.traced:
            return self.calls
        return any(site.name == self.names[0] and site is not self.site for site in report.sites)

    def by_call(self, operation: str) -> bool:
        """Return whether the number of a call of an operation decides about it."""
        rules = (self.surgery.plan.rules[i] for i in self.rules)
        return any(rule.call is not None and (not rule.operation or operation in rule.operation) for rule in rules)


def _in_checkpoint() -> bool:
    """Return whether a function given to ``torch.utils.checkpoint`` is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not CHECKPOINT:
        frame = frame.f_back
    return frame is not None
