"""The surgery's reach in every torchvision classifier and in one model of every timm family, or in all small ones.

``python -m benchmarks.zoo`` patches each model with an example, runs it forwards and backwards on a small batch before
and after, and writes one row: the sites reached as modules and as functions, the operations left with PyTorch's own
derivative, whether outputs and parameter gradients keep their bits under the reference choice, and what the autograd
graph of the *unpatched* model holds beyond what was reported. The second image of the batch is black, so that networks
without biases meet ties nearly everywhere. Rows are appended to a CSV as they are made; another run goes on after them.
"""

import argparse
import copy
import csv
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import timm
import torch
import torchvision
from timm.models import get_pretrained_cfg, list_models, list_modules
from torch import Tensor, nn

from benchmarks.families import MODELS, Built
from nslightning import Jacobians, PatchReport, patch
from nslightning.ops.unreached import UNREACHED
from nslightning.surgery import using

CSV = Path(__file__).parent / "results" / "zoo.csv"
COLUMNS = (
    "family", "model", "parameters", "input", "modules", "functional", "functional_calls", "unreached", "missed",
    "forward", "gradients", "nonzero", "moved", "seconds", "error",
)  # fmt: skip
SIZES = (64, 96, 112, 128)  # tried in turn before the model's own
MAX_PARAMETERS = 700e6
SMALL = 12e6  # what `--all` runs of timm

# Autograd nodes of operations whose derivative is not unique somewhere, by the name that the report gives them. What is
# one kernel there may be two operations here: ReLU6 is Hardtanh, SELU is ELU.
NODES = {
    "Relu": "relu", "Hardtanh": "hardtanh", "Hardswish": "hardswish", "Hardsigmoid": "hardsigmoid", "Elu": "elu",
    "LeakyRelu": "leaky_relu", "Threshold": "threshold", "Softshrink": "softshrink", "Hardshrink": "hardshrink",
    "PreluKernel": "prelu", "RreluWithNoise": "rrelu", "Abs": "abs",
    **dict.fromkeys(("MaxPool2DWithIndices", "MaxPool3DWithIndices"), "max_pool"),
    **dict.fromkeys(("AdaptiveMaxPool2D", "AdaptiveMaxPool3D"), "max_pool"),
    **dict.fromkeys(("Clamp", "ClampMin", "ClampMax"), "clamp"),
    **dict.fromkeys(("Max", "Min", "Amax", "Amin", "Aminmax"), "max"),
    **dict.fromkeys(("Maximum", "Minimum", "Fmax", "Fmin"), "maximum"),
    **dict.fromkeys(("Norm", "LinalgVectorNorm", "Dist"), "norm"),
    "Cummax": "cummax", "Cummin": "cummin", "Median": "median", "Nanmedian": "nanmedian", "Kthvalue": "kthvalue",
    "Topk": "topk", "Sort": "sort", "Cdist": "cdist", "Logit": "logit",
}  # fmt: skip
_IN_GRAPH = {"relu6": ("hardtanh",), "selu": ("elu",), "normalize": ("norm", "clamp")}
# Reference on one side, something else at every tie on the other.
OTHER = Jacobians(
    relu=1.0, relu6=(1.0, 1.0), hardtanh=(1.0, 1.0), leaky_relu=0.5, abs=1.0, max_pool="minimal", clamp=(0.5, 0.5)
)


class TooLongError(Exception):
    """A model took longer than its limit."""


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """End the block after so many seconds, at the next Python instruction."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooLongError(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tensors(output: object) -> Iterator[Tensor]:
    """Every floating tensor of a model's output, whatever it is packed in."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for part in output:
            yield from tensors(part)


