"""``nslightning fit | validate | test | predict``: LightningCLI, with run folders and helpful errors."""

from __future__ import annotations

import copy
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from configparser import ConfigParser
from configparser import Error as ConfigError
from contextlib import contextmanager, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, ClassVar, Literal, cast
from urllib.parse import urlparse

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

import nslightning.optim  # noqa: F401 # so that INNA and INNAprop are known by their bare names
from nslightning import runs
from nslightning.callbacks import NonsmoothPatch
from nslightning.commands.config_parser import HelpfulErrors
from nslightning.data import DataError, ImageDataModule, TokenFile
from nslightning.models import ImageClassifier, LanguageModel
from nslightning.models.own import current_folder_importable
from nslightning.surgery import UnreachedError, selections

__all__ = ["TrainCLI", "main", "task_of"]


#: What ``--task`` trains: the model, the data modules it takes, and what the data tell the model.
TASKS: dict[str, tuple[type[LightningModule], type[LightningDataModule], tuple[str, ...]]] = {
    "images": (ImageClassifier, ImageDataModule, ("num_classes", "image_shape")),
    "text": (LanguageModel, TokenFile, ("vocab_size", "block_size")),
    "own": (LightningModule, LightningDataModule, ()),  # any, by class path
}


class Parser(HelpfulErrors, LightningArgumentParser):
    """Lightning's parser with helpful errors."""


