"""LightningCLI of the training commands: their options, and the work before and after."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import nslightning.optim  # noqa: F401 # so that INNA and INNAprop are known by their bare names
from nslightning.callbacks import NonsmoothPatch, RunRecord
from nslightning.choices import choice_label
from nslightning.commands import checkpoint_fit, trainer_options, trainer_parts, wandb_run
from nslightning.commands.config_parser import HelpfulErrors
from nslightning.commands.endings import CallError
from nslightning.commands.epoch_ends import EpochEnds
from nslightning.commands.going_on import Start
from nslightning.commands.predictions import PredictionsFile
from nslightning.commands.run_callbacks import LoggerNotes, MovedRun, StopWhenAsked, makes_again
from nslightning.commands.run_place import RunPlace
from nslightning.commands.stopping import Signals
from nslightning.data import ImageDataModule, TokenFile
from nslightning.files import replacing, utf8
from nslightning.models import ImageClassifier, LanguageModel
from nslightning.surgery import selections

__all__ = ["TASKS", "Parser", "TrainCLI", "training_parser"]


#: For each value of ``--task``: the model, the data modules that it takes, and its arguments that the data set.
TASKS: dict[str, tuple[type[LightningModule], type[LightningDataModule], tuple[str, ...]]] = {
    "images": (ImageClassifier, ImageDataModule, ("num_classes", "image_shape")),
    "text": (LanguageModel, TokenFile, ("vocab_size", "block_size")),
    "own": (LightningModule, LightningDataModule, ()),  # any, by class path
}


class Parser(HelpfulErrors, LightningArgumentParser):
    """Lightning's parser with helpful errors."""


