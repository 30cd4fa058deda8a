"""``nslightning push``: a trained model as the folder of a model hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from nslightning.commands.endings import ended
from nslightning.commands.plain_parser import Arguments
from nslightning.exact_csv import read_exactly
from nslightning.files import expanded

__all__ = ["main", "make_parser"]


def main(argv: Sequence[str]) -> int:
    """Run ``nslightning push``.

    Args:
        argv: The command line, from the subcommand's name on.

    Returns:
        0; 1 where the upload failed; 2 where it was called wrongly.
    """
    parser = make_parser(f"nslightning {argv[0]}")
    options = parser.parse_args(list(argv[1:]))
    return ended(parser.prog, lambda: _push(options))


def make_parser(prog: str) -> Arguments:
    """The command's parser.

    Args:
        prog: Name of the command in its usage and error messages.

    Returns:
        The parser.
    """
    parser = Arguments(
        prog=prog,
        description="Write a trained model as a folder of a model hub: a card, a config and safetensors.",
        epilog="example:\n  nslightning push runs/quickstart/001 my-model\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=expanded, metavar="RUN_FOLDER", help="the folder of a run of fit")
    parser.add_argument("folder", type=expanded, metavar="DEST", help="the folder that is written")
    parser.add_argument("--checkpoint", type=expanded, help="which checkpoint (default: the run's last one)")
    parser.add_argument("--upload", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    return parser


def _push(options: argparse.Namespace) -> int:
    if options.upload is not None:
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise ImportError("--upload needs huggingface_hub: pip install 'nslightning[hub]'") from error
    from nslightning.models.hub import write_hub_folder
    from nslightning.models.weights import read_checkpoint
    from nslightning.runs import last_checkpoint, read_record

    if not options.run.is_dir():
        raise ValueError(f"there is no folder {options.run}: name a run's, such as runs/quickstart/001")
    if (checkpoint := options.checkpoint or last_checkpoint(options.run)) is None:
        raise ValueError(f"{options.run} has no checkpoint: --checkpoint names one")
    step = read_checkpoint(checkpoint).get("global_step", 0)
    metrics = _metrics_at(step, options.run / "metrics.csv")
    write_hub_folder(checkpoint, options.folder, read_record(options.run), metrics)
    print(f"{options.folder}: README.md, config.json, model.safetensors, of {checkpoint}")
    if options.upload is not None:
        api = HfApi()
        api.create_repo(options.upload, exist_ok=True)
        print(api.upload_folder(repo_id=options.upload, folder_path=str(options.folder)))
    return 0


def _metrics_at(step: int, file: Path) -> dict[str, float]:
    """Each metric as it was logged last before a checkpoint; those of single choices, sites and times are left out.

    Args:
        step: Number of optimizer steps behind the checkpoint's weights; a row of step k is of the step after k.
        file: The run's ``metrics.csv``.
    """
    if not file.is_file():
        return {}
    table = read_exactly(file)
    table = table[table["step"] < step]
    names = [name for name in table if str(name).startswith(("train/", "val/", "test/"))]
    return {str(name): float(table[name].dropna().iloc[-1]) for name in names if table[name].notna().any()}
