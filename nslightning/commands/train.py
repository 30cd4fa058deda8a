"""``nslightning fit | validate | test | predict``: LightningCLI, with run folders and helpful errors."""

from __future__ import annotations

import os
import secrets
import sys
import warnings
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from nslightning import runs
from nslightning.commands.parsing import HelpfulErrors
from nslightning.data import DataError, ImageDataModule
from nslightning.models import ImageClassifier

__all__ = ["TrainCLI", "main"]


class Parser(HelpfulErrors, LightningArgumentParser):
    """Lightning's parser with helpful errors."""


class TrainCLI(LightningCLI):
    """Lightning's command line for :class:`~nslightning.models.ImageClassifier` and a data module.

    What it adds: one folder per run, found again with ``--ckpt_path=last``; flags win over a checkpoint's
    hyperparameters; W&B goes offline by itself; fp16 mixed precision on a CPU.
    """

    started = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of our own, and what follows from others."""
        parser.add_argument("--name", type=str | None, default=None, help="Name of the run; by default the config's.")
        parser.add_argument("--output", type=str, default="runs", help="Where run folders are kept.")
        for attribute in ("num_classes", "image_shape"):
            parser.link_arguments(f"data.{attribute}", f"model.{attribute}", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Find ``last``, and leave the hyperparameters to flags and config, where Lightning's own takes the checkpoint's."""
        config = self.config[self.config.subcommand]
        config.name = config.name or self._default_name(config)
        path = config.get("ckpt_path")
        self.resumed: Path | None = None
        if path == "last":
            self.resumed = runs.last_run_folder(config.output, config.name)
            if self.resumed is None:
                kept = Path(config.output, config.name)
                if self.config.subcommand != "fit":
                    self.parser.error(f"--ckpt_path=last: there is no checkpoint in {kept}/*/checkpoints")
                rank_zero_warn(f"--ckpt_path=last: no checkpoint in {kept}/*/checkpoints yet, so a new run starts")
                config.ckpt_path = None
            else:
                config.ckpt_path = str(runs.last_checkpoint(self.resumed))
                rank_zero_info(f"Going on with {config.ckpt_path}")
        elif path and path not in ("best", "hpc", "registry") and not Path(path).is_file():
            self.parser.error(f"--ckpt_path: there is no file {path}")
        elif path is None and self.config.subcommand != "fit":
            rank_zero_warn("no --ckpt_path was given: the weights are the initial ones")

    @staticmethod
    def _default_name(config: Namespace) -> str:
        files = config.get("config") or []
        return Path(str(files[-1])).stem if files else config.model.backbone.replace("/", "-")

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and point the loggers to it."""
        config = self.config[self.subcommand]
        self.folder: Path | None = None
        self._made: Path | None = None
        if self.subcommand != "fit" or config.trainer.fast_dev_run:
            return
        if self.resumed is None:
            self._made = runs.new_run_folder(config.output, config.name)
        self.folder = self.resumed or self._made
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and str(logger.get("class_path")).endswith("WandbLogger"):
                self._prepare_wandb(logger.init_args)

    def _prepare_wandb(self, options: Namespace) -> None:
        assert self.folder is not None
        options.save_dir = str(self.folder)
        options.name = options.name or f"{self.folder.parent.name}/{self.folder.name}"
        id_file = self.folder / "wandb_id"
        if id_file.exists():
            options.id = id_file.read_text().strip()
        else:
            options.id = options.id or secrets.token_hex(4)
            id_file.write_text(f"{options.id}\n")
        if not options.offline and "WANDB_MODE" not in os.environ and not _has_wandb_key():
            os.environ["WANDB_MODE"] = "offline"
        if options.offline or os.environ.get("WANDB_MODE") == "offline":
            os.environ.setdefault("WANDB_SILENT", "true")
            rank_zero_info(
                "W&B has no API key here and stays offline; to upload this run: "
                f"wandb login && wandb sync {self.folder}/wandb/offline-run-*"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add what every run has: the metrics file, seeds per step, and the run's record."""
        from nslightning.callbacks import RunRecord, StepSeed

        trainer = self._get(self.config_init, "trainer")
        if self.subcommand != "fit":
            trainer.logger = trainer.logger if _is_logger(trainer.logger) else False
        elif self.folder is not None:
            seed = self.config[self.subcommand].seed_everything
            given = trainer.callbacks or []
            given = given if isinstance(given, list) else [given]
            self._dump_config()
            trainer.callbacks = [StepSeed(int(seed)), *given, RunRecord(self.config_dump, int(seed))]
            if trainer.logger is False:
                trainer.default_root_dir = str(self.folder)
            else:
                extra = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
                trainer.logger = [runs.MetricsFile(self.folder), *(x for x in extra if _is_logger(x))]
        if trainer.precision in ("16-mixed", "16", 16) and _runs_on_cpu(trainer.accelerator):
            # Lightning falls back to bfloat16 there, from a time when CPUs had no fp16 autocast.
            plugins = trainer.plugins or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            trainer.plugins, trainer.precision = [*plugins, MixedPrecision("16-mixed", "cpu")], None
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Read the data before anything of the run is written: what is missing is said first."""
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
            self.datamodule.setup("fit")
        self.started = True

    def after_fit(self) -> None:
        """Say where the results are."""
        if self.folder is None or not self.trainer.is_global_zero:
            return
        best = {k: f"{v:.4f}" for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        rank_zero_info(f"{self.folder}: {' '.join(f'{k}={v}' for k, v in best.items())}")
        rank_zero_info("  " + "  ".join(sorted(f.name for f in self.folder.iterdir())))

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write one row per image."""
        import pandas as pd

        batches = self.trainer.predict(**kwargs)
        if not batches or not self.trainer.is_global_zero:
            return
        probability, label = torch.cat([b if isinstance(b, torch.Tensor) else b[0] for b in batches]).max(1)
        config = self.config[self.subcommand]
        file = Path(config.output, config.name, "predictions.csv")
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"class": label.tolist(), "probability": probability.tolist()}).to_csv(file, index_label="image")
        rank_zero_info(f"{len(label)} predictions in {file}")

    def forget(self) -> None:
        """Remove the folder of a run that did not start, if nothing is in it."""
        if getattr(self, "_made", None) is not None and self._made.exists() and not any(self._made.rglob("*.c*")):
            import shutil

            shutil.rmtree(self._made)


