"""Run folders and their contents: the folder and its lock, checkpoints, metrics, the record."""

from .checkpoints import WholeCheckpoints, checkpoints_in, is_whole, last_checkpoint, read_checkpoint
from .environment import environment
from .folders import folder_of_job, last_run_folder, new_run_folder, note_job
from .lock import RunLock
from .metrics import MetricsFile, forget_from
from .record import (
    Segment,
    check_record,
    choice_changes,
    comparable_from,
    ended,
    flat,
    note_end,
    read_record,
    segments,
    with_segment,
)

__all__ = [
    "MetricsFile",
    "RunLock",
    "Segment",
    "WholeCheckpoints",
    "check_record",
    "checkpoints_in",
    "choice_changes",
    "comparable_from",
    "ended",
    "environment",
    "flat",
    "folder_of_job",
    "forget_from",
    "is_whole",
    "last_checkpoint",
    "last_run_folder",
    "new_run_folder",
    "note_end",
    "note_job",
    "read_checkpoint",
    "read_record",
    "segments",
    "with_segment",
]
