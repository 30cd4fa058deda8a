"""Patch a model in place, and undo the patch."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass, replace
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from nslightning._torch import call_with_hooks, forget_kept_attributes, is_compiled, kept_attributes
from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.module_base import ChosenFunction, ChosenModule
from nslightning.ops.record import MODULES
from nslightning.ops.unreached import UNSUPPORTED_MODULES
from nslightning.spelling import closest
from nslightning.surgery.checks import nothing_to_patch
from nslightning.surgery.entrances import Caller, LeftAlone
from nslightning.surgery.graph import MOST, OF_MODULES
from nslightning.surgery.hooks import REGISTRATIONS, HookRegistration, has_own_hooks
from nslightning.surgery.lookups import Looked, lookups
from nslightning.surgery.methods import Method, Reduction, binds_itself
from nslightning.surgery.origins import of_library
from nslightning.surgery.plan import AnyChoice, Plan, Selector, matches, text, to_choice
from nslightning.surgery.report import PatchReport, PatchWarning, Site, UnreachedError
from nslightning.surgery.sites import SiteForward, SiteText
from nslightning.surgery.state import PART, Part, Surgery
from nslightning.surgery.tracing import ClassName

__all__ = [
    "choices",
    "chooses",
    "patch",
    "preview",
    "report",
    "selections",
    "surgeries",
    "unpatch",
    "using",
]


# ---------------------------------------------------------------------------------------------------- public
def patch(
    model: nn.Module,
    jacobians: AnyChoice,
    only: Selector | None = None,
    skip: Selector | None = None,
    *,
    example: Any = None,
    seed: int = 0,
    strict: bool = True,
) -> PatchReport:
    """Give a model's nonsmooth operations a chosen Jacobian, in place; the forward stays exactly the same.

    Modules keep their class and stay the same objects: aliases, hooks, ``state_dict`` keys, ``type()``, pickles and
    optimizers stay valid. Functional calls (``F.relu``, ``x.relu_()``, ``F.max_pool2d``, ...) are caught while the
    model's methods run.

    The patch cannot reach some operations, which would keep PyTorch's own derivative: an operation that has no choice
    (``topk``, ``median``, ...), a scripted part, an autograd function or operator with its own backward, a
    call that a checkpoint computes again. Each of them is an error. If the modules or the ``example`` show the
    operation, this function raises and leaves the model as it was; otherwise the first forward with gradients raises.

    Args:
        model: The model; patch it before it is compiled or wrapped for distributed training.
        jacobians: The choice for all sites, or a :class:`Plan` with a choice for each.
        only: Reach only the sites that match: a glob over qualified names (``"layer1.*"``), a compiled
            regular expression, a module class, or several of these. A functional call is matched by the name
            of the module that makes it.
        skip: Leave the sites that match alone; wins over ``only``. Sites that are left alone may be unreachable.
        example: An input, a tuple of positional or a dict of keyword arguments for one forward in evaluation
            mode, so that the report lists the functional calls at once.
        seed: Seeds the ``"random"`` choice.
        strict: Raise where an operation cannot be reached; otherwise it becomes a row of the report.

    Returns:
        The report, which lists every site, how the patch reaches it, and the calls that it does not reach.

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
    surgery = Surgery(model, Plan.of(jacobians), only, skip, seed, strict)
    changes = list(_find(model, surgery))
    surgery.begin([part for _, part, _ in changes])
    surgery.catching = any(part.calls for _, part, _ in changes)
    surgery.fused = any(isinstance(module, Caller.FUSED) for module, _, _ in changes)
    surgery.report.sites += [part.site for _, part, _ in changes if part.site is not None]
    if strict and surgery.report.unreached:
        raise UnreachedError(surgery.report.model, surgery.report.unreached)
    try:
        for module, part, methods in changes:
            _install(module, part, methods)
        for module, part, methods in changes:
            if methods:
                part.kept = _replace_kept(module, surgery)
        for hint in _hints(surgery, changes):
            warnings.warn(hint, PatchWarning, stacklevel=2)
        if example is not None:
            _run(model, example)
        elif not surgery.catching:
            if not surgery.report.reached:
                warnings.warn(nothing_to_patch(surgery.report), PatchWarning, stacklevel=2)
            for hint in surgery.idle(model):  # no call can add a site
                warnings.warn(hint, PatchWarning, stacklevel=2)
    except BaseException:
        _restore(module for module, _, _ in changes)
        raise
    return surgery.report


