"""``nslightning experiment``: run a grid, go on with it, hold it against the papers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.commands.devices import check_device
from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments
from nslightning.files import expanded, write_text
from nslightning.spelling import did_you_mean

if TYPE_CHECKING:
    from nslightning.experiments import Experiment

__all__ = ["main", "make_parser"]

_EPILOG = """\
examples:
  nslightning experiment configs/experiments/mnist_lenet_beta.yaml --scale smoke
  nslightning experiment mnist_lenet_beta --scale small --workers 2 --compare
  nslightning experiment mnist_lenet_beta --scale small --only precision=32 --only rule=exact
  nslightning experiment configs/experiments/*.yaml --scale smoke --workers 1  # all of them, in a minute
  nslightning experiment mnist_lenet_beta --scale paper --set shared_lr=true --device cuda --workers 4

What is finished is skipped; what failed or was interrupted is computed by the next call.
"""


def main(argv: Sequence[str]) -> int:
    """Run ``nslightning experiment``.

    Args:
        argv: The command line, from the subcommand's name on.

    Returns:
        0; 1 where cells failed; 2 where it was called wrongly; 130 after an interruption.
    """
    parser = make_parser(f"nslightning {argv[0]}")
    given = parser.parse_args(list(argv[1:]))
    return ended(parser.prog, lambda: _read_and_run(given), go_on="the same command goes on")


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: What the command is called.

    Returns:
        The parser.
    """
    parser = Arguments(
        prog=prog,
        description="Run an experiment: a grid of runs, one YAML file.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a YAML file, or the name of a packaged experiment")
    parser.add_argument("--scale", default="small", help="smoke, small (default) or paper")
    parser.add_argument("--output", default="results", type=expanded, help="where results are kept (default: results)")
    parser.add_argument("--workers", type=int, help="processes side by side; by default one per core, or 4 on a GPU")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    parser.add_argument(
        "--download", nargs="?", const="true", default="false", choices=("true", "false"),
        help="fetch data that are not there",
    )  # fmt: skip
    parser.add_argument("--compare", action="store_true", help="print and write the table beside the published numbers")
    parser.add_argument(
        "--only", action="append", default=[], metavar="KEY=VALUE[|VALUE]", help="only the cells with these values"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that wins over the file's"
    )
    parser.add_argument(
        "--as-published",
        action="store_true",
        help="the released procedure: its rule, loss in half, evaluation precision, shared loss scaler, NaN handling, "
        "the rate of beta = 0 for all, nothing held out",
    )
    parser.add_argument("--list", action="store_true", help="list the cells and whether they are finished; run nothing")
    return parser


def _read_and_run(given: argparse.Namespace) -> int:
    from nslightning.experiments import Experiment  # after --help

    overrides = {k: v[-1] for k, v in _pairs(given.set, "--set").items()}
    quirks = given.as_published
    experiments = [Experiment.read(_found(file), given.scale, overrides, quirks) for file in given.files]
    return max(_run(experiment, given) for experiment in experiments)


def _run(experiment: Experiment, given: argparse.Namespace) -> int:
    from nslightning.experiments import collect, comparison, folder_of, markdown, run
    from nslightning.experiments.data import download

    only = _pairs(given.only, "--only")
    folder = folder_of(experiment, given.output)
    if given.list:
        cells = experiment.cells(only)
        for planned in cells:
            done = (folder / "cells" / f"{planned.id}.json").exists()
            what = ", ".join(f"{k}={v}" for k, v in planned.varied.items())
            print(f"{planned.id} {'finished' if done else 'missing '} {what}")
        print(f"{len(cells)} cells")
        return 0
    device, workers = _resources(given.device, given.workers)
    if given.download == "true":
        wanted = [planned.cell for planned in experiment.cells(only)]
        for data, options in {(cell.data, tuple(sorted(cell.data_options.items()))) for cell in wanted}:
            download(data, options)
    report = run(experiment, given.output, workers=workers, device=device, only=only, progress=sys.stderr)
    failed = f", {len(report.failed)} failed (cells/*.error say why; the same command tries again)"
    print(
        f"{report.folder}: {report.planned} cells, {report.skipped} finished before, {report.computed} computed"
        f"{failed if report.failed else ''}"
    )
    if given.compare:
        text = markdown(experiment, compared := comparison(experiment, collect(experiment, given.output)))
        write_text(folder / "comparison.md", text)
        write_text(folder / "comparison.csv", compared.to_csv(index=False, float_format="%.6g"))
        print(f"\n{text}")
    return 1 if report.failed else 0


def _found(file: str) -> Path:
    """The file, or the packaged experiment of that name."""
    from nslightning import configs

    if Path(file).is_file():
        return Path(file)
    name = file.replace("\\", "/").removeprefix("./").removeprefix("configs/").removeprefix("experiments/")
    folder = Path(configs.__file__).parent / "experiments"
    packaged = {f.stem: f for f in sorted(folder.glob("*.yaml"))}
    name = name.removesuffix(".yaml")
    if name not in packaged:
        raise ValueError(
            f"there is no file {file}, and no packaged experiment of that name{did_you_mean(name, packaged)} "
            f"There are: {', '.join(packaged)}"
        )
    return packaged[name]


def _pairs(given: Sequence[str], option: str) -> dict[str, list[Any]]:
    import yaml

    found: dict[str, list[Any]] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"{option} takes KEY=VALUE, such as {option} precision=32; given {word!r}")
        values = value.split("|") if option == "--only" else [value]
        try:
            found.setdefault(key, []).extend(yaml.safe_load(v) for v in values)
        except yaml.YAMLError:
            raise ValueError(f"{option} {word}: the value is no YAML, such as 32, exact or {{a: 1}}") from None
    return found


def _resources(device: str | None, workers: int | None) -> tuple[str, int]:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 4 if device.startswith("cuda") else cores
    if device == "cpu" and workers == 1:
        torch.set_num_threads(1)  # as each of several processes would have
    return device, workers