class Bar(RichProgressBar):
    """Lightning's progress bar without the loggers' version numbers, which say nothing here."""

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        """The logged values to show."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


class TrainCLI(LightningCLI):
    """Lightning's command line for :class:`~nslightning.models.ImageClassifier`, or for a LightningModule of one's own.

    What it adds: one folder per run, found again with ``--ckpt_path=last``; flags win over a checkpoint's
    hyperparameters; W&B goes offline by itself; fp16 mixed precision on a CPU.
    """

    trained = False  # whether a step was taken: what goes wrong before is a mistake in the call, not a bug
    _made: Path | None = None
    task = "images"
    tasks: ClassVar[dict[str, Any]] = TASKS

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
        """Find the checkpoint; flags and config win over its hyperparameters, which Lightning would put above them."""
        config = self.config[self.config.subcommand]
        config.name = config.name or self._default_name(config)
        if Path(config.name).name != config.name:
            raise ValueError(f"--name={config.name} is to be the name of one folder in --output={config.output}")
        if not 0 <= config.seed_everything < 2**32:
            raise ValueError(f"--seed_everything={config.seed_everything} is to be from 0 to 2**32 - 1")
        self.resumed: Path | None = None
        self.checkpoint: Path | None = None
        given = config.get("ckpt_path")
        if given in ("last", "best"):
            self._find_checkpoint(config, given)
        elif given is not None and given not in ("hpc", "registry"):
            self.checkpoint = Path(given)
            if not self.checkpoint.is_file():
                raise FileNotFoundError(f"--ckpt_path: there is no file {given}")
        elif given is None and self.config.subcommand != "fit":
            rank_zero_warn("no --ckpt_path was given: the weights are the initial ones")

    def _find_checkpoint(self, config: Namespace, which: str) -> None:
        """``last`` and ``best`` of the run whose own config was given, or else of the last run of that name."""
        fit = self.config.subcommand == "fit"
        if fit and which == "best":
            raise ValueError("--ckpt_path=best: a run goes on from its last checkpoint: --ckpt_path=last")
        own = [f for c in config.get("config") or [] if (f := Path(str(c)).parent) and runs.last_checkpoint(f)]
        folder = own[-1] if own else runs.last_run_folder(config.output, config.name)
        if folder is not None:
            best = folder / "checkpoints" / "best.ckpt"
            self.checkpoint = runs.last_checkpoint(folder) if which == "last" else best if best.is_file() else None
        if self.checkpoint is None:
            searched = folder or Path(config.output, config.name, "*")
            missing = f"--ckpt_path={which}: there is no checkpoint in {searched}/checkpoints"
            if not fit:
                raise FileNotFoundError(missing)
            rank_zero_warn(f"{missing} yet, so a new run starts")
        elif fit:
            self.resumed = folder
        if self.checkpoint is not None:
            rank_zero_info(f"Checkpoint: {self.checkpoint}")

    @staticmethod
    def _default_name(config: Namespace) -> str:
        files = config.get("config") or []
        if not files:
            what = config.model.get("backbone") or config.model.get("class_path") or config.task
            return re.sub(r"[/:]", "-", str(what))
        # configs/innaprop/cifar10_vgg11.yaml is another experiment than configs/cifar10_vgg11.yaml.
        folders = Path(str(files[-1])).parent.parts
        inside = folders[folders.index("configs") + 1 :] if "configs" in folders else ()
        return "-".join([*inside, Path(str(files[-1])).stem])

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and point the loggers to it."""
        config = self.config[self.subcommand]
        self._content = _read_checkpoint(self.checkpoint, config.weights_only) if self.checkpoint else None
        self.folder: Path | None = None
        if self.subcommand != "fit":
            config.trainer.logger = False
            if self.subcommand == "predict":  # one process sees all images, in order
                config.trainer.devices, config.trainer.num_nodes, config.trainer.strategy = 1, 1, "auto"
            return
        if config.trainer.fast_dev_run:
            self._scratch = tempfile.TemporaryDirectory()
            self.folder = Path(self._scratch.name)
            return
        if self.resumed is None:
            self._made = runs.new_run_folder(config.output, config.name)
        self.folder = self.resumed or self._made
        # config.yaml keeps what was given: a new run of it must not take this one's place in W&B.
        self._loggers_given = copy.deepcopy(config.trainer.logger)
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace) and str(logger.get("class_path")).endswith("WandbLogger"):
                self._prepare_wandb(logger.init_args)

    def _prepare_wandb(self, options: Namespace) -> None:
        assert self.folder is not None
        options.save_dir = str(self.folder.absolute())  # W&B's own process keeps the folder it was started in
        options.name = options.name or f"{self.folder.parent.name}/{self.folder.name}"
        id_file = self.folder / "wandb_id"
        options.id = options.id or secrets.token_hex(4)
        try:
            with id_file.open("x") as file:  # the first process of a launch names the run
                file.write(f"{options.id}\n")
        except FileExistsError:
            options.id = id_file.read_text().strip()
        mode = "offline" if options.offline else os.environ.get("WANDB_MODE")
        reason = "W&B is offline"
        if not mode and not _has_wandb_key():
            mode = os.environ["WANDB_MODE"] = "offline"
            reason = "W&B has no API key here and stays offline"
        if mode == "offline":
            os.environ.setdefault("WANDB_SILENT", "true")  # the next line says what wandb's own six would
            rank_zero_info(f"{reason}; to upload this run: wandb login && wandb sync {self.folder}/wandb/offline-run-*")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add what every run has: the metrics file, seeds per step, and the run's record."""
        from nslightning.callbacks import ArithmeticSetting, RunRecord, StepSeed

        trainer = self._get(self.config_init, "trainer")
        given = trainer.callbacks or []
        callbacks = list(given) if isinstance(given, list) else [given]
        if not any(isinstance(c, ArithmeticSetting) for c in callbacks):
            callbacks.insert(0, ArithmeticSetting(self.config[self.subcommand].arithmetic))
        if trainer.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(Bar())
        if self.subcommand != "fit":
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
            trainer.enable_checkpointing = False
        else:
            seed = self.config[self.subcommand].seed_everything
            self._dump_config()
            if not self._scratch_run:
                self.config[self.subcommand].trainer.logger = self._loggers_given
            callbacks = [StepSeed(seed), *callbacks, RunRecord(self.config_dump, seed), _Trained(self)]
            if trainer.logger is False or trainer.fast_dev_run:
                trainer.default_root_dir = str(self.folder)
            elif self.folder is not None:
                loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
                trainer.logger = [
                    runs.MetricsFile(self.folder),
                    *(x for x in loggers if isinstance(x, Logger)),
                ]
                for logger in trainer.logger:
                    if isinstance(logger, WandbLogger) and logger._wandb_init.get("anonymous") is None:
                        # Lightning always passes it on, and wandb warns that it is deprecated.
                        logger._wandb_init.pop("anonymous", None)
        trainer.callbacks = callbacks
        if trainer.precision in ("16-mixed", "16", 16) and _runs_on_cpu(trainer.accelerator):
            # Lightning falls back to bfloat16 there, from a time when CPUs had no fp16 autocast.
            plugins = trainer.plugins or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            trainer.plugins, trainer.precision = [*plugins, MixedPrecision("16-mixed", "cpu")], None
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:  # how Lightning refuses a value
            raise ValueError(str(error)) from error

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another network, in words and not as a list of all its parameters, or choice."""
        if self._content is None:
            return
        stored = {name: tuple(v.shape) for name, v in self._content["state_dict"].items()}
        wanted = {name: tuple(v.shape) for name, v in self.model.state_dict().items()}
        odd = sorted(n for n in stored.keys() | wanted.keys() if stored.get(n) != wanted.get(n))
        if odd:
            made = self._content.get("hyper_parameters", {})
            made_as, now = (_network_in_words(hparams) for hparams in (made, self.model.hparams))
            name, (then_shape, now_shape) = odd[0], (d.get(odd[0], "missing") for d in (stored, wanted))
            raise ValueError(
                f"--ckpt_path: {self.checkpoint} holds {made_as}, and this is {now}: {len(odd)} parameters differ, "
                f"as {name}: {then_shape} there, {now_shape} here. Give the config that made it, by --config"
            )
        with warnings.catch_warnings():  # which the run itself gives, when it loads the checkpoint
            warnings.simplefilter("ignore")
            self.model.on_load_checkpoint(self._content)
        self._content = None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        # Here and not in the config, so that config.yaml keeps what was asked for.
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") not in ("hpc", "registry"):
            kwargs["ckpt_path"] = None if self.checkpoint is None else str(self.checkpoint)
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
        if self._scratch_run or not self.trainer.is_global_zero or self.folder is None:
            return
        best = {k: f"{v:.4f}" for k, v in self.trainer.callback_metrics.items() if k.startswith("val/")}
        rank_zero_info(f"{self.folder}: {' '.join(f'{k}={v}' for k, v in best.items())}")
        rank_zero_info("  " + "  ".join(sorted(f.name for f in self.folder.iterdir())))

    @property
    def _scratch_run(self) -> bool:
        return bool(self.config[self.subcommand].trainer.fast_dev_run)

    def predict(self, **kwargs: Any) -> None:
        """Predict, and write one row per image."""
        import pandas as pd

        batches = self.trainer.predict(**kwargs)
        if not batches:
            return
        config = self.config[self.subcommand]
        run = self.checkpoint.parent.parent if self.checkpoint else None
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

    def forget(self) -> None:
        """Remove the folder of a run that did not take a step, and what was made to hold it."""
        if self._made is None or self.trained or getattr(rank_zero_only, "rank", 0) != 0:
            return
        shutil.rmtree(self._made, ignore_errors=True)
        for parent in list(self._made.parents)[:2]:  # <output>/<name>, <output>
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


class _SaveConfig(SaveConfigCallback):
    """Saves the config when the first step is about to be taken: a run that cannot go on has overwritten nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class _Trained(Callback):
    """Tells the command line that training has begun."""

    def __init__(self, cli: TrainCLI) -> None:
        self.cli = cli

    def on_train_batch_start(self, *args: Any) -> None:
        self.cli.trained = True