def unpatch(model: nn.Module) -> None:
    """Undo a patch: the model is exactly as it was before.

    Args:
        model: The model that was given to :func:`patch`.

    Raises:
        ValueError: If the model is not patched.
    """
    _root(model)
    for name, module in model.named_modules():
        part: Part | None = module.__dict__.get(PART)
        if part is None:
            continue
        for method in part.methods:
            if type(module.__dict__.get(method)) not in _KINDS and hasattr(type(module), method):
                raise ValueError(
                    f"{method} of {name or 'the model'} was replaced after the patch: undo that first, then unpatch"
                )
    _restore(model.modules())


def preview(
    model: nn.Module,
    jacobians: AnyChoice,
    only: Selector | None = None,
    skip: Selector | None = None,
    *,
    example: Any = None,
) -> PatchReport:
    """The report that :func:`patch` would make, without a change of the model.

    Args:
        model: A model that is not patched; it stays as it is.
        jacobians: As in :func:`patch`.
        only: As in :func:`patch`.
        skip: As in :func:`patch`.
        example: As in :func:`patch`; without it functional calls stay unknown.

    Returns:
        The report. Its rows include the operations that cannot be reached.

    Example:
        >>> plan = Plan([Jacobians(relu=1.0), {"stage": "1", "relu": 0.5}])
        >>> for site in preview(nn.Sequential(nn.ReLU(), nn.ReLU()), plan).sites:
        ...     print(site.name, site.choice, site.decided)
        0 1.0
        1 0.5 rule 1 (stage='1') over the choice for all sites (1.0)
    """
    report = patch(model, jacobians, only, skip, example=example, strict=False)
    unpatch(model)
    return report


@contextmanager
def using(model: nn.Module, jacobians: AnyChoice) -> Iterator[None]:
    """Set the choice that backward passes inside this block take; forwards never change.

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
        ValueError: If no part of the model is patched; if one side has the published rule with a beta other than
            0, whose arithmetic is part of max pooling's forward; or if a plan gives two choices to sites that
            share one selection.
    """
    by_name = selections(model)
    wanted = choices(model, jacobians)
    before = {name: selection.jacobians for name, selection in by_name.items()}
    for name, now in before.items():
        if _published_beta(now) != _published_beta(wanted[name]):
            raise ValueError(
                "the published rule computes max pooling's forward with its beta, so rule and max_pool "
                f"cannot change between forward and backward: patched with {now!r}, asked for {wanted[name]!r}. "
                "Patch the model again instead."
            )
    try:
        for name, selection in by_name.items():
            selection.set(wanted[name])
        yield
    finally:
        for name, selection in by_name.items():
            selection.set(before[name])


def choices(model: nn.Module, jacobians: AnyChoice) -> dict[str, Jacobians]:
    """The Jacobians that each of a model's selections takes under a choice.

    Args:
        model: A patched model, or one that contains patched ones.
        jacobians: The choice: of all sites, or a plan.

    Returns:
        By the names of :func:`selections`.

    Raises:
        ValueError: If no part of the model is patched, or if a plan gives two choices to sites that share a selection.
    """
    by_name = selections(model)
    if not by_name:
        raise ValueError(f"{type(model).__name__} is not patched; call `patch(model, Jacobians())` first")
    jacobians = to_choice(jacobians)
    if isinstance(jacobians, Jacobians):
        return dict.fromkeys(by_name, jacobians)
    wanted: dict[int, Jacobians] = {}
    for surgery in surgeries(model).values():
        wanted |= {id(surgery.selections[rules]): choice for rules, choice in _meant(model, surgery, jacobians).items()}
    return {name: wanted[id(selection)] for name, selection in by_name.items()}


