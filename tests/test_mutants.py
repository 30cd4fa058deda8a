"""``make mutants`` kills a change that a test sees, and keeps one that no test could see."""

import sys

import pytest
from mutants import TESTS, Mutant, mutants, outcome

SOURCE = '''"""Numbers."""

LIMIT: int | None = 3


def larger(a: float, b: float) -> float:
    """The larger one."""
    if a < 0 and b < 0:
        raise ValueError(f"{a + 1} and {b} are below 0")
    return a if a > b else b


def forever() -> None:
    """Until the limit."""
    n = 0
    while n < 2:
        n += 1
'''
CHECKS = """
import pytest
import {module}

def test_larger():
    pairs = ((1, 2), (2, 1), (-1, 1), (1, -1), (2, 2), (0, -2))
    assert [{module}.larger(*pair) for pair in pairs] == [2, 2, 1, 1, 2, 0]
    with pytest.raises(ValueError):
        {module}.larger(-1, -2)

def test_forever():
    {module}.forever()
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A module outside the package, of a name that nothing has imported."""
    path = tmp_path / "little_module_for_mutants.py"
    path.write_text(SOURCE)
    (tmp_path / "test_little_module.py").write_text(CHECKS.format(module=path.stem))
    monkeypatch.syspath_prepend(tmp_path)
    return path


def run(file, text, limit=60):
    (mutant,) = [m for m in mutants(file) if m.text == text]
    return outcome(
        mutant, [f"--rootdir={file.parent}", str(file.parent / "test_little_module.py")], limit, file.parent / "log"
    )


def test_what_a_test_sees_is_killed_and_what_is_equivalent_survives(file):
    assert run(file, "a > b -> a < b") == "killed"
    assert "assert [1, 1" in (file.parent / "log").read_text()
    assert run(file, "a > b -> a >= b") == "survived"
    assert file.read_text() == SOURCE
    assert file.stem not in sys.modules  # this process is as it was


def test_a_change_that_never_ends_is_ended(file):
    assert run(file, "n += 1 -> pass", limit=5) == "slow"


def test_a_plugin_that_is_imported_already_is_no_failure(file, monkeypatch):
    """Where warnings are errors, pytest would refuse to start, and every mutant would pass for killed."""
    (file.parent / "little_plugin_for_mutants.py").write_text("")
    monkeypatch.setitem(sys.modules, "little_plugin_for_mutants", __import__("little_plugin_for_mutants"))
    arguments = ["-W", "error", "-p", "little_plugin_for_mutants", f"--rootdir={file.parent}", str(file.parent)]
    log = file.parent / "log"
    assert outcome(Mutant(file, None), arguments, 60, log) == "survived", log.read_text()
    assert outcome(Mutant(file, None), [*arguments, "-p", "no_such_plugin"], 60, log) == "not run"


def test_types_and_messages_are_no_mutants(file):
    texts = [mutant.text for mutant in mutants(file)]
    assert "a < 0 and b < 0 -> a < 0 or b < 0" in texts
    assert "return a if a > b else b -> return None" in texts
    assert "3 -> 4" in texts
    assert not [text for text in texts if text.startswith(("int | None", "a + 1"))]


def test_a_module_that_is_imported_already_is_refused(file):
    __import__(file.stem)
    try:
        with pytest.raises(ValueError, match="imported already"):
            run(file, "a > b -> a >= b")
    finally:
        del sys.modules[file.stem]


def test_every_module_and_every_test_named_is_there(repo_root):
    for name, tests in TESTS.items():
        assert mutants(repo_root / name)
        for test in tests:
            file, _, function = test.partition("::")
            (path,) = (repo_root / "tests").rglob(f"test_{file}.py")
            assert f"def {function}" in path.read_text()
