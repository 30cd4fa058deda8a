"""``nslightning figure``: draw a figure from the results of experiments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_EPILOG = """\
examples:
  nslightning figure --list
  nslightning figure volume-mnist --from results/mnist_volume_relu/small
  nslightning figure fig3 --from results/cifar10_vgg_alpha/small results/cifar10_vgg_beta/small --out figures
  nslightning figure pool-ties

RESULTS is what `nslightning experiment NAME` wrote: <output>/<name>/<scale>, or the results.csv in it.
exit status: 0 done; 2 the command was called wrongly, or the results are not what the figure is drawn from.
"""


def main(argv: Sequence[str]) -> int:
    """Run ``nslightning figure``.

    Args:
        argv: The command line, from the subcommand's name on.

    Returns:
        0; 2 where it was called wrongly or the results do not fit.

    Raises:
        SystemExit: After ``--help`` (0) and for options that are not understood (2).
    """
    parser = argparse.ArgumentParser(
        prog="nslightning figure",
        description="Draw a figure from the results of experiments, as PDF and PNG.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help="the figure; --list tells all")
    parser.add_argument(
        "--from", dest="results", nargs="+", type=Path, default=[], metavar="RESULTS", help="results of experiments"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("figures"), metavar="FOLDER", help="where to (default: figures)"
    )
    parser.add_argument("--list", action="store_true", help="tell every figure, what feeds it and its published one")
    given = parser.parse_args(list(argv[1:]))
    if given.name is None and not given.list:
        parser.error("name a figure, or --list them")
    try:
        from nslightning.experiments.figures import FIGURES, draw, feeding, find

        if given.list:
            for name in FIGURES if given.name is None else (given.name,):
                drawing = find(name)
                fed = ", ".join(feeding(name)) if drawing.needs_results else "no results needed"
                print(f"{name}\n    {drawing.title}\n    from: {fed}\n    paper: {drawing.paper}")
            return 0
        for file in draw(given.name, given.results, given.out):
            print(file)
    except (ImportError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0
