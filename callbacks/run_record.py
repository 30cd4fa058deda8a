"""Records everything that it takes to trace the numbers of a run."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from nslightning.choices import choice_label
from nslightning.files import write_text
from nslightning.runs import (
    MetricsFile,
    Segment,
    check_record,
    environment,
    forget_from,
    read_record,
    segments,
    with_segment,
)
from nslightning.runs.record import End, note_end, write_record
from nslightning.surgery import PatchReport, surgeries

from .measurements import run_folder
from .showing import show_record, show_table

__all__ = ["RunRecord"]

_SHOWN = 24  # sites printed; the files have them all


class RunRecord(Callback):
    """Prints the patched sites, and writes a run's record into its folder before the first step.

    ``run.json`` holds the command, seed, precision, device, number of processes, git commit, versions, the data's
    provenance and the patch fingerprint; ``patch_report.json`` and ``.txt`` hold every site. W&B, MLflow and
    TensorBoard get the same, next to the config file's own content.

    A run that goes on under another config, choice, code or machine gets a new one of its ``segments``
    (:class:`~nslightning.runs.Segment`), so that every row it wrote belongs to what held when it was written.

    Args:
        config: The run's configuration as plain data.
        seed: The run's seed.
        words: The command line's words after the subcommand.
        checkpoint: The checkpoint that the run starts from.
    """

    def __init__(
        self,
        config: dict[str, Any],
        seed: int | None = None,
        words: Sequence[str] = (),
        checkpoint: Path | None = None,
    ) -> None:
        self.config, self.seed, self.words, self.checkpoint = config, seed, list(words), checkpoint
        self._written = False
        self._folder = Path()  # known from the beginning: the others may be gone when an error is noted
        self._complete = True  # whether the report's file names the functional calls

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the patch report."""
        folder, report = run_folder(trainer), _report(pl_module)  # on all ranks: Lightning broadcasts the folder
        self._folder = folder
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
        """Write the report again once the first step has shown the functional calls. A folder that is gone raises."""
        if self._written:
            check_record(self._folder)
        if self._complete:
            return
        self._complete = True
        folder, report = run_folder(trainer), _report(pl_module)
        if report is not None and trainer.is_global_zero:
            calls = [site for site in report.sites if site.how == "functional"]
            if calls:
                sites = f"{len(calls)} more site{'s' * (len(calls) > 1)}"
                rank_zero_info(f"The first step called {sites} as functions: {folder}/patch_report.txt lists them")
            _write(report, folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the record; drop the metrics that will be logged again, now that the step to resume at is known."""
        folder, report = run_folder(trainer), _report(pl_module)
        if not trainer.is_global_zero:
            return
        settings = {
            "seed": self.seed,
            "precision": trainer.precision,
            "device": str(pl_module.device),
            "processes": trainer.world_size,
        }
        here, patch = environment(), None if report is None else report.to_dict()
        began = Segment(
            from_step=trainer.global_step,
            choice=None if patch is None else choice_label(patch["jacobians"]),
            sites=[] if patch is None else patch["rules"],
            fingerprint=None if report is None else report.fingerprint,
            config=self.config,
            settings={**settings, "devices": here["devices"], "arithmetic": here["arithmetic"]},
            versions={"python": here["python"], **here["versions"]},
            git=here["git"],
            command=here["command"],
            words=self.words,
            started=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            checkpoint=None if self.checkpoint is None else str(self.checkpoint),
        )
        record = {
            **settings,
            "resumed_at_step": trainer.global_step or None,
            "data": getattr(getattr(trainer, "datamodule", None), "provenance", None),
            "patch": None if report is None else report.to_dict() | {"sites": len(report.sites)},
            **here,
            "ended": None,
            "segments": [asdict(s) for s in with_segment(segments(read_record(folder)), began)],
        }
        write_record(folder, record)
        self._written = True
        show_record(trainer, self.config, record)
        if report is not None:
            columns = ["site", "operation", "choice", "how", "kind", "inplace", "calls"]
            rows = [[s.name, s.operation, str(s.choice), s.how, s.kind, s.inplace, s.calls] for s in report.sites]
            show_table(trainer, "patch_report", columns, rows)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                forget_from(Path(logger.experiment.metrics_file_path), trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the run is finished, also where it was stopped after its last step and no step was left."""
        self._written = self._written or (trainer.is_global_zero and bool(read_record(self._folder)))
        self._note(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note that a signal, or an error, ended the run."""
        ended: End = "stopped" if isinstance(exception, (SystemExit, KeyboardInterrupt)) else "failed"
        # A disk that took no checkpoint takes no note of it: the run's own error is the one to be read.
        with suppress(OSError) if isinstance(exception, OSError) else nullcontext():
            self._note(trainer, ended)

    def _note(self, trainer: Trainer, ended: End) -> None:
        if self._written:
            note_end(self._folder, ended, trainer.global_step)


def _report(module: LightningModule) -> PatchReport | None:
    """Return the patch report of a module: that of the first part where there are several, as of twins."""
    return next((surgery.report for surgery in surgeries(module).values()), None)


def _write(report: PatchReport, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "patch_report.json")
    write_text(folder / "patch_report.txt", f"{report}\n")
