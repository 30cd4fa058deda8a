"""The mechanism of max pooling with a chosen way to share the gradient over the tied entries of a window."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from nslightning._torch import in_forward_mode, in_functorch, is_legacy_batch
from nslightning.ops.autograd import fused, native, pool_operators
from nslightning.ops.autograd.nodes import NonsmoothFunction, OwnFunction
from nslightning.ops.autograd.selection import Selection, concrete, data_dependent, fixed, refuse_random, replayed
from nslightning.ops.autograd.windows import Adaptive, Regular, Windows

__all__ = ["adaptive", "pool", "regular", "tied_windows"]

aten = torch.ops.aten
Geometry = Regular | Adaptive
_NATIVE = (0.0, 1.0, 0.0, 0.0)  # the weights of the reference choice
# (share, whole, each): each of a window's k tied entries receives g * (share / k + each), and one g * whole more.
_Weights = tuple[float | Tensor, float | Tensor, float | Tensor]
_PART = 2**18  # elements of the input that are worked on at a time on a CPU, so that temporaries stay in the cache


class _MaxPool(NonsmoothFunction):
    """Stock forward; untied windows go through the stock backward, tied ones are shared as the selection says."""

    @staticmethod
    def forward(x: Tensor, geometry: Geometry, selection: Selection) -> tuple[Tensor, Tensor]:
        return geometry.forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.geometry, ctx.selection = inputs
        ctx.operation = "max_pool"
        # As stock, not the output, which the next layer may overwrite: it is read from the input where it is needed.
        ctx.save_for_backward(x, output[1])
        if _forward_mode():
            ctx.save_for_forward(x, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if g is None:
            return None, None, None
        x, indices = ctx.saved_tensors
        selection = ctx.selection
        vjp = partial(_vjp, x, indices, g, ctx.geometry)
        if not torch.compiler.is_compiling() and selection.recorder is not None:
            selection.recorder(ctx, vjp)
        return vjp(selection), None, None


class _TransformableMaxPool(_MaxPool):
    """Adds forward-mode differentiation and ``torch.func``; the compiler takes no function with a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, v: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if v is None:
            return None, None
        x, indices = ctx.saved_tensors
        target, weights = _chosen(x, indices, ctx.geometry, ctx.selection)
        return _Take.apply(v, x, target, ctx.geometry, weights), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _folded(_TransformableMaxPool, info.batch_size, in_dims, args)


class _Target(OwnFunction):
    """The index of the tied entry that the last or the random choice takes; PyTorch's where there is no tie."""

    @staticmethod
    def forward(x: Tensor, indices: Tensor, geometry: Geometry, selection: Selection | None) -> Tensor:
        return _in_parts(partial(_target, geometry, selection), geometry, indices, (x, indices))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * 4

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _folded(_Target, info.batch_size, in_dims, args)


class _Linear(OwnFunction):
    """A linear map of the first argument, under a choice that the others name; ``_Give`` and ``_Take`` transpose."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, target, *ctx.rest = inputs
        ctx.save_for_backward(x, target)
        if _forward_mode():
            ctx.save_for_forward(x, target)


class _Give(_Linear):
    """The transposed Jacobian: from the output's gradient to the input's."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, target: Tensor, geometry: Geometry, weights: _Weights) -> Tensor:
        if _is_vertex(weights):
            return geometry.backward(g, x, target)
        return _in_parts(partial(_give, geometry, weights), geometry, x, (g, x, target))

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        return (_Take.apply(u, *ctx.saved_tensors, *ctx.rest), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, v: Tensor, *_: Any) -> Tensor:
        return cast(Tensor, _Give.apply(v, *ctx.saved_tensors, *ctx.rest))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _folded(_Give, info.batch_size, in_dims, args)


