"""Patch a model in place, and take it back."""

from __future__ import annotations

import copyreg
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from nslightning._torch import is_compiled
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.registry import MODULES, OPERATIONS, UNSUPPORTED_MODULES, Operation, positional
from nslightning.spelling import closest
from nslightning.surgery.functional import FunctionalCalls, active, custom_functions, in_checkpoint, teach_the_compiler
from nslightning.surgery.plan import Plan, Selector, matches, selectors, text
from nslightning.surgery.report import PatchReport, Site, UnreachedError

__all__ = [
    "Part",
    "PatchWarning",
    "Surgery",
    "choices",
    "patch",
    "preview",
    "report",
    "selections",
    "surgeries",
    "unpatch",
    "using",
]

_PART = "_nonsmooth_part"
_ANY = torch.empty(0, 0, 0, 0, 0)  # enough dimensions for every module to say which operation it is


class PatchWarning(UserWarning):
    """Something about a patch that its owner will want to know."""


class Surgery:
    """What one :func:`patch` did to one model; the modules that it changed share it.

    Args:
        model: The model to be patched.
        plan: The choice for every site.
        only: Reach only these sites.
        skip: Leave these sites alone.
        seed: Seeds the ``"random"`` choice.
        strict: Raise where an operation is met that cannot be reached.

    Attributes:
        selections: One per combination of the plan's rules that holds somewhere, by their indices.
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
        self._rows: dict[tuple[str, str, bool, tuple[int, ...]], Site] = {}
        self._counted = any(rule.call is not None for rule in plan.rules)
        #: By operation the selection of all functional calls; None where a compiler could not tell them apart.
        self.everywhere: dict[str, Selection | None] = {}

    def begin(self, parts: Sequence[Part]) -> None:
        """Make every selection that a call of these parts may need, so that none appears while somebody watches."""
        for name in OPERATIONS:
            found = {self.plan.covering(part.rules, name, i) for part in parts for i in self.plan.calls}
            for rules in sorted(found):
                if rules not in self.selections:
                    self.selections[rules] = Selection(self.plan.choice(rules), self.seed)
            one = len(found) == 1 and not self.only and not self.skip
            self.everywhere[name] = self.selections[min(found)] if one else None

    @property
    def watched(self) -> bool:
        """Whether calls matter without gradients: somebody observes, or the published rule changes the forward."""
        return any(s.observer is not None or s.jacobians.rule == "published" for s in self.selections.values())

    def chosen(self, names: Sequence[str], module: nn.Module) -> bool:
        """Whether ``only`` and ``skip`` let the choice reach a module of these qualified names."""
        if self.only and not any(matches(s, names, module) for s in self.only):
            return False
        return not any(matches(s, names, module) for s in self.skip)

    def part(self, module: nn.Module) -> Part | None:
        """What this surgery keeps with a module; None if it does not know the module."""
        part: Part | None = module.__dict__.get(_PART)
        return part if part is not None and part.surgery is self else None

    def operations(self, part: Part, module: nn.Module) -> Iterable[str]:
        """The operations that a module evaluates, or may evaluate as long as no forward has told."""
        if not self.report.traced and part.site is None and _calls(module):
            return OPERATIONS
        return {site.operation for site in self.report.reached if site.name == part.names[0]}

    def decide(self, part: Part, operation: str, mode: FunctionalCalls | None) -> tuple[int, ...]:
        """The rules that hold for the call of an operation that a module now makes.

        Raises:
            RuntimeError: If they depend on the call's number, and that cannot be known.
        """
        if not self._counted or not part.by_call(operation):
            return self.plan.covering(part.rules, operation, 0)
        where = f"{part.names[0] or 'the model'} takes its Jacobian of {operation} by the number of the call, which"
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{where} is not known under torch.compile: do not compile, or drop `call` from the rule"
            )
        if in_checkpoint():
            raise RuntimeError(
                f"{where} torch.utils.checkpoint counts anew in the backward: do not checkpoint, or drop `call` from "
                "the rule"
            )
        return self.plan.covering(part.rules, operation, 0 if mode is None else mode.number(part, operation))

    def row(self, part: Part, operation: str, kind: str, inplace: bool, how: Any, rules: tuple[int, ...] = ()) -> Site:
        """The report's row for one module's calls of one function, made when it is first met."""
        if part.site is not None and part.site.operation == operation and (how == "unreached" or rules == part.first):
            return part.site  # what its class tells
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
        found = self._rows.setdefault(key, new)
        if found is new:
            self.report.sites.append(new)
        return found

    def unreached(self, part: Part, operation: str, kind: str, inplace: bool = False) -> Site:
        """The row of calls that keep PyTorch's own derivative.

        Raises:
            UnreachedError: If the surgery is strict.
        """
        site = self.row(part, operation, kind, inplace, "unreached")
        if self.strict:
            raise UnreachedError(self.report.model, [site])
        return site


@dataclass(eq=False)
class Part:
    """What a surgery keeps with one module of the model.

    Args:
        surgery: The surgery.
        names: The qualified names under which the model has the module; the patched model itself is ``""``.
        rules: The plan's rules that are for some calls of the module.
        site: The module's row in the report, if it has one.
        operation: The operation that reaches the site, if one does.
        cls: The registered class that says how.
    """

    surgery: Surgery
    names: tuple[str, ...]
    rules: tuple[int, ...] = ()
    site: Site | None = None
    operation: Operation | None = None
    cls: type[nn.Module] | None = None

    @property
    def reached(self) -> tuple[Site, Operation, type[nn.Module]]:
        """Site, operation and class of a module whose class was swapped for a site's: it has all three."""
        assert self.site is not None
        assert self.operation is not None
        assert self.cls is not None
        return self.site, self.operation, self.cls

    @property
    def first(self) -> tuple[int, ...] | None:
        """The rules that hold for the site's first call."""
        return None if self.operation is None else self.surgery.plan.covering(self.rules, self.operation.name, 0)

    def by_call(self, operation: str) -> bool:
        """Whether the number of a call of an operation decides about it."""
        rules = (self.surgery.plan.rules[i] for i in self.rules)
        return any(rule.call is not None and (not rule.operation or operation in rule.operation) for rule in rules)


