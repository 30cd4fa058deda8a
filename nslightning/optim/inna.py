"""INNA: the inertial Newton algorithm."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from nslightning.optim._velocity import Decay, VelocityForm, add_, hyperparameter


class INNA(VelocityForm):
    r"""INNA (Castera, Bolte, Févotte, Pauwels, JMLR 22(134), 2021, arXiv 1905.12278), in velocity form.

    With learning rate :math:`\gamma`, weight decay :math:`\lambda` and :math:`w_0 = 0`, a step is

    .. math::
        \theta &\leftarrow \theta + \gamma w - \gamma\beta\, g - \gamma\lambda\,\theta \\
        w &\leftarrow (1 - \alpha\gamma)\, w - \gamma (1 - \alpha\beta)\, g
            - \tfrac{1 - \alpha\beta}{\beta} \gamma\lambda\,\theta
            \quad\text{(last term only with decay="published")}

    where both right-hand sides take the old :math:`\theta` and :math:`w`. It is the explicit Euler step of
    the inertial system :math:`\theta'' + \alpha\theta' + \beta\nabla^2 J\,\theta' + \nabla J = 0`, written
    without the Hessian. The paper's auxiliary variable is :math:`\psi = (1 - \alpha\beta)\theta - \beta w`,
    and in these variables the iterates are those of the published algorithm started at
    :math:`\psi_0 = (1 - \alpha\beta)\theta_0`. Learning rates, schedules, weight decay
    and half-precision parameters are as for :class:`~nslightning.optim.INNAprop`; the published decay is added
    to the step here and applied before it there.

    The state is `velocity`, as large as that of SGD with momentum; it is not stored when `alpha * beta == 1`,
    where INNA is gradient descent with step `lr * beta`. For the paper's
    `lr / sqrt(k + 1)` use `torch.optim.lr_scheduler.LambdaLR`.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\gamma \ge 0`, a number or a one-element tensor.
        alpha: Friction, >= 0, a number or a one-element tensor.
        beta: Newton damping, > 0, a number or a one-element tensor.
        weight_decay: :math:`\lambda \ge 0`, a number or a one-element tensor.
        decay: How the weight decay acts: `"published"` or `"decoupled"`.
        maximize: Go up the objective instead of down.
        foreach: Update all tensors of a device together (faster on accelerators) or one by one; None means
            together where torch's own optimizers do so. On a CPU both give the same bits.
        capturable: Read nothing back from the device, so that a CUDA graph can capture the step. Numbers are
            then baked into the graph, tensors stay live. A tensor `alpha` or `beta` always keeps a velocity.
            Without `capturable`, tensor hyperparameters are read back at every step.
        differentiable: Not supported; True is refused.

    Raises:
        ValueError: A hyperparameter is outside its range; the message says which range.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = INNA([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()  # the first step is lr * beta * gradient = 0.1 * 0.1 * 2
        >>> weight.detach()
        tensor([0.9800, 0.9800, 0.9800])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        alpha: float | Tensor = 0.5,
        beta: float | Tensor = 0.1,
        weight_decay: float | Tensor = 0.0,
        *,
        decay: Decay = "published",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "beta": beta,
            "weight_decay": weight_decay,
            "decay": decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

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
        sign = -1.0 if group["maximize"] else 1.0
        decays = isinstance(weight_decay, Tensor) or weight_decay != 0
        lost = torch._foreach_mul(weights, lr * weight_decay) if decays else ()

        if velocities:
            add_(weights, velocities, lr)
        add_(weights, grads, -sign * lr * beta)
        if velocities:
            torch._foreach_mul_(velocities, 1 - alpha * lr)
            add_(velocities, grads, -sign * lr * (1 - alpha * beta))
        if decays:
            torch._foreach_sub_(weights, lost)
            if velocities and group["decay"] == "published":
                add_(velocities, lost, -(1 - alpha * beta) / beta)
