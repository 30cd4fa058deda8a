"""Turn a folder of images into shards, and hold shards against the folder."""

from __future__ import annotations

import argparse

from nslightning.commands.endings import CallError, ended
from nslightning.commands.plain_parser import Arguments
from nslightning.commands.progress import progress
from nslightning.files import expanded

__all__ = ["main", "make_parser"]


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: The command line, the command's name first.

    Returns:
        The exit status: 0, 1 where the images or the disk are at fault, 2 where the call is.
    """
    parser = make_parser(f"nslightning {argv[0]}")
    arguments = parser.parse_args(argv[1:])
    go_on = "shards that are written stay; the same command goes on"
    return ended(parser.prog, lambda: _shards(arguments), go_on=go_on, output="OUT")


def _shards(arguments: argparse.Namespace) -> int:
    from nslightning.data.sharding import convert, verify

    folder, out = arguments.folder, arguments.out
    if out is None and not arguments.verify:
        raise CallError("name the folder to be made: nslightning shards FOLDER OUT; or add --verify")
    if not 1 <= arguments.shard_mb <= 1024:
        raise CallError(f"--shard-mb={arguments.shard_mb} is to be from 1 to 1024")
    with progress() as show:
        if out is None:
            out, folder = folder, None
        else:
            manifest = convert(folder, out, round(arguments.shard_mb * 1e6), show)
        if arguments.verify:
            manifest = verify(out, folder, show)
    counts = ", ".join(
        f"{manifest.images[split]:,} images of {split} in {len(shards)} file{'s' * (len(shards) > 1)}"
        for split, shards in manifest.splits.items()
    )
    compared = f", as in {folder}, byte by byte" if folder is not None else ", whole by their sums"
    print(f"{out}: {counts}, {len(manifest.classes)} classes{compared if arguments.verify else ''}")
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
        description="Turn FOLDER/train/<class>/<image>, val and test into a few large files, which --data=ImageFolder "
        "--data.root=OUT reads in place of the folder: the same images in the same order. After an interruption the "
        "same command goes on.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=expanded, metavar="FOLDER", help="The images; with --verify alone, the shards.")
    parser.add_argument("out", type=expanded, nargs="?", metavar="OUT", help="The folder to be made.")
    parser.add_argument("--shard-mb", type=float, default=256, metavar="MB", help="Size of a file, up to 1024.")
    help_ = "Compare counts, classes and every byte with FOLDER; the sums of the files where OUT is left out."
    parser.add_argument("--verify", action="store_true", help=help_)
    return parser
