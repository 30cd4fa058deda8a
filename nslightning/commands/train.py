"""``nslightning fit | validate | test | predict``: LightningCLI, with run folders."""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

import nslightning.optim  # noqa: F401 # so that INNA and INNAprop are known by their bare names
from nslightning import runs
from nslightning.callbacks import NonsmoothPatch
from nslightning.commands import checkpoint_fit, trainer_options, wandb_run
from nslightning.commands.config_parser import HelpfulErrors
from nslightning.commands.endings import ending_of
from nslightning.commands.going_on import Start, start
from nslightning.commands.process import own_process
from nslightning.commands.run_callbacks import Bar, SaveConfig, StopWhenAsked, makes_again
from nslightning.commands.stopping import Signals, Stopped, signals
from nslightning.data import ImageDataModule, TokenFile
from nslightning.models import ImageClassifier, LanguageModel
from nslightning.models.own import current_folder_importable
from nslightning.surgery import selections

__all__ = ["TrainCLI", "main"]


#: What ``--task`` trains: the model, the data modules it takes, and what the data tell the model.
TASKS: dict[str, tuple[type[LightningModule], type[LightningDataModule], tuple[str, ...]]] = {
    "images": (ImageClassifier, ImageDataModule, ("num_classes", "image_shape")),
    "text": (LanguageModel, TokenFile, ("vocab_size", "block_size")),
    "own": (LightningModule, LightningDataModule, ()),  # any, by class path
}


class Parser(HelpfulErrors, LightningArgumentParser):
    """Lightning's parser with helpful errors."""


