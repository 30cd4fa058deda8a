"""Saves the state of an unfinished cell: an interruption of a long training loses minutes."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nslightning.files import replacing
from nslightning.runs import environment

__all__ = ["SAVED_EVERY", "Partial"]

#: Seconds between two savings of a cell that is being computed.
SAVED_EVERY = 120.0


class Partial:
    """The file of a cell that is being computed.

    A file that another version of the code, of Python or of a library wrote is left aside, and the cell begins again:
    one version computes a whole cell.

    Args:
        file: Where; None keeps nothing.
        every: Seconds between two savings.
    """

    def __init__(self, file: Path | None, every: float | None = None) -> None:
        self._file, self._every = file, SAVED_EVERY if every is None else every
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Return whether it is time to save."""
        return self._file is not None and time.monotonic() - self._last >= self._every

    def load(self) -> dict[str, Any] | None:
        """Return the state that was saved last.

        Returns:
            The state; None where there is none, where it cannot be read, or another version wrote it.
        """
        if self._file is None or not self._file.exists():
            return None
        try:
            content = torch.load(self._file, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file may raise anything
            return None
        return content["state"] if content.get("writer") == _writer() else None

    def save(self, state: dict[str, Any]) -> None:
        """Save, whole or not at all.

        Args:
            state: Tensors, numbers, text and containers of them.
        """
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._file) as partial, partial.open("wb") as opened:
                torch.save({"writer": _writer(), "state": state}, opened)
            self._last = time.monotonic()


@cache
def _writer() -> dict[str, str]:
    """Describe everything that the bits of a computation depend on besides its settings."""
    here = environment()
    return {name: str(here[name]) for name in ("python", "versions", "git", "devices")}
