"""Patch a model in place, and take it back."""

from __future__ import annotations

import copyreg
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from nslightning.jacobians import Jacobians
from nslightning.ops.registry import MODULES, UNSUPPORTED_MODULES, Operation
from nslightning.ops.selection import Selection
from nslightning.surgery.functional import FunctionalCalls
from nslightning.surgery.report import PatchReport, Site

__all__ = ["PatchWarning", "Selector", "Surgery", "patch", "report", "selections", "unpatch", "using"]

Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Iterable[Selector]"

_SITE, _SURGERY = "_nonsmooth_site", "_nonsmooth_surgery"


class PatchWarning(UserWarning):
    """Something about a patch that its owner will want to know."""


class Surgery:
    """What one :func:`patch` did to one model: kept on the model's root module.

    Args:
        root: The patched model.
        jacobians: The choice.
        only: Reach only these sites.
        skip: Leave these sites alone.
        seed: Seeds the ``"random"`` choice.
    """

    def __init__(
        self, root: nn.Module, jacobians: Jacobians, only: Selector | None, skip: Selector | None, seed: int
    ) -> None:
        self.selection = Selection(jacobians, seed)
        self.only, self.skip = only, skip
        self.report = PatchReport(type(root).__name__, jacobians)
        self.running = False  # the root's forward is on the stack, so functional calls are being caught
        self.index(root)

    def index(self, root: nn.Module) -> None:
        """Note every module's qualified name, by identity, to name the functional calls that it makes."""
        self.names = {id(module): name for name, module in root.named_modules()}

    def chosen(self, name: str | None, module: nn.Module | None = None) -> bool:
        """Whether ``only`` and ``skip`` let the choice reach a site; a None name is a call whose owner is unknown."""
        if self.only is None and self.skip is None:
            return True
        if name is None:
            raise RuntimeError(
                "functional calls cannot be told apart under torch.compile, so `only` and `skip` cannot decide on "
                "them. Patch without `only` and `skip`, or run the model without torch.compile."
            )
        if self.only is not None and not _matches(self.only, name, module):
            return False
        return self.skip is None or not _matches(self.skip, name, module)

    def saw(self, owner: str, operation: str, function: str, inplace: bool, *, reached: bool) -> None:
        """Note a functional call in the report."""
        for site in self.report.sites:
            if site.name == owner and (site.kind == function or (site.how == "unreached" and not reached)):
                site.calls += 1
                return
        choice = getattr(self.selection.jacobians, operation) if reached else None
        how = "functional" if reached else "unreached"
        self.report.sites.append(Site(owner, operation, choice, how, function, inplace=inplace, calls=1))  # type: ignore[arg-type] # a Literal of the two

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"names": {}, "running": False}  # identities do not travel; see `_forward_root`


def _matches(selector: Selector, name: str, module: nn.Module | None) -> bool:
    if isinstance(selector, str):
        return fnmatch.fnmatchcase(name, selector)
    if isinstance(selector, re.Pattern):
        return selector.search(name) is not None
    if isinstance(selector, type):
        return isinstance(module, selector)
    return any(_matches(s, name, module) for s in selector)


# ------------------------------------------------------------------------------------------- swapped classes
_swapped: dict[tuple[type[nn.Module], bool, bool], type[nn.Module]] = {}


def _swapped_class(cls: type[nn.Module], is_site: bool, is_root: bool) -> type[nn.Module]:
    """The subclass that a patched module belongs to; one per class and role, so that pickles find it again."""
    key = (cls, is_site, is_root)
    if key not in _swapped:
        body: dict[str, Any] = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "__reduce_ex__": _reduce,
            "_nonsmooth_key": key,
        }
        if is_site:
            body |= {"forward": _forward_site, "extra_repr": _extra_repr}
        else:
            body |= {
                name: _forward_root(name)
                for name in dir(cls)
                if name.startswith("forward") and callable(getattr(cls, name))
            }
        _swapped[key] = type(cls.__name__, (cls,), body)
    return _swapped[key]