class TrainCLI(LightningCLI):
    """Lightning's command line for :class:`~nslightning.models.ImageClassifier`, or for a LightningModule of one's own.

    What it adds: one folder per run, in which it goes on with ``--ckpt_path=last``, under its own config; flags win
    over a checkpoint's hyperparameters; fp16 mixed precision on a CPU.
    """

    tasks: ClassVar[dict[str, Any]] = TASKS
    silent_stop: ClassVar[bool] = False  # whether the command that runs this one says how it goes on
    # Set by `main`, before Lightning's constructor does everything.
    task = "images"
    start: Start
    signals: Signals
    stopper: StopWhenAsked | None = None
    folder: Path | None = None
    _made: Path | None = None
    _lock: runs.RunLock | None = None

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run is called and where it goes."""
        seed = "Seed of the initial weights, the order of the images, their augmentation and dropout."
        parser.add_argument("--seed_everything", type=int, default=0, help=seed)
        task = (
            "What is trained: a backbone, GPT-2, or a LightningModule of one's own, which --model=CLASS_PATH implies."
        )
        parser.add_argument("--task", type=Literal["images", "text", "own"], default=self.task, help=task)
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; by default the config's.")
        words = "How sums are ordered and rounded, and switches, joined by +: bias_last, random_rounding, tf32, ..."
        parser.add_argument("--arithmetic", type=str, default="native", help=words)
        parser.add_argument("--output", type=str, default="runs", help="Where run folders are kept.")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Model and data before the trainer, whose options fill pages of ``--help``."""
        model, data, _ = self.tasks[self.task]
        own = self.task == "own"
        parser.add_lightning_class_args(model, "model", subclass_mode=own)
        parser.add_lightning_class_args(data, "data", subclass_mode=True, required=not own)
        parser.add_lightning_class_args(Trainer, "trainer")
        # Of a patched network the patch report says more than a table of its one child module.
        parser.set_defaults({"trainer.enable_model_summary": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What follows from other options."""
        for attribute in self.tasks[self.task][2]:
            parser.link_arguments(f"data.{attribute}", f"model.{attribute}", apply_on="instantiate")
        if self.task != "own":
            parser.link_arguments("seed_everything", "data.init_args.seed")
            parser.link_arguments("seed_everything", "model.seed")

    def _parse_ckpt_path(self) -> None:
        """Check what was parsed. Flags and config win over a checkpoint's hyperparameters, unlike in Lightning."""
        config = self.config[self.config.subcommand]
        config.name = config.name or self.start.name
        config.output = str(Path(config.output).expanduser())
        config.ckpt_path = None if self.start.checkpoint or config.ckpt_path == "last" else config.ckpt_path
        if Path(config.name).name != config.name:
            raise ValueError(f"--name={config.name} is to be the name of one folder in --output={config.output}")
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
        if config.trainer.fast_dev_run:
            self._scratch = tempfile.TemporaryDirectory()
            self.folder = Path(self._scratch.name)
            return
        if self.start.folder is None:
            self._made = runs.new_run_folder(config.output, config.name)
            runs.note_job(self._made)
        else:
            checkpoint_fit.check_optimizer(self._plain_config(), self.start.folder)
        self.folder = self.start.folder or self._made
        assert self.folder is not None
        if _rank() == 0:
            self._lock = runs.RunLock(self.folder)
        # config.yaml keeps what was given: a new run of it must not take this one's place in W&B.
        self._loggers_given = copy.deepcopy(config.trainer.logger)
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and str(logger.get("class_path")).endswith("WandbLogger"):
                wandb_run.prepare(logger.init_args, self.folder)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add what every run has: its own folder, the metrics file, seeds per step, the record, an orderly stop."""
        from nslightning.callbacks import ArithmeticSetting, LossWatch, RunRecord, StepSeed

        trainer = self._get(self.config_init, "trainer")
        given = trainer.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if not any(isinstance(c, ArithmeticSetting) for c in callbacks):
            callbacks.insert(0, ArithmeticSetting(self.config[self.subcommand].arithmetic))
        if trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(Bar())
        config = self.config[self.subcommand]
        # There Lightning looks for what a SLURM job left: never in the folder that the command was started in.
        trainer.default_root_dir = str(self.folder or Path(config.output, config.name))
        if self.subcommand != "fit":
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
            trainer.enable_checkpointing = False
        else:
            self._dump_config()
            if not config.trainer.fast_dev_run:
                config.trainer.logger = self._loggers_given
            record = RunRecord(self.config_dump, config.seed_everything, sys.argv[2:], self.start.checkpoint)
            callbacks = [StepSeed(config.seed_everything), *callbacks, LossWatch(), record]
            if self.folder is not None and trainer.logger is not False and not trainer.fast_dev_run:
                loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
                trainer.logger = [runs.MetricsFile(self.folder), *(x for x in loggers if isinstance(x, Logger))]
                for logger in trainer.logger:
                    if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous") is None:
                        # Lightning always passes it on, and wandb warns that it is deprecated.
                        logger._wandb_init.pop("anonymous", None)
        trainer.callbacks = callbacks
        if trainer.precision in ("16-mixed", "16", 16) and trainer_options.runs_on_cpu(trainer.accelerator):
            # Lightning falls back to bfloat16 there, from a time when CPUs had no fp16 autocast.
            plugins = trainer.plugins or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            trainer.plugins, trainer.precision = [*plugins, MixedPrecision("16-mixed", "cpu")], None
        try:
            made = super().instantiate_trainer(**kwargs)
        except TypeError as error:  # how Lightning refuses a value
            raise ValueError(str(error)) from error
        strategy = made.strategy
        plain = type(strategy.checkpoint_io) is TorchCheckpointIO
        if plain and isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            strategy.checkpoint_io = runs.WholeCheckpoints()
        if self.subcommand == "fit":
            scratch = config.trainer.fast_dev_run
            self.stopper = StopWhenAsked(self.signals, None if scratch else self.folder)
            made.callbacks.append(self.stopper)  # type: ignore[attr-defined] # set by a connector
        return made

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
        """Read the data before anything of the run is written: what is missing is said first."""
        if not self.trainer.is_global_zero:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # set by a connector
        if not selections(self.model) and not any(isinstance(c, NonsmoothPatch) for c in callbacks):
            rank_zero_warn(
                f"{type(self.model).__name__} is not patched and trains with PyTorch's own derivatives; "
                "--trainer.callbacks+=NonsmoothPatch patches it"
            )
        if not isinstance(self.datamodule, (ImageDataModule, TokenFile)):
            return
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        counts = ", ".join(f"{n:,} {split}" for split, n in self.datamodule.provenance["counts"].items())
        parameters = sum(p.numel() for p in self.model.parameters())
        title = getattr(self.model, "title", type(self.model).__name__)
        data = f"{self.datamodule.name} ({counts} {self.datamodule.summary})"
        rank_zero_info(f"{title} ({parameters:,} parameters) on {data}")

    def after_fit(self) -> None:
        """Say where the results are."""
        scratch = self.config[self.subcommand].trainer.fast_dev_run
        if scratch or not self.trainer.is_global_zero or self.folder is None:
            return
        best = {k: f"{v:.4f}" for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        rank_zero_info(f"{self.folder}: {' '.join(f'{k}={v}' for k, v in best.items())}")
        rank_zero_info("  " + "  ".join(sorted(f.name for f in self.folder.iterdir() if f.name[0] != ".")))

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write one row per image."""
        import pandas as pd

        batches = self.trainer.predict(**kwargs)
        if not batches:
            return
        config = self.config[self.subcommand]
        run = self.start.checkpoint.parent.parent if self.start.checkpoint else None
        folder = run if run and (run / "config.yaml").is_file() else Path(config.output, config.name)
        folder.mkdir(parents=True, exist_ok=True)
        if self.task == "own":  # of any form
            torch.save(batches, folder / "predictions.pt")
            rank_zero_info(f"The predictions of {len(batches)} batches in {folder / 'predictions.pt'}")
            return
        probability, label = torch.cat(cast("list[torch.Tensor]", batches)).max(1)
        file = folder / "predictions.csv"
        pd.DataFrame({"class": label.tolist(), "probability": probability.tolist()}).to_csv(file, index_label="image")
        rank_zero_info(f"{len(label)} predictions in {file}")

    @property
    def began(self) -> bool:
        """Whether a training step was begun."""
        return self.stopper is not None and self.stopper.began

    def go_on(self, program: str = "fit") -> str | None:
        """The command that goes on with this run.

        Args:
            program: The subcommand's name.

        Returns:
            The command; None where there is no checkpoint to go on from.
        """
        if self.folder is None or runs.last_checkpoint(self.folder) is None:
            return None
        return f"nslightning {program} --config {self.folder / 'config.yaml'} --ckpt_path=last"

    def close(self, ok: bool) -> None:
        """Let go of the folder, and remove it where no step was taken in it.

        Args:
            ok: Whether the command did what it was asked to.
        """
        if self._lock is not None:
            self._lock.release()
        if self._made is None or ok or self.began or _rank() != 0:
            return
        shutil.rmtree(self._made, ignore_errors=True)
        for parent in list(self._made.parents)[:2]:  # <output>/<name>, <output>
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _rank() -> int:
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def main(argv: Sequence[str], cli_class: type[TrainCLI] = TrainCLI) -> int:
    """Run ``fit``, ``validate``, ``test``, ``predict``, or a command that is a ``fit`` of its own kind.

    Args:
        argv: The command line from the subcommand on.
        cli_class: What runs it; a command that is not one of the four runs as ``fit``.

    Returns:
        The exit status: 0, 1 for data that are missing or damaged and for a full disk, 2 for a mistaken call, 130 after
        Ctrl-C and 143 after SIGTERM.
    """
    cli = cli_class.__new__(cli_class)
    subcommand = argv[0] if argv[0] in cli.subcommands() else "fit"
    status = 1
    with own_process(argv), current_folder_importable(), signals() as cli.signals:
        try:
            cli.start, cli.task = start(argv, subcommand)
            if cli.task not in cli.tasks:
                raise ValueError(f"--task={cli.task} is not one of {argv[0]}, which takes {', '.join(cli.tasks)}")
            cli.__init__(  # type: ignore[misc] # so that `close` has it when this raises
                *cli.tasks[cli.task][:2],
                subclass_mode_model=cli.task == "own",
                subclass_mode_data=True,
                save_config_callback=SaveConfig if subcommand == "fit" else None,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                parser_kwargs={
                    "prog": "nslightning",
                    subcommand: {"usage": f"nslightning {argv[0]} --config FILE [options]"},
                },
                auto_configure_optimizers=False,
                args=[subcommand, *cli.start.argv[1:]],
            )
            status = 0
        except Stopped as stop:
            status = _stopped(cli, stop, argv[0])
        except SystemExit as stop:
            if cli.signals.signum is not None:  # Lightning's way to end after it
                status = _stopped(cli, Stopped(cli.signals.signum), argv[0])
            elif not isinstance(stop.code, int):
                raise
            else:
                status = stop.code
        except Exception as error:
            if cli.signals.signum is not None:  # a loader's worker that the same signal ended, say
                status = _stopped(cli, Stopped(cli.signals.signum), argv[0])
            elif (ending := ending_of(error, began=cli.began, go_on=cli.go_on(argv[0]) if cli.began else None)) is None:
                raise
            else:
                print(f"nslightning {argv[0]}: error: {ending.message}", file=sys.stderr)
                status = ending.status
        finally:
            wandb_run.finish()
            cli.close(ok=status == 0)
    return status


def _stopped(cli: TrainCLI, stop: Stopped, program: str) -> int:
    """Say at which step a run was stopped, and how it goes on."""
    if _rank() != 0:
        # Lightning's launcher takes a further process that ends otherwise for a failed one.
        return 0
    if cli.silent_stop:
        return stop.status
    told = f"\nnslightning {program}: stopped by {stop.by}"
    if cli.stopper is None or not cli.began:
        print(f"{told} before the first step", file=sys.stderr)
        return stop.status
    told += f": stopped at step {cli.stopper.step}"
    if cli.folder is not None:
        runs.note_end(cli.folder, "stopped", cli.stopper.step)
    if (go_on := cli.go_on(program)) is None:
        told += "; there is no checkpoint to go on from"
    else:
        told += "; go on with" if cli.stopper.saved else ", without a checkpoint of it; go on from the last one with"
        told += f": {go_on}"
    print(told, file=sys.stderr)
    return stop.status
