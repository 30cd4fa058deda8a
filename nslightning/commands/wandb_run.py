"""The W&B run of a run folder: its id, where it is kept, and whether it can be online."""

from __future__ import annotations

import importlib
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from configparser import ConfigParser
from configparser import Error as ConfigError
from contextlib import suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from jsonargparse import Namespace

from nslightning.files import check_writable
from nslightning.spelling import did_you_mean

__all__ = ["CORE_IS_GONE", "finish", "prepared"]

#: The errors of wandb whose own process has ended, beside those of a connection.
CORE_IS_GONE = ("HandleAbandonedError", "MailboxClosedError")

#: Seconds that a finished run waits for W&B to take what is not uploaded yet; without them it waits without end.
_UPLOAD = "300"
#: The length of a tag that W&B takes.
_TAG = 64
_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


def prepared(loggers: Any, folder: Path, tags: Sequence[str]) -> tuple[Any, list[str]]:
    """Point the WandbLoggers of a config to a run's folder; where W&B cannot be imported, go on without it.

    Args:
        loggers: The Trainer's loggers, as options.
        folder: The run's folder.
        tags: The tags of a run whose config names none.

    Returns:
        The loggers to make, or True, which is Lightning's default, where none is left; and what to say of them once
        the run begins.

    Raises:
        ValueError: If ``WANDB_MODE`` needs a package or a key that is missing.
    """
    several = isinstance(loggers, list)
    tags = [tag if len(tag) <= _TAG else f"{tag[: _TAG - 3]}..." for tag in tags]
    kept, notes = [], list[str]()
    for logger in loggers if several else [loggers]:
        if isinstance(logger, Namespace) and str(logger.get("class_path")).endswith("WandbLogger"):
            if (reason := _missing()) is not None:
                notes.append(
                    f"W&B is left out ({reason}); `pip install wandb` mends it. {folder}/metrics.csv has its numbers"
                )
                continue
            notes += _prepare(logger.init_args, folder)
            # jsonargparse lists arguments of `wandb.init` as the logger's where it finds that function.
            if "group" in logger.init_args:
                logger.init_args.group = logger.init_args.group or folder.parent.name
                logger.init_args.tags = logger.init_args.tags or list(tags)
            else:
                asked = dict(logger.get("dict_kwargs") or {})
                logger.dict_kwargs = {"group": folder.parent.name, "tags": list(tags)} | asked
        kept.append(logger)
    if several:
        return kept, notes
    return (kept[0] if kept else True), notes


def _missing() -> str | None:
    """Return the reason why W&B cannot be imported; None where it can."""
    try:
        importlib.import_module("wandb")
    except Exception as error:  # whatever a half-installed package raises
        return f"{type(error).__name__}: {error}"
    return None


def _prepare(options: Namespace, folder: Path) -> list[str]:
    """Point a WandbLogger's options to a run's folder, stay offline where there is no account, and say how to upload.

    The file ``wandb_id`` in the folder makes a run that goes on the same W&B run.
    """
    options.save_dir = str(folder.absolute())  # W&B's own process keeps the folder it was started in
    options.name = options.name or f"{folder.parent.name}/{folder.name}"
    id_file = folder / "wandb_id"
    options.id = options.id or secrets.token_hex(4)
    try:
        with id_file.open("x") as file:  # the first process of a launch names the run
            file.write(f"{options.id}\n")
    except FileExistsError:
        options.id = id_file.read_text().strip()
    mode = "offline" if options.offline else os.environ.get("WANDB_MODE")
    if mode and mode not in _MODES:
        known = _MODES[:3]
        raise ValueError(f"WANDB_MODE={mode} is not a mode{did_you_mean(mode, known)} There are: {', '.join(known)}")
    reason = "W&B is offline"
    if mode in ("online", "run", "shared") and not _has_key():
        raise ValueError(
            f"WANDB_MODE={mode}, and W&B has no API key here: log in with `wandb login`, set WANDB_API_KEY, or leave "
            "WANDB_MODE out (a run without a key stays offline, and `wandb sync` uploads it later)"
        )
    if not mode and not _has_key():
        mode = os.environ["WANDB_MODE"] = "offline"
        reason = "W&B has no API key here and stays offline"
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", _UPLOAD)
    os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")
    if mode == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")  # the next line says what wandb's own six would
    if not _cache_is_writable():
        _start_with_cache(folder / "wandb" / "cache")
    if mode == "offline":
        return [f"{reason}; to upload this run: wandb login && wandb sync {folder}/wandb/offline-run-*"]
    return []


def _cache_is_writable() -> bool:
    """Return whether W&B's own process has a place for its log; without one it writes the log to the terminal."""
    if not (place := os.environ.get("XDG_CACHE_HOME") or os.environ.get("HOME")):
        return False
    try:
        check_writable(place)
    except ValueError:
        return False
    return True


def _start_with_cache(folder: Path) -> None:
    """Start W&B's own process with a separate cache; this process keeps its own."""
    import wandb

    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder.absolute())
    try:
        wandb.setup()
    finally:
        del os.environ["XDG_CACHE_HOME"]
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


def finish(failed: bool = False) -> None:
    """End the W&B run, so that the next one in this process is another, and say what W&B lacks of it.

    Args:
        failed: Whether the run's own error is said already, which tells why W&B could not end its record.
    """
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        run = wandb.run
        try:
            wandb.finish(exit_code=int(sys.exc_info()[0] is not None))
        except TimeoutError:
            upload = shlex.join(["wandb", "sync", str(Path(run.dir).parent)])
            print(f"W&B has not taken all of this run; its own file is whole: {upload}", file=sys.stderr)
        except Exception as error:  # its log is on a full disk, or its process is gone
            if not isinstance(error, OSError) and type(error).__name__ not in CORE_IS_GONE:
                raise
            record = Path(run.dir).parent
            if not failed:
                upload = shlex.join(["wandb", "sync", str(record)])
                print(
                    f"W&B's record of this run is not whole, since its process, wandb-core, was ended from outside: "
                    f"{record.parent.parent} has all of it, and this uploads what W&B has: {upload}",
                    file=sys.stderr,
                )
            with suppress(Exception):
                wandb.teardown()  # which W&B would do at the end of this process, with a traceback


def _has_key() -> bool:
    """Return whether W&B could log in; asking wandb itself would fix its settings before the mode is chosen."""
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
