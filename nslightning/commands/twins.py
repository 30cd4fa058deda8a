"""``nslightning twins``: train several Jacobian choices in lockstep and measure how far they come apart."""

from __future__ import annotations

import re
from typing import ClassVar

from lightning.pytorch.cli import LightningArgumentParser

from nslightning.callbacks import TwinDivergence
from nslightning.commands import train, training_cli
from nslightning.data import ImageDataModule
from nslightning.models import Twins

__all__ = ["TwinsCLI", "main"]


class TwinsCLI(training_cli.TrainCLI):
    """The command line of ``fit`` for :class:`~nslightning.models.Twins`, with deterministic kernels where they exist.

    It adds ``--divergence``, the options of :class:`~nslightning.callbacks.TwinDivergence`.
    """

    tasks: ClassVar = {"images": (Twins, ImageDataModule, ("num_classes", "image_shape"))}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of ``fit``, and those of the measurement."""
        super().add_core_arguments_to_parser(parser)
        parser.add_lightning_class_args(TwinDivergence, "divergence")
        # "warn" names a kernel that has no deterministic form, and goes on: the control shows what it does.
        parser.set_defaults({"trainer.deterministic": "warn"})

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: dict) -> None:
        super()._add_subcommands(parser, **kwargs)
        fit = self._subcommand_parsers["fit"]
        fit.prog = "nslightning twins"
        assert parser._subcommands_action is not None
        parser._subcommands_action.choices["twins"] = fit  # where errors look for the options there are


def main(argv: list[str]) -> int:
    """Run ``twins``.

    Args:
        argv: The command line from the subcommand on.

    Returns:
        The exit status: 0, 1 for data that is missing or damaged, 2 for a mistaken call.
    """
    return train.main(_gathered(argv), TwinsCLI)


def _gathered(argv: list[str]) -> list[str]:
    """``--model.choices.beta10.max_pool=10`` as ``--model.choices.beta10={max_pool: 10}``, which the parser takes.

    Example:
        >>> _gathered(["twins", "--model.choices.a.relu=1", "--name", "x", "--model.choices.a.max_pool", "minimal"])
        ['twins', '--name', 'x', '--model.choices.a={relu: 1, max_pool: minimal}']
    """
    rest: list[str] = []
    choices: dict[str, list[str]] = {}
    words = iter(argv)
    for word in words:
        if field_of_choice := re.fullmatch(r"--model\.choices\.([^.=]+)\.(\w+)(?:=(.*))?", word):
            name, field, value = field_of_choice.groups()
            choices.setdefault(name, []).append(f"{field}: {next(words, '') if value is None else value}")
        else:
            rest.append(word)
    return rest + [f"--model.choices.{name}={{{', '.join(fields)}}}" for name, fields in choices.items()]
