"""The common base of INNA and INNAprop: parameter groups, state, master weights, and the walk over the tensors."""

import math
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from nslightning._torch import default_to_fused_or_foreach, number_of_tensor, scalar_of, use_grad_for_differentiable
from nslightning.spelling import did_you_mean

Decay: TypeAlias = Literal["published", "decoupled"]
Scalar: TypeAlias = float | Tensor
Tensors: TypeAlias = list[Tensor] | tuple[Tensor, ...]

# Elements of one block on a CPU, per thread. The tensors of an update then take 2 to 3 MiB, a core's share of
# the caches of current processors; smaller blocks spend the gain on calls.
BLOCK_PER_THREAD = 131_072

# The state that keeps its own precision, whatever the parameter's.
FULL_PRECISION = ("master", "velocity", "exp_avg_sq")


class VelocityForm(Optimizer):
    """Base of the optimizers that keep INNA's auxiliary variable as a velocity.

    A subclass gives `_update`, which moves lists of real tensors of one precision in place.

    Args:
        params: As for every torch optimizer.
        defaults: The hyperparameters. `lr`, `alpha`, `beta` and `weight_decay` may be one-element tensors.

    Raises:
        ValueError: A hyperparameter is outside its range, or `differentiable` is asked for.
    """

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        if defaults["differentiable"]:
            raise ValueError(
                f"{type(self).__name__} does not support differentiable=True: it works in place. "
                "Leave differentiable=False; to differentiate through a step, use torch.optim.AdamW."
            )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its hyperparameters.

        Args:
            param_group: `params` and the hyperparameters that differ from the optimizer's.

        Raises:
            ValueError: A hyperparameter is outside its range.
        """
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "fused" in group and group["fused"] is None:
            group["fused"] = group["foreach"] is None and all(p.is_cuda for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as `torch.optim.Optimizer` does, but keep float32 state of half-precision parameters.

        Args:
            state_dict: A dict that `state_dict()` returned.

        Raises:
            ValueError: The state is another optimizer's, or its groups do not match.
        """
        loaded: dict[str, Any] = {}

        def look(_: Optimizer, state: dict[str, Any]) -> None:
            for group in state["param_groups"]:
                if missing := {"alpha", "beta"} - group.keys():
                    raise ValueError(
                        f"this state dict is not one of {type(self).__name__}: its parameter groups have no "
                        f"{' and no '.join(sorted(missing))}. Load it into the optimizer that wrote it."
                    )
            loaded.update(state)

        # The last pre-hook sees what is loaded, after the user's own hooks had their turn.
        hook = self.register_load_state_dict_pre_hook(look)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        names = chain.from_iterable(group["params"] for group in loaded["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for name, param in zip(names, params, strict=True):
            precise = _state_dtype(param)
            if precise == param.dtype:
                if param in self.state:
                    self.state[param].pop("master", None)  # it was saved for a half-precision parameter
                continue
            for key, value in loaded["state"].get(name, {}).items():
                if key in FULL_PRECISION:
                    self.state[param][key] = value.to(device=param.device, dtype=precise)

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: A gradient is sparse, or a CUDA graph is being captured without `capturable=True`.
        """
        if not torch.compiler.is_compiling():
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            weights: list[Tensor] = []
            velocities: list[Tensor] = []
            exp_avg_sqs: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, params, grads, weights, velocities, exp_avg_sqs, steps)
            if not params:
                continue
            _read_weights(params, weights)
            columns = [
                [_real(t) for t in weights],
                [_real(g.to(w.dtype)) for g, w in zip(grads, weights, strict=True)],
                [_real(t) for t in velocities],
                [_real(t) for t in exp_avg_sqs],
                steps,
            ]
            if steps:
                # On the CPU, one wrapped number for all of them: torch's loop would wrap it each time.
                torch._foreach_add_(steps, torch.ones(()) if steps[0].is_cpu and not on_device(group) else 1)
            for block in _blocks(columns, group.get("fused") or group["foreach"]):
                self._update(group, *block)
            _write_weights(params, weights)
        return loss

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        weights: list[Tensor],
        velocities: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Create missing state and fill the lists; `torch.compile` runs a method of this name untraced."""
        has_velocity = _has_velocity(group, self.state)
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} does not support sparse gradients. Give the layer dense ones "
                    "(sparse=False in torch.nn.Embedding), or its parameters to torch.optim.SparseAdam."
                )
            state = self.state[param]
            self._init_state(state, param, group)
            precise = _state_dtype(param)
            if precise != param.dtype and "master" not in state:
                state["master"] = param.detach().to(precise)
            if has_velocity and "velocity" not in state:
                state["velocity"] = zeros_state(param)
            params.append(param)
            grads.append(param.grad)
            weights.append(state.get("master", param))
            if has_velocity:
                velocities.append(state["velocity"])
            if "step" in state:
                exp_avg_sqs.append(state["exp_avg_sq"])
                steps.append(state["step"])

    def _init_state(self, state: dict[str, Any], param: Tensor, group: dict[str, Any]) -> None:
        """Create the state that a subclass needs beside the velocity."""

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        grads: list[Tensor],
        velocities: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Move real tensors of one device and precision in place; lists that are not used are empty."""
        raise NotImplementedError


def zeros_state(param: Tensor) -> Tensor:
    """Create the zero state of a parameter.

    Args:
        param: A parameter.

    Returns:
        Zeros of its shape and strides, in float32 (complex64) at least.
    """
    return torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format)


def hyperparameter(group: dict[str, Any], name: str, device: torch.device) -> Scalar:
    """Read a hyperparameter: a number, or a 0-d tensor where nothing may be read back from the device.

    Args:
        group: A parameter group.
        name: The hyperparameter's name.
        device: The device for a tensor.

    Returns:
        A float in eager mode; with `capturable` or under `torch.compile`, tensors stay tensors.
    """
    value = group[name]
    if not isinstance(value, Tensor):
        return float(value) if isinstance(value, int) else value
    return scalar_of(value).to(device) if on_device(group) else float(number_of_tensor(value))


def on_device(group: dict[str, Any]) -> bool:
    """Say whether the update must not read a tensor back to Python.

    Args:
        group: A parameter group.

    Returns:
        True with `capturable` and under `torch.compile`.
    """
    return bool(group["capturable"]) or torch.compiler.is_compiling()


def add_(targets: list[Tensor], others: Tensors, scale: Scalar) -> None:
    """Do `targets += scale * others`.

    Args:
        targets: Tensors, changed in place.
        others: The tensors to add, one for each target.
        scale: A number, or a 0-d tensor (which torch's own `alpha` would read back to Python).
    """
    if isinstance(scale, Tensor):
        torch._foreach_add_(targets, torch._foreach_mul(others, scale))
    else:
        torch._foreach_add_(targets, others, alpha=scale)


def addcdiv_(targets: list[Tensor], numerators: Tensors, denominators: Tensors, scale: Scalar) -> None:
    """Do `targets += scale * numerators / denominators`.

    Args:
        targets: Tensors, changed in place.
        numerators: One tensor for each target.
        denominators: One tensor for each target.
        scale: A number or a 0-d tensor.
    """
    if isinstance(scale, Tensor):
        torch._foreach_addcdiv_(targets, torch._foreach_mul(numerators, scale), denominators)
    else:
        torch._foreach_addcdiv_(targets, numerators, denominators, value=scale)


def _check(group: dict[str, Any]) -> None:
    """Refuse a hyperparameter outside its range."""
    ranges = {
        "lr": (lambda x: 0 <= x < math.inf, "lr >= 0"),
        "alpha": (lambda x: 0 <= x < math.inf, "alpha >= 0 (the friction)"),
        "beta": (lambda x: 0 < x < math.inf, "beta > 0 (the Newton damping)"),
        "weight_decay": (lambda x: 0 <= x < math.inf, "weight_decay >= 0"),
        "sigma": (lambda x: 0 <= x < 1, "0 <= sigma < 1 (the decay of the squared gradients)"),
        "eps": (lambda x: 0 <= x < math.inf, "eps >= 0"),
    }
    for name, (allowed, text) in ranges.items():
        if name not in group:
            continue
        value = group[name]
        if isinstance(value, Tensor):
            if name in ("sigma", "eps"):
                raise ValueError(f"{name} must be a number, not a tensor; lr, alpha, beta and weight_decay may be.")
            if value.numel() != 1:
                raise ValueError(f"{name} is a tensor of {value.numel()} elements; a tensor {name} must have one.")
        if not allowed(float(value)):
            raise ValueError(f"{name}={float(value)!r} is outside its range: {text}.")
    if group.get("fused") and group["foreach"]:
        raise ValueError("fused=True and foreach=True exclude each other; give one of them.")
    if group["decay"] not in get_args(Decay):
        hint = did_you_mean(group["decay"], get_args(Decay))
        raise ValueError(f"decay={group['decay']!r} is not one of {', '.join(map(repr, get_args(Decay)))}{hint}")


def _check_capture(optimizer: Optimizer) -> None:
    if all(group["capturable"] for group in optimizer.param_groups) or not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured, but this {type(optimizer).__name__} would bake its step count "
            "into it. Create the optimizer with capturable=True."
        )


def _has_velocity(group: dict[str, Any], state: dict[Tensor, Any]) -> bool:
    """Say whether the velocity of this group can be anything but zero.

    It stays zero as long as alpha * beta == 1. A tensor is not read (that would wait for the device), and a
    velocity built under other values goes on acting.
    """
    alpha, beta = group["alpha"], group["beta"]
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor) or alpha * beta != 1:
        return True
    return any("velocity" in state[param] for param in group["params"] if param in state)


def _state_dtype(param: Tensor) -> torch.dtype:
    """Give the precision of the state: the parameter's, and float32 (complex64) for half precision."""
    return torch.promote_types(param.dtype, torch.float32)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _read_weights(params: list[Tensor], weights: list[Tensor]) -> None:
    """Let a master weight follow its parameter where somebody else has written to it since the last step."""
    for param, weight in zip(params, weights, strict=True):
        if weight.dtype != param.dtype:
            param, weight = _real(param), _real(weight)
            weight.copy_(torch.where(weight.to(param.dtype) == param, weight, param.to(weight.dtype)))


def _write_weights(params: list[Tensor], weights: list[Tensor]) -> None:
    """Round the master weights into the parameters."""
    for param, weight in zip(params, weights, strict=True):
        if weight.dtype != param.dtype:
            param.copy_(weight)


def _blocks(columns: list[list[Tensor]], foreach: bool | None) -> Iterator[list[list[Tensor]]]:
    """Cut the columns (weights, gradients, state) into the lists that one update works on.

    On an accelerator these are all tensors of a device and precision (`foreach`), or one tensor. On a CPU an
    operation over all of them would stream the whole model through memory, so there the update walks over
    blocks that stay in cache; elementwise arithmetic does not depend on where a tensor is cut.

    Args:
        columns: Lists with one tensor per parameter, the step counters last. Unused lists are empty.
        foreach: The user's choice; None means torch's default.

    Yields:
        The columns of one block.
    """
    weights = columns[0]
    if foreach is None:
        _, foreach = default_to_fused_or_foreach(weights, differentiable=False, use_fused=False)
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in weights)
    if plain and not torch.compiler.is_compiling():
        yield from _cache_blocks(columns, BLOCK_PER_THREAD * torch.get_num_threads(), together=foreach)
    elif foreach:
        for grouped, _ in Optimizer._group_tensors_by_device_and_dtype(columns).values():  # type: ignore[arg-type] # as below
            yield grouped  # type: ignore[misc] # torch types the elements as optional
    else:
        for i in range(len(weights)):
            yield [column[i : i + 1] for column in columns]


def _cache_blocks(columns: list[list[Tensor]], size: int, together: bool) -> Iterator[list[list[Tensor]]]:
    """Cut large tensors along their first dimension; put small ones together up to `size` elements."""
    used = [i for i, column in enumerate(columns) if column]
    block: list[list[Tensor]] = [[] for _ in columns]
    filled = 0
    for row in zip(*(columns[i] for i in used), strict=True):
        weight = row[0]
        pieces: Iterator[tuple[Tensor, ...]] = iter([row])
        if weight.numel() > size:
            length = max(1, size * weight.shape[0] // weight.numel())
            pieces = zip(*(t.split(length) if t.dim() else repeat(t) for t in row), strict=False)
        for piece in pieces:
            if filled and (not together or filled + piece[0].numel() > size):
                yield block
                block, filled = [[] for _ in columns], 0
            for i, tensor in zip(used, piece, strict=True):
                block[i].append(tensor)
            filled += piece[0].numel()
    if block[0]:
        yield block
