"""What a command prints arrives, or the command says that it did not; a lost terminal stops a run in order."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import termios
import threading
import time
import weakref
from pathlib import Path

import pytest

from nslightning.cli import main
from nslightning.commands.endings import ended
from nslightning.commands.stopping import Stopped, signals
from nslightning.commands.streams import NO_READER

HELP = [sys.executable, "-m", "nslightning", "--help"]


def test_a_reader_that_is_gone_ends_a_command_quietly():
    """As `nslightning --help | head -1` may; a pipe whose reading end is closed from the start is surely so."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(HELP, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (NO_READER, "")


def test_a_broken_pipe_of_the_work_s_own_is_no_lost_reader():
    def work() -> int:
        raise BrokenPipeError(32, "Broken pipe")

    assert ended("nslightning x", work) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_said():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(HELP, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "nslightning: error: the output cannot be written: No space left on device" in done.stderr


def test_a_folder_that_is_gone_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["fit", "--config", "configs/quickstart.yaml"]) == 2
    assert "the folder that this shell stands in is gone" in capsys.readouterr().err


@pytest.fixture
def heeds_sighup():
    """As in a terminal; under nohup the tests' process ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heeds_sighup")
def test_the_end_of_the_terminal_stops_as_sigterm_does():
    with signals() as kept:
        with pytest.raises(Stopped) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert (stop.value.status, stop.value.by, kept.signum) == (129, "the end of its terminal", signal.SIGHUP)


@pytest.mark.parametrize("words", [["--version", "--verbose"], ["--print-completion", "bash"], ["fit", "--help=all"]])
def test_whatever_the_command_it_is_stopped_in_one_line(words, capsys, monkeypatch):
    def interrupted(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return "not reached"

    monkeypatch.setattr("nslightning.commands.installation.describe", interrupted)
    monkeypatch.setattr("nslightning.commands.completion.script", interrupted)
    monkeypatch.setattr("nslightning.commands.help.whole", interrupted)
    assert main(words) == 130
    assert f"{' '.join(['nslightning', *words[:1]]) if words[0] == 'fit' else 'nslightning'}: stopped by Ctrl-C" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(("command", "rank", "waits"), [("fit", "1", True), ("fit", "0", False), ("audit", "1", False)])
def test_a_further_process_of_a_training_leaves_the_answer_to_the_first(command, rank, waits, capsys, monkeypatch):
    def interrupted(argv: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 7

    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr("nslightning.cli._run", interrupted)
    assert main([command]) == (7 if waits else 143)
    assert ("SIGTERM" in capsys.readouterr().err) == (not waits)


def test_a_command_under_nohup_goes_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals() as kept:
            kept.install()  # as a training does once more
            os.kill(os.getpid(), signal.SIGHUP)
            assert kept.signum is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class _Stops:
    """A signal comes while Python deletes it."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # here the handler runs
            pass


@pytest.mark.parametrize("place", ["__del__", "weak reference"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_signal_where_python_ignores_exceptions_stops_the_command(place, times, capsys):
    def delete_and_wait() -> None:
        for _ in range(times):
            delete()
        time.sleep(30)

    def delete() -> None:
        if place == "__del__":
            _Stops()
        else:
            key = threading.Event()
            dead = weakref.ref(key, lambda _: os.kill(os.getpid(), signal.SIGTERM))
            del key
            assert dead() is None

    before = sys.unraisablehook
    with signals(), pytest.raises(Stopped) as stop:
        delete_and_wait()
    assert stop.value.status == 143
    assert "Exception ignored" not in capsys.readouterr().err
    assert sys.unraisablehook is before


def test_other_exceptions_that_python_ignores_are_reported_as_ever(monkeypatch):
    class Fails:
        def __del__(self) -> None:
            raise OSError("no disk")

    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(str(unraisable.exc_value)))
    with signals():
        Fails()
    assert reported == ["no disk"]


@pytest.mark.usefixtures("heeds_sighup")
def test_nothing_is_written_to_a_terminal_that_is_gone():
    """A training prints between the signal and its checkpoint: to a lost terminal that would raise."""
    code = (
        "import os, signal, sys\n"
        "from nslightning.commands.stopping import signals\n"
        "with signals() as kept:\n"
        "    kept.waits = True\n"
        "    os.write(1, b'ready')\n"
        "    while kept.signum is None: signal.pause()\n"
        "    for _ in range(3): print('x' * 10000, flush=True); print('y', file=sys.stderr, flush=True)\n"
        "sys.exit(17)\n"
    )
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as command:  # fmt: skip
        os.close(theirs)
        assert os.read(ours, 5) == b"ready"
        os.close(ours)  # the system sends SIGHUP
        try:
            assert command.wait(60) == 17
        finally:
            command.kill()


def test_a_full_disk_is_said_whatever_a_library_raises_after_it(capsys):
    """Matplotlib's PDF writer raises an AttributeError when it closes the file that it could not write."""

    def work() -> int:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise AttributeError("'Stream' object has no attribute 'pos'")  # noqa: B904 # as it does

    assert ended("nslightning figure", work) == 1
    assert capsys.readouterr().err == "nslightning figure: error: a file cannot be written: the disk is full\n"
