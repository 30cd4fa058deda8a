"""A run's record, ``run.json``: what holds now, and the segments in which it was not always so.

A run that goes on under another config, choice, code or machine starts a new *segment*. Every row that the run writes
belongs, by its step, to one of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from nslightning.files import write_text

__all__ = [
    "End",
    "Segment",
    "check_record",
    "choice_changes",
    "ended",
    "flat",
    "note_end",
    "read_record",
    "segments",
    "with_segment",
    "write_record",
]

#: How a run may end: by itself, by a signal, by an error.
End = Literal["finished", "stopped", "failed"]

# Keys of a config that concern the call, not the run.
_OF_THE_CALL = ("config", "ckpt_path", "weights_only", "name", "output")


@dataclass
class Segment:
    """Steps of a run under one config, choice, code and machine.

    Args:
        from_step: The first optimizer step.
        choice: The Jacobian choice in use, in short; None where the model is not patched.
        sites: Rules for single sites, as plain data.
        fingerprint: Fingerprint of the patched sites.
        config: The config, as plain data.
        settings: Seed, precision, device, number of processes.
        versions: Versions of Python, PyTorch and the other libraries.
        git: The commit of the code.
        command: The command line that began it.
        words: Its words after the subcommand.
        started: Time of the beginning, in UTC.
        to_step: The step before which the next segment begins; None for the last one.
        changed: The settings that differ from the segment before: by name, the value there and the value here.
        resumed_at: Steps at which a process went on, with nothing changed.
        checkpoint: The file that the first step began from, where there was one.
    """

    from_step: int
    choice: str | None
    sites: list[Any] = field(default_factory=list)
    fingerprint: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    git: str | None = None
    command: str | None = None
    words: list[str] = field(default_factory=list)
    started: str | None = None
    to_step: int | None = None
    changed: dict[str, list[Any]] = field(default_factory=dict)
    resumed_at: list[int] = field(default_factory=list)
    checkpoint: str | None = None

    def compared(self) -> dict[str, Any]:
        """Return the values that are compared with those of the segment before.

        Returns:
            Values by dotted name.
        """
        config = {k: v for k, v in flat(self.config).items() if k.partition(".")[0] not in _OF_THE_CALL}
        return {
            **config,
            **self.settings,
            **{f"version of {name}": v for name, v in self.versions.items()},
            "sites": self.sites,
            "fingerprint": self.fingerprint,
            "choice": self.choice,
            "git": self.git,
        }


def with_segment(before: Sequence[Segment], new: Segment) -> list[Segment]:
    """The segments of a run that goes on.

    Args:
        before: Those that the record holds. One that begins at the new one's first step, or later, was given up: none
            of its steps is kept.
        new: The segment that begins now.

    Returns:
        The segments; the last one is continued where nothing has changed.

    Example:
        >>> first = Segment(0, "relu=1")
        >>> [(s.from_step, s.to_step, s.changed) for s in with_segment([first], Segment(40, "relu=0.5"))]
        [(0, 40, {}), (40, None, {'choice': ['relu=1', 'relu=0.5']})]
        >>> [(s.from_step, s.resumed_at) for s in with_segment([first], Segment(40, "relu=1"))]
        [(0, [40])]
    """
    kept = [segment for segment in before if segment.from_step < new.from_step]
    if not kept:
        return [new]
    *earlier, last = kept
    then, now = last.compared(), new.compared()
    changed = {
        name: [then.get(name), now.get(name)] for name in {**then, **now} if not _same(then.get(name), now.get(name))
    }
    if not changed:
        resumed = sorted({*(step for step in last.resumed_at if step <= new.from_step), new.from_step})
        return [*earlier, Segment(**{**asdict(last), "to_step": None, "resumed_at": resumed})]
    ended_there = Segment(**{**asdict(last), "to_step": new.from_step})
    return [*earlier, ended_there, Segment(**{**asdict(new), "changed": changed})]


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON holds them: a tuple is a list."""
    one, other = (json.loads(json.dumps(value, default=str)) for value in (one, other))
    return bool(one == other)


