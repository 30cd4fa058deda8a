"""Files that are whole or not there."""

import csv
import errno
import os
import tempfile
from pathlib import Path

import pytest

from nslightning.files import check_writable, named_in_errors, replacing, write_text


def test_text_is_written_in_utf8_with_the_permissions_of_any_other_file(tmp_path):
    file = tmp_path / "new" / "a.txt"
    write_text(file, "\u03b1\n")
    (tmp_path / "plain").touch()
    assert file.read_bytes() == "\u03b1\n".encode()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("named", [None, "its own"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path, named):
    """Not the one that is written before it takes the other's place."""

    def full() -> None:
        with replacing(tmp_path / "a.txt") as partial:
            raise OSError(errno.ENOSPC, "No space left on device", named and str(partial))

    with pytest.raises(OSError, match=r"No space left on device: '.*/a\.txt'"):
        full()


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(OSError, match=r"denied: 'b\.txt'"), named_in_errors(tmp_path / "a.txt"):
        raise OSError(errno.EACCES, "denied", "b.txt")


def full(*_args, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_names_the_table_that_a_row_is_added_to(tmp_path, monkeypatch):
    from nslightning.callbacks.measurements import append_rows
    from nslightning.runs import MetricsFile

    metrics = MetricsFile(tmp_path / "x" / "001")
    metrics.log_metrics({"loss": 1.0}, step=0)
    metrics.save()
    monkeypatch.setattr(csv.DictWriter, "writerows", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*divergence\.csv'"):
        append_rows(tmp_path / "divergence.csv", [{"step": 1}])
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.csv'"):
        metrics.log_metrics({"loss": 1.0}, step=1)


def test_a_pipe_is_written_and_stays_one(tmp_path):
    """As `--json /dev/stdout` is: a file would take the device's place."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "text\n")
    assert os.read(reader, 100) == b"text\n"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_is_writable_where_a_file_can_be_made(tmp_path, monkeypatch):
    """Root may write into any folder by its permissions, and not into those of the kernel."""
    assert check_writable(tmp_path / "a" / "b") == tmp_path
    assert list(tmp_path.iterdir()) == []
    if Path("/proc").is_dir():
        with pytest.raises(ValueError, match=r"/proc/reports cannot be written: /proc is not a folder that may be"):
            check_writable("/proc/reports")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/b'"):
        check_writable(tmp_path / "b")


def test_a_file_s_name_that_is_no_utf8_is_written_with_escapes(tmp_path):
    write_text(tmp_path / "a.txt", "runs/\udcff")
    assert (tmp_path / "a.txt").read_text() == r"runs/\udcff"


def test_the_permissions_of_the_file_that_is_replaced_stay(tmp_path):
    file = tmp_path / "a.txt"
    file.touch(mode=0o600)
    write_text(file, "new")
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("failure", ["while writing", "while moving", "on a full disk"])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failure):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    if failure == "while moving":
        monkeypatch.setattr("pathlib.Path.replace", fails)
    if failure == "on a full disk":
        monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises((OSError, UnicodeEncodeError)), replacing(file) as partial:
        partial.write_text("\ud800" if failure == "while writing" else "new", encoding="utf-8")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
