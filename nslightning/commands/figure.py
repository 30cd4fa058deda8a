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
    given = parser.parse_args(list(argv[1:]))
    from nslightning.experiments.grid import SCALES

    if given.name is None and not given.list:
        parser.error("name a figure, or --list them")
    if given.run and given.results:
        parser.error("--from draws results that are there, --run makes them: give one of the two")
    if given.run and given.run not in SCALES:
        parser.error(f"--run {given.run} is no scale{did_you_mean(given.run, SCALES)} There are: {', '.join(SCALES)}")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out {given.out} is a file, and is to be a folder")
    if given.name == "all" and not given.run:
        parser.error("all needs --run SCALE; what is finished is skipped")
    return ended(parser.prog, lambda: _figures(given), output="--out=FOLDER")


def _figures(given: argparse.Namespace) -> int:
    from nslightning.experiments.figures import FIGURES, feeding, find

    names = list(FIGURES) if given.name in (None, "all") else [given.name]
    for name in names:
        find(name)
    if given.list:
        for name in names:
            drawing = FIGURES[name]
            fed = ", ".join(feeding(name)) if drawing.needs_results else "no results needed"
            print(f"{name}\n    {drawing.title}\n    from: {fed}\n    paper: {drawing.paper}")
        return 0
    status = _run(given, names) if given.run else 0
    return status if status in (2, 130) else max(status, _draw(given, names))


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: What the command is called.

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
    parser.add_argument("name", nargs="?", help="the figure, or all; --list tells every name")
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
    parser.add_argument("--list", action="store_true", help="tell every figure, what feeds it and its published one")
    return parser


def _run(given: argparse.Namespace, names: Sequence[str]) -> int:
    """Run the experiments that feed the figures: the worst of their exit statuses."""
    from nslightning.commands import experiment
    from nslightning.experiments.figures import FIGURES, feeding

    options = ["--scale", given.run, "--output", str(given.output), "--compare"]
    for option in ("workers", "device"):
        if getattr(given, option) is not None:
            options += [f"--{option}", getattr(given, option)]
    worst = 0
    for one in dict.fromkeys(e for name in names if FIGURES[name].needs_results for e in feeding(name)):
        status = experiment.main(["experiment", one, *options])
        if status in (2, 130):
            return status
        worst = max(worst, status)
    return worst


def _draw(given: argparse.Namespace, names: Sequence[str]) -> int:
    """Draw the figures; one that cannot be drawn does not keep the others."""
    from nslightning.experiments.figures import draw, feeding

    worst = 0
    for name in names:
        results = given.results
        if given.run:
            folders = [Path(given.output) / e / given.run for e in feeding(name)]
            results = [f for f in folders if (f / "results.csv").is_file()]

        def drawn(name: str = name, results: Sequence[Path] = results) -> int:
            for file in draw(name, results, given.out):
                print(file)
            return 0

        worst = max(worst, ended("nslightning figure", drawn, output="--out=FOLDER"))
    return worst
