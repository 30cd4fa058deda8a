"""Random small programs over PyTorch's functions and modules, run in a stock and in a patched model, and compared.

A program is a seed. It takes one of PyTorch's own samples of arguments, prepares the memory of its inputs (views,
strides, channels last, expanded), calls the function in one of its spellings (function, method, in place, ``out=``,
operator of ATen), and goes on with a few operations, most of which have kinks. Inputs are small multiples of 1/2, so
that entries meet kinks and each other, and sums are exact.

``python -m tests.fuzzer 17 23`` shows the programs of two seeds and what they differ in.
"""

from __future__ import annotations

import copy
import itertools
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from oracle import OTHER, Oracle
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves
from torch_samples import functions, modules

from nslightning import Jacobians, PatchWarning, patch, using

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
WEIGHTS = (8, 6, 3, 2, 1, 1)
CONTEXTS = {
    "gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
# They return memory that is not initialised, or an address, or ask for more memory or time than there is.
UNDEFINED = frozenset((
    "empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_", "resize_as_",
    "nn.functional.scaled_dot_product_attention", "torch.ops.aten._safe_softmax.default", "linalg.lstsq",
))  # fmt: skip
# Reached by the package, and too intricate for a second implementation in the oracle: other tests compare them.
NO_FORMULA = ("FractionalMaxPool", "MultiMarginLoss", "torch::autograd::CopySlices", "Clamp")
Step = tuple[str, Callable[[Tensor], Any]]


# ------------------------------------------------------------------------------------------------- pieces of programs
def layouts(rng: random.Random, x: Tensor) -> Step:
    """How an input lies in memory, as a function of a leaf."""
    ways: list[Step] = [("", lambda t: t), ("times 1", lambda t: t * 1), ("cloned", lambda t: t.clone())]
    if x.dim() >= 2:
        ways += [
            ("transposed twice", lambda t: t.mT.contiguous().mT),
            ("every other column", lambda t: torch.stack((t, t), -1)[..., 0]),
            ("expanded", lambda t: t[:1].expand(t.shape) if t.shape[0] else t),
            ("rows of a base", lambda t: torch.cat((t, t))[: t.shape[0]]),
        ]
    if x.dim() == 4:
        ways.append(("channels last", lambda t: t.contiguous(memory_format=torch.channels_last)))
    if x.dim() == 1:
        ways.append(("flipped twice", lambda t: t.flip(0)[torch.arange(t.shape[0] - 1, -1, -1)]))
    return rng.choice(ways)


def _out(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: function(t, out=t.detach().new_empty(0))


STEPS: list[Step] = [
    ("F.relu", F.relu),
    ("relu_", lambda t: t.relu_()),
    ("F.relu6", F.relu6),
    ("torch.relu", torch.relu),
    ("aten.relu", torch.ops.aten.relu),
    ("F.leaky_relu", lambda t: F.leaky_relu(t, 0.25)),
    ("F.leaky_relu_", lambda t: F.leaky_relu_(t, 0.25)),
    ("F.elu", lambda t: F.elu(t, 2.0)),
    ("F.selu", F.selu),
    ("F.elu in place", lambda t: F.elu(t, 2.0, inplace=True)),
    ("F.celu", F.celu),
    ("selu_", torch.selu_),
    ("F.hardtanh", F.hardtanh),
    ("F.hardtanh_", lambda t: F.hardtanh_(t, -0.5, 0.5)),
    ("F.hardswish", F.hardswish),
    ("F.hardswish in place", lambda t: F.hardswish(t, inplace=True)),
    ("F.hardsigmoid", F.hardsigmoid),
    ("F.hardshrink", F.hardshrink),
    ("F.softshrink", F.softshrink),
    ("F.threshold", lambda t: F.threshold(t, 0.5, 0.0)),
    ("abs", lambda t: t.abs()),
    ("abs()", abs),
    ("abs_", lambda t: t.abs_()),
    ("torch.absolute", torch.absolute),
    ("clamp", lambda t: t.clamp(-0.5, 1)),
    ("clamp_", lambda t: t.clamp_(0, 1.5)),
    ("clamp_min", lambda t: t.clamp_min(0)),
    ("clip", lambda t: torch.clip(t, max=0.5)),
    ("clamp by tensors", lambda t: t.clamp(t.flip(-1) if t.dim() else t * 0)),
    ("maximum", lambda t: torch.maximum(t, t.flip(0) if t.dim() else -t)),
    ("minimum", lambda t: torch.minimum(t, -t)),
    ("fmax", lambda t: torch.fmax(t, t * 0)),
    ("max", lambda t: t.max()),
    ("max along", lambda t: t.max(-1)[0]),
    ("min along", lambda t: torch.min(t, 0, keepdim=True).values),
    ("amax", lambda t: t.amax((0, -1)) if t.dim() > 1 else t),
    ("aminmax", lambda t: torch.stack(tuple(t.aminmax()))),
    ("norm", lambda t: t.norm()),
    ("of 2", lambda t: torch.max(t, -t)),
    ("norm along", lambda t: torch.linalg.vector_norm(t, dim=-1)),
    ("norm 1", lambda t: t.norm(1, dim=0)),
    ("F.normalize", lambda t: F.normalize(t, dim=0)),
    ("F.l1_loss", lambda t: F.l1_loss(t, t.flip(0) if t.dim() else t * 0)),
    ("F.max_pool1d", lambda t: F.max_pool1d(t, 2, 1)),
    ("F.max_pool2d", lambda t: F.max_pool2d(t, 2)),
    ("overlapping F.max_pool2d", lambda t: F.max_pool2d(t, 3, 1, 1)),
    ("F.max_pool3d", lambda t: F.max_pool3d(t, 2)),
    ("F.adaptive_max_pool2d", lambda t: F.adaptive_max_pool2d(t, 2)),
    ("topk", lambda t: t.topk(1)[0]),
    ("sort", lambda t: t.sort(-1)[0]),
    ("cummax", lambda t: t.cummax(0)[0]),
    ("median", lambda t: t.median()),
    # smooth, and views
    ("square", torch.square),
    ("halved", lambda t: t / 2),
    ("mul_", lambda t: t.mul_(2)),
    ("add itself", lambda t: t + t),
    ("transposed", lambda t: t.mT),
    ("flattened", lambda t: t.flatten()),
    ("row", lambda t: t[0]),
    ("narrowed", lambda t: t[1:]),
    ("overwritten row", lambda t: t.index_fill_(0, torch.tensor([0]), 0)),
    ("float", lambda t: t.float()),
    ("relu_ of a row", lambda t: (t[:1].relu_(), t)[1]),
    ("abs_ of a row", lambda t: (t[:1].abs_(), t)[1]),
    ("clamp_ of a column", lambda t: (t[..., :1].clamp_(min=0), t)[1]),
    ("detached", lambda t: t.detach()),
    ("bfloat16", lambda t: t.bfloat16()),
    ("cumsum", lambda t: t.cumsum(0)),
    ("F.softmax", lambda t: F.softmax(t, -1)),
    ("abs out", _out(torch.abs)),
    ("clamp out", _out(lambda t, out: torch.clamp(t, 0, 1, out=out))),
    ("maximum out", _out(lambda t, out: torch.maximum(t, -t, out=out))),
    ("imag", lambda t: t.imag),
    ("real", lambda t: t.real),
]


@dataclass
class Program:
    """A program; `run` executes it on leaves that its caller makes by `leaves`."""

    seed: int
    text: str
    context: str
    leaves: Callable[[], list[Any]]
    body: Callable[[list[Any], list[Any]], None]  # appends what each step returns to the second list
    wanted: list[int] = field(default_factory=list)
    accumulate: bool = False
    twice: bool = False


def _halves(x: Any, spread: bool) -> Any:
    """Floating entries as multiples of 1/2, most of them between -2 and 2."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or not (x.is_floating_point() or x.is_complex()):
        return x
    if not spread:
        return x.detach().clone()
    with torch.no_grad():
        y = x.detach().clone()
        real = torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
        rounded = real.clone().clamp(-3, 3).mul(2).round().div(2)
        return torch.view_as_complex(rounded) if y.is_complex() else rounded


def spellings(op: Any, sample: Any) -> list[tuple[str, Callable[..., Any]]]:
    """The ways to call a function with a sample of arguments."""
    ways: list[tuple[str, Callable[..., Any]]] = [(op.name, op.op)] * 2
    if op.method_variant is not None:
        ways.append((f"method {op.name}", op.method_variant))
    if op.inplace_variant is not None and not sample.broadcasts_input:
        ways += [(f"in place {op.name}", op.inplace_variant)] * 2
    if op.supports_out:
        ways.append(
            (f"{op.name} out=", lambda *args, **kwargs: op.op(*args, **kwargs, out=torch.empty(0, dtype=args[0].dtype)))
        )
    return ways


def program(seed: int, least: int = 20) -> Program | None:
    """The program of a seed; None where its sample cannot be made."""
    rng = random.Random(seed)
    if rng.random() < 0.12:
        return _module_program(seed, rng)
    op = rng.choice(functions())
    if op.name in UNDEFINED or op.name.startswith(("_refs", "torch.ops.prims")):
        return None
    dtype = rng.choices(DTYPES, WEIGHTS)[0]
    if dtype not in op.dtypes:
        dtype = next((d for d in DTYPES if d in op.dtypes), None)
    if dtype is None:
        return None
    torch.manual_seed(seed)
    random.seed(seed)
    try:
        samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), least))
    except Exception:  # a sample may need a library that is not installed
        return None
    if not samples:
        return None
    sample = rng.choice(samples)
    if isinstance(sample.input, Tensor) and sample.input.numel() > 20_000:
        return None
    name, call = rng.choice(spellings(op, sample))
    spread = rng.random() < 0.8
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    flat = [_halves(x, spread) for x in flat]
    wanted = [
        i
        for i, x in enumerate(flat)
        if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and (i == 0 or rng.random() < 0.7)
    ]
    prepared: dict[int, Step] = {
        i: layouts(rng, x) for i, x in enumerate(flat) if isinstance(x, Tensor) and x.layout == torch.strided
    }
    after = rng.choices(STEPS, k=rng.randint(1, 4))
    context = rng.choices(list(CONTEXTS), (12, 1, 1, 3))[0]

    def leaves() -> list[Any]:
        return [
            x.clone().requires_grad_(i in wanted) if isinstance(x, Tensor) else copy.copy(x) for i, x in enumerate(flat)
        ]

    def body(made: list[Any], results: list[Any]) -> None:
        ready = [prepared[i][1](x) if i in prepared else x for i, x in enumerate(made)]
        first, args, kwargs = torch.utils._pytree.tree_unflatten(ready, spec)
        results.append(call(first, *args, **kwargs))
        _go_on(after, results)

    words = [text for text, _ in prepared.values() if text]
    text = f"{name}({dtype}{', ' + ', '.join(words) if words else ''}); " + "; ".join(text for text, _ in after)
    return Program(seed, text, context, leaves, body, wanted, rng.random() < 0.3, rng.random() < 0.15)


def _go_on(after: list[Step], results: list[Any]) -> None:
    for _, step in after:
        previous = next((x for x in tree_leaves(results[-1]) if isinstance(x, Tensor)), None)
        if previous is None or not (previous.is_floating_point() or previous.is_complex()):
            return
        results.append(step(previous))


def _module_program(seed: int, rng: random.Random) -> Program | None:
    info = rng.choice(modules())
    dtype = rng.choices(DTYPES, WEIGHTS)[0]
    if dtype not in info.dtypes:
        return None
    torch.manual_seed(seed)
    training = rng.random() < 0.5
    try:
        inputs = list(info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training))
        inputs = [i for i in inputs if i.forward_input is not None]
        one = rng.choice(inputs)
        made = info.module_cls(*one.constructor_input.args, **one.constructor_input.kwargs).to(dtype).train(training)
    except Exception:
        return None
    spread = rng.random() < 0.8
    flat, spec = tree_flatten((one.forward_input.args, one.forward_input.kwargs))
    flat = [_halves(x, spread) for x in flat]
    wanted = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    after = rng.choices(STEPS, k=rng.randint(0, 2))
    context = rng.choices(list(CONTEXTS), (12, 1, 1, 3))[0]
    result = Program(
        seed,
        f"nn.{info.module_cls.__name__}({dtype}, {'training' if training else 'evaluation'}); "
        + "; ".join(text for text, _ in after),
        context,
        lambda: [x.clone().requires_grad_(i in wanted) if isinstance(x, Tensor) else x for i, x in enumerate(flat)],
        lambda leaves, results: None,
        wanted,
    )
    result.module, result.spec, result.after = made, spec, after
    return result


# ------------------------------------------------------------------------------------------------------------- runs
class Model(nn.Module):
    """Runs a program in its forward."""

    def __init__(self, one: Program) -> None:
        super().__init__()
        self.program = one
        if hasattr(one, "module"):
            self.part = copy.deepcopy(one.module)

    def forward(self, leaves: list[Any]) -> list[Any]:
        one = self.program
        self.results: list[Any] = []  # what there is if a step raises
        results = self.results
        if hasattr(one, "module"):
            args, kwargs = torch.utils._pytree.tree_unflatten(leaves, one.spec)
            results.append(self.part(*args, **kwargs))
            _go_on(one.after, results)
        else:
            one.body(leaves, results)
        return results


def pattern(x: Tensor) -> Any:
    """The bits of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    if x.layout != torch.strided:
        return ("not strided", *(pattern(part) for part in _parts(x)))
    x = x.detach().resolve_conj().resolve_neg()
    if x.is_quantized:
        x = x.int_repr()
    if not (x.is_floating_point() or x.is_complex()):
        return x.tolist()
    return x.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def _parts(x: Tensor) -> Iterator[Tensor]:
    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        yield from (x.indices(), x.values())
    elif x.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (x.crow_indices(), x.col_indices(), x.values())
    elif x.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (x.ccol_indices(), x.row_indices(), x.values())
    elif x.is_nested:
        yield from x.unbind()
    else:
        yield x.to_dense()


def shown(x: Any, leaves: list[Any]) -> Any:
    """The comparable properties of a value."""
    if not isinstance(x, Tensor):
        return x if isinstance(x, (int, float, bool, str, complex, type(None), torch.dtype)) else type(x).__name__
    if x.is_nested:
        return "nested", x.dtype, pattern(x)
    strided = x.layout == torch.strided
    base = x._base if x._is_view() else None
    return {
        "dtype": x.dtype, "shape": tuple(x.shape), "layout": x.layout, "class": type(x).__name__,
        "stride": x.stride() if strided else (), "offset": x.storage_offset() if strided else 0,
        "requires_grad": x.requires_grad, "leaf": x.is_leaf, "inference": x.is_inference(),
        "conj": x.is_conj(), "neg": x.is_neg(), "version": x._version if not x.is_inference() else None,
        "view": base is not None, "of a leaf": base is not None and any(base is y for y in leaves),
        "memory of a leaf": strided and any(_shares(x, y) for y in leaves),
        "bits": pattern(x),
    }  # fmt: skip


def gradient_shown(g: Tensor | None) -> Any:
    """The comparable properties of a gradient."""
    if g is None or g.layout != torch.strided:
        return None if g is None else (g.dtype, g.layout, pattern(g))
    return {"dtype": g.dtype, "shape": tuple(g.shape), "stride": g.stride(), "bits": pattern(g)}


def _shares(x: Tensor, y: Any) -> bool:
    """Whether a tensor lies in another one's memory."""
    if not isinstance(y, Tensor) or y.layout != torch.strided:
        return False
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


@dataclass
class Outcome:
    """The results, warnings and errors of a run."""

    seen: list[tuple[str, Any]]
    gradients: list[tuple[str, Any]]
    warnings: list[str]
    named: list[str] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)
    undefined: bool = False


OVERWRITTEN = "RuntimeError: modified by an inplace operation"
_NODE = re.compile(r"\S*Backward\d*\S*")


def _message(error: BaseException) -> str:
    """An error without the names of nodes, which are the package's own."""
    if "modified by an inplace operation" in str(error):  # goes on about versions of tensors that nodes keep
        return OVERWRITTEN
    return f"{type(error).__name__}: {_NODE.sub('NODE', str(error))}".split("\n")[0][:300]


def _gradients(one: Program, leaves: list[Any], results: list[Any], model: Model) -> list[tuple[str, Any]]:
    ends = [
        x
        for x in tree_leaves(results[-1:])
        if isinstance(x, Tensor) and x.requires_grad and x.layout == torch.strided and not x.is_nested
    ]
    starts = [leaves[i] for i in one.wanted] + list(model.parameters())
    if not ends or not starts:
        return []
    generator = torch.Generator().manual_seed(one.seed)
    incoming = [torch.randint(-3, 4, x.shape, generator=generator).to(x.dtype) for x in ends]
    try:
        if one.accumulate:
            torch.autograd.backward(ends, incoming)
            gradients = [x.grad for x in starts]
        else:
            gradients = torch.autograd.grad(ends, starts, incoming, allow_unused=True, create_graph=one.twice)
        second: list[Tensor | None] = []
        if one.twice and not one.accumulate:
            again = [g.abs().square().sum() for g in gradients if g is not None and g.requires_grad]
            second = list(torch.autograd.grad(again, starts, allow_unused=True)) if again else [None] * len(starts)
    except Exception as error:
        return [("gradient raises", _message(error))]
    # Where nothing comes down a second time, stock hands down zeros, or nothing, as its formulas happen to be written.
    second = [None if g is None or not g.count_nonzero() else g for g in second]
    # Such a zero times infinity is a NaN, where without it there is infinity.
    second = [None if g is None else torch.where(g.isfinite(), g, torch.nan) for g in second]
    return [
        *((f"gradient {i}", gradient_shown(g)) for i, g in enumerate(gradients)),
        *((f"second gradient {i}", gradient_shown(g)) for i, g in enumerate(second)),
    ]


def outcome(one: Program, patched: bool, choice: Jacobians | None = None) -> Outcome:
    """Run a program.

    Args:
        one: The program.
        patched: In a patched model.
        choice: The choice of the backward: `using` where patched, the oracle's where stock. None is the reference,
            and stock without the oracle.

    Returns:
        The outcome.
    """
    torch.manual_seed(one.seed)
    random.seed(one.seed)
    model, leaves = Model(one), one.leaves()
    report = None
    if patched:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = patch(model, Jacobians(), strict=False)
    seen: list[tuple[str, Any]] = []
    unexplained: list[str] = []
    oracle = Oracle(choice) if choice is not None and not patched else None
    torch.manual_seed(one.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with CONTEXTS[one.context]():
            try:
                if oracle is not None:
                    with oracle:
                        model(leaves)
                    unexplained = [node.name() for node in oracle.attach(model.results)]
                else:
                    model(leaves)
            except Exception as error:
                seen.append(("raises", _message(error)))
        results = model.results
        for i, result in enumerate(results):
            flat, spec = tree_flatten(result)
            seen.append((f"result {i}", str(spec)))
            try:
                seen += [(f"result {i}", shown(x, leaves)) for x in flat]
            except RuntimeError as error:  # PyTorch refuses to tell, of views that were made without gradients
                seen.append((f"result {i}", _message(error)))
        seen += [(f"leaf {i}", shown(x, leaves)) for i, x in enumerate(leaves)]
        seen += [("buffer", shown(x, [])) for x in model.buffers()]
        gradients: list[tuple[str, Any]] = []
        if results and not any(name == "raises" for name, _ in seen):
            if patched and choice is not None:
                with using(model, choice):
                    gradients = _gradients(one, leaves, results, model)
            else:
                gradients = _gradients(one, leaves, results, model)
    texts = [
        f"{w.category.__name__}: {str(w.message).splitlines()[0]}" for w in caught if w.category is not PatchWarning
    ]
    named = [site.operation for site in report.unreached] if report is not None else []
    undefined = oracle is not None and oracle.undefined
    return Outcome(seen, gradients, [_NODE.sub("NODE", t) for t in texts], named, unexplained, undefined)


def differences(a: Iterable[tuple[str, Any]], b: Iterable[tuple[str, Any]], signless: bool = False) -> list[str]:
    """The differences between two lists of observations.

    Args:
        a: Observations of our run.
        b: Observations of the stock run.
        signless: Take -0.0 for 0.0.

    Returns:
        A sentence for each difference.
    """
    a, b = list(a), list(b)
    if [name for name, _ in a] != [name for name, _ in b]:
        said = [[f"{name} {x}" for name, x in seen if name.endswith("raises")] for seen in (a, b)]
        return [f"{said[0] or 'no error'} instead of {said[1] or 'no error'}"[:600]]
    failures = []
    for (name, x), (_, y) in zip(a, b, strict=True):
        if x == y or (isinstance(x, float) and x != x and y != y) or _alike(name, x, y, signless):
            continue
        if isinstance(x, dict) and isinstance(y, dict):
            keys = [k for k in x if x[k] != y.get(k)]
            failures.append(
                f"{name}: " + ", ".join(k if k == "bits" else f"{k} {x[k]} instead of {y[k]}" for k in keys)
            )
        else:
            failures.append(f"{name}: {x} instead of {y}"[:400])
    return failures


def _alike(name: str, x: Any, y: Any, signless: bool) -> bool:
    """Whether two tensors differ in the signs of zeros alone; second gradients may also round otherwise."""
    if not (isinstance(x, dict) and isinstance(y, dict)):
        return False
    if {k for k in x if x[k] != y.get(k)} - {"bits", "stride"}:
        return False
    if name.startswith("second") and signless:
        return torch.allclose(shaped(x), shaped(y), rtol=64 * torch.finfo(x["dtype"]).eps, equal_nan=True)
    if not signless or x["stride"] != y["stride"]:
        return False
    a, b = shaped(x), shaped(y)
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@dataclass
class Verdict:
    """The outcome of comparing a program."""

    differs: list[str]
    ran: bool = True
    tied: bool = False
    named: bool = False


def compare(one: Program) -> Verdict:
    """Run a program in a stock and in a patched model, under the reference and under another choice.

    Args:
        one: The program.

    Returns:
        In what they differ.
    """
    stock = outcome(one, patched=False)
    ours = outcome(one, patched=True)
    # Overwriting costs stock no addition, and the package may add 0.0: -0.0 + 0.0 is 0.0.
    signless = one.twice or re.search(r"_(;|$| of a )|in place", one.text) is not None
    apart = differences(ours.seen, stock.seen) + differences(ours.gradients, stock.gradients, signless)
    if sorted(ours.warnings) != sorted(stock.warnings):
        apart.append(f"warnings {ours.warnings} instead of {stock.warnings}")
    if apart:
        again = outcome(one, patched=False)
        if differences(again.seen, stock.seen) + differences(again.gradients, stock.gradients):
            return Verdict([], ran=False)  # it differs from call to call
        return Verdict(apart)
    if not stock.gradients or stock.gradients[0][0].endswith("raises") or one.twice:
        return Verdict([])
    oracle = outcome(one, patched=False, choice=OTHER)
    if oracle.unexplained:
        if all(name.startswith(NO_FORMULA) for name in oracle.unexplained):
            return Verdict([])
        if not ours.named:
            return Verdict([f"{', '.join(sorted(set(oracle.unexplained)))} is not named"])
        return Verdict([], named=True)
    if oracle.undefined or differences(oracle.seen, stock.seen):
        return Verdict([])  # a NaN, of which the formulas know nothing; or autocast, which a mode below it changes
    gradients = (*stock.gradients, *oracle.gradients)
    if any(isinstance(g, dict) and not bool(shaped(g).isfinite().all()) for _, g in gradients):
        return Verdict([])  # 0 times infinity is a NaN wherever a formula multiplies, and none where it selects
    chosen = outcome(one, patched=True, choice=OTHER)
    if any(name == "gradient raises" and "has PyTorch's own derivative only" in x for name, x in chosen.gradients):
        return Verdict([], named=True)  # refused, for how the tensor lies in memory
    apart = [
        f"under the other choice, {text}" for text in departures(chosen.gradients, oracle.gradients, stock.gradients)
    ]
    return Verdict(apart, tied=bool(differences(oracle.gradients, stock.gradients)))


def departures(ours: list[Any], oracle: list[Any], stock: list[Any]) -> list[str]:
    """Where gradients under a choice are not the oracle's: elsewhere than there, or by more than sums round."""
    failures = differences(ours, oracle)
    if any(name.endswith("raises") for name, _ in (*ours, *oracle)):
        return failures
    failures = []
    for (name, x), (_, y), (_, z) in zip(ours, oracle, stock, strict=True):
        if not (isinstance(x, dict) and isinstance(y, dict)):
            if x is None or y is None or x[1] != y[1]:
                if x is not y:
                    failures.append(f"{name} is None, or of another layout, in one of them")
                continue
            x, y, z = ({"shape": -1, "dtype": one[0], "bits": b"".join(_bytes(one))} for one in (x, y, z))
        a, b, c = (shaped(one) for one in (x, y, z))
        eps = torch.finfo(a.dtype).eps
        scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 0.0
        if not torch.allclose(a, b, rtol=8 * eps, atol=8 * eps * max(scale, 1.0), equal_nan=True):
            most = float((a - b).abs().nan_to_num().max())
            values = f"{a.tolist()} instead of {b.tolist()}, stock {c.tolist()}"
            failures.append(f"{name}: by {most:.3g}, {values}"[:400])
    return failures


def _bytes(seen: Any) -> Iterator[bytes]:
    """The bits of the values of a tensor that is not strided, as :func:`gradient_shown` shows it."""
    for part in seen if isinstance(seen, tuple) else ():
        if isinstance(part, bytes):
            yield part
        else:
            yield from _bytes(part)


def shaped(seen: dict[str, Any]) -> Tensor:
    """The tensor of a gradient that was shown."""
    flat = (
        torch.frombuffer(bytearray(seen["bits"]), dtype=seen["dtype"])
        if seen["bits"]
        else torch.empty(0, dtype=seen["dtype"])
    )
    return flat.view(seen["shape"])


def main(seeds: list[int]) -> None:
    for seed in seeds:
        one = program(seed)
        if one is None:
            print(seed, "no program")
            continue
        print(seed, one.text, f"[{one.context}{', twice' if one.twice else ''}]")
        print("   ", compare(one))


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
