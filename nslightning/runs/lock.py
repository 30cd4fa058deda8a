"""One process at a time writes into a run's folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nslightning.files import forget_partial, write_text

__all__ = ["RunLock"]

_ORPHANS = 15.0  # seconds that loader workers of a killed process may outlive it, and hold what it held


class RunLock:
    """Holds a run's folder until :meth:`release`, or the end of the process.

    Args:
        folder: The run's folder.

    Raises:
        ValueError: If another process holds it; the message says which.
    """

    def __init__(self, folder: Path) -> None:
        self._holder = folder / ".lock.json"
        self._lock = FileLock(folder / ".lock", is_singleton=False)
        try:
            self._lock.acquire(timeout=0 if self._is_held_by_the_living() else _ORPHANS)
        except Timeout:
            raise ValueError(
                f"{folder} is in use by {_in_words(self._read())}: two processes would write into the same files. "
                "Wait until it ends, or stop it; without --ckpt_path a new run gets its own folder"
            ) from None
        me = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        }
        forget_partial(folder)
        write_text(self._holder, json.dumps(me) + "\n")

    def release(self) -> None:
        """Let another process write into the folder."""
        for file in (self._holder, Path(self._lock.lock_file)):  # the lock's file while it is still held
            with suppress(OSError):
                file.unlink(missing_ok=True)
        self._lock.release()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._holder.read_text())
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _is_held_by_the_living(self) -> bool:
        holder = self._read()
        if holder.get("host") != platform.node():
            return True
        try:
            os.kill(int(holder["pid"]), 0)
        except (ProcessLookupError, KeyError, ValueError):
            return False
        except OSError:  # it is another user's
            return True
        return True


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']} ({holder['command']})"
