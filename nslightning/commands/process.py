"""Sets up the global state of one command and takes it back: arguments, environment, warnings, messages."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["own_process", "plain_warnings"]

# Environment variables that a command sets for the processes that it starts. WANDB_SERVICE stays: W&B's own process
# outlives a run.
_SET = (
    "NSLIGHTNING_RUN_FOLDER",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "WANDB_FINISH_TIMEOUT",
    "WANDB_FINISH_TIMEOUT_RAISES",
    "WANDB_MODE",
    "WANDB_SILENT",
)


def _wanted(record: logging.LogRecord) -> bool:
    # Two advertisements, a line about hardware that was not asked for, and one that a better one follows.
    noises = ("litlogger", "litmodels", "TPU available: False", "Detected KeyboardInterrupt")
    return not any(noise in record.getMessage() for noise in noises)


@contextmanager
def plain_warnings() -> Iterator[None]:
    r"""Print a warning as one message, without the place in the source; leave out what libraries tell each other.

    Lightning's import sets another form: import it before.

    Yields:
        Nothing.

    Example:
        >>> with plain_warnings():
        ...     warnings.formatwarning("few images", UserWarning, "data.py", 3)
        'UserWarning: few images\n'
    """
    form = warnings.formatwarning
    with warnings.catch_warnings():
        # Names of PyTorch's on their way out, which Lightning and PyTorch itself use.
        warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated")
        warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
        try:
            yield
        finally:
            warnings.formatwarning = form


@contextmanager
def own_process(argv: Sequence[str]) -> Iterator[None]:
    """Run a command as if the process were its own.

    Args:
        argv: The command line from the subcommand on.

    Yields:
        Nothing.
    """
    program, environment = sys.argv, dict(os.environ)
    messages = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tracebacks = logging.raiseExceptions
    sys.argv = [program[0], *argv]
    with plain_warnings():
        # A run that goes on writes where it did before.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        # The arguments are those of the command line, with `fit` for a command that is one of its kind.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        if argv[0] in ("validate", "test", "predict"):  # they would save, and evaluation saves nothing
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint need to be provided")
        messages.addFilter(_wanted)
        logging.raiseExceptions = False  # a library's log on a full disk: the run's own error says so
        try:
            yield
        finally:
            messages.removeFilter(_wanted)
            logging.raiseExceptions = tracebacks
            sys.argv = program
            for name in _SET:
                if (value := environment.get(name)) is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
