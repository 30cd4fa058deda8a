"""What a run must say of itself for its numbers to be traced."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from nslightning.runs import MetricsFile, environment, forget_from
from nslightning.surgery import PatchReport, surgeries

from .measurements import run_folder

__all__ = ["RunRecord"]

_SHOWN = 24  # sites printed; the files have them all


class RunRecord(Callback):
    """Prints what was patched, and writes a run's record into its folder before the first step.

    ``run.json`` holds the command, seed, precision, device, number of processes, git commit, versions, the data's
    provenance and the patch fingerprint; ``patch_report.json`` and ``.txt`` hold every site. W&B gets the same as
    the run's config, next to the config file's own content.

    Args:
        config: The run's configuration as plain data.
        seed: The run's seed.
    """

    def __init__(self, config: dict[str, Any], seed: int | None = None) -> None:
        self.config, self.seed = config, seed
        self._complete = True  # whether the report's file names the functional calls

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the patch report."""
        folder, report = run_folder(trainer), _report(pl_module)  # on all ranks: Lightning broadcasts the folder
        self._complete = report is None or report.traced
        if report is None or not trainer.is_global_zero:
            return
        lines = str(report).splitlines()
        more = [f"... and {len(lines) - _SHOWN - 4} more in patch_report.txt"] * (len(lines) > _SHOWN + 4)
        rank_zero_info("\n".join([*lines[: _SHOWN + 4], *more]))
        _write(report, folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the report again once the first step has shown the functional calls."""
        if self._complete:
            return
        self._complete = True
        folder, report = run_folder(trainer), _report(pl_module)
        if report is not None and trainer.is_global_zero:
            calls = [site for site in report.sites if site.how == "functional"]
            if calls:
                rank_zero_info(f"The first step called {len(calls)} more sites as functions: {folder}/patch_report.txt")
            _write(report, folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record; drop the metrics that will be logged again, now that the step to resume at is known."""
        folder, report = run_folder(trainer), _report(pl_module)
        if not trainer.is_global_zero:
            return
        record = {
            "seed": self.seed,
            "precision": trainer.precision,
            "device": str(pl_module.device),
            "processes": trainer.world_size,
            "resumed_at_step": trainer.global_step or None,
            "data": getattr(getattr(trainer, "datamodule", None), "provenance", None),
            "patch": None if report is None else report.to_dict() | {"sites": len(report.sites)},
            **environment(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"config": self.config, "run": record}, allow_val_change=True)
                if report is not None:
                    _log_sites(logger, report)
            if isinstance(logger, MetricsFile):
                forget_from(Path(logger.experiment.metrics_file_path), trainer.global_step)


def _report(module: LightningModule) -> PatchReport | None:
    """What was patched of a module: of the first part where there are several, as of twins."""
    return next((surgery.report for surgery in surgeries(module).values()), None)


def _write(report: PatchReport, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "patch_report.json")
    (folder / "patch_report.txt").write_text(f"{report}\n")


@rank_zero_only
def _log_sites(logger: WandbLogger, report: PatchReport) -> None:
    columns = ["site", "operation", "choice", "how", "kind", "inplace", "calls"]
    data = [[s.name, s.operation, str(s.choice), s.how, s.kind, s.inplace, s.calls] for s in report.sites]
    logger.log_table("patch_report", columns=columns, data=data)