def _meant(model: nn.Module, surgery: Surgery, plan: Plan) -> dict[tuple[int, ...], Jacobians]:
    """The Jacobians that each selection of a surgery takes under a plan, which may differ from the surgery's own."""
    if plan == surgery.plan:
        return {rules: plan.choice(rules) for rules in surgery.selections}
    decided: dict[tuple[int, ...], dict[str, tuple[Any, str]]] = {rules: {} for rules in surgery.selections}
    for module in model.modules():
        if (part := surgery.part(module)) is None or not surgery.chosen(part.names, module):
            continue
        matching = plan.matching(part.names, module)
        for operation in surgery.operations(part):
            for call in sorted({*plan.calls, *surgery.plan.calls}):
                rules = surgery.plan.covering(part.rules, operation, call)
                choice = plan.choice(plan.covering(matching, operation, call))
                place = f"{part.names[0] or 'the model'}, call {call}"
                for field in (operation, "rule"):
                    value = getattr(choice, field)
                    other, other_place = decided[rules].setdefault(field, (value, place))
                    if other != value:
                        raise ValueError(
                            f"the plan gives {operation} {field}={other!r} at {other_place} and {value!r} at {place}, "
                            "which were patched as one: patch the model with a plan whose rules tell them apart (a "
                            "rule may repeat the choice that would hold without it)"
                        )
    return {
        rules: replace(plan.base, **{field: value for field, (value, _) in fields.items()})
        for rules, fields in decided.items()
    }


def _published_beta(jacobians: Jacobians) -> float | str | None:
    """The beta that the published rule puts into max pooling's forward; None if the forward is the stock one."""
    stock = jacobians.rule == "exact" or jacobians.max_pool in (None, 0.0, "native")
    return None if stock else jacobians.max_pool


def report(model: nn.Module) -> PatchReport:
    """The report of a patched model, with the functional calls seen so far.

    Args:
        model: The model that was given to :func:`patch`.

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
        except for the first; 0 is the choice for all sites that a plan begins with.
    """
    return {
        f"{name}#{'+'.join(str(surgery.plan.number(i)) for i in rules)}" if k else name: selection
        for name, surgery in surgeries(model).items()
        for k, (rules, selection) in enumerate(surgery.selections.items())
    }


def chooses(module: nn.Module) -> bool:
    """Return whether a module of a patched model, called alone, takes a choice anywhere in its own code.

    Args:
        module: Any module, after the model ran.

    Returns:
        True for a site, and for a module whose code calls functions that are sites.
    """
    part: Part | None = module.__dict__.get(PART)
    return part is not None and (part.operation is not None or part.may_call) and part.chosen


def surgeries(model: nn.Module) -> dict[str, Surgery]:
    """The surgeries that a model's parts went through.

    Args:
        model: Any module.

    Returns:
        Each one, in the order of the modules, by the qualified name of the part that was patched.
    """
    by_identity: dict[int, tuple[str, Surgery]] = {}
    for name, module in model.named_modules():
        part: Part | None = module.__dict__.get(PART)
        if part is not None:
            by_identity.setdefault(id(part.surgery), (name, part.surgery))
    return dict(by_identity.values())


# --------------------------------------------------------------------------------------------------- helpers
def _root(model: nn.Module) -> Part:
    """The surgery's record of a model that was given to `patch`."""
    part: Part | None = model.__dict__.get(PART)
    if part is not None and "" in part.names:
        return part
    kind = type(model).__name__
    if part is not None:
        raise ValueError(f"this {kind} is {part.names[0]!r} of a patched {part.surgery.report.model}: give that one")
    parts = [name for name, module in model.named_modules() if PART in module.__dict__]
    hint = f"; its part {parts[0]!r} is" if parts else "; `patch(model, Jacobians(...))` does that"
    raise ValueError(f"{kind} is not patched{hint}")