class TrainCLI(LightningCLI):
    """Lightning's command line for :class:`~nslightning.models.ImageClassifier`, or for your own LightningModule.

    It adds one folder per run, in which it goes on with ``--ckpt_path=last``, under its own config; flags win
    over a checkpoint's hyperparameters; fp16 mixed precision on a CPU.
    """

    tasks: ClassVar[dict[str, Any]] = TASKS
    program: ClassVar[str | None] = None  # the command that a person typed, where it is another one
    silent_stop: ClassVar[bool] = False  # whether the command that runs this one says how it goes on
    # Set by `train.main`, before Lightning's constructor does everything.
    task = "images"
    start: Start
    signals: Signals
    place: RunPlace
    stopper: StopWhenAsked | None = None
    _notes: Sequence[str] = ()  # of the loggers, said when the run begins

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options for a run's seed, task, name, arithmetic and folder."""
        seed = "Seed of the initial weights, the order of the images, their augmentation and dropout."
        parser.add_argument("--seed_everything", type=int, default=0, help=seed)
        task = "The task: to train a backbone, GPT-2, or your own LightningModule, which --model=CLASS_PATH implies."
        parser.add_argument("--task", type=Literal["images", "text", "own"], default=self.task, help=task)
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; by default the config's.")
        words = "How sums are ordered and rounded, and switches, joined by +: bias_last, random_rounding, tf32, ..."
        parser.add_argument("--arithmetic", type=str, default="native", help=words)
        parser.add_argument("--output", type=str, default="runs", help="Where run folders are kept.")

    def setup_parser(self, *args: Any) -> None:
        """Build the parsers; their errors name the command that a person typed."""
        super().setup_parser(*args)
        if self.program is not None:
            for parser in self._subcommand_parsers.values():
                parser.prog = f"nslightning {self.program}"

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of model and data before those of the trainer, which fill pages of ``--help``."""
        model, data, _ = self.tasks[self.task]
        own = self.task == "own"
        parser.add_lightning_class_args(model, "model", subclass_mode=own)
        parser.add_lightning_class_args(data, "data", subclass_mode=True, required=not own)
        parser.add_lightning_class_args(Trainer, "trainer")
        # Of a patched network the patch report says more than a table of its one child module.
        parser.set_defaults({"trainer.enable_model_summary": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the options that follow from other options."""
        for attribute in self.tasks[self.task][2]:
            parser.link_arguments(f"data.{attribute}", f"model.{attribute}", apply_on="instantiate")
        if self.task != "own":
            parser.link_arguments("seed_everything", "data.init_args.seed")
            parser.link_arguments("seed_everything", "model.seed")

    def _parse_ckpt_path(self) -> None:
        """Check the parsed options. Flags and config win over a checkpoint's hyperparameters, unlike in Lightning."""
        config = self.config[self.config.subcommand]
        for group, example in (("trainer", "max_epochs=3"), ("model", "backbone=paper/lenet5")):
            if not isinstance(config.get(group), Namespace):
                value = config.get(group)
                raise CallError(f"--{group}={value} is not a mapping of options, such as --{group}.{example}")
        choice = config.model.get("jacobians")
        if self.task != "own" and not isinstance(choice, (Namespace, type(None))):
            raise CallError(f"--model.jacobians={choice} is not a choice, such as {{relu: 1}}, relu=1 or jax")
        if not config.output:
            raise CallError("--output= names no folder: give --output=FOLDER, or leave it out for runs")
        config.name = config.name or self.start.name
        config.output = str(Path(config.output).expanduser())
        config.ckpt_path = None if self.start.checkpoint or config.ckpt_path == "last" else config.ckpt_path
        if Path(config.name).name != config.name:
            raise ValueError(f"--name={config.name} is to be the name of one folder in --output={config.output}")
        for option in ("name", "output"):
            if not utf8(text := getattr(config, option)):
                raise ValueError(
                    f"--{option}={text} is no UTF-8, and PyTorch opens no checkpoint there: give another --{option}"
                )
        if not 0 <= config.seed_everything < 2**32:
            raise ValueError(f"--seed_everything={config.seed_everything} is to be from 0 to 2**32 - 1")
        if self.task != "own" and config.model.get("jacobians", "") is None:
            raise ValueError(
                "--model.jacobians=null names no choice: leave it out for PyTorch's own, or name one, such as "
                "--model.jacobians.relu=1 or --model.jacobians=jax"
            )
        trainer_options.check(config.trainer, self.config.subcommand)
        if self.start.checkpoint is None and config.ckpt_path is None and self.config.subcommand != "fit":
            rank_zero_warn("no --ckpt_path was given: the weights are the initial ones")

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and point the loggers to it."""
        config = self.config[self.subcommand]
        if self.subcommand != "fit":
            config.trainer.logger = False
            if self.subcommand == "predict":  # one process sees all images, in order
                config.trainer.devices, config.trainer.num_nodes, config.trainer.strategy = 1, 1, "auto"
            return
        trainer_options.say_what_is_slow(config.trainer, self._network())
        trainer_options.say_what_hangs()
        if config.trainer.fast_dev_run:
            self.place.take_scratch()
            return
        if self.start.folder is not None:
            checkpoint_fit.check_optimizer(self._plain_config(), self.start.folder)
        folder = self.place.take(config.output, config.name, self.start.folder)
        # config.yaml keeps what was asked for: a new run of it must not take this one's place in W&B.
        self._loggers_asked = copy.deepcopy(config.trainer.logger)
        config.trainer.logger, self._notes = wandb_run.prepared(config.trainer.logger, folder, self._tags())

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add what every run has: its own folder, the metrics file, seeds per step, the record, an orderly stop."""
        trainer, config = self._get(self.config_init, "trainer"), self.config[self.subcommand]
        folder = self.place.folder
        # There Lightning looks for what a SLURM job left: never in the folder that the command was started in.
        trainer.default_root_dir = str(folder or Path(config.output, config.name))
        if self.subcommand == "fit":
            if not self.place.scratch:
                config.trainer.logger = self._loggers_asked
            self.__dict__.pop("config_dump", None)  # of the loggers that point into this run's folder
            self._dump_config()
            record = RunRecord(self.config_dump, config.seed_everything, sys.argv[2:], self.start.checkpoint)
            trainer_parts.for_a_training(trainer, config.arithmetic, config.seed_everything, record, folder)
        else:
            trainer_parts.for_an_evaluation(trainer, config.arithmetic)
        trainer_parts.with_half_precision_on_a_cpu(trainer)
        try:
            made = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # how Lightning refuses a value
            raise ValueError(str(error)) from error
        trainer_parts.whole_checkpoints(made)
        if self.subcommand == "fit":
            self.stopper = StopWhenAsked(self.signals, None if self.place.scratch else folder)
            moved = [] if self.start.folder is None else [MovedRun(self.start.folder)]
            made.callbacks += [*moved, LoggerNotes(self._notes), EpochEnds(), self.stopper]  # type: ignore[attr-defined] # by a connector
        return made

    def _network(self) -> str:
        """The network that is trained, by its name."""
        model = self.config[self.subcommand].model
        return str(model.get("backbone") or model.get("size") or model.get("class_path"))

    def _tags(self) -> list[str]:
        """Return the tags of a run in W&B: its network, data, precision and choice."""
        config = self.config[self.subcommand]
        data = str((config.get("data") or {}).get("class_path", "")).rpartition(".")[2]
        choice = config.model.get("jacobians")
        fields = choice.as_dict() if isinstance(choice, Namespace) else None
        return [
            part
            for part in (self._network(), data, str(config.trainer.precision or "32-true"), choice_label(fields))
            if part and part != "unknown"
        ]

    def _dump_config(self) -> None:
        super()._dump_config()
        self.config_dump = makes_again(self.config_dump)

    def _plain_config(self) -> dict[str, Any]:
        """The config as ``config.yaml`` holds it."""
        parser = self._parser(self.subcommand)
        content: dict[str, Any] = yaml.safe_load(parser.dump(self.config[self.subcommand], skip_unset=False))
        return content

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another network or choice, before anything is written."""
        if not self.start.content:
            return
        checkpoint_fit.check_network(self.start, self.model)
        with warnings.catch_warnings():  # which the run itself gives, when it loads the checkpoint
            warnings.simplefilter("ignore")
            self.model.on_load_checkpoint(self.start.content)
        self.start.content = {}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Here and not in the config, so that config.yaml keeps what makes the run again.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self.start.checkpoint is not None or not str(kwargs.get("ckpt_path")).startswith("registry"):
            kwargs["ckpt_path"] = None if self.start.checkpoint is None else str(self.start.checkpoint)
        return kwargs

    def before_fit(self) -> None:
        """Read the data before anything of the run is written: a missing file is named first."""
        if not self.trainer.is_global_zero:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        if not selections(self.model) and not any(isinstance(c, NonsmoothPatch) for c in callbacks):
            rank_zero_warn(
                f"{type(self.model).__name__} is not patched and trains with PyTorch's own derivatives; "
                "--trainer.callbacks+=NonsmoothPatch patches it"
            )
        if isinstance(self.datamodule, (ImageDataModule, TokenFile)):
            self._read(self.datamodule)

    def _read(self, data: ImageDataModule | TokenFile) -> None:
        """Read the data, and name the network and the data."""
        data.prepare_data()
        data.setup("fit")
        counts = ", ".join(f"{n:,} {split}" for split, n in data.provenance["counts"].items())
        parameters = sum(p.numel() for p in self.model.parameters())
        title = getattr(self.model, "title", type(self.model).__name__)
        rank_zero_info(f"{title} ({parameters:,} parameters) on {data.name} ({counts} {data.summary})")

    def after_fit(self) -> None:
        """Say where the results are."""
        folder = self.place.folder
        if self.place.scratch or not self.trainer.is_global_zero or folder is None:
            return
        best = {k: f"{v:.4f}" for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        said = [f"{k}={v}" for k, v in best.items()]
        if not self.began:
            step, most = self.trainer.global_step, self.trainer.max_steps
            limit = "max_steps" if 0 <= most <= step else "max_epochs"
            said.append(f"no step was left after step {step}; a larger --trainer.{limit} trains on")
        rank_zero_info(f"{folder}: {' '.join(said)}")
        rank_zero_info("  " + "  ".join(sorted(f.name for f in folder.iterdir() if f.name[0] != ".")))

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write one row per image."""
        config = self.config[self.subcommand]
        run = self.start.checkpoint.parent.parent if self.start.checkpoint else None
        folder = run if run and (run / "config.yaml").is_file() else Path(config.output, config.name)
        folder.mkdir(parents=True, exist_ok=True)
        if self.task == "own":  # of any form
            if batches := self.trainer.predict(**kwargs):
                with replacing(folder / "predictions.pt") as partial:
                    torch.save(batches, partial)
                rank_zero_info(f"The predictions of {len(batches)} batches in {folder / 'predictions.pt'}")
            return
        writer = PredictionsFile(folder / "predictions.csv")
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined] # a list
        self.trainer.predict(**kwargs | {"return_predictions": False})
        if writer.count:
            rank_zero_info(f"{writer.count} predictions in {writer.file}")

    @property
    def began(self) -> bool:
        """Return whether a training step was begun."""
        return self.stopper is not None and self.stopper.began


class _ParserMade(Exception):  # noqa: N818 # not an error: the parser is there, and nothing is to run
    pass


def training_parser(task: str = "images", cli_class: type[TrainCLI] = TrainCLI) -> ArgumentParser:
    """The parser of a training command, without anything to run.

    Args:
        task: One of the class's tasks.
        cli_class: The command's class.

    Returns:
        The parser.
    """

    class ParserOnly(cli_class):  # type: ignore[misc, valid-type] # the class is an argument
        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            raise _ParserMade

    cli = ParserOnly.__new__(ParserOnly)
    cli.task = task
    with suppress(_ParserMade):
        cli.__init__(  # type: ignore[misc] # as in `train.main`
            *cli_class.tasks[task][:2],
            subclass_mode_model=task == "own",
            subclass_mode_data=True,
            save_config_callback=None,
            parser_class=Parser,
            auto_configure_optimizers=False,
            args=["fit"],
        )
    made: ArgumentParser = cli._parser("fit")
    return made
