"""Ends a command on Ctrl-C, SIGTERM or a lost terminal, with one line and the right exit status."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Signals", "Stopped", "signals"]

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
if _HANGUP is not None:
    _NAMES[_HANGUP] = "the end of its terminal"


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop.

    Args:
        signum: The signal.

    Attributes:
        status: The exit status: 130 for Ctrl-C, 143 for SIGTERM, 129 for a lost terminal.
        by: Name of the signal in messages, such as ``Ctrl-C``.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum
        self.by = _NAMES.get(signal.Signals(signum), signal.Signals(signum).name)


class Signals:
    """Handles Ctrl-C, SIGTERM and the end of the terminal (SIGHUP) while a command runs.

    They raise :class:`Stopped` where the command happens to be. A training sets ``waits``: the first signal is then
    kept in ``signum`` until a step is done, and the second one ends the command at once. Where Python ignores
    exceptions, as in ``__del__`` and in the callback of a weak reference, :class:`Stopped` is raised again soon after.

    Attributes:
        waits: Whether the first signal is only kept.
        answers: Whether this process says that it stops: not one that another one started for its training.
        signum: The first signal that came; None where there was none.
    """

    def __init__(self) -> None:
        self.waits, self.answers = False, True
        self.signum: int | None = None
        self._process = os.getpid()
        self._terminal = [number for number in (1, 2) if os.isatty(number)]
        self._unraisable_hook = sys.unraisablehook
        self._will_send = False  # a timer will send the signal once more
        self._in_hook = self._came_in_hook = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self._process:  # a loader's worker, forked: the process that started it ends it
            return
        again, self.signum = self.signum is not None, self.signum or signum
        if signum == _HANGUP:
            self._let_go_of_terminal()
        if self.waits and not again:
            if self.answers:
                stop = _NAMES.get(signal.Signals(signum), "the signal")
                print(f"\n{stop}: stopping after this step; a second one stops at once", file=sys.stderr, flush=True)
            # The same signal may end a loader's workers, and PyTorch would raise for it in the middle of the step.
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return
        if self._in_hook:  # Python would ignore it here, too
            self._came_in_hook = True
            return
        raise Stopped(signum)

    def install(self) -> None:
        """Make this the handler, also where a library has set its own since. Under `nohup` SIGHUP stays ignored."""
        for signum in _NAMES:
            if signum == _HANGUP and signal.getsignal(signum) is signal.SIG_IGN:
                continue
            with suppress(ValueError):  # outside the main thread
                signal.signal(signum, self)

    def catch_unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Send the signal once more where Python ignored :class:`Stopped`: else the command would go on for ever.

        Args:
            unraisable: An exception that Python ignores.
        """
        stop = unraisable.exc_value
        if not isinstance(stop, Stopped):
            self._unraisable_hook(unraisable)
            return
        self._in_hook, self._came_in_hook = True, False
        if not self._will_send:
            self._send_soon(stop.args[0])
        self._in_hook = False
        if self._came_in_hook and not self._will_send:
            self._send_soon(stop.args[0])

    def _send_soon(self, signum: int) -> None:
        self._will_send = True
        timer = threading.Timer(0.01, self._send, (signum,))  # by then Python has left the place
        timer.daemon = True
        timer.start()

    def _send(self, signum: int) -> None:
        self._will_send = False
        if _current and _current[-1] is self:
            signal.pthread_kill(threading.main_thread().ident or 0, signum)

    def _let_go_of_terminal(self) -> None:
        """Write no more to a terminal that is gone: what writes would raise before the checkpoint is saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminal:
            os.dup2(nowhere, number)
        os.close(nowhere)


_current: list[Signals] = []


def _end_quietly() -> None:
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def signals() -> Iterator[Signals]:
    """Handle Ctrl-C, SIGTERM and SIGHUP by a :class:`Signals`, the outer command's where one command runs another.

    Yields:
        The handler.
    """
    if _current:
        yield _current[-1]
        return
    before = {}
    for signum in _NAMES:
        with suppress(ValueError):
            before[signum] = signal.getsignal(signum)
    handler = Signals()
    _current.append(handler)
    handler.install()
    hook, sys.unraisablehook = sys.unraisablehook, handler.catch_unraisable
    try:
        yield handler
    finally:
        _current.pop()
        sys.unraisablehook = hook
        # Once the command is done, Ctrl-C ends the process without an account of what Python was tidying up.
        atexit.unregister(_end_quietly)
        atexit.register(_end_quietly)
        for signum, old in before.items():
            with suppress(ValueError):
                signal.signal(signum, signal.SIG_DFL if old is None else old)