def _refuse(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module; given {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be patched: patch the eager model it was made from")
    for name, module in model.named_modules():
        label = f"its part {name!r}" if name else "the model"
        if is_compiled(module):
            raise TypeError(f"{label} is compiled already: patch first, then compile")
        bases = {base.__name__ for base in type(module).__mro__}
        for wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel"):
            if wrapper in bases:
                raise TypeError(f"{label} is wrapped by {wrapper} already: patch first, then wrap")
        if (part := module.__dict__.get(PART)) is not None:
            raise ValueError(
                f"{label} is patched already ({part.surgery.report.summary()}): use `using(model, ...)` to "
                "change the choice of a backward, or `unpatch` it first"
            )


_KINDS = (Caller, ClassName, HookRegistration, LeftAlone, Reduction, SiteForward, SiteText)
_BASE = frozenset(dir(nn.Module))  # names that PyTorch's class defines


def _install(module: nn.Module, part: Part, methods: Mapping[str, type[Method]]) -> None:
    """Put a module's part and its methods into the instance."""
    attributes: dict[str, Any] = {PART: part}
    for name, kind in methods.items():
        kept = (module.__dict__[name],) if name in module.__dict__ else ()
        attributes[name] = kind(module, name, part, *kept)
    part.methods = tuple(methods)
    if part.calls:
        part.lookups = {
            (definer, name, when): Looked(module, name, part, definer, when)
            for definer, name, when in lookups(type(module), _own)
        }
    module.__dict__.update(attributes)
    if (kept_by_copies := kept_attributes(module)) is not None:
        kept_by_copies.update(attributes)


def _restore(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        part: Part | None = module.__dict__.pop(PART, None)
        if part is None:
            continue
        for name in part.methods:
            method: Any = module.__dict__.get(name)
            if type(method) not in _KINDS:
                continue  # the user set another attribute after the patch
            method.retire()
            if method.is_replacement:
                module.__dict__[name] = method.replaced  # in the place that it had
            else:
                del module.__dict__[name]
        for container, key, before, after in part.kept:
            entries = _entries(module if container is None else container)
            if _entry(entries, key) is after:
                entries[key] = before
        for looked in part.lookups.values():
            looked.release()
        forget_kept_attributes(module, (PART, *part.methods))


def _replace_kept(module: nn.Module, surgery: Surgery) -> list[tuple[Any, Any, Any, Any]]:
    """Put a surgery's methods in the place of the bound methods that a module keeps in its attributes and containers.

    A model may keep a table of them, such as ``self.table = {"a": self.encode}``, and code may call these from outside.

    Returns:
        Each place: the container, or None for the module itself, the key or index, the value before and that after.
    """
    search = _KeptMethods(module, surgery)
    search.replace_entries(None, vars(module), OF_MODULES)
    return search.changes


class _KeptMethods:
    """The search of :func:`_replace_kept`: closures that call each other would keep the module alive in a cycle."""

    def __init__(self, module: nn.Module, surgery: Surgery) -> None:
        self.module, self.surgery = module, surgery
        self.changes: list[tuple[Any, Any, Any, Any]] = []
        self.seen: set[int] = set()

    def replaced(self, value: Any) -> Any:
        if type(value) in (FunctionType, MethodType):
            return _of_surgery(value, self.module, self.surgery)
        if type(value) is partial:
            function = self.replaced(value.func)
            return value if function is value.func else partial(function, *value.args, **value.keywords)
        if id(value) in self.seen or len(self.seen) >= MOST:
            return value
        if isinstance(value, tuple):
            self.seen.add(id(value))
            entries = [self.replaced(entry) for entry in value]
            if all(one is other for one, other in zip(value, entries, strict=True)):
                return value
            return value._make(entries) if hasattr(value, "_make") else type(value)(entries)
        if isinstance(value, (dict, list, deque)) or (is_dataclass(value) and hasattr(value, "__dict__")):
            self.seen.add(id(value))
            self.replace_entries(value, _entries(value))
        return value

    def replace_entries(self, container: Any, entries: Any, without: frozenset[str] = frozenset()) -> None:
        for key, before in list(entries.items() if isinstance(entries, dict) else enumerate(entries)):
            if key in without or isinstance(before, nn.Module) or type(before) in _KINDS:
                continue
            if (after := self.replaced(before)) is not before:
                entries[key] = after
                self.changes.append((container, key, before, after))


def _entries(container: Any) -> Any:
    """The dictionary or sequence that holds the values of a container, or of an object's attributes."""
    return container if isinstance(container, (dict, list, deque)) else vars(container)


def _of_surgery(value: Any, module: nn.Module, surgery: Surgery) -> Any:
    """The surgery's object for a method that a module keeps; the value itself if the surgery has none for it."""
    owner = getattr(value, "__self__", None)
    owner = owner if isinstance(owner, nn.Module) else module
    if surgery.part(owner) is None:
        return value
    methods = (method for method in vars(owner).values() if type(method) in _KINDS)
    return next((method for method in methods if method.stock(owner) == value), value)


def _entry(container: Any, key: Any) -> Any:
    """An entry of a dictionary or a sequence; None if it has none there any more."""
    try:
        return container[key]
    except LookupError:
        return None


def _calls(module: nn.Module) -> bool:
    """Return whether a module's code may call functions that cannot be known from its class."""
    if "forward" in module.__dict__ or _own_code(module):
        return True
    definer = _definer(type(module))
    if definer is not nn.Module and not definer.__module__.startswith("torch.nn."):
        return True
    return definer.__name__.startswith("Transformer") or issubclass(definer, _CALLING)


# Modules of torch's that call a function which has a choice in one of their forms.
_CALLING = (nn.RNN, nn.RNNCell)


def _own_code(module: nn.Module) -> bool:
    """Return whether a module has methods, properties or special methods that PyTorch's class lacks."""
    return bool(set(_own_entrances(module)) - {"forward"}) or any(lookups(type(module), _own))


def _entrances(module: nn.Module) -> Iterator[str]:
    """The methods of a module whose code may call functions."""
    yield from _own_entrances(module)
    for name in dir(type(module)):  # a library's class may have methods that are called in place of `forward`
        if name.startswith("forward") and name not in module.__dict__:
            yield name


def _own_entrances(module: nn.Module) -> Iterator[str]:
    """The methods that a model's own classes define, and the functions without a name among the attributes."""
    seen: set[str] = set()
    for cls in filter(_own, type(module).__mro__):
        for name, method in vars(cls).items():
            if name in seen or name.startswith("__") or (name in _BASE and name not in ("forward", call_with_hooks())):
                continue
            seen.add(name)
            if name not in module.__dict__ and (isinstance(method, _METHODS) or _binds(method, module)):
                yield name
    for name, value in vars(module).items():  # lambdas and partials; code may compare a named function with itself
        if _has_no_name(value) or isinstance(value, partial):
            yield name


def _has_no_name(value: Any) -> bool:
    """Return whether a value is a lambda or a local function."""
    return isinstance(value, FunctionType) and "<" in value.__qualname__


_METHODS = (FunctionType, staticmethod, classmethod, type(cache(len)))


def _binds(value: Any, module: nn.Module) -> bool:
    """Return whether an object in a class makes a method of a module, as an object does that a decorator returned."""
    if not binds_itself(value):
        return False
    with suppress(Exception):  # the user's code: any error
        return callable(value.__get__(module, type(module)))
    return False


def _own(cls: type) -> bool:
    """Return whether a class comes from a model's code, and not from a library."""
    return not of_library(cls.__module__)


def _definer(cls: type[nn.Module]) -> type[nn.Module]:
    """The class whose forward the instances of a class run."""
    return next(base for base in cls.__mro__ if "forward" in base.__dict__)


def _find(model: nn.Module, surgery: Surgery) -> Iterator[tuple[nn.Module, Part, dict[str, type[Method]]]]:
    """Each module once, the model itself first, with its part and the methods that the surgery puts into it."""
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
        part.chosen = surgery.chosen(part.names, module)
        kind, inplace = type(module).__name__, bool(getattr(module, "inplace", False))
        cls = _whose_forward(module, MODULES)
        operation = None
        if cls is not None:  # the first that claims it, if any: the parameters of an ELU may make it smooth
            operation = next((op for op in MODULES[cls] if op.claims(module)), None)
        methods: dict[str, type[Method]] = {}
        unreached: str | None = None
        if isinstance(module, torch.jit.ScriptModule):
            scripted |= {id(m) for m in module.modules()}
            unreached = "scripted"
        elif operation is not None and part.chosen:
            part.operation, part.cls, part.calls = operation, cls, _own_code(module) or has_own_hooks(module)
            methods = dict.fromkeys(_own_entrances(module), Caller) if part.calls else {}
            methods |= {"forward": SiteForward, "extra_repr": SiteText}
            rules = surgery.plan.covering(part.rules, operation.name, 0)
            choice = getattr(surgery.plan.choice(rules), operation.name)
            part.site = Site(name, operation.name, choice, "module", kind, tuple(aliases), inplace)
            part.site.decided = surgery.plan.explain(rules, operation.name)
        elif operation is not None or isinstance(module, (ChosenFunction, ChosenModule)):  # these have their own choice
            methods = {"forward": LeftAlone}
        else:
            part.calls = _calls(module) or has_own_hooks(module)
            unsupported = _whose_forward(module, UNSUPPORTED_MODULES)
            if unsupported is not None:
                unreached = UNSUPPORTED_MODULES[unsupported]
            if part.calls:
                methods = dict.fromkeys(_entrances(module), Caller) | {"_get_name": ClassName}
                if "forward" in module.__dict__ or type(module).forward is not nn.Module.forward:
                    methods["forward"] = Caller
                if module._forward_hooks or module._forward_pre_hooks:
                    methods[call_with_hooks()] = Caller
            elif isinstance(module, Caller.FUSED) or unsupported is not None or module is model:
                methods = {"forward": Caller} | ({"_get_name": ClassName} if module is model else {})
        if module is model and unreached != "scripted":
            if part.calls or has_own_hooks(module):  # also for a `forward` that is set later, as Accelerate does
                methods[call_with_hooks()] = Caller
            else:
                methods |= dict.fromkeys(REGISTRATIONS, HookRegistration)
        if module is model and type(module).forward is nn.Module.forward and "forward" not in module.__dict__:
            methods.pop("forward", None)  # the model defines no forward
        if methods and "__reduce_ex__" not in module.__dict__:
            methods["__reduce_ex__"] = Reduction
        if unreached is not None and part.chosen:
            part.site = Site(name, unreached, None, "unreached", kind, tuple(aliases), inplace)
        yield module, part, methods


def _whose_forward(module: nn.Module, classes: Mapping[type[nn.Module], Any]) -> type[nn.Module] | None:
    """The class among these whose forward this module runs; None if there is none, or the instance has its own."""
    if "forward" in module.__dict__:  # replaced on the instance
        return None
    # ReLU6 inherits Hardtanh's forward: the most derived class decides which operation it is.
    definer = _definer(type(module))
    return next((c for c in type(module).__mro__ if c in classes and issubclass(c, definer)), None)


def _hints(surgery: Surgery, changes: list[tuple[nn.Module, Part, dict[str, type[Method]]]]) -> Iterator[str]:
    """A warning for each selector and each rule that matches no module."""
    names = [name for _, part, _ in changes for name in part.names if name]

    def close(pattern: str) -> str:
        near = closest(pattern.rstrip(".*"), names, most=3)
        return " matches no module of the model" + (f"; close names: {', '.join(near)}" if near else "")

    for selector in (*surgery.only, *surgery.skip):
        if not any(matches(selector, part.names, module) for module, part, _ in changes):
            yield f"{text(selector)!r}{close(text(selector))}"
    for i, rule in enumerate(surgery.plan.rules):
        if not any(i in part.rules for _, part, _ in changes):
            patterns = [text(one) for one in (*rule.name, *rule.stage)]
            yield f"rule {surgery.plan.number(i)} ({rule.where}){close(patterns[0] if patterns else '')}"


def _run(model: nn.Module, example: Any) -> None:
    """One forward in evaluation mode; afterwards the modes and the random number generators are as before."""
    training = {module: module.training for module in model.modules()}
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        model.eval()
        with torch.enable_grad():  # separates calls that gradients pass through from bookkeeping
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