def _is_logger(value: Any) -> bool:
    from lightning.pytorch.loggers import Logger

    return isinstance(value, Logger)


def _has_wandb_key() -> bool:
    """Whether W&B could log in; asking wandb itself would fix its settings before the mode is chosen."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = os.environ.get("NETRC") or Path("~/.netrc").expanduser()
    try:
        return host in netrc(str(file)).hosts
    except (OSError, NetrcParseError):
        return False


def _runs_on_cpu(accelerator: Any) -> bool:
    automatic = accelerator == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return accelerator == "cpu" or automatic


def main(argv: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        argv: The command line from the subcommand on.

    Returns:
        The exit status.
    """
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")  # Lightning's own use of a torch name on its way out
    warnings.filterwarnings("ignore", ".*litlogger.*")
    cli = TrainCLI.__new__(TrainCLI)
    program, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        cli.__init__(  # type: ignore[misc] # so that `forget` has it when this raises
            ImageClassifier,
            ImageDataModule,
            subclass_mode_data=True,
            save_config_callback=SaveConfigCallback if argv[0] == "fit" else None,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"prog": "nslightning"},
            auto_configure_optimizers=False,
        )
    except (DataError, FileNotFoundError, ValueError, TypeError) as error:
        if cli.started and not isinstance(error, DataError):  # a bug, not a mistaken call
            raise
        cli.forget()
        print(f"nslightning {argv[0]}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, DataError) else 2
    finally:
        sys.argv = program
    return 0
