"""Show what runs recorded: one self-contained HTML page with interactive figures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments
from nslightning.files import expanded, write_text

__all__ = ["main", "make_parser"]

_EPILOG = """\
examples:
  nslightning report runs/quickstart/001
  nslightning report runs/quickstart --out quickstart.html       # all its runs, side by side
  nslightning report runs/quickstart/001 --open                  # and show it

A run may still be going, or have been killed: the page shows what it recorded so far.
exit status: 0 done; 2 the command was called wrongly, or a run's files cannot be read.
"""


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line, the command's name first.

    Returns:
        The exit status: 0; 2 where there is no run to show, its files cannot be read, or the page cannot be written.

    Raises:
        SystemExit: After ``--help`` (0) and for options that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(argv[1:])
    return ended(parser.prog, lambda: _report(options), output="--out=FILE")


def _report(options: argparse.Namespace) -> int:
    check_output(options.out)
    from nslightning.report import find_runs, page, read_run

    runs = [read_run(folder) for folder in find_runs(options.runs)]
    write_text(options.out, page(runs))
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {len(runs)} run{'s' * (len(runs) != 1)}, {size:.1f} MB; open it in any browser")
    if options.open:
        import webbrowser

        if not webbrowser.open(options.out.resolve().as_uri()):
            print(f"there is no browser here: copy {options.out} to a machine that has one", file=sys.stderr)
    return 0


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
    )
    parser.add_argument("runs", nargs="+", type=expanded, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument(
        "--out", type=expanded, default=Path("report.html"), metavar="FILE", help="the page (default: report.html)"
    )
    parser.add_argument("--open", action="store_true", help="show the page in the browser")
    return parser


def check_output(path: Path) -> None:
    """Raise, before any work, if a page cannot be written.

    Args:
        path: The file to be written.

    Raises:
        ValueError: If the file cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"--out takes a file; {path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it first")
