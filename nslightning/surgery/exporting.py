"""Nonsmooth operations in a graph of ``torch.export``: one custom operator keeps their choice in the graph."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from nslightning.jacobians import Jacobians
from nslightning.ops.autograd.selection import Selection
from nslightning.ops.autograd.windows import Regular
from nslightning.ops.record import OPERATIONS, Call, Operation

__all__ = ["exported"]


@torch.library.custom_op("nslightning::chosen", mutates_args=())
def chosen(x: Tensor, others: list[Tensor], spec: str) -> list[Tensor]:
    """A nonsmooth operation under the choice that was in force when the model was exported.

    Args:
        x: The operation's input.
        others: Its other tensors, such as a weight.
        spec: The operation, its parameters and the choice, as JSON.

    Returns:
        The stock operation's result.
    """
    with torch.no_grad():
        return _results(_evaluate(x, others, spec))


@chosen.register_fake
def _(x: Tensor, others: list[Tensor], spec: str) -> list[Tensor]:
    with torch.no_grad():
        return _results(_evaluate(x, others, spec))


def _keep(ctx: Any, inputs: tuple[Tensor, list[Tensor], str], output: list[Tensor]) -> None:
    x, others, ctx.spec = inputs
    ctx.save_for_backward(x, *others)
    ctx.floating = [y.is_floating_point() for y in output]


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, list[Tensor | None], None]:
    # This is no custom operator: PyTorch records no graph inside one.
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        results = _results(_evaluate(leaves[0], leaves[1:], ctx.spec))
        pairs = [(y, g) for y, g, floating in zip(results, gradients, ctx.floating, strict=True) if floating]
        input_gradients: list[Tensor | None] = list(
            torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        )
    return input_gradients[0], input_gradients[1:], None


chosen.register_autograd(_backward, setup_context=_keep)


def _results(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _evaluate(x: Tensor, others: list[Tensor], spec: str) -> Any:
    decoded, rest = json.loads(spec), iter(others)
    parameters = tuple(_read(p, rest) for p in decoded["parameters"])
    call = Call(x, parameters, return_indices=decoded["return_indices"])
    return OPERATIONS[decoded["operation"]].apply(Selection(Jacobians(**decoded["jacobians"]), decoded["seed"]), call)


def _read(written: Any, others: Any) -> Any:
    match written:
        case {"tensor": _}:
            return next(others)
        case {"windows": fields}:
            arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return Regular(**arguments)
        case {"tuple": values}:
            return tuple(values)
    return written


def _write(parameter: Any) -> Any:
    if isinstance(parameter, Tensor):
        return {"tensor": True}
    if isinstance(parameter, Regular):
        return {"windows": parameter._asdict() if hasattr(parameter, "_asdict") else dict(vars(parameter))}
    if isinstance(parameter, (tuple, list)):
        return {"tuple": list(parameter)}
    return parameter


def exported(operation: Operation, selection: Selection, call: Call) -> Any:
    """Evaluate a call so that ``torch.export`` keeps its choice.

    Args:
        operation: The operation.
        selection: The choice; the exported graph keeps the one now in force, and ``using`` does not reach it.
        call: The call to evaluate.

    Returns:
        The stock operation's result.

    Raises:
        RuntimeError: If the operation is part of something else, or has a parameter that a graph cannot keep.
    """
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError("torch.export keeps a Jacobian choice with strict=False; or unpatch the model first")
    try:
        if call.within is not None:
            raise TypeError
        spec = json.dumps(
            {
                "operation": operation.name,
                "parameters": [_write(p) for p in call.parameters],
                "return_indices": call.return_indices,
                "jacobians": selection.jacobians.to_dict(),
                "seed": selection.seed,
            }
        )
    except TypeError:
        raise RuntimeError(
            f"torch.export does not keep the Jacobian choice of this {operation.name}: unpatch the model first, and "
            "patch the exported module"
        ) from None
    others = [p for p in call.parameters if isinstance(p, Tensor)]
    if call.inplace:  # the operator keeps its input for the backward
        return call.x.copy_(torch.ops.nslightning.chosen(call.x.clone(), others, spec)[0])
    results = torch.ops.nslightning.chosen(call.x, others, spec)
    return results[0] if len(results) == 1 else tuple(results)
