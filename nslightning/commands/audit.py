"""Measure how far a model's gradients depend on the Jacobian choice: its ties, the divergence, and plain advice."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.commands.devices import check_device
from nslightning.commands.endings import CallError, ended
from nslightning.commands.plain_parser import Arguments
from nslightning.commands.process import plain_warnings
from nslightning.commands.progress import progress
from nslightning.files import check_writable, expanded, write_text
from nslightning.names import DATA_SETS, FAMILIES, PAPER_NETWORKS
from nslightning.spelling import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batch = tuple[Tensor, Tensor | None]

__all__ = ["main", "make_parser"]

_DTYPES = ("16", "bf16", "32", "64")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
_CHECKPOINTS = {".ckpt", ".pt", ".pth", ".safetensors"}
_EPILOG = """\
examples:
  nslightning audit timm/resnet50 --image-size 64 --html audit.html
  nslightning audit torchvision/inception_v3 --data my_images --precisions 16 32
  nslightning audit my_package.models:build --data MNIST --fail-above 1e-3     # in CI
  nslightning audit my_package.models:build --weights best.ckpt
  nslightning audit runs/quickstart/001/checkpoints/best.ckpt --data FashionMNISTSample

exit status: 0 done; 1 the data or the model is at fault; 2 the command was called wrongly;
3 a relative divergence exceeds --fail-above, or a gradient is not finite; 130 after an interruption: what was measured
until then is shown and written.
"""


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line, the command's name first.

    Returns:
        The exit status: 0; 1 where the data or the model is at fault; 2 where the call is; 3 where a relative
        divergence exceeds ``--fail-above`` or is not a number.

    Raises:
        SystemExit: After ``--help`` (0) and for options that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(argv[1:])
    return ended(
        parser.prog,
        lambda: _audit(options),
        go_on="nothing was measured yet",
        output="--json or --html",
        fault=1,
    )


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: Name of the command in its usage and error messages.

    Returns:
        The parser.
    """
    parser = Arguments(
        prog=prog,
        description=__doc__,
        epilog=_EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        renamed={"--dtypes": "--precisions", "--dtype": "--precisions"},
    )
    add = parser.add_argument
    add("model", metavar="MODEL",
        help="timm/NAME, torchvision/NAME or paper/NAME, freshly initialised; your own package.module:factory, with "
        "the weights it has; a checkpoint of `nslightning fit`; or a folder that Hugging Face's save_pretrained "
        "wrote")  # fmt: skip
    add("--weights", type=Path, metavar="FILE",
        help="a checkpoint of any training, or a state dict, to load into MODEL")  # fmt: skip
    add("--data", default="synthetic", metavar="DATA",
        help="synthetic (standard normal images, random labels), a folder of images, or a data set such as MNIST or "
        "FashionMNISTSample (default: synthetic)")  # fmt: skip
    add("--download", nargs="?", const="true", default="false", choices=("true", "false"),
        help="fetch data that are not there")  # fmt: skip
    add("--batches", type=_whole(1), default=1, metavar="N", help="batches to measure (default: 1)")
    add("--batch-size", type=_whole(1), default=4, metavar="N", help="images per batch (default: 4)")
    add("--image-size", type=_whole(1), metavar="N",
        help="height and width (default: the data set's own; else 224, and 32 for paper/)")  # fmt: skip
    add("--precisions", nargs="+", choices=_DTYPES, default=list(_DTYPES), metavar="BITS",
        help="of weights and all: 16 bf16 32 64 (default: all)")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    add("--seed", type=_whole(0, 2**32 - 1), default=0, metavar="N", help="of weights, data and labels (default: 0)")
    add("--eval", action="store_true", help="evaluation instead of training mode")
    add("--json", type=expanded, metavar="FILE", help="write all findings")
    add("--html", type=expanded, metavar="FILE", help="write one page with tables and figures, which loads nothing")
    add("--fail-above", type=_limit, metavar="X", help="exit with status 3 if a relative divergence exceeds X")
    return parser


def _whole(least: int, most: float = math.inf) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            above = "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}{above}")
        return int(text)

    return number


