"""``nslightning figure``: draw a figure from the results of experiments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments
from nslightning.files import expanded
from nslightning.spelling import did_you_mean

__all__ = ["main", "make_parser"]

_EPILOG = """\
examples:
  nslightning figure --list
  nslightning figure volume-mnist --from results/mnist_volume_relu/small
  nslightning figure fig3 --from results/cifar10_vgg_alpha/small results/cifar10_vgg_beta/small --out figures
  nslightning figure fig3 --run smoke       # first the experiments that feed it; what is finished is skipped
  nslightning figure all --run small
  nslightning figure pool-ties

RESULTS is what `nslightning experiment NAME` wrote: <output>/<name>/<scale>, or the results.csv in it.
exit status: 0 done; 1 cells of an experiment failed; 2 the command was called wrongly, or the results are not what the
figure is drawn from; 130 after an interruption.
"""


def main(argv: Sequence[str]) -> int:
    """Run ``nslightning figure``.

    Args:
        argv: The command line, from the subcommand's name on.

    Returns:
        0; 1 where cells failed; 2 where it was called wrongly or results do not fit; 130 after an interruption.

    Raises:
        SystemExit: After ``--help`` (0) and for options that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(list(argv[1:]))
    from nslightning.experiments.grid import SCALES

    if options.name is None and not options.list:
        parser.error("name a figure, or --list them")
    if options.run and options.results:
        parser.error("--from draws results, --run makes them first: give one of the two")
    if options.run and options.run not in SCALES:
        hint = did_you_mean(options.run, SCALES)
        parser.error(f"--run {options.run} is not a scale{hint} There are: {', '.join(SCALES)}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file, and is to be a folder")
    if options.name == "all" and not options.run:
        parser.error("all needs --run SCALE; what is finished is skipped")
    return ended(parser.prog, lambda: _figures(options), output="--out=FOLDER")


def _figures(options: argparse.Namespace) -> int:
    from nslightning.experiments.figures import FIGURES, feeding, find

    names = list(FIGURES) if options.name in (None, "all") else [options.name]
    for name in names:
        find(name)
    if options.list:
        for name in names:
            drawing = FIGURES[name]
            fed = ", ".join(feeding(name)) if drawing.needs_results else "no results needed"
            print(f"{name}\n    {drawing.title}\n    from: {fed}\n    paper: {drawing.paper}")
        return 0
    status = _run(options, names) if options.run else 0
    return status if status in (2, 130) else max(status, _draw(options, names))


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: Name of the command in its usage and error messages.

    Returns:
        The parser.
    """
    parser = Arguments(
        prog=prog,
        description="Draw a figure from the results of experiments, as PDF and PNG.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help="the figure, or all; --list prints every name")
    parser.add_argument(
        "--from", dest="results", nargs="+", type=Path, default=[], metavar="RESULTS", help="results of experiments"
    )
    parser.add_argument("--run", metavar="SCALE", help="run the experiments that feed it: smoke, small or paper")
    parser.add_argument(
        "--output", default="results", type=expanded, help="where --run keeps results (default: results)"
    )
    parser.add_argument("--workers", help="for --run, as of `nslightning experiment`")
    parser.add_argument("--device", help="for --run, as of `nslightning experiment`")
    parser.add_argument(
        "--out", type=expanded, default=Path("figures"), metavar="FOLDER", help="where to (default: figures)"
    )
    parser.add_argument("--list", action="store_true", help="print every figure, its experiments and its published one")
    return parser


def _run(options: argparse.Namespace, names: Sequence[str]) -> int:
    """Run the experiments that feed the figures: the worst of their exit statuses."""
    from nslightning.commands import experiment
    from nslightning.experiments.figures import FIGURES, feeding

    words = ["--scale", options.run, "--output", str(options.output), "--compare"]
    for option in ("workers", "device"):
        if getattr(options, option) is not None:
            words += [f"--{option}", getattr(options, option)]
    worst = 0
    for one in dict.fromkeys(e for name in names if FIGURES[name].needs_results for e in feeding(name)):
        status = experiment.main(["experiment", one, *words])
        if status in (2, 130):
            return status
        worst = max(worst, status)
    return worst


def _draw(options: argparse.Namespace, names: Sequence[str]) -> int:
    """Draw the figures; one that cannot be drawn does not keep the others."""
    from nslightning.experiments.figures import draw, feeding

    worst = 0
    for name in names:
        results = options.results
        if options.run:
            folders = [Path(options.output) / e / options.run for e in feeding(name)]
            results = [f for f in folders if (f / "results.csv").is_file()]

        def drawn(name: str = name, results: Sequence[Path] = results) -> int:
            for file in draw(name, results, options.out):
                print(file)
            return 0

        worst = max(worst, ended("nslightning figure", drawn, output="--out=FOLDER"))
    return worst
