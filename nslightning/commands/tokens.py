"""Turn text into the token files that a language model is trained on."""

import argparse
import sys

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

    from nslightning.data import DataError
    from nslightning.data.tokens import prepare

    try:
        meta = prepare(arguments.text, arguments.out, arguments.tokenizer, arguments.val)
    except (DataError, ImportError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DataError) else 2
    counts = ", ".join(f"{count} tokens in {split}.bin" for split, count in meta["tokens"].items())
    print(f"{arguments.out}: {counts}, vocabulary {meta['vocab_size']}")
    return 0


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The command's parser.

    Args:
        prog: What the command is called.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Turn text files into train.bin, val.bin and meta.json for nslightning.data.TokenFile.",
        allow_abbrev=False,
    )
    parser.add_argument("--text", nargs="+", type=expanded, required=True, metavar="FILE", help="One document each.")
    parser.add_argument("--out", type=expanded, required=True, metavar="DIR", help="The folder to be made.")
    parser.add_argument("--tokenizer", default="bytes", metavar="bytes|FILE", help="Or a tokenizer.json file.")
    parser.add_argument("--val", type=float, default=0.1, help="Fraction of each file for validation.")
    return parser