def segments(record: Mapping[str, Any]) -> list[Segment]:
    """The segments that a record holds.

    Args:
        record: The content of ``run.json``; empty where there is none yet.

    Returns:
        The segments in the order of their steps. A record from before there were segments is one.
    """
    known = {f.name for f in fields(Segment)}
    if "segments" in record:
        return [Segment(**{k: v for k, v in one.items() if k in known}) for one in record["segments"]]
    if not record:
        return []
    from nslightning.choices import choice_label

    patch = record.get("patch") or {}
    return [
        Segment(
            from_step=0,
            choice=choice_label(patch["jacobians"]) if "jacobians" in patch else None,
            sites=patch.get("rules") or [],
            fingerprint=patch.get("fingerprint"),
            settings={k: record.get(k) for k in ("seed", "precision", "device", "processes")},
            versions=record.get("versions") or {},
            git=record.get("git"),
            command=record.get("command"),
        )
    ]


def read_record(folder: str | Path) -> dict[str, Any]:
    """The content of a run's ``run.json``.

    Args:
        folder: The run's folder.

    Returns:
        The content; empty where there is none, or it cannot be read.
    """
    try:
        content = json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_record(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write a run's ``run.json``, whole or not at all.

    Args:
        folder: The run's folder.
        record: Its content.
    """
    write_text(Path(folder, "run.json"), json.dumps(record, indent=2, default=str) + "\n")


def check_record(folder: str | Path) -> None:
    """Raise if a run's record is gone: then so is its folder, and a file written there would begin another one.

    Args:
        folder: The folder of a run that has a record.

    Raises:
        FileNotFoundError: If it is gone.
    """
    try:
        Path(folder, "run.json").stat()
    except FileNotFoundError:
        raise
    except OSError:  # a disk that does not answer now: the next file that is written says so, if it still does not
        return


def choice_changes(folder: str | Path) -> list[tuple[int, str]]:
    """Return where a run's Jacobian choice changed.

    Args:
        folder: The run's folder.

    Returns:
        The first step of each segment under another choice than the one before, and what it changed to in words.
    """
    changes = []
    for before, after in pairwise(segments(read_record(folder))):
        if (before.choice, before.sites) != (after.choice, after.sites):
            rules = f", {len(after.sites)} rules for sites" if before.sites != after.sites else ""
            changes.append((after.from_step, f"{before.choice} to {after.choice}{rules}"))
    return changes


def comparable_from(folder: str | Path) -> int:
    """The step from which a run's measurements are of the choice and the precision that it has now.

    Args:
        folder: The run's folder.

    Returns:
        The first step of the last segment that changed either; 0 where none did.
    """
    step = 0
    for before, after in pairwise(segments(read_record(folder))):
        one, other = ((s.choice, s.sites, s.settings.get("precision")) for s in (before, after))
        if one != other:
            step = after.from_step
    return step


def note_end(folder: str | Path, end: End, step: int) -> None:
    """Write into a run's record how it ended.

    Args:
        folder: The run's folder; nothing happens where it has no record.
        end: How.
        step: The optimizer steps that were taken.
    """
    if record := read_record(folder):
        write_record(folder, record | {"ended": end, "ended_at_step": step})


def ended(folder: str | Path) -> End | None:
    """Return how a run ended.

    Args:
        folder: The run's folder.

    Returns:
        ``"finished"``, ``"stopped"`` by a signal, ``"failed"`` by an error, or None: it is running, or was killed.
    """
    state: End | None = read_record(folder).get("ended")
    return state


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A config by dotted names: a class's arguments under the option's own name, items of a list by their number.

    Args:
        config: A config file's content, or a part of it.
        prefix: Beginning of each name.

    Returns:
        Values by name.

    Example:
        >>> flat({"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}, "seed": 0})
        {'optimizer': 'SGD', 'optimizer.lr': 0.1, 'seed': 0}
    """
    name = prefix.rstrip(".")
    if isinstance(config, dict) and "class_path" in config:
        arguments = config.get("init_args") or config.get("dict_kwargs") or {}
        return {name: str(config["class_path"]).rpartition(".")[2], **flat(arguments, prefix)}
    if isinstance(config, dict) and config:
        return {k: v for key, value in config.items() for k, v in flat(value, f"{prefix}{key}.").items()}
    if isinstance(config, list) and any(isinstance(item, dict) for item in config):
        return {k: v for i, item in enumerate(config) for k, v in flat(item, f"{prefix}{i}.").items()}
    return {name: config} if name else {}