def _forward_site(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    site, selection, operation, cls = self.__dict__[_SITE]
    call = operation.modules[cls](self, *args, **kwargs)
    if selection.observer is not None:
        selection.observer(site.name, operation, call)
    return operation.apply(selection, call)


def _extra_repr(self: nn.Module) -> str:
    site, selection, operation, _ = self.__dict__[_SITE]
    base = super(type(self), self).extra_repr()
    value = getattr(selection.jacobians, operation.name)
    return f"{base}{', ' if base else ''}jacobian={'native' if value is None else value}"


def _forward_root(name: str) -> Callable[..., Any]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        surgery: Surgery = self.__dict__[_SURGERY]
        stock = getattr(super(type(self), self), name)
        if surgery.running:
            return stock(*args, **kwargs)
        if not surgery.names:  # a copy, or fresh from a pickle
            surgery.index(self)
        surgery.running = True
        try:
            with FunctionalCalls(surgery):
                return stock(*args, **kwargs)
        finally:
            surgery.running = False
            surgery.report.traced = True

    forward.__name__ = name
    return forward


def _reduce(self: nn.Module, protocol: int) -> Any:
    _, (_, *args), *rest = object.__reduce_ex__(self, max(protocol, 2))
    return (_rebuild, (*self._nonsmooth_key, *args), *rest)  # type: ignore[misc] # the class of this method has it


def _rebuild(cls: type[nn.Module], is_site: bool, is_root: bool, *args: Any) -> nn.Module:
    return copyreg.__newobj__(_swapped_class(cls, is_site, is_root), *args)  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------- public
def patch(
    model: nn.Module,
    jacobians: Jacobians,
    only: Selector | None = None,
    skip: Selector | None = None,
    *,
    example: Any = None,
    seed: int = 0,
) -> PatchReport:
    """Give every nonsmooth operation of a model a chosen Jacobian, in place; the forward stays bit for bit the same.

    Modules become members of a subclass of their class, so they stay the same objects: aliases, hooks, ``state_dict``
    keys, ``isinstance`` checks, pickles and optimizers stay valid. Functional calls (``F.relu``, ``x.relu_()``,
    ``F.max_pool2d``, ...) are caught while the model runs. What is nonsmooth and has no choice yet (``clamp``,
    ``Hardswish``, ...) keeps PyTorch's own derivative and is named in the report.

    Args:
        model: The model; patch it before it is compiled or wrapped for distributed training.
        jacobians: The choice.
        only: Reach only the sites that match: a glob over qualified names (``"layer1.*"``), a compiled regular
            expression, a module class, or several of these. A functional call is matched by the name of the module
            that makes it.
        skip: Leave the sites that match alone; wins over ``only``.
        example: An input, a tuple of positional or a dict of keyword arguments for one forward in evaluation mode
            without gradients, so that the report lists the functional calls at once.
        seed: Seeds the ``"random"`` choice.

    Returns:
        The report: every site, how it was reached, and what was not.

    Raises:
        TypeError: If ``model`` is not a plain ``nn.Module``: compiled, scripted, or wrapped by DDP or FSDP.
        ValueError: If it, or a part of it, is patched already.

    Warns:
        PatchWarning: If there is nothing to patch.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        >>> print(patch(model, Jacobians(relu=1.0, max_pool="minimal")).summary())
        Patched Sequential: 1 relu, 1 max_pool with Jacobians(relu=1.0, max_pool='minimal') [...]
    """
    _refuse(model)
    surgery = Surgery(model, jacobians, only, skip, seed)
    sites = list(_find(model, surgery))
    surgery.report.sites += [site for _, site, _ in sites]
    for module, site, operation in sites:
        if operation is not None:
            module.__dict__[_SITE] = (site, surgery.selection, operation, _known(module))
            module.__class__ = _swapped_class(type(module), is_site=True, is_root=module is model)
    model.__dict__[_SURGERY] = surgery
    if _SITE not in model.__dict__:
        model.__class__ = _swapped_class(type(model), is_site=False, is_root=True)
    if example is not None:
        _run(model, example)
    if not surgery.report.reached and (example is not None or _has_no_code_of_its_own(model)):
        warnings.warn(
            f"{type(model).__name__} has nothing to patch: no ReLU, ReLU6, LeakyReLU or MaxPool2d was found"
            + (f" among {only!r}" if only is not None else ""),
            PatchWarning,
            stacklevel=2,
        )
    return surgery.report


def unpatch(model: nn.Module) -> None:
    """Make a patched model exactly the model it was.

    Args:
        model: What was given to :func:`patch`.

    Raises:
        ValueError: If the model is not patched.
    """
    if _SURGERY not in model.__dict__:
        raise ValueError(f"{type(model).__name__} is not patched; `patch(model, Jacobians(...))` does that")
    for module in model.modules():
        if _SITE in module.__dict__ or _SURGERY in module.__dict__:
            module.__class__ = type(module)._nonsmooth_key[0]  # type: ignore[attr-defined]
            module.__dict__.pop(_SITE, None)
            module.__dict__.pop(_SURGERY, None)


@contextmanager
def using(model: nn.Module, jacobians: Jacobians) -> Iterator[None]:
    """The choice that backward passes inside this block take; forwards never change.

    One forward serves any number of choices::

        loss = criterion(model(x), y)
        for alpha in (0.0, 0.5, 1.0):
            with using(model, Jacobians(relu=alpha)):
                gradients = torch.autograd.grad(loss, model.parameters(), retain_graph=True)

    Args:
        model: A patched model, or one that contains patched ones.
        jacobians: The choice.

    Yields:
        Nothing.

    Raises:
        ValueError: If nothing of the model is patched, or the published rule of max pooling is involved, whose
            arithmetic is part of the forward.
    """
    found = selections(model)
    if not found:
        raise ValueError(f"{type(model).__name__} is not patched; call `patch(model, Jacobians())` first")
    before = [selection.jacobians for selection in found]
    for now in before:
        if "published" in (now.rule, jacobians.rule) and (now.rule, now.max_pool) != (
            jacobians.rule,
            jacobians.max_pool,
        ):
            raise ValueError(
                "the published rule computes max pooling's forward with its beta, so rule and max_pool cannot change "
                f"between forward and backward: patched with {now!r}, asked for {jacobians!r}. "
                "Patch the model again instead."
            )
    try:
        for selection in found:
            selection.set(jacobians)
        yield
    finally:
        for selection, old in zip(found, before, strict=True):
            selection.set(old)


def report(model: nn.Module) -> PatchReport:
    """The report of a patched model, with the functional calls seen so far.

    Args:
        model: What was given to :func:`patch`.

    Returns:
        The live report.

    Raises:
        ValueError: If the model is not patched.
    """
    if _SURGERY not in model.__dict__:
        raise ValueError(f"{type(model).__name__} is not patched; `patch(model, Jacobians(...))` does that")
    surgery: Surgery = model.__dict__[_SURGERY]
    return surgery.report


def selections(model: nn.Module) -> list[Selection]:
    """The selections that a model's patched parts share.

    Args:
        model: Any module.

    Returns:
        Each distinct selection once, in the order of the modules.
    """
    surgeries = (m.__dict__[_SURGERY] for m in model.modules() if _SURGERY in m.__dict__)
    return list({id(s.selection): s.selection for s in surgeries}.values())


# --------------------------------------------------------------------------------------------------- helpers
def _refuse(model: nn.Module) -> None:
    wrapper = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module; given {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise TypeError("the model is compiled already: patch it first, then compile it")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be patched: patch the eager model it was made from")
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
        raise TypeError(f"the model is wrapped by {wrapper} already: patch it first, then wrap it")
    for name, module in model.named_modules():
        if _SURGERY in module.__dict__ or _SITE in module.__dict__:
            raise ValueError(
                f"{name or wrapper} is patched already ({report(module).summary() if _SURGERY in module.__dict__ else ''}"
                "): use `using(model, ...)` to change the choice of a backward, or `unpatch(model)` first"
            )


def _known(module: nn.Module) -> type[nn.Module] | None:
    """The registered class whose forward this module runs, or None: a subclass may have its own."""
    if "forward" in module.__dict__:  # replaced on the instance: a swapped class would not be reached
        return None
    for cls in type(module).__mro__:
        if "forward" in cls.__dict__:
            # ReLU6 inherits Hardtanh's forward: the most derived registered class says what it is.
            return next((c for c in type(module).__mro__ if c in MODULES and issubclass(c, cls)), None)
    return None


def _find(model: nn.Module, surgery: Surgery) -> Iterator[tuple[nn.Module, Site, Operation | None]]:
    """Every nonsmooth module once, under its first name, with the operation that reaches it, if one does."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    for key, module in modules.items():
        name, *aliases = names[key]
        if not surgery.chosen(name, module):
            continue
        cls = _known(module)
        kind = type(module).__name__
        inplace = bool(getattr(module, "inplace", False))
        operation = MODULES.get(cls) if cls is not None else None
        if operation is not None and operation.modules[cls](module, torch.empty(0)) is not None:  # type: ignore[index]
            choice = getattr(surgery.selection.jacobians, operation.name)
            yield module, Site(name, operation.name, choice, "module", kind, tuple(aliases), inplace), operation
        elif isinstance(module, UNSUPPORTED_MODULES) and not isinstance(module, tuple(MODULES)) or cls is nn.Hardtanh:
            yield module, Site(name, kind.lower(), None, "unreached", kind, tuple(aliases), inplace), None


def _run(model: nn.Module, example: Any) -> None:
    """One forward that leaves no trace: evaluation mode, no gradients, no random numbers kept."""
    training = {module: module.training for module in model.modules()}
    cpu, cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        model.eval()
        with torch.no_grad():
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


def _has_no_code_of_its_own(model: nn.Module) -> bool:
    """Whether all code is PyTorch's, which makes no functional call that a module's class does not tell."""
    return all(type(m).__module__.startswith("torch.nn") or _SURGERY in m.__dict__ for m in model.modules()) and (
        type(model)._nonsmooth_key[0].__module__.startswith("torch.nn")  # type: ignore[attr-defined]
    )
