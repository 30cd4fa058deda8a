"""A W&B workspace with the panels that runs of nslightning fill: loss, divergence, layers, ties, twins, settings."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments
from nslightning.commands.report import check_output
from nslightning.files import expanded, write_text

__all__ = ["main", "make_parser"]

_EPILOG = """\
examples:
  nslightning dashboard --entity my-team --out dashboard.json    # look at it first; no connection, no account
  nslightning dashboard --entity my-team --apply                 # make the view at W&B

Without W&B, `nslightning report RUN...` shows the same from run folders.
exit status: 0 done; 1 W&B refused; 2 the command was called wrongly.
"""


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line, the command's name first.

    Returns:
        The exit status: 0; 1 where W&B cannot be reached or refuses; 2 where the call is mistaken.

    Raises:
        SystemExit: After ``--help`` (0) and for options that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(argv[1:])
    return ended(parser.prog, lambda: _define(options), output="--out=FILE")


def _define(options: argparse.Namespace) -> int:
    if not options.apply:
        check_output(options.out)
    from nslightning import dashboard

    if options.apply:
        print(dashboard.apply(options.entity, options.project, options.name))
        return 0
    content = dashboard.definition(options.entity, options.project, options.name)
    write_text(options.out, json.dumps(content, indent=2) + "\n")
    print(f"{options.out}: written; --apply makes the view at W&B")
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
    add = parser.add_argument
    entity = os.environ.get("WANDB_ENTITY")
    add("--entity", default=entity, required=not entity, metavar="NAME",
        help="your W&B user name or team (default: WANDB_ENTITY)")  # fmt: skip
    add("--project", default="nslightning", metavar="NAME", help="the project of the runs (default: nslightning)")
    add("--name", default="nslightning", metavar="NAME", help="what the view is called (default: nslightning)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--out", type=expanded, default=Path("dashboard.json"), metavar="FILE",
        help="write the definition, which needs no connection (default: dashboard.json)",
    )  # fmt: skip
    target.add_argument("--apply", action="store_true", help="make the view at W&B instead")
    return parser
