"""``nslightning experiment``: run a grid, go on with it, hold it against the papers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nslightning.commands.devices import check_device
from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments
from nslightning.commands.wandb_sweep import log_cells, wandb_sweeps
from nslightning.files import expanded, write_text
from nslightning.spelling import did_you_mean

if TYPE_CHECKING:
    from nslightning.experiments import Experiment

__all__ = ["main", "make_parser", "pairs_of"]

_EPILOG = """\
examples:
  nslightning experiment --list                                                # the packaged experiments
  nslightning experiment configs/experiments/mnist_lenet_beta.yaml --scale smoke
  nslightning experiment mnist_lenet_beta --scale small --workers 2 --compare
  nslightning experiment mnist_lenet_beta --scale small --only precision=32 --only rule=exact
  nslightning experiment configs/experiments/*.yaml --scale smoke --workers 1  # all of them
  nslightning experiment mnist_lenet_beta --scale paper --set shared_lr=true --device cuda --workers 4
  nslightning experiment mnist_lenet_beta --scale paper --executor ray --gpus-per-cell 0.25
  nslightning experiment mnist_lenet_beta --executor submitit --executor-option slurm_partition=gpu --workers 64
  nslightning experiment mnist_lenet_beta --scale small --wandb-sweep sweep.yaml  # the grid as a W&B sweep

A call skips finished cells, and computes those that failed or were interrupted.
"""


def main(argv: Sequence[str]) -> int:
    """Run ``nslightning experiment``.

    Args:
        argv: The command line, from the subcommand's name on.

    Returns:
        0; 1 where cells failed; 2 where it was called wrongly; 130 after an interruption.
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(list(argv[1:]))
    if not options.files and not options.list:
        parser.error("name an experiment, or --list them")
    if not options.files and (options.only or options.set or options.wandb_sweep is not None):
        parser.error("--only, --set and --wandb-sweep are for the cells of an experiment: name it")
    work = _read_and_run if options.files else _list_packaged
    return ended(parser.prog, lambda: work(options), go_on="the same command goes on")


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: Name of the command in its usage and error messages.

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
    parser.add_argument(
        "files", nargs="*", metavar="FILE",
        help="a YAML file, or the name of a packaged experiment; --list alone prints every name",
    )  # fmt: skip
    parser.add_argument("--scale", default="small", help="smoke, small (default) or paper")
    parser.add_argument("--output", default="results", type=expanded, help="where results are kept (default: results)")
    parser.add_argument("--workers", type=int, help="cells side by side; by default as many as cores and memory take")
    parser.add_argument("--executor", default="local", help="local (default), ray or submitit: who computes the cells")
    parser.add_argument("--gpus-per-cell", type=float, help="share of a GPU that a cell takes, such as 0.25")
    parser.add_argument(
        "--executor-option", action="append", default=[], metavar="KEY=VALUE",
        help="an option of the executor, such as timeout_min=60 (submitit) or address=auto (Ray)",
    )  # fmt: skip
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
    parser.add_argument("--wandb-sweep", metavar="FILE", help="write the grid as a W&B sweep; run nothing")
    parser.add_argument(
        "--list", action="store_true",
        help="list the cells and whether they are finished; without FILE, the packaged experiments with their "
        "number of cells at --scale; run nothing",
    )  # fmt: skip
    return parser


def _read_and_run(options: argparse.Namespace) -> int:
    from nslightning.experiments import Experiment  # after --help

    overrides = {k: v[-1] for k, v in pairs_of(options.set, "--set").items()}
    quirks = options.as_published
    experiments = [Experiment.read(_experiment_file(file), options.scale, overrides, quirks) for file in options.files]
    return max(_run(experiment, options) for experiment in experiments)


def _list_packaged(options: argparse.Namespace) -> int:
    """Print each packaged experiment: its name, its title, and how many cells it has."""
    from nslightning.experiments import Experiment

    packaged = _packaged()
    width = max(map(len, packaged))
    for name, file in packaged.items():
        experiment = Experiment.read(file, options.scale, as_published=options.as_published)
        print(f"{name:<{width}}  {len(experiment.cells()):>4} cells  {experiment.title}")
    print(f"{len(packaged)} experiments, at the scale {options.scale}")
    return 0


def _run(experiment: Experiment, options: argparse.Namespace) -> int:
    from nslightning.experiments import collect, comparison, folder_of, markdown, run
    from nslightning.experiments.collecting import finished, recorded
    from nslightning.experiments.data import download

    only = pairs_of(options.only, "--only")
    folder = folder_of(experiment, options.output)
    if options.wandb_sweep is not None:
        return _write_sweeps(experiment, options)
    if options.list:
        cells, done = experiment.cells(only), finished(folder) | recorded(folder)
        for planned in cells:
            varied = ", ".join(f"{k}={v}" for k, v in planned.varied.items())
            print(f"{planned.id} {'finished' if planned.id in done else 'missing '} {varied}")
        print(f"{len(cells)} cells")
        return 0
    device = _device(options.device, options.workers)
    if options.download == "true":
        wanted = [planned.cell for planned in experiment.cells(only)]
        for data, settings in {(cell.data, tuple(sorted(cell.data_options.items()))) for cell in wanted}:
            download(data, settings)
    report = run(
        experiment,
        options.output,
        workers=options.workers,
        device=device,
        only=only,
        progress=sys.stderr,
        executor=options.executor,
        gpus_per_cell=options.gpus_per_cell,
        executor_options={k: v[-1] for k, v in pairs_of(options.executor_option, "--executor-option").items()},
    )
    failed = f", {len(report.failed)} failed (cells/*.error say why; the same command tries again)"
    print(
        f"{report.folder}: {report.planned} cells, {report.skipped} finished before, {report.computed} computed"
        f"{failed if report.failed else ''}"
    )
    if os.environ.get("WANDB_SWEEP_ID"):  # an agent of W&B's runs this call as one run of its sweep
        log_cells(experiment, options.output, only)
    if options.compare:
        text = markdown(experiment, compared := comparison(experiment, collect(experiment, options.output)))
        write_text(folder / "comparison.md", text)
        write_text(folder / "comparison.csv", compared.to_csv(index=False, float_format="%.6g"))
        print(f"\n{text}")
    return 1 if report.failed else 0


def _write_sweeps(experiment: Experiment, options: argparse.Namespace) -> int:
    """Write the grid as W&B's sweeps, one for each of its grids."""
    import yaml

    experiment.cells()  # refuses what is not admissible
    if len(options.files) > 1:
        raise ValueError("--wandb-sweep takes one experiment")
    words = [options.files[0], f"--scale={options.scale}", f"--output={options.output}"]
    words += [f"--set={word}" for word in options.set] + ["--as-published"] * options.as_published
    sweeps, path = wandb_sweeps(experiment, words), Path(options.wandb_sweep)
    for number, sweep in enumerate(sweeps, 1):
        file = path if len(sweeps) == 1 else path.with_stem(f"{path.stem}-{number}")
        write_text(file, yaml.safe_dump(sweep, sort_keys=False))
        print(f"{file}: start it with `wandb sweep {file}`, then `wandb agent` on each machine")
    return 0


def _experiment_file(file: str) -> Path:
    """The file, or the packaged experiment of that name."""
    if Path(file).is_file():
        return Path(file)
    name = file.replace("\\", "/").removeprefix("./").removeprefix("configs/").removeprefix("experiments/")
    packaged = _packaged()
    name = name.removesuffix(".yaml")
    if name not in packaged:
        raise ValueError(
            f"there is no file {file}, and no packaged experiment of that name{did_you_mean(name, packaged)} "
            f"There are: {', '.join(packaged)}"
        )
    return packaged[name]


def _packaged() -> dict[str, Path]:
    """The files of the packaged experiments, by name."""
    from nslightning import configs

    folder = Path(configs.__file__).parent / "experiments"
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def pairs_of(words: Sequence[str], option: str) -> dict[str, list[Any]]:
    """Read words such as ``precision=32``.

    Args:
        words: The words; ``--only`` takes several values with ``|`` between them, or a mapping as JSON.
        option: The option that takes them.

    Returns:
        The values, by key.

    Raises:
        ValueError: For a word that is no such pair.

    Example:
        >>> pairs_of(["precision=16|32", "rule=exact"], "--only")
        {'precision': [16, 32], 'rule': ['exact']}
    """
    import yaml

    pairs: dict[str, list[Any]] = {}
    for word in words:
        if word.startswith("{") and option == "--only":  # how W&B's agents give the values of a run
            pairs |= {key: [value] for key, value in json.loads(word).items()}
            continue
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"{option} takes KEY=VALUE, such as {option} precision=32; given {word!r}")
        values = value.split("|") if option == "--only" else [value]
        try:
            pairs.setdefault(key, []).extend(yaml.safe_load(v) for v in values)
        except yaml.YAMLError:
            raise ValueError(f"{option} {word}: the value is no YAML, such as 32, exact or {{a: 1}}") from None
    return pairs


def _device(device: str | None, workers: int | None) -> str:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if device == "cpu" and workers == 1:
        torch.set_num_threads(1)  # as each of several processes would have
    return device