def _network_in_words(hparams: Mapping[str, Any]) -> str:
    """What a checkpoint, or a model, holds."""
    network = hparams.get("backbone", hparams.get("size"))
    classes = hparams.get("num_classes", hparams.get("vocab_size"))
    return f"{network} for {classes} classes" if network else "another network"


def _read_checkpoint(file: Path, weights_only: bool | None) -> dict[str, Any]:
    """The checkpoint's content, its tensors left on disk."""
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only is not False)
    except Exception:  # unpickling damaged bytes raises anything
        trust = "; where it holds more than plain data and you trust it, add --weights_only=false"
        raise ValueError(f"--ckpt_path: {file} is damaged, or not a checkpoint at all{trust}") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"--ckpt_path: {file} is no checkpoint of a run: it has no state_dict")
    return content


def _has_wandb_key() -> bool:
    """Whether W&B could log in; asking wandb itself would fix its settings before the mode is chosen."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = ConfigParser()
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
    try:
        settings.read(folder / "settings")
        base_url = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    except ConfigError:
        base_url = "https://api.wandb.ai"
    host = urlparse(os.environ.get("WANDB_BASE_URL") or base_url).hostname
    home = [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]
    for file in [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else home:
        try:
            if host in netrc(str(file)).hosts:
                return True
        except (OSError, NetrcParseError):
            continue
    return False


def _runs_on_cpu(accelerator: Any) -> bool:
    automatic = accelerator == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return accelerator == "cpu" or automatic


def main(argv: list[str], cli_class: type[TrainCLI] = TrainCLI) -> int:
    """Run ``fit``, ``validate``, ``test``, ``predict``, or a command that is a ``fit`` of its own kind.

    Args:
        argv: The command line from the subcommand on.
        cli_class: What runs it; a command that is not one of the four runs as ``fit``.

    Returns:
        The exit status: 0, 1 for data that is missing or damaged, 2 for a mistaken call.
    """
    cli = cli_class.__new__(cli_class)
    cli.task = task_of(argv)
    subcommand = argv[0] if argv[0] in cli.subcommands() else "fit"
    usage = f"nslightning {argv[0]} --config FILE [options]"
    with _process(argv), current_folder_importable():
        try:
            cli.__init__(  # type: ignore[misc] # so that `forget` has it when this raises
                *cli.tasks[cli.task][:2],
                subclass_mode_model=cli.task == "own",
                subclass_mode_data=True,
                save_config_callback=_SaveConfig if subcommand == "fit" else None,
                save_config_kwargs={"overwrite": True},
                parser_class=Parser,
                parser_kwargs={"prog": "nslightning", subcommand: {"usage": usage}},
                auto_configure_optimizers=False,
                args=[subcommand, *argv[1:]],
            )
        except SystemExit as stop:
            if not isinstance(stop.code, int):
                raise
            return stop.code
        except Exception as error:
            cause = _cause(error)
            data = isinstance(cause, DataError)
            mistake = isinstance(cause, UnreachedError) or (  # which the first step may find
                isinstance(cause, (FileNotFoundError, ImportError, ValueError, MisconfigurationException))
                and not cli.trained
            )
            if not data and not mistake:
                raise
            # A loader's worker puts its traceback before the message.
            message = str(cause).rpartition("DataError: ")[2].strip()
            print(f"nslightning {argv[0]}: error: {message}", file=sys.stderr)
            return 1 if data else 2
        else:
            cli.trained = True
        finally:
            _finish_wandb()
            cli.forget()
    return 0


def task_of(argv: list[str]) -> str:
    """The task that the last flag or config file to name one names: the options depend on it.

    Args:
        argv: The command line.

    Returns:
        A key of ``TASKS``.
    """
    task = "images"
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else following
        if flag in ("--config", "-c") and Path(value).is_file():
            content = None
            with suppress(yaml.YAMLError):  # the parser will say so
                content = yaml.safe_load(Path(value).read_text())
            content = content if isinstance(content, dict) else {}
            model = content.get("model")
            own = isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)
            flag, value = "--task", content.get("task", "own" if own else task)
        if flag == "--model":
            flag, value = "--task", "own"
        if flag == "--task" and value in TASKS:
            task = value
    return task


def _cause(error: Exception) -> Exception:
    """The error that jsonargparse wrapped in an account of all types it tried."""
    wrapped = ("Does not validate against any", "Problem with given class_path", "Parser key")
    while str(error).startswith(wrapped) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _finish_wandb() -> None:
    """End the W&B run, so that the next one in this process is another."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(sys.exc_info()[0] is not None))


# What a command sets for the processes that it starts. WANDB_SERVICE stays: W&B's own process outlives a run.
_SET = ("NSLIGHTNING_RUN_FOLDER", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "WANDB_MODE", "WANDB_SILENT")


@contextmanager
def _process(argv: list[str]) -> Iterator[None]:
    """Set up what is global for one command, and take it back: arguments, environment, warnings, messages."""
    program, environment, form = sys.argv, dict(os.environ), warnings.formatwarning
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def wanted(record: logging.LogRecord) -> bool:
        # Two advertisements, and a line about hardware that nobody has asked for.
        return not any(noise in record.getMessage() for noise in ("litlogger", "litmodels", "TPU available: False"))

    sys.argv = [program[0], *argv]
    with warnings.catch_warnings():
        # Lightning's own use of a torch name on its way out.
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
        # A run that goes on writes where it did before.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        # The arguments are those of the command line, with `fit` for a command that is one of its kind.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        if argv[0] in ("validate", "test", "predict"):  # they would save, and evaluation saves nothing
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided")
        warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
        messages.addFilter(wanted)
        try:
            yield
        finally:
            messages.removeFilter(wanted)
            warnings.formatwarning = form
            sys.argv = program
            for name in _SET:
                if (value := environment.get(name)) is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