def graph(output: object) -> Counter[str]:
    """The nonsmooth operations in the autograd graph below an output, counted without the surgery."""
    counts: Counter[str] = Counter()
    todo = [node for x in tensors(output) if (node := x.grad_fn) is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        name = NODES.get(node.name().rstrip("0123456789").removesuffix("Backward"))
        # ELU with alpha 1 is smooth, unless it is SELU, which is scaled.
        if name is not None and not (name == "elu" and node._saved_alpha == node._saved_scale == 1):
            counts[name] += 1
        new = {below for below, _ in node.next_functions if below is not None} - seen
        seen |= new
        todo += new
    return counts


def reported(report: PatchReport) -> Counter[str]:
    """The calls of a report in the graph's terms."""
    counts: Counter[str] = Counter()
    for site in report.sites:
        for name in _IN_GRAPH.get(site.kind, _IN_GRAPH.get(site.operation, (site.operation,))):
            counts[name] += site.calls
    return counts


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    flat = x.detach().clone(memory_format=torch.contiguous_format).reshape(-1)  # strides of 1 at size 1 too
    return flat.view(torch.uint8)


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return len(a) == len(b) and all(
        (x is y) if x is None or y is None else torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def gradients(model: nn.Module, output: object, *, keep: bool = False) -> list[Tensor | None]:
    """The parameters' gradients of a fixed, generic function of the output."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    ends = [x for x in tensors(output) if x.grad_fn is not None]
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in ends)
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, retain_graph=keep))


def batch(size: int) -> Tensor:
    """One random image and one black one."""
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    return x


def measure(model: nn.Module, sizes: tuple[int, ...]) -> dict[str, object]:
    """One row of the table; the model stays patched.

    Args:
        model: A classifier.
        sizes: Image sizes in pixels; the first that the model takes is used.

    Returns:
        The row's columns from ``parameters`` to ``moved``.
    """
    model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" not in name and not p.any():  # heads and branches that start at 0 would stop every gradient
                p.normal_(std=0.1)
    for i, size in enumerate(sizes):
        x = batch(size)
        try:
            before = model(x)
            break
        except (RuntimeError, AssertionError, ValueError, IndexError):
            if i + 1 == len(sizes):
                raise
    del before
    return examine(model, (x,), {}, patch_example=x) | {"input": size}


def examine(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], patch_example: object = None
) -> dict[str, object]:
    """The columns of a row that do not depend on what kind of input the model takes; the model stays patched.

    Args:
        model: Any model, in the mode that it is measured in.
        args: Positional arguments of one call.
        kwargs: Its keyword arguments.
        patch_example: The example for `patch`, in evaluation mode; without one the call that is measured
            lists the functional sites.

    Returns:
        The row's columns from ``parameters`` to ``moved``, without ``input``.
    """

    def call(net: nn.Module) -> object:
        torch.manual_seed(1)
        return net(*args, **kwargs)

    untouched = copy.deepcopy(model)  # a forward in training mode leaves its statistics
    before = call(untouched)
    nodes, stock = graph(before), [y.detach() for y in tensors(before)]
    wanted = gradients(untouched, before)
    del before, untouched

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model with nothing to patch is a row, not a warning
            report = patch(model, Jacobians(), example=patch_example, strict=False)
            after = call(model)
        reference = gradients(model, after, keep=True)
        with using(model, OTHER):
            moved = gradients(model, after)
    except TooLongError:
        raise
    except Exception as error:  # what the stock model can do
        raise RuntimeError(f"fails once patched: {error}") from error

    unreached: Counter[str] = Counter()
    for site in report.unreached:
        unreached[site.operation] += site.calls
    functional = [site for site in report.reached if site.how == "functional"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "modules": len(report.reached) - len(functional),
        "functional": len(functional),
        "functional_calls": sum(site.calls for site in functional),
        "unreached": words(unreached),
        "missed": words(nodes - reported(report)),
        "forward": "equal" if same(stock, [y.detach() for y in tensors(after)]) else "DIFFERS",
        "gradients": "equal" if same(wanted, reference) else "DIFFERS",
        "nonzero": f"{sum(g is not None and bool(g.any()) for g in reference)}/{len(reference)}",
        "moved": sum(not same([a], [b]) for a, b in zip(reference, moved, strict=True)),
    }


def words(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()) if n)


def torchvision_models() -> Iterator[tuple[str, str, Callable[[], nn.Module], int]]:
    """Every classification model: family, name, what builds it, its own image size."""
    for name in torchvision.models.list_models(module=torchvision.models):
        weights = list(torchvision.models.get_model_weights(name))
        size = min((w.transforms().crop_size[0] for w in weights), default=224)
        arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}  # slow, and not needed
        yield "torchvision", name, lambda name=name, k=arguments: torchvision.models.get_model(name, **k), size


def timm_models(done: set[str]) -> Iterator[tuple[str, str, Callable[[], nn.Module], int]]:
    """The smallest model of every family that is not done: family, name, what builds it, its own image size."""
    for family in list_modules():
        if f"timm/{family}" in done:
            continue
        if (name := smallest(family)) is not None:
            yield f"timm/{family}", name, lambda name=name: timm.create_model(name), image_size(name)


def small_timm_models(done: set[str]) -> Iterator[tuple[str, str, Callable[[], nn.Module], int]]:
    """Every timm model of at most `SMALL` parameters that is not done, one size of network after the other."""
    sizes = {
        (size, family, name)
        for family in list_modules()
        for name, size in parameters(family).items()
        if name not in done and size <= SMALL
    }
    for _, family, name in sorted(sizes):
        yield f"timm/{family}", name, lambda name=name: timm.create_model(name), image_size(name)


def image_size(name: str) -> int:
    """The size of the images that a timm model was made for."""
    config = get_pretrained_cfg(name, allow_unregistered=True)
    return (getattr(config, "input_size", None) or (3, 224, 224))[-1]


def smallest(family: str) -> str | None:
    """The model of a timm family with the fewest parameters."""
    sizes, names = parameters(family), list_models(module=family)
    return min(sizes, key=sizes.__getitem__) if sizes else (names[0] if names else None)


def parameters(family: str) -> dict[str, int]:
    """The number of parameters of a timm family's models; its miniatures for tests do not count."""
    sizes: dict[str, int] = {}
    for name in list_models(module=family):
        if name.startswith("test_"):
            continue
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except Exception:  # one that cannot be built without data is measured only where it is alone
            continue
        sizes[name] = sum(p.numel() for p in model.parameters())
    return sizes


def run(family: str, name: str, build: Callable[[], nn.Module], size: int, seconds: int) -> dict[str, object]:
    """One row, whatever happens."""
    start = time.perf_counter()
    row: dict[str, object] = {"family": family, "model": name}
    try:
        with limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models' own
            with torch.device("meta"):
                row["parameters"] = sum(p.numel() for p in build().parameters())
    except Exception:
        pass  # cannot be built on meta: its size is known below
    if row.get("parameters", 0) > MAX_PARAMETERS:  # type: ignore[operator] # an int, where it is set
        return row | {"error": f"not run: more than {MAX_PARAMETERS / 1e6:.0f} M parameters"}
    try:
        with limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            row |= measure(build(), tuple(dict.fromkeys((*(s for s in SIZES if s < size), size))))
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def run_family(family: str, name: str, build: Callable[[], Built], seconds: int) -> dict[str, object]:
    """One row of a model of :mod:`benchmarks.families`, whatever happens."""
    start = time.perf_counter()
    row: dict[str, object] = {"family": family, "model": name, "input": "own"}
    try:
        with limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            row |= examine(*build())
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def library(family: str) -> str:
    """The package that a family is of."""
    return family.partition("/")[0]


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def total(rows: list[dict[str, str]], column: str) -> Counter[str]:
    """The operations of a column, over all rows."""
    counts: Counter[str] = Counter()
    for row in rows:
        for part in filter(None, row[column].split(", ")):
            n, name = part.split()
            counts[name] += int(n)
    return counts


def page(rows: list[dict[str, str]]) -> str:
    """The table as Markdown, totals first."""
    rows = sorted(rows, key=lambda r: (r["family"] != "torchvision", r["family"], r["model"]))
    ran = [row for row in rows if not row["error"]]
    lines = [
        "# The zoo",
        "",
        "What `nslightning.patch` reaches in every torchvision classification model, in the smallest model of every",
        "timm family and, with `--all`, in every timm model of at most 12 M parameters, and in models for text, for",
        "graphs, for segmentation, detection, optical flow and video (`benchmarks/families.py`). Made by",
        "`python -m benchmarks.zoo --all` (its first lines say what is measured), from",
        "`benchmarks/results/zoo.csv`, on a CPU, in evaluation mode, with random weights and a batch of one random and",
        f"one black image; torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}.",
        "",
    ]
    for kind, some in (
        ("torchvision", [r for r in rows if r["family"] == "torchvision"]),
        ("timm", [r for r in rows if r["family"].startswith("timm/")]),
        ("other inputs than a batch of images", [r for r in rows if (r["family"], r["model"]) in MODELS]),
    ):
        good = [r for r in some if not r["error"]]
        left = [r for r in good if r["unreached"]]
        lines.append(
            f"- **{kind}**: {len(some)} models, {len(good)} run; {sum(int(r['modules']) for r in good)} sites reached "
            f"as modules, {sum(int(r['functional']) for r in good)} as functions in "
            f"{sum(r['functional'] != '0' for r in good)} models; {len(left)} models with an operation left to "
            f"PyTorch; {sum(r['modules'] == r['functional'] == '0' for r in good)} with nothing to patch; forward "
            f"bit-equal in {sum(r['forward'] == 'equal' for r in good)} of {len(good)}, gradients in "
            f"{sum(r['gradients'] == 'equal' for r in good)} of {len(good)}."
        )
    lines.append(f"- **Left to PyTorch**, calls over all models: {_ranking(ran, 'unreached')}.")
    lines += [f"  - {name}: {UNREACHED[name]}." for name in sorted(total(ran, "unreached")) if name in UNREACHED]
    lines.append(f"- **In the autograd graph and in no report**: {_ranking(ran, 'missed')}.")
    lines += [
        "",
        "*Functional* is sites, and their calls where these are more. *Moved* is the number of parameter tensors",
        "whose gradient another choice changes, of those whose gradient is not zero: where it is not 0, the",
        "reference's equal bits were met at real ties. Calls of operations left to PyTorch are those of one forward.",
        "Most models get images smaller than their own; the column *input* has the size. Parts that run in",
        "training mode only (auxiliary heads, dropout) are not measured, but for detectors, which have losses then.",
        "The tests compare the models of `benchmarks/families.py` with an oracle below autograd, too.",
        "",
        "| model | family | M param. | input | modules | functional | left to PyTorch | not reported | forward | "
        "gradients | moved |",
        "|---|---|--:|--:|--:|--:|---|---|---|---|--:|",
    ]
    for r in ran:
        calls = f" ({r['functional_calls']} calls)" if r["functional_calls"] != r["functional"] else ""
        lines.append(
            f"| {r['model']} | {r['family'].removeprefix('timm/')} | {int(r['parameters']) / 1e6:.1f} | {r['input']} | "
            f"{r['modules']} | {r['functional']}{calls} | {r['unreached']} | {r['missed']} | {r['forward']} | "
            f"{r['gradients']} | {r['moved']} of {r['nonzero'].split('/')[0]} |"
        )
    lines += ["", "## Not run, or failed", "", "| model | family | why |", "|---|---|---|"]
    lines += [f"| {r['model']} | {r['family'].removeprefix('timm/')} | {r['error']} |" for r in rows if r["error"]]
    have = {r["family"] for r in rows}
    missing = [family for family in list_modules() if f"timm/{family}" not in have]
    if missing:
        lines += ["", f"timm families without a row yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _ranking(rows: list[dict[str, str]], column: str) -> str:
    models = Counter(name for row in rows for name in total([row], column))
    counts = total(rows, column).most_common()
    return ", ".join(f"{name} {n} ({models[name]} models)" for name, n in counts) or "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=("torchvision", "timm", "others"), help="one source only")
    parser.add_argument("--all", action="store_true", help="every timm model of at most 12 M parameters too")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; go on another time")
    parser.add_argument("--out", type=Path, default=Path("docs/zoo.md"), help="the table")
    parser.add_argument("--csv", type=Path, default=CSV, help="the rows; those that are there are not run again")
    parser.add_argument("--seconds", type=int, default=60, help="the time limit of a model")
    args = parser.parse_args()
    rows = read(args.csv)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    done, families = {(library(row["family"]), row["model"]) for row in rows}, {row["family"] for row in rows}
    todo = (
        (torchvision_models() if args.family in (None, "torchvision") else iter(())),
        (timm_models(families) if args.family in (None, "timm") else iter(())),
        (
            small_timm_models({name for home, name in done if home == "timm"})
            if args.all and args.family in (None, "timm")
            else iter(())
        ),
    )
    end = time.monotonic() + 60 * args.minutes
    with args.csv.open("a", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            out.writeheader()
        for family, name, build, size in (model for some in todo for model in some):
            if time.monotonic() > end:
                break
            if (library(family), name) in done:
                continue
            done.add((library(family), name))
            row = run(family, name, build, size, args.seconds)
            print(*row.values(), flush=True)
            out.writerow(row)
            file.flush()
        for (family, name), build in MODELS.items() if args.family in (None, "others") else ():
            if time.monotonic() > end or any((row["family"], row["model"]) == (family, name) for row in rows):
                continue
            row = run_family(family, name, build, args.seconds)
            print(*row.values(), flush=True)
            out.writerow(row)
            file.flush()
    args.out.write_text(page(read(args.csv)), encoding="utf-8")


if __name__ == "__main__":
    main()
