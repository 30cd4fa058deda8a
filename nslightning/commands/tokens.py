"""Turn text into the token files that a language model is trained on."""

import argparse

from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments
from nslightning.files import expanded

__all__ = ["main", "make_parser"]


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line, the command's name first.

    Returns:
        The exit status: 0, 1 where the text is at fault, 2 where the call is.
    """
    parser = make_parser(f"nslightning {argv[0]}")
    arguments = parser.parse_args(argv[1:])
    return ended(parser.prog, lambda: _tokens(arguments), output="--out=FOLDER")


def _tokens(arguments: argparse.Namespace) -> int:
    from nslightning.data.tokens import prepare

    meta = prepare(arguments.text, arguments.out, arguments.tokenizer, arguments.val)
    counts = ", ".join(f"{count} tokens in {split}.bin" for split, count in meta["tokens"].items())
    print(f"{arguments.out}: {counts}, vocabulary {meta['vocab_size']}")
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
        description="Turn text files into train.bin, val.bin and meta.json for nslightning.data.TokenFile.",
        allow_abbrev=False,
    )
    parser.add_argument("--text", nargs="+", type=expanded, required=True, metavar="FILE", help="One document each.")
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="The folder to be made.")
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|FILE", help="Or a tokenizer.json file.")
    parser.add_argument("--val", type=float, default=0.1, help="Fraction of each file for validation.")
    return parser
