"""What a newcomer meets first: help at once, a line while imports take their time, completion, spellings."""

import inspect
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from nslightning import Jacobians, data
from nslightning.cli import COMMANDS, main
from nslightning.commands import help as fast
from nslightning.commands.dashes import spelled_with_dashes, with_new_spellings
from nslightning.commands.plain_parser import Arguments

HEAVY = ("torch", "lightning", "torchvision", "timm", "wandb", "scipy", "matplotlib", "pandas")


def test_help_of_every_command_imports_nothing_heavy():
    """One process for all of them: what one imported would be there for the next."""
    code = (
        "import sys\nfrom nslightning.cli import COMMANDS, main\n"
        "for command in COMMANDS:\n"
        "    try: status = main([command, '--help'])\n"
        "    except SystemExit as stop: status = stop.code\n"
        f"    print('HEAVY', command, status, [m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    assert imported == [f"HEAVY {command} 0 []" for command in COMMANDS]
    assert done.stderr == ""


@pytest.mark.parametrize("command", fast.COMMANDS)
def test_the_short_help_names_what_a_run_needs(command, capsys):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: nslightning {command} --config FILE [options]\n")
    assert text.index("--model.backbone") < text.index("--data ") < text.index("--trainer.max_epochs")
    assert f"nslightning {command} --help=all" in text
    assert max(map(len, text.splitlines())) <= 120
    if command != "twins":
        assert all(f"--model.jacobians.{field.name}" in text for field in fields(Jacobians))
    (listed,) = re.findall(r"--data NAME +The data set: ([^.]+)\.", text)
    kind = data.ImageDataModule if command == "twins" else data.ResumableDataModule
    classes = {name: getattr(data, name) for name in data.__all__}
    named = [n for n, c in classes.items() if isinstance(c, type) and issubclass(c, kind) and not inspect.isabstract(c)]
    assert re.split(r",\s+", listed) == named
    assert ("TokenFile" in named) == (command != "twins")


def whole_help(command, capsys):
    assert main([command, "--help=all"]) == 0
    return capsys.readouterr().out


def fresh_help(command, capsys):
    from importlib import import_module

    assert import_module(COMMANDS[command][0]).main([command, "--help"]) == 0
    return capsys.readouterr().out


def test_the_whole_help_is_kept_and_is_the_fresh_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = whole_help("fit", capsys)
    assert text == fresh_help("fit", capsys)
    assert text.startswith("usage: nslightning fit --config FILE [options]\n")
    assert 0 < text.index("--model.jacobians.relu") < text.index("--data ") < text.index("--trainer.accelerator")
    assert "ReLU'(0) = alpha" in text
    (kept,) = (tmp_path / "nslightning" / "help").iterdir()
    kept.write_text("as it was kept\n")
    assert whole_help("fit", capsys) == "as it was kept\n"
    # Another source, another help: the file's size and time are part of the name.
    monkeypatch.setattr(fast, "version", lambda package: "9.9")
    assert whole_help("fit", capsys) == text
    # The short one names only what the whole one knows; classes of data take further ones.
    known = set(re.findall(r"--[\w.]+", text))
    unknown = [o.flag for o in fast.options("fit") if o.flag not in known and not o.flag.startswith("--data.")]
    assert unknown == []
    twins = set(re.findall(r"--[\w.]+", fresh_help("twins", capsys)))
    assert [o.flag for o in fast.options("twins") if o.flag not in twins and "--data." not in o.flag] == []


def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fast.whole(["fit"], lambda: "built\n") == "built\n"


def test_a_line_comes_before_the_imports():
    """The line is there when the first heavy module is asked for."""
    code = (
        "import sys, builtins, io\nfrom nslightning.cli import main\n"
        "sys.stderr = told = io.StringIO()\nkept = builtins.__import__\n"
        "def watch(name, *rest, **more):\n"
        "    if name.split('.')[0] in ('torch', 'lightning'):\n"
        "        sys.stdout.write(told.getvalue()); sys.stdout.flush(); import os; os._exit(7)\n"
        "    return kept(name, *rest, **more)\n"
        "builtins.__import__ = watch\n"
        "main(['fit', '--config', 'configs/quickstart.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "nslightning fit: loading torch and lightning ...\n")


def test_a_shell_completes_commands_and_options(capsys):
    assert main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    for word in [*COMMANDS, "--model.jacobians.relu", "--batch-size", "--fail-above", "--backbone", "--scale"]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", script), word
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert main(["--print-completion", "fish"]) == 2
    assert "bash, zsh, tcsh" in capsys.readouterr().err


def test_old_spellings_go_on_working_with_a_word(capsys):
    parser = Arguments("nslightning x")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--backbone")
    spelled_with_dashes(parser)
    rewritten = with_new_spellings(
        parser, ["--batch_size=3", "--model", "a_b", "--new_one=1"], {"--model": "--backbone"}
    )
    assert rewritten == ["--batch-size=3", "--backbone", "a_b", "--new_one=1"]
    warned = capsys.readouterr().err
    assert "--batch_size is spelled --batch-size today" in warned
    assert "--model is spelled --backbone today" in warned
    assert parser.parse_args(rewritten[:3]).batch_size == 3
    assert "--batch-size" in parser.format_help()
    assert "batch_size" not in parser.format_help()


def test_a_list_in_brackets_and_a_switch_that_stands_alone(capsys):
    """As a config writes them, and as other commands do."""
    from nslightning.commands import zones

    parser = zones.make_parser("nslightning zones")
    words = ["--precisions", "[16,32]", "--choice=a:relu=1", "--download", "--batch-size=3"]
    read = parser.parse_args(with_new_spellings(parser, words, {"--choice": "--choices"}))
    assert (read.precisions, read.choices, read.download, read.batch_size) == ([16, 32], ["a:relu=1"], True, 3)
    warned = capsys.readouterr().err
    assert "--precisions=[16,32] is spelled --precisions 16 32 today" in warned
    assert "--choice is spelled --choices today" in warned


def test_the_same_things_have_the_same_names():
    """In the commands that take choices, precisions, a device and batches."""
    from importlib import import_module

    options = {
        command: set(import_module(COMMANDS[command][0]).make_parser("x")._option_string_actions)
        for command in ("zones", "cost", "lr-search", "audit", "experiment", "tokens", "report", "figure", "dashboard")
    }
    for command, names in options.items():
        assert not [name for name in names if "_" in name and name not in ("--print_config", "--print_shtab")], command
    assert all("--choices" in options[command] for command in ("zones", "cost", "lr-search"))
    assert all("--batch-size" in options[command] for command in ("zones", "cost", "audit"))
    assert all("--precisions" in options[command] for command in ("zones", "audit"))
    assert all({"--device", "--seed"} <= options[command] for command in ("zones", "cost", "audit"))
    assert all("--download" in options[command] for command in ("zones", "audit", "experiment"))


def test_a_training_takes_dashes(capsys):
    words = ["fit", "--config", "configs/quickstart.yaml", "--data.batch-size=7", "--seed-everything=3"]
    assert main([*words, "--model.jacobians.max-pool=minimal", "--print-config"]) == 0
    shown = capsys.readouterr().out
    assert "batch_size: 7" in shown
    assert "seed_everything: 3" in shown
    assert "max_pool: minimal" in shown


@pytest.mark.parametrize("command", ["cost", "zones"])
def test_options_of_a_config_keep_their_names(command, tmp_path):
    from importlib import import_module

    (tmp_path / "a.yaml").write_text("backbone: paper/lenet5\nbatch_size: 7\n")
    parser = import_module(COMMANDS[command][0]).make_parser("x")
    parsed = parser.parse_args([f"--config={tmp_path / 'a.yaml'}", "--device", "cuda"])
    assert (parsed.backbone, parsed.batch_size, parsed.device) == ("paper/lenet5", 7, "cuda")
    assert parser.parse_args(["--backbone=paper/fc", "--batch-size", "5"]).batch_size == 5
