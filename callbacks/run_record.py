"""What a run must say of itself for its numbers to be traced."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from nslightning.runs import MetricsFile, environment, forget_from
from nslightning.surgery import PatchReport

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

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the patch report."""
        folder = run_folder(trainer)
        report: PatchReport | None = getattr(pl_module, "patch_report", None)
        if report is None or not trainer.is_global_zero:
            return
        lines = str(report).splitlines()
        more = [f"... and {len(lines) - _SHOWN - 4} more in patch_report.txt"] * (len(lines) > _SHOWN + 4)
        rank_zero_info("\n".join([*lines[: _SHOWN + 4], *more]))
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder / "patch_report.json")
        (folder / "patch_report.txt").write_text(f"{report}\n")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record; drop the metrics that will be logged again, now that the step to resume at is known."""
        folder = run_folder(trainer)
        report: PatchReport | None = getattr(pl_module, "patch_report", None)
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


@rank_zero_only
def _log_sites(logger: WandbLogger, report: PatchReport) -> None:
    columns = ["site", "operation", "choice", "how", "kind", "inplace", "calls"]
    data = [[s.name, s.operation, str(s.choice), s.how, s.kind, s.inplace, s.calls] for s in report.sites]
    logger.log_table("patch_report", columns=columns, data=data)