def _limit(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 0, such as 1e-3")
    return value


def _check_outputs(outputs: dict[str, Path]) -> None:
    """Raise, before any work, if an output cannot be written."""
    for kind, path in outputs.items():
        if path.is_dir():
            raise CallError(f"--{kind} takes a file; {path} is a folder")
        if not path.parent.is_dir():
            raise CallError(f"--{kind} {path}: there is no folder {path.parent}; make it first")
        try:
            check_writable(path.parent)
        except ValueError as error:
            raise CallError(f"--{kind} {path}: {error}") from None
    if len(outputs) == 2 and outputs["json"].resolve() == outputs["html"].resolve():
        raise CallError(f"--json and --html name one file, {outputs['json']}")


def _audit(options: argparse.Namespace) -> int:
    outputs = {kind: path for kind in ("json", "html") if (path := getattr(options, kind)) is not None}
    _check_outputs(outputs)
    # Before PyTorch is loaded, which takes seconds.
    _check_data(options.data)
    _check_model(options.model)

    import torch

    from nslightning.models.weights import load_weights, read_checkpoint

    check_device(options.device)
    torch.manual_seed(options.seed)
    network, batches, description = _model_and_data(options)
    if options.weights is not None:
        load_weights(network, read_checkpoint(options.weights)["state_dict"], str(options.weights))
    batches = [(_fit(images, network, options.model), labels) for images, labels in batches]

    from nslightning.arithmetic import Arithmetic
    from nslightning.probes.audit import audit
    from nslightning.report.audit_page import page
    from nslightning.report.audit_text import advice, table

    with Arithmetic().applied(), progress() as show, plain_warnings():
        report = audit(
            network,
            batches,
            dtypes=options.precisions,
            device=options.device,
            training=not options.eval,
            seed=options.seed,
            name=options.model,
            data=description,
            progress=show,
        )
    print(table(report))
    for kind, path in outputs.items():
        if kind == "json":
            import json

            plain = report.to_dict() | {"advice": advice(report)}
            text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
        else:
            text = page(report)
        write_text(path, text)
    if outputs:
        print(f"\nWritten: {', '.join(map(str, outputs.values()))}")
    if unmeasured := [dtype for dtype, why in report.not_run.items() if why == "interrupted"]:
        rest = " ".join(unmeasured)
        print(f"\ninterrupted; the same command with --precisions {rest} measures the rest", file=sys.stderr)
        return 130
    if options.fail_above is not None and not report.largest <= options.fail_above:
        largest = "not finite" if not math.isfinite(report.largest) else f"{report.largest:.3g}"
        above = f"exceeds --fail-above {options.fail_above}"
        print(f"\nThe largest relative divergence, {largest}, {above}", file=sys.stderr)
        return 3
    return 0


# ----------------------------------------------------------------------------------------------------- model
def _model_and_data(options: argparse.Namespace) -> tuple[nn.Module, list[Batch], str]:
    """The named network, batches that it takes, and a description of these."""
    from nslightning.models import weights
    from nslightning.models.own import OwnNameError, is_own, own_network

    if weights.is_hugging_face_folder(options.model):
        network = weights.HuggingFaceLogits(options.model)
        if network.vocab_size is not None:
            return network, _tokens(options, network.vocab_size), "random tokens"
        assert network.image_shape is not None
        batches, description, _ = _data(options, network.image_shape)
        return network, batches, description
    if options.model.endswith(".py"):
        function = f"{options.model.removesuffix('.py').replace('/', '.')}:FUNCTION"
        raise CallError(f"{options.model} is code: name the function in it that makes the network, as {function}")
    if Path(options.model).is_file():
        made, shape, _ = weights.network_of_checkpoint(weights.read_checkpoint(Path(options.model)), options.model)
        batches, description, _ = _data(options, shape)
        return made, batches, description
    if Path(options.model).is_dir():
        from nslightning.runs import checkpoints_in

        inside = checkpoints_in(Path(options.model))
        way = f": {inside[0]}" if inside else ", and there is none in it"
        raise CallError(f"{options.model} is a folder: name a checkpoint of `nslightning fit`{way}")
    if is_own(options.model):
        try:
            own = own_network(options.model)
        except OwnNameError as error:
            raise CallError(str(error)) from error
        batches, description, _ = _data(options)
        return own, batches, description
    batches, description, classes = _data(options)
    return _backbone(options.model, classes or 1000, tuple(batches[0][0].shape[1:])), batches, description


def _tokens(options: argparse.Namespace, vocab_size: int) -> list[Batch]:
    """Random token ids, 32 in a row."""
    import torch

    if options.data != "synthetic":
        raise CallError(f"--data {options.data}: a text model is audited on random tokens; leave --data out")
    drawn = torch.Generator().manual_seed(options.seed)
    shape = (options.batch_size, 32)
    return [(torch.randint(vocab_size, shape, generator=drawn), None) for _ in range(options.batches)]


def _check_model(name: str) -> None:
    """Raise if a name has the form of a backbone's and is none; a library is imported where the name asks for it."""
    family, _, network = name.partition("/")
    own = ":" in family or name.endswith(".py")
    if own or Path(name).exists():
        return
    if Path(name).suffix in _CHECKPOINTS:
        raise CallError(
            f"there is no file {name}; `nslightning fit` keeps its checkpoints in runs/NAME/NUMBER/checkpoints"
        )
    if family not in FAMILIES or not network:
        if network:
            hint = did_you_mean(name, [f"{other}/{network}" for other in FAMILIES])
        else:
            from nslightning.models.backbones import list_backbones

            same = [known for known in list_backbones() if known.partition("/")[2] == name]
            hint = f"; did you mean {' or '.join(map(repr, same))}?" if same else did_you_mean(name, list_backbones())
        path, colon, factory = name.partition(":")
        if colon and path.endswith(".py"):
            hint = f"; did you mean {path.removesuffix('.py').replace('/', '.') + ':' + factory!r}?"
        raise CallError(
            f"there is no model {name!r}{hint} A model is timm/NAME, torchvision/NAME, paper/NAME, or "
            "package.module:factory of your own"
        )
    if family == "timm" and ":" in network:
        return
    if family == "paper":
        known = [f"paper/{network}" for network in PAPER_NETWORKS]
    else:
        from nslightning.models.backbones import list_backbones

        known = list_backbones(f"{family}/*")
    if name.partition(".")[0] not in known:
        hint = did_you_mean(name, known, most=3)
        raise CallError(f"there is no model {name!r}{hint} `nslightning audit --help` says how models are named")


def _backbone(name: str, classes: int, shape: tuple[int, ...]) -> nn.Module:
    from nslightning.models.backbones import create_backbone

    return create_backbone(name, classes, shape)


def _fit(images: Tensor, network: nn.Module, name: str) -> Tensor:
    """Images with the channels that the network's first convolution takes; gray ones are repeated."""
    from torch import nn

    first = next((m for m in network.modules() if isinstance(m, nn.Conv2d)), None)
    channels = images.shape[1]
    if first is None or first.in_channels == channels:
        return images
    if channels == 1:
        return images.expand(-1, first.in_channels, -1, -1)
    if first.in_channels == 1:
        raise ValueError(f"{name} takes images of 1 channel, the data have {channels}; name data of gray images")
    return images  # not necessarily the first to be run: the model says what it does not take


# ------------------------------------------------------------------------------------------------------ data
def _data(options: argparse.Namespace, shape: tuple[int, ...] | None = None) -> tuple[list[Batch], str, int | None]:
    """The batches, a description of them, and the number of classes where the data have some.

    Args:
        options: The command line.
        shape: (channels, height, width) that the network was made for, where that is known.
    """
    size = options.image_size or (shape[1] if shape else 32 if options.model.startswith("paper/") else 224)
    if options.data == "synthetic":
        import torch

        drawn = torch.Generator().manual_seed(options.seed)
        images = (
            options.batch_size,
            shape[0] if shape else 3,
            size,
            shape[2] if shape and not options.image_size else size,
        )
        return [(torch.randn(images, generator=drawn), None) for _ in range(options.batches)], "synthetic images", None
    if Path(options.data).expanduser().is_dir():
        return _folder(Path(options.data).expanduser(), options, size)
    return _module(options)


def _check_data(name: str) -> None:
    """Raise if ``--data`` names neither a folder nor a data set."""
    if name in ("synthetic", *DATA_SETS) or Path(name).expanduser().is_dir():
        return
    beside = [str(folder) for folder in Path(name).parent.glob("*/")]
    hint = did_you_mean(name, ["synthetic", *DATA_SETS, *beside])
    sets = ", ".join(DATA_SETS)
    raise CallError(f"--data {name}: there is no such folder or data set{hint} Data sets: synthetic, {sets}")


def _folder(folder: Path, options: argparse.Namespace, size: int) -> tuple[list[Batch], str, int | None]:
    import torch

    from nslightning.data.images import FileImages, pixels_of
    from nslightning.data.preprocessing import HE2016
    from nslightning.data.verify import data_error

    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in _SUFFIXES and f.is_file())
    wanted = options.batches * options.batch_size
    if len(files) < wanted:
        fix = f"Give fewer --batches or a smaller --batch-size, or more images ({', '.join(sorted(_SUFFIXES))})."
        raise data_error(folder, f"count: {len(files)} images in it, {wanted} needed", fix)
    classes = sorted({f.parent.name for f in files})
    labelled = len(classes) > 1 and all(f.parent != folder for f in files)
    images = FileImages([(str(f), classes.index(f.parent.name)) for f in files], HE2016.at(size))
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(options.seed)).tolist()[:wanted]
    batches: list[Batch] = []
    for start in range(0, wanted, options.batch_size):
        pixels, labels = images.__getitems__(order[start : start + options.batch_size])
        batches.append((pixels, labels if labelled else None))
    labels_of = f"{len(classes)} classes" if labelled else "random labels"
    prepared = f"resized and cropped from {pixels_of([str(files[i]) for i in order])} (--image-size)"
    description = f"{len(files)} images of {folder}, {labels_of}, {prepared}"
    return batches, description, len(classes) if labelled else None


def _module(options: argparse.Namespace) -> tuple[list[Batch], str, int | None]:
    import torch.nn.functional as F

    from nslightning import data
    from nslightning.experiments.data import download

    if options.download == "true":
        download(options.data, ())
    source = getattr(data, options.data)(batch_size=options.batch_size, seed=options.seed, workers=0)
    source.prepare_data()
    loader: Iterable[tuple[Tensor, Tensor]] = source.train_dataloader()
    batches: list[Batch] = []
    for images, labels in islice(loader, options.batches):
        size = options.image_size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        batches.append((images, labels))
    if len(batches) < options.batches:
        asked = f"{options.batches} of them were asked for"
        raise data.DataError(f"{options.data} has {len(batches)} batches of {options.batch_size}, and {asked}")
    return batches, f"{options.data}, training images", source.num_classes