class _Take(_Linear):
    """The Jacobian: from the input's tangent to the output's."""

    @staticmethod
    def forward(v: Tensor, x: Tensor, target: Tensor, geometry: Geometry, weights: _Weights) -> Tensor:
        return _in_parts(partial(_take, geometry, weights), geometry, target, (v, x, target), dtype=v.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return (_Give.apply(g, *ctx.saved_tensors, *ctx.rest), None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, v: Tensor, *_: Any) -> Tensor:
        return cast(Tensor, _Take.apply(v, *ctx.saved_tensors, *ctx.rest))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _folded(_Take, info.batch_size, in_dims, args)


def _forward_mode() -> bool:
    """Return whether the code runs in forward mode, where inputs may have tangents."""
    return not torch.compiler.is_compiling() and in_forward_mode()


def _differentiable(x: Tensor) -> bool:
    """Return whether a derivative may be wanted; a tensor inside a ``torch.func`` transform does not always show it."""
    if _forward_mode() or (not torch.compiler.is_compiling() and in_functorch()):
        return True
    return torch.is_grad_enabled() and x.requires_grad


def _folded(function: Any, size: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> Any:
    """Apply a function to a batch of calls, which is one call with a larger batch."""
    dims = next(a.dims for a in args if isinstance(a, Geometry))
    batch: int | None = None
    batched = []
    for a, at in zip(args, in_dims, strict=True):
        if isinstance(a, Tensor):
            a = a.expand(size, *a.shape) if at is None else a.movedim(at, 0)
            if a.dim() > dims + 2:
                batch = a.shape[1]
                a = a.flatten(0, 1)
        batched.append(a)
    result = function.apply(*batched)
    if batch is None:
        return result, (0, 0) if isinstance(result, tuple) else 0
    if isinstance(result, tuple):
        return tuple(r.unflatten(0, (size, batch)) for r in result), (0, 0)
    return result.unflatten(0, (size, batch)), 0


def _vjp(x: Tensor, indices: Tensor, g: Tensor, geometry: Geometry, selection: Selection) -> Tensor:
    """The gradient with respect to the input under a selection."""
    if pool_operators.wanted() and g.device.type == "cpu":
        numbers = pool_operators.numbers_of(geometry) if isinstance(geometry, Regular) else list(geometry.output)
        return cast(Tensor, _pool_composed(g, x, indices, selection.on(g.device)[".pool"], geometry.dims, numbers))
    if replayed(g):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        share, whole, each, last = selection.read(".pool", g).to(wide).unbind()
        target = torch.where(last > 0, _Target.forward(x, indices, geometry, None), indices)
        give = _Give.forward if torch.compiler.is_compiling() else _Give.apply
        return cast(Tensor, give(g, x, target, geometry, (share, whole, each)))
    target, weights = _chosen(x, indices, geometry, selection)
    gradient = cast(Tensor, _Give.apply(g, x, target, geometry, weights))
    # As stock's, in the input's memory format: the parts have that of the incoming gradient.
    return gradient.contiguous(memory_format=_layout(x, geometry.dims)) if concrete(g) else gradient


def _run_composed(g: Tensor, x: Tensor, indices: Tensor, weights: Tensor, dims: int, numbers: Sequence[int]) -> Tensor:
    """The composed gradient in eager mode, inside a compiled graph."""
    pool_operators.refuse_second_derivative(g)
    refuse_random(weights)
    share, whole, each, last = weights.tolist()
    geometry: Geometry
    if len(numbers) == dims:
        geometry = Adaptive(tuple(numbers))
    else:
        kernel, stride, padding, dilation = (tuple(numbers[i : i + dims]) for i in range(0, 4 * dims, dims))
        geometry = Regular(kernel, stride, padding, dilation, bool(numbers[-1]))
    target = _Target.forward(x, indices, geometry, None) if last else indices
    gradient = _Give.forward(g, x, target, geometry, (share, whole, each))
    return gradient.contiguous(memory_format=_layout(x, dims))


def _fake_composed(g: Tensor, x: Tensor, indices: Tensor, weights: Tensor, dims: int, numbers: Sequence[int]) -> Tensor:
    return torch.empty(x.shape, dtype=g.dtype, device=g.device, memory_format=_layout(x, dims))


_pool_composed = pool_operators.operator(
    "pool_composed(Tensor g, Tensor x, Tensor indices, Tensor weights, int dims, int[] windows) -> Tensor",
    _run_composed,
    _fake_composed,
    devices=("CPU",),
)


def _layout(x: Tensor, dims: int) -> torch.memory_format:
    """The memory format of images with ``dims`` spatial dimensions: channels last, or else contiguous."""
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    images = x.dim() == dims + 2 and not x.is_contiguous() and x.is_contiguous(memory_format=last)
    return last if images else torch.contiguous_format


def _composed(geometry: Geometry, x: Tensor, g: Tensor, selection: Selection) -> Tensor:
    """The gradient, where the forward kept no indices."""
    return _vjp(x, geometry.forward(x.detach())[1], g, geometry, selection)


def _windows_of(sizes: tuple[int, ...]) -> Regular:
    """The windows as a C++ node has them."""
    kernel, stride, padding, dilation = (sizes[i : i + 2] for i in range(0, 8, 2))
    return Regular(kernel, stride, padding, dilation, bool(sizes[8]))


def _native_gradient(sizes: tuple[int, ...], saved: tuple[Tensor, Tensor], g: Tensor, selection: Selection) -> Tensor:
    """The gradient from the tensors of a C++ node: the input, and which entries reach each window's maximum."""
    geometry = _windows_of(sizes)
    return fused.pool_gradient(*saved, g, selection, geometry, partial(_composed, geometry))


def _native_difference(
    sizes: tuple[int, ...], saved: tuple[Tensor, Tensor], g: Tensor, selection: Selection, less: Selection
) -> Tensor:
    geometry = _windows_of(sizes)
    return fused.pool_difference((*saved, g), geometry, partial(_composed, geometry), selection, less)


native.composition("max_pool", _native_gradient, _native_difference)


def _chosen(x: Tensor, indices: Tensor, geometry: Geometry, selection: Selection) -> tuple[Tensor, _Weights]:
    """The entry of each window that receives ``whole``, and the weights."""
    share, whole, each, last = selection.pool_weights()
    if last or selection.jacobians.max_pool == "random":
        indices = _Target.apply(x, indices, geometry, selection)
    return indices, (share, whole, each)


def _is_vertex(weights: _Weights) -> bool:
    """Return whether each window's gradient goes to one entry."""
    return not any(isinstance(weight, Tensor) for weight in weights) and weights == (0.0, 1.0, 0.0)


def _in_parts(
    part: Callable[..., Tensor],
    geometry: Geometry,
    like: Tensor,
    tensors: tuple[Tensor, ...],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute a result shaped as ``like`` in the layout (B, *spatial, I), in parts along B.

    I is the channels where these come last in memory, so that inner loops run over them; else it is 1, and B counts
    all channels of all images.
    """
    if not torch.compiler.is_compiling() and any(map(is_legacy_batch, tensors)):
        raise RuntimeError(
            "max pooling with a chosen Jacobian does not take the batches of is_grads_batched=True or vectorize=True, "
            "which PyTorch makes without its vmap rule. Use torch.func: jacrev, jacfwd, or vmap over vjp."
        )
    dims, x = geometry.dims, next(t for t in tensors if t.is_floating_point())
    last = _layout(x, dims) != torch.contiguous_format
    ordered = [(t.movedim(1, -1) if last else t.flatten(0, -dims - 1).unsqueeze(-1)).contiguous() for t in tensors]
    shape = like.movedim(1, -1).shape if last else (*like.flatten(0, -dims - 1).shape, 1)
    rows = max(1, _PART * ordered[0].shape[0] // max(1, max(t.numel() for t in ordered)))
    if torch.compiler.is_compiling() or x.device.type != "cpu" or rows >= ordered[0].shape[0]:
        result = part(*ordered)
    else:
        result = torch.empty(shape, dtype=dtype or like.dtype, device=x.device)
        for into, *some in zip(result.split(rows), *(t.split(rows) for t in ordered), strict=True):
            into.copy_(part(*some))
    return result.movedim(-1, 1) if last else result.squeeze(-1).view(like.shape)


def _stock(t: Tensor) -> Tensor:
    """Move a tensor from the layout (B, *spatial, I) to stock's: (B, I, *spatial)."""
    return t.movedim(-1, 1)


def _windows(geometry: Geometry, x: Tensor, windows: Sequence[int]) -> Windows:
    # In float32 at least: fp16 and bf16 can neither count nor hold beta / k + (1 - beta) for a large beta.
    x = x if x.dtype == torch.float64 else x.float()
    return Windows(x, geometry, windows)


def _target(geometry: Geometry, selection: Selection | None, x: Tensor, indices: Tensor) -> Tensor:
    """Return the index of the last tied entry, or of a random one under that choice; the layout is (B, *spatial, I)."""
    windows = _windows(geometry, x, indices.shape[1:-1])
    count = windows.count
    if data_dependent(x) and (count.numel() == 0 or count.amax() <= 1):
        return indices
    if selection is not None and selection.jacobians.max_pool == "random":
        generator = selection.generator(x.device)
        draw = torch.rand(count.shape, dtype=count.dtype, device=x.device, generator=generator)
        chosen = windows.nth((draw * count).floor())
    else:
        chosen = windows.last()
    if data_dependent(x) and count.amin() > 0:
        return chosen
    return torch.where(count > 0, chosen, indices)


def _give(geometry: Geometry, weights: _Weights, g: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Return the input's gradient, in the layout (B, *spatial, I)."""
    look = data_dependent(x)
    windows = _windows(geometry, x, g.shape[1:-1])
    count = windows.count

    def stock(g: Tensor) -> Tensor:
        return geometry.backward(_stock(g), _stock(x), _stock(target)).movedim(1, -1)

    if look and (count.numel() == 0 or count.amax() <= 1):
        return stock(g)
    share, whole, each = weights
    wide = g.to(count.dtype)
    rest = torch.div(share, count) + each
    disjoint = geometry.disjoint(x.shape[1:-1])
    if look and whole == 0 and (disjoint or (len(windows.stages) == 1 and g.dtype == wide.dtype)) and count.amin() > 0:
        return windows.give(wide * rest).to(g.dtype)  # untied windows too: their coefficient is 1, their order stock's
    tied = partial(aten.threshold_backward.default, self=count, threshold=1.5)
    alone = aten.threshold_backward.default(wide, -count, -1.5)  # the gradients of the untied windows
    if disjoint:  # each entry is written once, its coefficient formed before the product
        gradient = windows.give(tied(wide * rest) + alone).to(g.dtype)
        value = (tied(wide * (rest + whole)) + alone).to(g.dtype)
        return gradient.flatten(1, -2).scatter_(1, target.flatten(1, -2), value.flatten(1, -2)).view(x.shape)
    # An entry that no tied window reaches keeps the stock gradient, bit for bit.
    own = alone if look and whole == 0 else tied(wide * whole) + alone
    return (stock(own.to(g.dtype)).to(wide.dtype) + windows.give(tied(wide * rest))).to(g.dtype)


def _take(geometry: Geometry, weights: _Weights, v: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """Return the output's tangent, in the layout (B, *spatial, I)."""
    at_target = v.flatten(1, -2).gather(1, target.flatten(1, -2)).view(target.shape)
    if _is_vertex(weights):
        return at_target
    windows = _windows(geometry, x, target.shape[1:-1])
    share, whole, each = weights
    rest = torch.div(share, windows.count) + each
    wide = v.to(windows.count.dtype)
    shared = windows.take(wide) * rest + at_target.to(wide.dtype) * whole
    return torch.where(windows.count > 1, shared.to(v.dtype), at_target)


def pool(x: Tensor, selection: Selection, geometry: Geometry, return_indices: bool = False) -> Any:
    """Max-pool with the choice that ``selection`` names at backward time.

    Args:
        x: Input of shape (N, C, *spatial) or (C, *spatial), floating dtype.
        selection: The choice, read when the backward runs; the published rule is read here too.
        geometry: The windows, of one dimension, two or three.
        return_indices: Also return the flat index of the entry that PyTorch picks.

    Returns:
        The stock result, bit for bit under the exact rule, shape (N, C, *windows) or (C, *windows); with
        ``return_indices`` a tuple of it and of the indices.

    Raises:
        ValueError: If a window has no entries; if the choice has no published rule.
    """
    selection.meet(x)
    if isinstance(geometry, Regular) and geometry.dims == 2 and not return_indices:
        sizes = geometry.kernel, geometry.stride, geometry.padding, geometry.dilation
        if (result := native.max_pool2d(x, selection, *sizes, geometry.ceil_mode)) is not NotImplemented:  # type: ignore[arg-type] # of two dimensions
            return cast(Tensor, result)
    published = selection.jacobians.rule == "published"
    if published and not (isinstance(geometry, Regular) and geometry.dims == 2):
        if selection.pool_weights() != _NATIVE or selection.jacobians.max_pool == "random":
            raise ValueError(
                "the published rule exists for max_pool2d only, the one pooling that the papers' code has; give "
                f'rule="exact", or the reference choice here (given max_pool={selection.jacobians.max_pool!r})'
            )
        published = False
    if isinstance(geometry, Regular) and geometry.dims == 1 and not return_indices:
        (kernel,), (padding,), (dilation,) = geometry.kernel, geometry.padding, geometry.dilation
        too_small = x.shape[-1] + 2 * padding <= dilation * (kernel - 1)
        if too_small or not _differentiable(x):  # max_pool1d has its own kernel and messages
            return torch.max_pool1d(x, kernel, geometry.stride, padding, dilation, geometry.ceil_mode)
    if geometry.dims == 1:  # one row, as stock does it
        result = pool(x.unsqueeze(-2), selection, geometry.of_a_row(), return_indices)
        return tuple(r.squeeze(-2) for r in result) if return_indices else result.squeeze(-2)
    x = _autocast(x, geometry, return_indices)
    if isinstance(geometry, Regular):
        _refuse_empty_windows(x, geometry)
    if (
        isinstance(geometry, Regular)
        and not (return_indices or published)
        and pool_operators.wanted()
        and _differentiable(x)
        and pool_operators.fits(x, geometry)
    ):
        return pool_operators.max_pool2d(x, geometry, selection)
    transformed = not torch.compiler.is_compiling() and in_functorch()
    if (
        isinstance(geometry, Regular)
        and not (return_indices or published or transformed or _forward_mode())
        and (_differentiable(x) or (x.device.type == "cpu" and x.is_contiguous()))  # there stock's forward is slow
        and fused.pool_fits(x, geometry)
    ):
        return fused.max_pool2d(x, geometry, selection, partial(_composed, geometry))
    if not _differentiable(x):
        output, indices = geometry.forward(x)
    else:
        function = _MaxPool if torch.compiler.is_compiling() else _TransformableMaxPool
        output, indices = function.apply(x, geometry, selection)
    if published and isinstance(geometry, Regular):
        beta = selection.jacobians.max_pool or 0.0
        if isinstance(beta, str):
            raise ValueError(f'the published rule of max pooling takes a number beta; given "{beta}"')
        minimal = _published_minimal(x, geometry)
        reference = pool(x, fixed("max_pool", None), geometry)
        output = beta * minimal + (1 - beta) * reference
    return (output, indices) if return_indices else output


class _DividedGradient(torch.autograd.Function):
    """The identity; its gradient is divided by a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        ctx.save_for_backward(by)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (by,) = ctx.saved_tensors
        return g / by, None


def _published_minimal(x: Tensor, geometry: Regular) -> Tensor:
    """Equal shares as the released code forms them: the gradient is divided by the number of tied entries first.

    The exact rule multiplies it by a coefficient, which rounds otherwise where that number is no power of 2. In half
    precision both are formed in float32 and rounded once.
    """
    if x.dtype not in (torch.float32, torch.float64) or not _differentiable(x):
        return cast(Tensor, pool(x, fixed("max_pool", "minimal"), geometry))
    count = tied_windows(x.detach(), geometry).to(x.dtype).clamp(min=1)
    return cast(Tensor, _DividedGradient.apply(pool(x, fixed("max_pool", "sum"), geometry), count))


def _autocast(x: Tensor, geometry: Geometry, return_indices: bool) -> Tensor:
    """The input as autocast on a CPU gives it to the stock operation."""
    if x.dtype not in (torch.float16, torch.bfloat16) or x.device.type != "cpu" or geometry.dims != 3:
        return x
    widened = torch.is_autocast_enabled("cpu") and not (isinstance(geometry, Regular) and return_indices)
    return x.float() if widened else x


def _refuse_empty_windows(x: Tensor, geometry: Regular) -> None:
    """Padding and dilation together can place all entries of a window outside; stock then writes out of bounds."""
    if not any(p and d > 1 for p, d in zip(geometry.padding, geometry.dilation, strict=True)):
        return
    sizes = x.shape[-geometry.dims :]
    with torch.device("meta"):
        windows = geometry.forward(torch.empty(1, *sizes))[0].shape[1:]
    for spans, n in zip(geometry.spans(sizes, windows), windows, strict=True):
        if {i for _, reached in spans for i in range(n)[reached]} != set(range(n)):
            raise ValueError(
                f"max pooling of size {tuple(sizes)} with kernel {geometry.kernel}, stride {geometry.stride}, padding "
                f"{geometry.padding} and dilation {geometry.dilation} has a window without entries, for which stock "
                "PyTorch's backward writes out of bounds. Use less padding or dilation."
            )


def tied_windows(x: Tensor, geometry: Geometry) -> Tensor:
    """Return how many entries of each window reach its maximum.

    Args:
        x: Input of shape (N, C, *spatial) or (C, *spatial), floating dtype.
        geometry: The windows.

    Returns:
        Counts of the output's shape, float32 or float64; 0 where the maximum is NaN, more than 1 at a tie.
    """
    if geometry.dims == 1:
        return tied_windows(x.unsqueeze(-2), geometry.of_a_row()).squeeze(-2)
    with torch.no_grad():
        output = geometry.forward(x)[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        count = lambda x, y: _windows(geometry, x, y.shape[1:-1]).count  # noqa: E731 # a name keeps the call short
        return _in_parts(count, geometry, output, (x, output), dtype=dtype)


def regular(
    dims: int, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Regular:
    """The windows that the arguments of ``max_pool1d``, ``max_pool2d`` or ``max_pool3d`` describe.

    Args:
        dims: The number of spatial dimensions.
        kernel_size: A number for all dimensions, alone or in a list, or a list of one each; as all that follow.
        stride: Steps between windows; None or empty is the kernel's size.
        padding: Implicit -inf padding.
        dilation: Steps between the entries of a window.
        ceil_mode: Round the output's size up.

    Returns:
        The windows.
    """
    kernel = _each(dims, kernel_size)
    steps = kernel if stride is None or (isinstance(stride, Sequence) and not stride) else _each(dims, stride)
    return Regular(kernel, steps, _each(dims, padding), _each(dims, dilation), bool(ceil_mode))


def adaptive(dims: int, x: Tensor, output_size: Any) -> Adaptive:
    """The windows that the arguments of ``adaptive_max_pool1d``, ``2d`` or ``3d`` describe.

    Args:
        dims: The number of spatial dimensions.
        x: The input.
        output_size: A number for all dimensions, alone or in a list, or a list of one each; None is the input's size.

    Returns:
        The windows.
    """
    sizes = output_size if isinstance(output_size, Sequence) else (output_size,)
    sizes = tuple(sizes) * dims if len(sizes) == 1 else sizes
    return Adaptive(tuple(_whole(size if n is None else n) for n, size in zip(sizes, x.shape[-dims:], strict=True)))


def _each(dims: int, numbers: Any) -> tuple[int, ...]:
    numbers = tuple(numbers) if isinstance(numbers, Sequence) else (numbers,)
    return tuple(map(_whole, numbers * dims if len(numbers) == 1 else numbers))


def _whole(n: Any) -> int:
    """A whole number of any class; PyTorch takes 2.0 for none. A compiler knows `int` alone, and refuses 2.0 itself."""
    return int(n) if torch.compiler.is_compiling() else operator.index(n)
