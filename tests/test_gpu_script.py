"""The script that measures on a GPU, read without one: its limits, and that each command takes its options."""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from nslightning.cli import main as nslightning

PARTS = ("patching", "training", "science")
RECORD = """#!/usr/bin/env bash
printf '%q ' "$@" >>"$RECORDED"
echo >>"$RECORDED"
"""


class _ParsedError(Exception):
    """The command line was taken."""


@pytest.fixture(scope="module")
def steps(repo_root, tmp_path_factory):
    """The time limit and the command of each step, by part, as `timeout` gets them."""
    folder = tmp_path_factory.mktemp("script")
    for name in ("timeout", "python"):
        (folder / name).write_text(RECORD)
        (folder / name).chmod(0o755)
    recorded: dict[str, list[tuple[int, list[str]]]] = defaultdict(list)
    for part in PARTS:
        environment = {
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / "python"),
            "RECORDED": str(folder / part), "NSLIGHTNING_DATA_DIR": str(folder),
        }  # fmt: skip
        script = ["bash", str(repo_root / "benchmarks" / "on_gpu.sh"), str(folder / "results"), part]
        subprocess.run(script, env=environment, check=True, capture_output=True)
        for line in (folder / part).read_text().splitlines():
            words = shlex.split(line)
            if words[0].startswith("--kill-after"):
                recorded[part].append((int(words[1]), words[3:]))
    return recorded


@pytest.mark.parametrize("part", PARTS)
def test_a_part_fits_into_ten_minutes(steps, part):
    assert len(steps[part]) > 5
    assert sum(seconds for seconds, _ in steps[part]) <= 600


@pytest.mark.parametrize("part", PARTS)
def test_each_command_takes_its_options(steps, part, repo_root, monkeypatch, capsys, tmp_path):
    parse = argparse.ArgumentParser.parse_args

    def parsed(*arguments, **options):
        parse(*arguments, **options)
        raise _ParsedError

    monkeypatch.chdir(repo_root)
    for _, command in steps[part]:
        if command[0] == "-c":
            compile(command[1], "step", "exec")
        elif command[1] == "pytest":
            files = [word for word in command if word.startswith("tests/")]
            assert files
            assert all(Path(file).is_file() for file in files)
        elif command[1] == "nslightning":
            options = [word if word != "cuda" else "cpu" for word in command[2:]]
            assert nslightning([*options, "--list", f"--output={tmp_path}"]) in (None, 0)
            assert int(capsys.readouterr().out.split(" cells")[0].rsplit(None, 1)[-1]) >= 6
        elif command[1].startswith("benchmarks"):
            module = importlib.import_module(command[1])
            with monkeypatch.context() as patched:
                patched.setattr(argparse.ArgumentParser, "parse_args", parsed)
                patched.setattr(sys, "argv", command[1:])
                with pytest.raises(_ParsedError):
                    module.main()


def test_a_part_that_is_misspelt_is_refused(repo_root, tmp_path):
    script = repo_root / "benchmarks" / "on_gpu.sh"
    done = subprocess.run(["bash", str(script), str(tmp_path), "trainig"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "on_gpu.sh: 'trainig' is not a part: patching, training, science\n"
