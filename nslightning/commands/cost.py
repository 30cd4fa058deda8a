"""Measures the cost of a backbone's gradient relative to its loss, under several Jacobian choices."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nslightning.commands.dashes import spelled_with_dashes, with_new_spellings
from nslightning.commands.devices import check_device
from nslightning.commands.endings import ended
from nslightning.commands.progress import progress
from nslightning.files import check_writable, expanded

if TYPE_CHECKING:
    # Nothing that imports torch: jsonargparse runs this block to understand the annotations of `cost`.
    from jsonargparse import ArgumentParser

__all__ = ["main", "make_parser"]

_RENAMED = {"--model": "--backbone", "--options": "--backbone-options", "--dtype": "--precision"}

_DTYPES = {"16": "float16", "bf16": "bfloat16", "32": "float32", "64": "float64"}


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line from the subcommand on.

    Returns:
        0; 2 where the call is mistaken, 1 where the machine or the disk fails, 130 after an interruption.

    Raises:
        SystemExit: After ``--help`` (0) and for arguments that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(with_new_spellings(parser, argv[1:], _RENAMED)).as_dict()
    options.pop("config")
    # Read when torch is imported: the profiler that measures memory would else write to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    return ended(parser.prog, lambda: cost(**options), go_on="nothing was written")


def make_parser(prog: str) -> ArgumentParser:
    """The command's parser.

    Args:
        prog: Name of the command in its usage and error messages.

    Returns:
        The parser.
    """
    from nslightning.commands.config_parser import HelpfulErrors

    parser = HelpfulErrors(prog=prog, description=__doc__)
    parser.add_argument("--config", action="config", help="A YAML file with any of these arguments.")
    parser.add_function_arguments(cost, skip={"choices", "widths"})
    parser.add_argument(
        "--choices",
        nargs="+",
        type=str,
        default=["relu0.5:relu=0.5", "relu1:relu=1", "minimal:max_pool=minimal"],
        metavar="NAME:FIELD=VALUE",
        help="Jacobian choices, as relu1:relu=1 or both:relu=1,max_pool=10; a preset by its name, as jax.",
    )
    parser.add_argument(
        "--widths",
        nargs="+",
        type=int,
        help="Widths of the hidden layers of paper/fc, to measure how the cost grows with the parameters.",
    )
    spelled_with_dashes(parser)
    return parser


def cost(
    backbone: str,
    num_classes: int = 10,
    image_shape: tuple[int, int, int] = (3, 32, 32),
    backbone_options: dict[str, Any] | None = None,
    batch_size: int = 32,
    precision: Literal["16", "bf16", "32", "64"] = "32",
    device: str = "cpu",
    choices: list[str] | None = None,
    repetitions: int = 20,
    widths: list[int] | None = None,
    seed: int = 0,
    output: str = "runs/cost",
    step: bool = False,
) -> int:
    """Measure, print the report, and write it.

    The network is freshly initialised and in training mode; images are standard normal, labels uniform.

    Args:
        backbone: As for fit, such as paper/fc, torchvision/resnet18 or timm/mobilenetv3_small_050.
        num_classes: Number of classes.
        image_shape: Channels, height and width of the images, as [3,32,32].
        backbone_options: Its further arguments, as {"hidden":[512,512]} for paper/fc.
        batch_size: Images in the batch.
        precision: Bits of parameters and images: true 16, bf16, 32 or 64 bits, not mixed.
        device: cpu, cuda, cuda:1, ...
        choices: Jacobian choices, each as :func:`~nslightning.choices.named_choice` takes it.
        repetitions: Measured rounds.
        widths: For paper/fc: the widths of its hidden layers, one report each.
        seed: Seeds the initialisation and the images.
        output: Folder for cost.json, cost.csv, cost.png and cost.pdf.
        step: Say where the time of a whole training step goes instead: data, forward, backward, optimizer, and what
            patching and measuring the choices add. Nothing is written.

    Returns:
        0.

    Raises:
        ValueError: If an argument is not admissible, or the device is not here.
        OSError: If the output cannot be written.
    """
    from nslightning.choices import named_choices

    named = named_choices(choices or [])
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1; given {batch_size}")
    if widths and backbone != "paper/fc":
        raise ValueError(f"widths are of the hidden layers of paper/fc; {backbone} has none to set")
    folder = expanded(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output is a folder; {output} is a file")
    if not step:
        check_writable(folder)

    import torch

    from nslightning.arithmetic import Arithmetic
    from nslightning.models.backbones import create_backbone, input_channels
    from nslightning.probes.cost import cost_ratio, cost_scaling
    from nslightning.probes.cost_data import CostReport, CostScaling
    from nslightning.report.cost_figures import plot_cost, plot_scaling
    from nslightning.report.cost_table import scaling_table, table

    Arithmetic().switch()  # float32 means float32
    check_device(device)
    target = torch.device(device)
    dtype = getattr(torch, _DTYPES[precision])
    options = backbone_options or {}
    if step and (widths or not named):
        raise ValueError("step=True measures one network under at least one choice: leave widths out, give --choices")

    def build(**changed: Any) -> Any:
        network = create_backbone(backbone, num_classes, image_shape, **(options | changed))
        return network.to(target, dtype).train()

    if step:
        from nslightning.commands.cost_of_steps import steps

        print(steps(build, (num_classes, image_shape, batch_size, seed), named, repetitions))
        return 0

    result: CostReport | CostScaling
    with torch.random.fork_rng(), progress() as show:
        torch.manual_seed(seed)
        shape = (batch_size, input_channels(backbone, image_shape), *image_shape[1:])
        batch = torch.randn(shape), torch.randint(num_classes, (batch_size,))
        if widths:
            depth = len(options.get("hidden", (1, 1, 1)))
            result = cost_scaling(
                lambda width: build(hidden=(width,) * depth),
                widths,
                batch,
                named,
                repetitions=repetitions,
                name=backbone,
                progress=show,
            )
        else:
            result = cost_ratio(build(), batch, named, repetitions=repetitions, name=backbone, progress=show)
    print(scaling_table(result) if isinstance(result, CostScaling) else table(result))

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:  # complete files only are moved into the folder
        written = [result.save(Path(partial) / f"cost.{ending}") for ending in ("json", "csv")]
        for ending in ("png", "pdf"):
            path = Path(partial) / f"cost.{ending}"
            if isinstance(result, CostScaling):
                written.append(plot_scaling({backbone: result}, path))
            else:
                written.append(plot_cost(result, path))
        for path in written:
            path.replace(folder / path.name)
    print(f"\nWritten to {folder}: {', '.join(path.name for path in written)}")
    return 0
