"""INNAprop: INNA along RMSprop-scaled gradients."""

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nslightning._torch import number_of_tensor, scalar_dtype
from nslightning.optim._velocity import (
    Decay,
    Scalar,
    VelocityForm,
    add_,
    addcdiv_,
    hyperparameter,
    on_device,
    zeros_state,
)


class INNAprop(VelocityForm):
    r"""INNAprop (Bolte, Boustany, Pauwels, Purica, arXiv 2410.05871), in velocity form.

    With learning rate :math:`\gamma`, weight decay :math:`\lambda` and :math:`w_0 = v_0 = 0`, a step is

    .. math::
        v &\leftarrow \sigma v + (1 - \sigma) g^2, \qquad
        d = g \,/\, \bigl(\sqrt{v / (1 - \sigma^t)} + \epsilon\bigr) \\
        w &\leftarrow w - \tfrac{1 - \alpha\beta}{\beta} \gamma\lambda\,\theta
            \quad\text{(only with decay="published")}, \qquad
        \theta \leftarrow (1 - \gamma\lambda)\,\theta \\
        \theta &\leftarrow \theta + \gamma w - \gamma\beta\, d, \qquad
        w \leftarrow (1 - \alpha\gamma)\, w - \gamma (1 - \alpha\beta)\, d

    which is an explicit Euler step of :math:`\theta' = w - \beta d,\ w' = -\alpha w - (1 - \alpha\beta) d`.
    The paper's auxiliary variable is :math:`\psi = (1 - \alpha\beta)\theta - \beta w`, and in these variables
    the iterates are those of the published algorithm. The velocity :math:`w` holds no copy of the weights and
    nothing is divided by :math:`\beta - \gamma`, so that

    * any learning rate is valid, :math:`\gamma \ge \beta` included, and under any schedule;
    * weights that somebody else writes (a moving average swapped in, pruning, loading) stay where they are;
    * `alpha` and `beta` can be scheduled, in the parameter groups, without moving the weights.

    The state is `exp_avg_sq` (:math:`v`), `velocity` (:math:`w`) and a step count, as large as AdamW's. When
    `alpha * beta == 1` the velocity stays zero and is not stored; with `alpha = beta = 1` the update is that
    of AdamW with `betas=(0, sigma)`.

    **Weight decay.** The published algorithm decays :math:`\theta` but not :math:`\psi`; its decay therefore
    also pushes the velocity and acts like a term of the loss: the weights shrink at the rate
    :math:`\lambda / (\alpha\beta)` or oscillate around zero. `decay="published"` does exactly that;
    `decay="decoupled"` leaves the velocity alone.

    **Half precision.** For float16, bfloat16 (and complex32) parameters the state is float32 (complex64) and
    includes `master`, the weights in that precision: steps too small for the parameter add up. The parameter
    stays the truth: where it differs from its rounded master (because it was overwritten) the master restarts
    from it. Saving and loading keep the precision of the state.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\gamma \ge 0`, a number or a one-element tensor.
        alpha: Friction, >= 0. The steps' long-run size is `lr / alpha`; a number or a one-element tensor.
        beta: Newton damping, > 0. The steps' immediate size is `lr * beta`; a number or a one-element tensor.
        sigma: Decay of the running mean of squared gradients, in [0, 1).
        eps: Added to the denominator, >= 0 (at 0, a weight whose gradient was always zero becomes NaN).
        weight_decay: :math:`\lambda \ge 0`, a number or a one-element tensor.
        decay: How the weight decay acts: `"published"` or `"decoupled"`.
        maximize: Go up the objective instead of down.
        foreach: Update all tensors of a device together (faster on accelerators) or one by one; None means
            together where torch's own optimizers do so. On a CPU both give the same bits.
        fused: Pass over the memory fewer times: on a CUDA device one kernel takes the whole step of float32 weights
            (a captured step and tensor hyperparameters aside); elsewhere torch's fused AdamW kernel does the part of
            the step that AdamW shares. Last bits differ from the other paths'; `torch.compile` ignores it. None:
            where all of a group's parameters are on a CUDA device and `foreach` is None.
        capturable: Read nothing back from the device, so that a CUDA graph can capture the step. Numbers are
            then baked into the graph, tensors stay live. A tensor `alpha` or `beta` always keeps a velocity.
            Without `capturable`, tensor hyperparameters are read back at every step.
        differentiable: Not supported; True is refused.

    Raises:
        ValueError: A hyperparameter is outside its range; the message says which range.

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = INNAprop(layer.parameters(), lr=1e-3, alpha=0.1, beta=0.9)
        >>> layer(torch.ones(4, 2)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[layer.weight])
        ['exp_avg_sq', 'step', 'velocity']
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        alpha: float | Tensor = 0.1,
        beta: float | Tensor = 0.9,
        sigma: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.01,
        *,
        decay: Decay = "published",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "sigma": sigma,
            "eps": eps,
            "weight_decay": weight_decay,
            "decay": decay,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def _init_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        if "step" not in state:
            # On the CPU, where Python reads it for nothing, unless a kernel or a captured graph reads it.
            device = param.device if group["capturable"] or group["fused"] else "cpu"
            state["step"] = torch.zeros((), dtype=scalar_dtype(group["fused"]), device=device)
            state["exp_avg_sq"] = zeros_state(param)

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        velocities: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        device = weights[0].device
        lr, alpha, beta, weight_decay = (
            hyperparameter(group, name, device) for name in ("lr", "alpha", "beta", "weight_decay")
        )
        sigma, sign = group["sigma"], -1.0 if group["maximize"] else 1.0
        published = group["decay"] == "published"

        fused = group["fused"] and not torch.compiler.is_compiling()
        numbers = not any(isinstance(number, Tensor) for number in (lr, alpha, beta, weight_decay))
        if fused and numbers and (kernel := _kernel()) is not None and kernel.fits(weights, steps):
            push = -lr * weight_decay * (1 - alpha * beta) / beta if published else 0.0
            to_weights, to_velocity = -sign * lr * beta, -sign * lr * (1 - alpha * beta)
            coefficients = kernel.Coefficients(
                sigma, group["eps"], 1 - lr * weight_decay, push, lr, to_weights, 1 - alpha * lr, to_velocity
            )
            kernel.step(weights, grads, velocities, exp_avg_sqs, steps, coefficients)
            return

        if isinstance(weight_decay, Tensor) or weight_decay != 0:
            if velocities and published:
                add_(velocities, weights, -lr * weight_decay * (1 - alpha * beta) / beta)
            torch._foreach_mul_(weights, 1 - lr * weight_decay)

        if fused:
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
            if not velocities:
                _adamw_(weights, grads, exp_avg_sqs, steps, group, lr * beta)
                return
            # One AdamW step of size beta on a copy of the velocity w gives the weights' speed w - beta d, and
            # (1 - alpha lr) w - lr (1 - alpha beta) d is a combination of w and that speed.
            speeds = list(torch._foreach_mul(velocities, 1.0))
            _adamw_(speeds, grads, exp_avg_sqs, steps, group, beta)
            add_(weights, speeds, lr)
            torch._foreach_mul_(velocities, 1 - lr / beta)
            add_(velocities, speeds, lr * (1 - alpha * beta) / beta)
            return

        torch._foreach_mul_(exp_avg_sqs, sigma)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - sigma)
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_div_(denominators, _corrections(sigma, steps, on_device(group)))
        torch._foreach_add_(denominators, group["eps"])

        if velocities:
            add_(weights, velocities, lr)
        addcdiv_(weights, grads, denominators, -sign * lr * beta)
        if velocities:
            torch._foreach_mul_(velocities, 1 - alpha * lr)
            addcdiv_(velocities, grads, denominators, -sign * lr * (1 - alpha * beta))


@cache
def _kernel() -> ModuleType | None:
    """Return the module whose kernel takes a whole step; None without Triton."""
    return import_module("nslightning.optim._fused") if find_spec("triton") else None


def _adamw_(
    targets: list[Tensor],
    grads: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
    lr: Scalar,
) -> None:
    """Take one AdamW step with betas (0, sigma) and no decay in torch's fused kernel.

    With a first beta of 0 the kernel stores the gradient as its momentum: the gradients serve as that buffer
    and keep their values.
    """
    torch._fused_adamw_(
        targets,
        grads,
        grads,
        exp_avg_sqs,
        [],
        steps,
        lr=lr,
        beta1=0.0,
        beta2=group["sigma"],
        weight_decay=0.0,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


def _corrections(sigma: float, steps: list[Tensor], as_tensors: bool) -> Any:
    """Give sqrt(1 - sigma^t) for each step count, as floats or as tensors on the steps' device."""
    if not as_tensors:
        return [(1 - sigma ** number_of_tensor(step)) ** 0.5 for step in steps]
    # In float32, 1 - sigma^t loses half of its digits for small t; expm1 does not.
    corrections = torch._foreach_mul(steps, math.log(sigma) if sigma else -math.inf)
    torch._foreach_expm1_(corrections)
    torch._foreach_neg_(corrections)
    torch._foreach_sqrt_(corrections)
    return corrections