# ------------------------------------------------------------------------------------------- swapped classes
# A "site" is evaluated with the choice, a "caller" has its functional calls caught ("replaced": also where
# its forward was replaced on the instance, and in its hooks), a module "left alone" has its own functional
# calls not caught.
# A LightningModule's code runs in its steps, too.
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_Role = Literal["site", "caller", "replaced", "left alone"]
_swapped: dict[tuple[type[nn.Module], _Role], type[nn.Module]] = {}


def _swapped_class(cls: type[nn.Module], role: _Role) -> type[nn.Module]:
    """The subclass that a patched module belongs to: one per class and role, which pickles find again."""
    key = (cls, role)
    if key not in _swapped:

        def stock(self: nn.Module, name: str) -> Any:
            return getattr(super(swapped, self), name)  # not `type(self)`: FSDP and others subclass it further

        def reduce_ex(self: nn.Module, protocol: Any) -> Any:
            make, args, *rest = stock(self, "__reduce_ex__")(max(int(protocol), 2))
            if make is not copyreg.__newobj__ or args[0] is not swapped:  # type: ignore[attr-defined] # as pickle does
                raise pickle.PicklingError(f"{cls.__name__} has its own way to be pickled: unpatch the model first")
            return (_rebuild, (*key, *args[1:]), *rest)

        body: dict[str, Any] = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": reduce_ex,
            "_nonsmooth_key": key,
        }
        if role == "site":
            body |= {"forward": _forward_site(stock), "extra_repr": _extra_repr(stock)}
        elif role == "left alone":
            body |= {"forward": _forward_left_alone(stock)}
        else:
            methods = [name for name in dir(cls) if name.startswith("forward")]
            methods += [name for name in _STEPS if hasattr(cls, name)]
            methods += ["__call__"] if role == "replaced" else []
            body |= {
                name: _entrance(stock, name, method)
                for name in methods
                if inspect.isfunction(method := inspect.getattr_static(cls, name))
            }
        swapped = type(cls.__name__, (cls,), body)
        _swapped[key] = swapped
    return _swapped[key]


