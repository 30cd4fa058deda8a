"""What follows a run of a patched model: the report gets what it evaluated, and its graph is checked."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from nslightning._torch import disable_function_modes, eager, is_compiled_function, number_of
from nslightning.ops.record import OPERATIONS
from nslightning.surgery.graph import foreign_nodes, is_checkpoint, kinds, nodes, structure, tensors
from nslightning.surgery.interception import FunctionalCalls
from nslightning.surgery.report import PatchReport, PatchWarning

__all__ = ["finish", "nothing_to_patch"]

_COMPILED = (
    "parts of the model are compiled by themselves: they take the choice, but the report cannot list their sites, and "
    "custom backwards in them are not seen. Compile the patched model instead"
)


@eager
def finish(
    run: FunctionalCalls, module: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]], result: Any, last: bool
) -> None:
    """Add the evaluations of a run to the report; check the run's graph if it differs from earlier ones.

    Args:
        run: The run, which has ended.
        module: The module whose method began it.
        arguments: The method's positional and keyword arguments.
        result: What it returned.
        last: Whether that may be the model's results, so that the report is complete now.
    """
    surgery, report = run.surgery, run.surgery.report
    with disable_function_modes():  # modes of others see the model's calls, and not that its tensors are looked at
        run.await_gradients()
        if run.differentiating:
            start, end = run.extent
            calls = frozenset((id(site), n) for site, n in run.evaluations.values() if site.how == "functional")
            path = (frozenset(run.entered), calls, kinds(*arguments), structure(result), end - start)
            if run.recording or (path not in surgery.looked and surgery.looks_again(run.entrance)):
                _look(run, module, arguments, result)
                surgery.checked(run.entrance, path, run.recording)
                surgery.counts.add(end - start)
        first = not report.traced and run.differentiating
        if first and not run.evaluations:  # a reentrant checkpoint computes without gradients until its backward
            first = last and any(x.grad_fn is not None for x in tensors(result))
            first = first and not any(map(is_checkpoint, nodes(tensors(result), _inputs(run, arguments))))
        for site, evaluations in run.evaluations.values():
            site.calls = site.calls or evaluations
        report.traced |= first
        if first and run.part.names[0] == "" and not report.reached:
            compiled = any(map(is_compiled_function, nodes(tensors(result), _inputs(run, arguments))))
            warnings.warn(_COMPILED if compiled else nothing_to_patch(report), PatchWarning, stacklevel=4)
        elif first and run.part.names[0] == "":
            for hint in surgery.idle(module):
                warnings.warn(hint, PatchWarning, stacklevel=4)


@eager
def _look(run: FunctionalCalls, module: nn.Module, arguments: Any, result: Any) -> None:
    """Name the kinks and custom backwards of the graph that belong to no site."""
    surgery = run.surgery
    made = tensors(result, *module.modules())
    earlier = range(surgery.first_node, run.extent[0])  # of the runs before, whose graphs a module may keep
    for node in foreign_nodes(made, _inputs(run, arguments)):
        if node.operation != "custom" and (not run.recording or node.number in earlier or _owned(run, node.number)):
            continue
        if (ranked := next((r for r in run.ranked if r.first <= node.number < r.last), None)) is not None:
            run.count(surgery.unreached(ranked.part, ranked.operation, ranked.kind))
            continue
        part = next((part for start, end, part in run.spans if start <= node.number < end), run.part)
        if part.site is not None and part.site.how == "unreached" and node.operation != "custom":
            run.count(part.site)  # the module is named already
        elif part.chosen:
            run.count(surgery.unreached(part, node.operation, node.kind))


def _inputs(run: FunctionalCalls, arguments: Any) -> list[Tensor]:
    """The tensors among a run's arguments that the run did not overwrite: their graphs are not the model's."""
    start, end = run.extent
    return [x for x in tensors(arguments) if x.grad_fn is None or not start <= number_of(x.grad_fn) < end]


def _owned(run: FunctionalCalls, number: int) -> bool:
    return any(start <= number < end for start, end in run.owned)


def nothing_to_patch(report: PatchReport) -> str:
    """The warning for a model without any nonsmooth operation.

    Args:
        report: The model's.

    Returns:
        One sentence.
    """
    among = f" among only={', '.join(report.only)}" if report.only else ""
    among += f" without skip={', '.join(report.skip)}" if report.skip else ""
    return f"{report.model} has nothing to patch: none of {', '.join(OPERATIONS)} was found{among}"
