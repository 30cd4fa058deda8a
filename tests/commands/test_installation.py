"""``nslightning --version --verbose``, and the building of the C++ autograd nodes."""

import subprocess
import sys

import pytest

from nslightning.cli import main
from nslightning.ops.autograd import native
from nslightning.ops.kernels import build, store


@pytest.fixture(autouse=True)
def _fresh_state(monkeypatch):
    monkeypatch.delenv("NSLIGHTNING_NATIVE", raising=False)


def test_the_version_says_which_ways_are_in_force(capsys, monkeypatch):
    assert main(["--version", "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "C++ autograd nodes" in shown
    assert "NSLIGHTNING_NATIVE=cuda asks for them" in shown
    monkeypatch.setenv("NSLIGHTNING_NATIVE", "0")
    main(["--version", "--verbose"])
    assert "switched off by NSLIGHTNING_NATIVE=0" in capsys.readouterr().out
    monkeypatch.delenv("NSLIGHTNING_NATIVE")
    monkeypatch.setattr(store, "library", lambda: store.SOURCE.with_name("absent"))
    main(["--version", "--verbose"])
    assert "python -m nslightning.ops.kernels.build" in capsys.readouterr().out


def test_a_mistaken_word_after_version(capsys):
    assert main(["--version", "--verbos"]) == 2
    assert "--version takes --verbose" in capsys.readouterr().err


def test_without_a_library_every_call_goes_the_python_way(monkeypatch):
    import torch
    from torch import nn

    from nslightning import Jacobians, patch

    monkeypatch.setattr(native, "_library", lambda: None)
    model = nn.Sequential(nn.ReLU(), nn.Hardtanh())
    patch(model, Jacobians(relu=0.5))
    x = torch.zeros(3, requires_grad=True)
    for _ in range(3):  # the first forward completes the report
        assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], torch.full((3,), 0.5))


def test_no_compiler_is_said_and_leaves_the_python_nodes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NSLIGHTNING_NATIVE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler"):
        build.build()
    assert build.main() == 0
    assert "The Python nodes are used" in capsys.readouterr().err


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("NSLIGHTNING_NATIVE_DIR", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "nodes.cpp:1: error: no such thing")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(build.BuildError, match="no such thing"):
        build.build()
    assert list(tmp_path.iterdir()) == []


def test_the_command_that_builds_runs_without_a_warning(repo_root):
    command = [sys.executable, "-W", "error", "-m", "nslightning.ops.kernels.build"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repo_root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "C++ autograd nodes" in done.stdout


def test_another_source_is_another_library(tmp_path, monkeypatch):
    before = store.library()
    changed = tmp_path / "nodes.cpp"
    changed.write_text(store.SOURCE.read_text() + "\n")
    monkeypatch.setattr(store, "SOURCE", changed)
    assert store.library() != before
    monkeypatch.setenv("NSLIGHTNING_NATIVE_DIR", str(tmp_path / "elsewhere"))
    assert store.library().parent == tmp_path / "elsewhere"