# Where an object has no part, something made it of a patched one's class later on, as slicing an nn.Sequential does: it
# is no more and no less patched than the modules in it.
def _forward_site(stock: Callable[[nn.Module, str], Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        part: Part | None = self.__dict__.get(_PART)
        if part is None:
            return stock(self, "forward")(*args, **kwargs)
        surgery, (_, operation, cls) = part.surgery, part.reached
        with torch._C.DisableTorchFunction():  # what the operation calls itself is not the model's
            call = operation.modules[cls](self, *args, **positional(kwargs))
            if call is None or not call.x.is_floating_point():  # integers and quantised values have no gradient
                return stock(self, "forward")(*args, **kwargs)
            mode = None if torch.compiler.is_compiling() else active(surgery)
            rules = surgery.decide(part, operation.name, mode)
            selection = surgery.selections[rules]
            if mode is not None:
                mode.count(surgery.row(part, operation.name, type(self).__name__, call.inplace, "module", rules))
            if selection.observer is not None and not torch.compiler.is_compiling():
                selection.observer(part.names[0], operation, call)
            return operation.apply(selection, call)

    return forward


def _extra_repr(stock: Callable[[nn.Module, str], Any]) -> Callable[[nn.Module], str]:
    def extra_repr(self: nn.Module) -> str:
        part: Part | None = self.__dict__.get(_PART)
        base = stock(self, "extra_repr")()
        if part is None:
            return str(base)
        selection = part.surgery.selections[part.first or ()]
        value = getattr(selection.jacobians, part.reached[1].name)
        return f"{base}{', ' if base else ''}jacobian={'native' if value is None else value}"

    return extra_repr


def _forward_left_alone(stock: Callable[[nn.Module, str], Any]) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return stock(self, "forward")(*args, **kwargs)

    return forward


def _entrance(stock: Callable[[nn.Module, str], Any], name: str, method: Any) -> Callable[..., Any]:
    def enter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        part: Part | None = self.__dict__.get(_PART)
        if part is None:
            return stock(self, name)(*args, **kwargs)
        surgery = part.surgery
        # Without gradients there is nothing to choose, but somebody may be watching, and the published rule's
        # forward differs from the stock one.
        if not (torch.is_grad_enabled() or surgery.watched) or active(surgery) is not None:
            return stock(self, name)(*args, **kwargs)
        with FunctionalCalls(surgery) as mode:
            result = stock(self, name)(*args, **kwargs)
        if not torch.compiler.is_compiling():
            _note(part, mode, (args, kwargs), result)
        return result

    enter.__name__ = name
    enter.__wrapped__ = method  # type: ignore[attr-defined] # Lightning reads from it what is overridden, and the signature
    FunctionalCalls.entrances |= {enter.__code__}
    return enter


def _note(part: Part, mode: FunctionalCalls, given: Any, result: Any) -> None:
    """Put what a forward evaluated into the report."""
    report, first = part.surgery.report, not part.surgery.report.traced and mode.differentiating
    if first:
        for function in custom_functions(result, given):
            mode.count(part.surgery.unreached(part, "custom", function))
    for site, evaluations in mode.evaluations.values():
        site.calls = site.calls or evaluations
    report.traced |= first
    if first and part.names[0] == "" and not report.reached:
        warnings.warn(_nothing(report), PatchWarning, stacklevel=3)


def _nothing(report: PatchReport) -> str:
    among = f" among only={', '.join(report.only)}" if report.only else ""
    among += f" without skip={', '.join(report.skip)}" if report.skip else ""
    return f"{report.model} has nothing to patch: none of {', '.join(OPERATIONS)} was found{among}"


def _rebuild(cls: type[nn.Module], role: _Role, *args: Any) -> nn.Module:
    swapped = _swapped_class(cls, role)
    return swapped.__new__(swapped, *args)


# ---------------------------------------------------------------------------------------------------- public
def patch(
    model: nn.Module,
    jacobians: Jacobians | Plan,
    only: Selector | None = None,
    skip: Selector | None = None,
    *,
    example: Any = None,
    seed: int = 0,
    strict: bool = True,
) -> PatchReport:
    """Give a model's nonsmooth operations a chosen Jacobian, in place; the forward stays exactly the same.

    Modules become members of a subclass of their class, so they stay the same objects: aliases, hooks,
    ``state_dict`` keys, ``isinstance`` checks, pickles and optimizers stay valid. Functional calls
    (``F.relu``, ``x.relu_()``, ``F.max_pool2d``, ...) are caught while the model runs.

    An operation that is found and cannot be reached would keep PyTorch's own derivative: one that has no choice
    (``topk``, ``median``, ...), a scripted part, an autograd function or operator with a backward of its own, a
    call that a checkpoint computes again. None is passed over in silence. Where it can be known from the modules,
    or from the ``example``, this function raises and leaves the model as it was; elsewhere the first forward with
    gradients does.

    Args:
        model: The model; patch it before it is compiled or wrapped for distributed training.
        jacobians: The choice for all sites, or a :class:`Plan` with a choice for each.
        only: Reach only the sites that match: a glob over qualified names (``"layer1.*"``), a compiled
            regular expression, a module class, or several of these. A functional call is matched by the name
            of the module that makes it.
        skip: Leave the sites that match alone; wins over ``only``. What is left alone need not be reachable.
        example: An input, a tuple of positional or a dict of keyword arguments for one forward in evaluation
            mode, so that the report lists the functional calls at once.
        seed: Seeds the ``"random"`` choice.
        strict: Raise where an operation cannot be reached; otherwise it becomes a row of the report.

    Returns:
        The report: every site, how it was reached, and what was not.

    Raises:
        TypeError: If ``model`` is not a plain ``nn.Module``: compiled, scripted, or wrapped by DDP or FSDP.
        ValueError: If it, or a part of it, is patched already.
        UnreachedError: If an operation cannot be reached; a ``ValueError`` too.

    Warns:
        PatchWarning: If there is nothing to patch (where functional calls are possible, at the first
            forward), or if a selector or a rule matches no module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> print(patch(model, Jacobians(relu=1.0, max_pool="minimal")).summary())
        Patched Sequential: 1 relu, 1 max_pool with Jacobians(relu=1.0, max_pool='minimal') [...]
    """
    _refuse(model)
    teach_the_compiler()
    surgery = Surgery(model, Plan.of(jacobians), only, skip, seed, strict)
    found = list(_find(model, surgery))
    surgery.begin([part for _, part, _ in found])
    surgery.report.sites += [part.site for _, part, _ in found if part.site is not None]
    if strict and surgery.report.unreached:
        raise UnreachedError(surgery.report.model, surgery.report.unreached)
    try:
        for module, part, role in found:
            if role is not None:
                module.__class__ = _swapped_class(type(module), role)
            module.__dict__[_PART] = part
        for hint in _hints(surgery, found):
            warnings.warn(hint, PatchWarning, stacklevel=2)
        if example is not None:
            _run(model, example)
        elif not surgery.report.reached and not any(_calls(module) for module in model.modules()):
            warnings.warn(_nothing(surgery.report), PatchWarning, stacklevel=2)
    except BaseException:
        _restore(module for module, _, _ in found)
        raise
    return surgery.report


def unpatch(model: nn.Module) -> None:
    """Make a patched model exactly the model it was.

    Args:
        model: What was given to :func:`patch`.

    Raises:
        ValueError: If the model is not patched.
    """
    _root(model)
    for name, module in model.named_modules():
        if hasattr(type(module), "_nonsmooth_key") and type(module) is not _swapped_class(*type(module)._nonsmooth_key):
            raise ValueError(
                f"{name or 'the model'} became a {type(module).__name__} after it was patched (sharded or "
                "parametrised?): undo that first, then unpatch"
            )
    _restore(model.modules())


def preview(
    model: nn.Module,
    jacobians: Jacobians | Plan,
    only: Selector | None = None,
    skip: Selector | None = None,
    *,
    example: Any = None,
) -> PatchReport:
    """What :func:`patch` would do, without doing it.

    Args:
        model: A model that is not patched; it stays as it is.
        jacobians: As in :func:`patch`.
        only: As in :func:`patch`.
        skip: As in :func:`patch`.
        example: As in :func:`patch`; without it functional calls stay unknown.

    Returns:
        The report, with what cannot be reached among its rows.

    Example:
        >>> plan = Plan([Jacobians(relu=1.0), {"stage": "1", "relu": 0.5}])
        >>> for site in preview(nn.Sequential(nn.ReLU(), nn.ReLU()), plan).sites:
        ...     print(site.name, site.choice, site.decided)
        0 1.0
        1 0.5 rule 2 (stage='1') over rule 1 (1.0)
    """
    report = patch(model, jacobians, only, skip, example=example, strict=False)
    unpatch(model)
    return report


@contextmanager
def using(model: nn.Module, jacobians: Jacobians | Plan) -> Iterator[None]:
    """The choice that backward passes inside this block take; forwards never change.

    One forward serves any number of choices::

        loss = criterion(model(x), y)
        for alpha in (0.0, 0.5, 1.0):
            with using(model, Jacobians(relu=alpha)):
                gradients = torch.autograd.grad(loss, model.parameters(), retain_graph=True)

    Args:
        model: A patched model, or one that contains patched ones.
        jacobians: The choice: of all sites, or a plan. A plan can give two sites different choices if the plan that
            the model was patched with has rules that tell them apart.

    Yields:
        Nothing.

    Raises:
        ValueError: If nothing of the model is patched; if one side has the published rule with a beta other than
            0, whose arithmetic is part of max pooling's forward; or if a plan wants to tell apart what was patched
            as one.
    """
    found = selections(model)
    wanted = choices(model, jacobians)
    before = {name: selection.jacobians for name, selection in found.items()}
    for name, now in before.items():
        if _published_beta(now) != _published_beta(wanted[name]):
            raise ValueError(
                "the published rule computes max pooling's forward with its beta, so rule and max_pool "
                f"cannot change between forward and backward: patched with {now!r}, asked for {wanted[name]!r}. "
                "Patch the model again instead."
            )
    try:
        for name, selection in found.items():
            selection.set(wanted[name])
        yield
    finally:
        for name, selection in found.items():
            selection.set(before[name])


def choices(model: nn.Module, jacobians: Jacobians | Plan) -> dict[str, Jacobians]:
    """What a choice means for each of a model's selections.

    Args:
        model: A patched model, or one that contains patched ones.
        jacobians: The choice: of all sites, or a plan.

    Returns:
        By the names of :func:`selections`.

    Raises:
        ValueError: If nothing of the model is patched, or if a plan wants to tell apart what was patched as one.
    """
    found = selections(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not patched; call `patch(model, Jacobians())` first")
    if isinstance(jacobians, Jacobians):
        return dict.fromkeys(found, jacobians)
    wanted: dict[int, Jacobians] = {}
    for surgery in surgeries(model).values():
        wanted |= {id(surgery.selections[rules]): choice for rules, choice in _meant(model, surgery, jacobians).items()}
    return {name: wanted[id(selection)] for name, selection in found.items()}


def _meant(model: nn.Module, surgery: Surgery, plan: Plan) -> dict[tuple[int, ...], Jacobians]:
    """What a plan means for each selection of a surgery that was made under another plan."""
    if plan == surgery.plan:
        return {rules: plan.choice(rules) for rules in surgery.selections}
    decided: dict[tuple[int, ...], dict[str, tuple[Any, str]]] = {rules: {} for rules in surgery.selections}
    for module in model.modules():
        if (part := surgery.part(module)) is None or not surgery.chosen(part.names, module):
            continue
        matching = plan.matching(part.names, module)
        for operation in surgery.operations(part, module):
            for call in sorted({*plan.calls, *surgery.plan.calls}):
                rules = surgery.plan.covering(part.rules, operation, call)
                choice = plan.choice(plan.covering(matching, operation, call))
                here = f"{part.names[0] or 'the model'}, call {call}"
                for what in (operation, "rule"):
                    value = getattr(choice, what)
                    other, there = decided[rules].setdefault(what, (value, here))
                    if other != value:
                        raise ValueError(
                            f"the plan gives {operation} {what}={other!r} at {there} and {value!r} at {here}, which "
                            "were patched as one: patch the model with a plan whose rules tell them apart (a rule may "
                            "repeat the choice that would hold without it)"
                        )
    return {
        rules: replace(plan.base, **{what: value for what, (value, _) in found.items()})
        for rules, found in decided.items()
    }


def _published_beta(jacobians: Jacobians) -> float | str | None:
    """The beta that max pooling's forward is computed with, where that is not the stock forward."""
    stock = jacobians.rule == "exact" or jacobians.max_pool in (None, 0.0, "native")
    return None if stock else jacobians.max_pool


def report(model: nn.Module) -> PatchReport:
    """The report of a patched model, with the functional calls seen so far.

    Args:
        model: What was given to :func:`patch`.

    Returns:
        The live report.

    Raises:
        ValueError: If the model is not patched.
    """
    return _root(model).surgery.report


def selections(model: nn.Module) -> dict[str, Selection]:
    """The selections that a model's patched parts share.

    Args:
        model: Any module.

    Returns:
        Each distinct selection once, in the order of the modules, by the qualified name of the part that was
        patched. Where a plan has several choices for one part, ``#`` and the numbers of the rules that hold follow,
        except for the first.
    """
    return {
        f"{name}#{'+'.join(str(i + 1) for i in rules)}" if k else name: selection
        for name, surgery in surgeries(model).items()
        for k, (rules, selection) in enumerate(surgery.selections.items())
    }


def surgeries(model: nn.Module) -> dict[str, Surgery]:
    """The surgeries that a model's parts went through.

    Args:
        model: Any module.

    Returns:
        Each one, in the order of the modules, by the qualified name of the part that was patched.
    """
    found: dict[int, tuple[str, Surgery]] = {}
    for name, module in model.named_modules():
        part: Part | None = module.__dict__.get(_PART)
        if part is not None:
            found.setdefault(id(part.surgery), (name, part.surgery))
    return dict(found.values())


# --------------------------------------------------------------------------------------------------- helpers
def _root(model: nn.Module) -> Part:
    """What is kept with a model that was given to `patch`."""
    part: Part | None = model.__dict__.get(_PART)
    if part is not None and "" in part.names:
        return part
    kind = type(model).__name__
    if part is not None:
        raise ValueError(f"this {kind} is {part.names[0]!r} of a patched {part.surgery.report.model}: give that one")
    parts = [name for name, module in model.named_modules() if _PART in module.__dict__]
    hint = f"; its part {parts[0]!r} is" if parts else "; `patch(model, Jacobians(...))` does that"
    raise ValueError(f"{kind} is not patched{hint}")


def _refuse(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module; given {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be patched: patch the eager model it was made from")
    for name, module in model.named_modules():
        what = f"its part {name!r}" if name else "the model"
        if is_compiled(module):
            raise TypeError(f"{what} is compiled already: patch first, then compile")
        bases = {base.__name__ for base in type(module).__mro__}
        for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"):
            if wrapper in bases:
                raise TypeError(f"{what} is wrapped by {wrapper} already: patch first, then wrap")
        if (part := module.__dict__.get(_PART)) is not None:
            raise ValueError(
                f"{what} is patched already ({part.surgery.report.summary()}): use `using(model, ...)` to "
                "change the choice of a backward, or `unpatch` it first"
            )


def _original(module: nn.Module) -> type[nn.Module]:
    """The module's class without the swap."""
    key = getattr(type(module), "_nonsmooth_key", None)
    return type(module) if key is None else key[0]


def _restore(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if module.__dict__.pop(_PART, None) is not None:
            module.__class__ = _original(module)


def _calls(module: nn.Module) -> bool:
    """Whether a module's code may call functions that its class does not tell of."""
    cls = _definer(_original(module))
    torchs = cls.__module__.startswith("torch.nn.") and not cls.__name__.startswith("Transformer")
    return "forward" in module.__dict__ or not torchs


def _definer(cls: type[nn.Module]) -> type[nn.Module]:
    """The class whose forward the instances of a class run."""
    return next(base for base in cls.__mro__ if "forward" in base.__dict__)


def _find(model: nn.Module, surgery: Surgery) -> Iterator[tuple[nn.Module, Part, _Role | None]]:
    """Every module with what the surgery makes of it, once, the model itself first."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    scripted: set[int] = set()
    for key, module in modules.items():
        if key in scripted:
            continue
        name, *aliases = names[key]
        part = Part(surgery, (name, *aliases), surgery.plan.matching((name, *aliases), module))
        chosen = surgery.chosen(part.names, module)
        kind, inplace = type(module).__name__, bool(getattr(module, "inplace", False))
        cls = _whose_forward(module, MODULES)
        operation = None
        if cls is not None:  # the first that its parameters make it, if any: an ELU may be smooth
            made = (op for op in MODULES[cls] if op.modules[cls](module, _ANY) is not None)
            operation = next(made, None)
        role: _Role | None = None
        unreached: str | None = None
        if isinstance(module, torch.jit.ScriptModule):
            scripted |= {id(m) for m in module.modules()}
            unreached = "scripted"
        elif operation is not None and chosen:
            part.operation, part.cls, role = operation, cls, "site"
            rules = surgery.plan.covering(part.rules, operation.name, 0)
            choice = getattr(surgery.plan.choice(rules), operation.name)
            part.site = Site(name, operation.name, choice, "module", kind, tuple(aliases), inplace)
            part.site.decided = surgery.plan.explain(rules, operation.name)
        elif operation is not None and module is not model:
            role = "left alone"  # its forward calls a function, which is not to be caught
        elif "forward" in module.__dict__:
            role = "replaced"
        elif (unsupported := _whose_forward(module, UNSUPPORTED_MODULES)) is not None:
            unreached = UNSUPPORTED_MODULES[unsupported]
        elif _calls(module) or module is model:
            role = "replaced" if module._forward_hooks or module._forward_pre_hooks else "caller"
        if unreached is not None and chosen:
            part.site = Site(name, unreached, None, "unreached", kind, tuple(aliases), inplace)
        yield module, part, role


def _whose_forward(module: nn.Module, classes: Mapping[type[nn.Module], Any]) -> type[nn.Module] | None:
    """Which of the classes has the forward that this module runs; None too if it has its own."""
    if "forward" in module.__dict__:  # replaced on the instance
        return None
    # ReLU6 inherits Hardtanh's forward: the most derived class says what it is.
    definer = _definer(type(module))
    return next((c for c in type(module).__mro__ if c in classes and issubclass(c, definer)), None)


def _hints(surgery: Surgery, found: list[tuple[nn.Module, Part, _Role | None]]) -> Iterator[str]:
    """What to say of selectors and rules that match no module."""
    names = [name for _, part, _ in found for name in part.names if name]

    def close(given: str) -> str:
        near = closest(given.rstrip(".*"), names, most=3)
        return " matches no module of the model" + (f"; close names: {', '.join(near)}" if near else "")

    for selector in (*surgery.only, *surgery.skip):
        if not any(matches(selector, part.names, module) for module, part, _ in found):
            yield f"{text(selector)!r}{close(text(selector))}"
    for i, rule in enumerate(surgery.plan.rules):
        if not any(i in part.rules for _, part, _ in found):
            given = [text(one) for one in (*rule.name, *rule.stage)]
            yield f"rule {i + 1} ({rule.where}){close(given[0] if given else '')}"


def _run(model: nn.Module, example: Any) -> None:
    """One forward that leaves no trace: evaluation mode, no random numbers kept."""
    training = {module: module.training for module in model.modules()}
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        model.eval()
        with torch.enable_grad():  # tells what gradients pass through from bookkeeping
            if isinstance(example, dict):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for module, mode in training.items():
            module.training = mode
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
