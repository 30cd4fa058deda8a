"""JSON schemas of configs and experiment files, from which an editor completes and checks them."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from nslightning.commands.endings import CallError, ended
from nslightning.commands.plain_parser import Arguments
from nslightning.files import expanded, write_text

__all__ = ["KINDS", "main", "make_parser", "schema"]

_EPILOG = """\
examples:
  nslightning schema config                          # where the packaged schema is
  nslightning schema config --out config.json        # made of what is installed, your own classes in --import included
  nslightning schema experiment --out experiment.json

The first line of a YAML file tells an editor with the YAML language server which schema it has:
  # yaml-language-server: $schema=PATH
"""

#: The kinds of files that have a schema.
KINDS = ("config", "experiment")


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line, the command's name first.

    Returns:
        The exit status: 0; 2 where the call is mistaken.

    Raises:
        SystemExit: After ``--help`` (0) and for options that are not understood (2).
    """
    parser = make_parser(f"nslightning {argv[0]}")
    arguments = parser.parse_args(argv[1:])
    return ended(parser.prog, lambda: _write(arguments), output="--out=FILE")


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
    parser.add_argument("kind", choices=KINDS, help="which schema: of a config of fit, or of an experiment file")
    parser.add_argument(
        "--out", type=expanded, metavar="FILE", help="generate it from the installed packages, and write it"
    )
    parser.add_argument("--import", dest="modules", nargs="+", default=[], metavar="MODULE",
        help="your own modules, whose callbacks, data and optimizers the schema is to know")  # fmt: skip
    return parser


def _write(arguments: argparse.Namespace) -> int:
    from nslightning import configs

    if arguments.out is None and not arguments.modules:
        print(Path(configs.__file__).parent / "schemas" / f"{arguments.kind}.json")
        return 0
    from nslightning.models.own import current_folder_importable

    with current_folder_importable():
        for module in arguments.modules:
            try:
                import_module(module)
            except ImportError as error:
                raise CallError(
                    f"--import {module} cannot be imported ({error}): name modules as Python does, as my_package.nets, "
                    "from the folder that holds them"
                ) from error
    text = json.dumps(schema(arguments.kind), separators=(",", ":"), sort_keys=True) + "\n"
    if arguments.out is None:
        print(text, end="")
        return 0
    write_text(arguments.out, text)
    print(f"{arguments.out}: written; the first line of a YAML file names it: # yaml-language-server: $schema=PATH")
    return 0


def schema(kind: str) -> dict[str, Any]:
    """Make a schema.

    Args:
        kind: One of :data:`KINDS`.

    Returns:
        The schema as plain data, of draft 2020-12.
    """
    if kind == "experiment":
        from nslightning.experiments.schema import experiment_schema

        return experiment_schema()
    from nslightning.commands.config_schema import config_schema

    return config_schema()
