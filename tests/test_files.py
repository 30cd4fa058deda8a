"""Files that are whole or not there."""

import errno
import os

import pytest

from nslightning.files import replacing, write_text


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
