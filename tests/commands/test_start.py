"""Where a command starts: which folder, which checkpoint, which config; and what is refused before anything runs."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from nslightning import runs
from nslightning.cli import main
from nslightning.commands.config_files import read_config
from nslightning.commands.going_on import Call, start


def write_run(folder: Path, *, jacobians=None, step=40, name="last.ckpt", **config) -> Path:
    """A run's folder as `fit` leaves it, with one checkpoint."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    content = {
        "name": folder.parent.name,
        "model": {"backbone": "paper/lenet5", "jacobians": {"relu": 1.0, "max_pool": 10.0}},
        "data": {"class_path": "nslightning.data.FashionMNISTSample", "init_args": {"batch_size": 64}},
        "trainer": {"max_epochs": 6, "callbacks": []},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content | config))
    runs.record.write_record(folder, {"segments": []})
    torch.save({"state_dict": {"w": torch.arange(1000.0)}, "global_step": step}, folder / "checkpoints" / name)
    return folder


def older(file: Path, seconds: float) -> None:
    now = file.stat().st_mtime
    os.utime(file, (now - seconds, now - seconds))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def change_a_byte(file: Path) -> None:
    """In the middle of a tensor: the archive's end is whole."""
    data = bytearray(file.read_bytes())
    place = data.index(torch.tensor([500.0]).numpy().tobytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


# --- the run's own config


def test_a_run_goes_on_under_its_own_config_and_flags_change_it(capfd, caplog):
    folder = write_run(Path("runs/quickstart/001"))
    Path("quickstart.yaml").write_text("model:\n  jacobians: {relu: 0, max_pool: 0}\ntrainer:\n  max_epochs: 6\n")
    with caplog.at_level("INFO"):
        started, task = start(
            [
                "fit",
                "--config",
                "quickstart.yaml",
                "--ckpt_path",
                "last",
                "--trainer.max_epochs=8",
                "--name=quickstart",
            ],
            "fit",
        )
    assert started.argv == ["fit", f"--config={folder}/config.yaml", "--trainer.max_epochs=8"]
    assert (started.folder, started.checkpoint, task) == (folder, folder / "checkpoints/last.ckpt", "images")


def test_what_follows_the_run_s_own_config_is_asked_for():
    folder = write_run(Path("runs/x/001"))
    Path("more.yaml").write_text("trainer:\n  max_epochs: 9\n")
    words = ["--config", f"{folder}/config.yaml", "--config=more.yaml", "--ckpt_path=last"]
    started, _ = start(["fit", *words], "fit")
    assert started.argv == ["fit", f"--config={folder}/config.yaml", "--config=more.yaml"]


@pytest.mark.parametrize("again", ["the same line", "another one"])
def test_callbacks_that_were_added_when_the_run_began_are_not_added_twice(again):
    began = ["--config=x.yaml", "--trainer.callbacks+=TieMonitor", "--trainer.callbacks.every_n_steps", "5"]
    items = [{"class_path": "A"}, {"class_path": "TieMonitor", "init_args": {"every_n_steps": 5}}]
    folder = write_run(Path("runs/x/001"), trainer={"callbacks": items})
    runs.record.write_record(folder, {"segments": [{"from_step": 0, "choice": None, "words": began}]})
    Path("x.yaml").write_text("seed_everything: 0\n")
    words = began if again == "the same line" else [*began[:-1], "7"]
    started, _ = start(["fit", *words, "--ckpt_path=last"], "fit")
    added = started.argv[2:]
    if again == "the same line":
        assert added == []
    else:
        assert added == [
            '--trainer.callbacks=[{"class_path": "A"}]',
            "--trainer.callbacks+=TieMonitor",
            "--trainer.callbacks.every_n_steps=7",
        ]


def test_a_checkpoint_by_its_path_takes_the_config_beside_it():
    folder = write_run(Path("elsewhere/x/001"))
    file = folder / "checkpoints/last.ckpt"
    started, _ = start(["test", f"--ckpt_path={file}"], "test")
    assert started.argv[:2] == ["test", f"--config={folder}/config.yaml"]
    assert started.checkpoint == file
    for options in ([f"--config={folder}/config.yaml"], ["--data=MNIST"]):
        started, _ = start(["test", *options, f"--ckpt_path={file}"], "test")
        assert started.argv == ["test", *options, f"--ckpt_path={file}"]


def test_a_config_beside_a_checkpoint_names_no_class_of_its_own_unasked():
    folder = write_run(Path("stranger/x/001"), data={"class_path": "evil.Data"})
    file = folder / "checkpoints/last.ckpt"
    with pytest.raises(
        ValueError, match=r"names code outside this package, evil\.Data.*--config=stranger/x/001/config\.yaml"
    ):
        start(["test", f"--ckpt_path={file}"], "test")
    start(["test", f"--config={folder}/config.yaml", f"--ckpt_path={file}"], "test")  # which the parser then reads


# --- damaged checkpoints


@pytest.mark.parametrize("damage", [cut, change_a_byte, lambda file: file.write_bytes(b"")])
def test_the_one_before_a_damaged_checkpoint_is_taken_with_a_warning(damage):
    folder = write_run(Path("runs/x/001"), name="best.ckpt", step=30)
    older(folder / "checkpoints/best.ckpt", 60)
    write_run(folder)
    damage(folder / "checkpoints/last.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged.*The one before is taken: .*best\.ckpt"):
        started, _ = start(["fit", "--config", f"{folder}/config.yaml", "--ckpt_path=last"], "fit")
    assert started.checkpoint == folder / "checkpoints/best.ckpt"
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged.*a whole one beside it: --ckpt_path=.*best\.ckpt"):
        start(["test", f"--ckpt_path={folder}/checkpoints/last.ckpt"], "test")


def test_a_run_whose_only_checkpoint_is_damaged_does_not_start_anew():
    folder = write_run(Path("runs/x/001"))
    cut(folder / "checkpoints/last.ckpt")
    with pytest.raises(ValueError, match=r"end is missing \([\d,]+ bytes are there\).*no whole checkpoint before"):
        start(["fit", "--name=x", "--ckpt_path=last"], "fit")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    runs.WholeCheckpoints().save_checkpoint({"state_dict": {}, "step": 1}, file)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        runs.WholeCheckpoints().save_checkpoint({"state_dict": {}, "step": 2}, file)
    assert runs.read_checkpoint(file)["step"] == 1
    assert list(tmp_path.iterdir()) == [file]


class Runs:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_stranger_s_checkpoint_runs_nothing():
    """What is not plain data is refused, and named with the way to trust it."""
    folder = write_run(Path("stranger/x/001"))
    file = folder / "checkpoints/last.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "hyper_parameters": Runs()}, file)
    for words in (["test", f"--ckpt_path={file}"], ["fit", f"--config={folder}/config.yaml", "--ckpt_path=last"]):
        with pytest.raises(ValueError, match="more than plain data; if you trust it, add --weights_only=false"):
            start(words, words[0])
        assert not Path("pwned").exists()


CLI = "lightning.pytorch.cli.instantiate_module"


@pytest.mark.parametrize(
    "hyper_parameters",
    [
        {"_instantiator": "os.mkdir"},
        {"_instantiator": "subprocess.getoutput", "backbone": "mkdir pwned"},
        {"_instantiator": CLI, "backbone": "os:mkdir", "backbone_options": {"path": "pwned"}},
        {"backbone": "os:mkdir", "backbone_options": {"path": "pwned"}, "num_classes": 2, "image_shape": [1, 8, 8]},
        {"_instantiator": CLI, "optimizer": {"class_path": "os.mkdir"}},
    ],
)  # fmt: skip
def test_a_stranger_s_hyperparameters_run_nothing(hyper_parameters):
    """Loading by name or by code: `load_from_checkpoint` makes the network that the file names."""
    from nslightning.models import ImageClassifier

    content = {"state_dict": {}, "hyper_parameters": hyper_parameters, "pytorch-lightning_version": "2.6.6"}
    torch.save(content, "stranger.ckpt")
    with pytest.raises(Exception, match=r"."):
        ImageClassifier.load_from_checkpoint("stranger.ckpt")
    assert not Path("pwned").exists()


LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


@pytest.mark.parametrize(
    "config",
    [
        {"model": {"backbone": "os:mkdir", "backbone_options": {"path": "pwned"}}},
        {"model": {"backbone": "torch.hub:load", "backbone_options": {"repo_or_dir": "evil", "source": "local"}}},
        {"model": {"optimizer": "os.mkdir"}},
        {"model": {"optimizer": {"class_path": "torch.utils.cpp_extension.load_inline"}}},
        {"model": {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LambdaLR",
                                    "init_args": {"lr_lambda": "shutil.rmtree"}}}},
        {"model": {"class_path": "os.mkdir", "init_args": {"path": "pwned"}}},
        {"model": "os.mkdir"},
        {"model": "config"},  # the name of a file
        {"model": "./config"},
        {"data": "strangers.Data"},
        {"data.class_path": "strangers.Data"},
        {"data": '{"class_path": "strangers.Data"}'},
        {"data": {"class_path": "nslightning.data.MNIST", "dict_kwargs": {"hook": "os.mkdir"}}},
        {"trainer": "other.yaml"},
        {"trainer": {"callbacks": ["strangers.Callback"]}},
        {"trainer": {"callbacks": "strangers.Callback"}},
        {"trainer": {"callbacks+": [{"class_path": "strangers.Callback"}]}},
        {"trainer": {"callbacks": [{"class_path": LAMBDA, "init_args": {"on_test_start": "os.mkdir"}}]}},
        {"trainer": {"callbacks": [{"class_path": LAMBDA, "init_args": '{"on_test_start": "os.mkdir"}'}]}},
        {"trainer": {"logger": [{"class_path": "strangers.Logger"}]}},
        {"trainer": {"strategy": {"class_path": "strangers.Strategy"}}},
        {"include": ["other.yaml"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_stranger_s_config_runs_no_code_of_its_own_unasked(config):
    """Beside a checkpoint, and in a folder that a run is to go on in."""
    folder = write_run(Path("stranger/x/001"), **config)
    for name in ("config", "other.yaml"):
        (folder / name).write_text("trainer:\n  callbacks: [strangers.Callback]\n")
    file = f"--ckpt_path={folder}/checkpoints/last.ckpt"
    refused = pytest.raises(ValueError, match=r"names code outside this package, .*: if you trust it, add --config=")
    if "include" in config:
        read = yaml.safe_load((folder / "config.yaml").read_text())
        del read["trainer"]
        (folder / "config.yaml").write_text(yaml.safe_dump(read))
    for words in (["test", file], ["fit", file], ["fit", "--output=stranger", "--name=x", "--ckpt_path=last"]):
        with refused:
            start(words, words[0])
    assert not Path("pwned").exists()
    # Read, its code is the caller's own.
    if "data.class_path" not in config:
        start(["fit", f"--config={folder}/config.yaml", "--ckpt_path=last"], "fit")


def test_a_run_goes_on_with_the_code_that_its_call_names():
    folder = write_run(Path("runs/x/001"), data={"class_path": "mine.Data"}, model={"class_path": "mine.Net"})
    Path("mine.yaml").write_text("model: mine.Net\n")
    words = ["--data=mine.Data", "--config=mine.yaml", "--name=x", "--ckpt_path=last"]
    assert start(["fit", *words], "fit")[0].folder == folder
    with pytest.raises(ValueError, match=r"mine\.Net, and is not read unasked"):
        start(["fit", *(word for word in words if "yaml" not in word)], "fit")


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [pwned]", "!!python/name:os.mkdir", "!!python/object:os.X {}"]
)
def test_a_config_s_yaml_makes_no_objects(tag, capsys):
    Path("tags.yaml").write_text(f"name: {tag}\n")
    with pytest.raises(ValueError, match=r"tags.yaml, line 1.*could not determine a constructor"):
        read_config("tags.yaml")
    folder = write_run(Path("stranger/x/001"))
    (folder / "config.yaml").write_text(f"model: {tag}\n")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        start(["test", f"--ckpt_path={folder}/checkpoints/last.ckpt"], "test")
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    "place",
    [
        "callbacks",
        "loops",
        "optimizer_states",
        "hparams_name",
        "hparams_type",
        "nslightning",
        "datamodule_hyper_parameters",
    ],
)
def test_code_in_any_part_of_a_checkpoint_is_refused(place):
    folder = write_run(Path("stranger/x/001"))
    file = folder / "checkpoints/last.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(2)}, place: {"ModelCheckpoint": Runs()}}, file)
    with pytest.raises(ValueError, match="more than plain data"):
        start(["fit", f"--config={folder}/config.yaml", "--ckpt_path=last"], "fit")
    # Its own config does not switch the protection off, where the call does not name that config.
    (folder / "config.yaml").write_text("weights_only: false\nmodel:\n  backbone: paper/lenet5\n")
    for words in (["test", f"--ckpt_path={file}"], ["fit", "--name=x", "--output=stranger", "--ckpt_path=last"]):
        with pytest.raises(ValueError, match="more than plain data"):
            start(words, words[0])
    assert not Path("pwned").exists()


# --- SLURM

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "1",
}  # fmt: skip


def test_a_requeued_job_goes_on_in_its_own_folder(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    folder = write_run(Path("runs/x/001"))
    runs.note_job(folder)
    other = write_run(Path("runs/x/002"))
    (other / "slurm_job").write_text("78.\n")
    Path("x.yaml").write_text("seed_everything: 0\n")
    argv = ["fit", "--config", "x.yaml"]
    assert start(argv, "fit")[0].folder is None  # a second run of the same job, which was not requeued
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(argv, "fit")[0].folder == folder
    runs.note_end(folder, "finished", 40)
    monkeypatch.delenv("NSLIGHTNING_RUN_FOLDER")
    assert start(argv, "fit")[0].folder is None
    shutil.rmtree(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "79")
    assert start(argv, "fit")[0].folder is None


def test_a_requeued_job_takes_the_checkpoint_that_lightning_left_it(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    folder = write_run(Path("runs/x/001"))
    runs.note_job(folder)
    older(folder / "checkpoints/last.ckpt", 60)
    shutil.copy(folder / "checkpoints/last.ckpt", folder / "hpc_ckpt_1.ckpt")
    started, _ = start(["fit", "--name=x"], "fit")
    assert (started.folder, started.checkpoint) == (folder, folder / "hpc_ckpt_1.ckpt")


def test_a_further_process_begins_or_goes_on_as_the_first_does(monkeypatch):
    """Outside SLURM too: it is told the folder, and what is in the folder says which of the two it is."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("NSLIGHTNING_RUN_FOLDER", "runs/x/001")
    Path("runs/x/001").mkdir(parents=True)
    assert start(["fit", "--name=x"], "fit")[0].folder is None
    assert runs.new_run_folder("runs", "x") == Path("runs/x/001")
    folder = write_run(Path("runs/x/001"))
    assert start(["fit", "--name=x"], "fit")[0].folder == folder


# --- one process per folder


def test_the_second_process_is_told_who_holds_the_folder(tmp_path):
    lock = runs.RunLock(tmp_path)
    with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on .* since .* UTC"):
        runs.RunLock(tmp_path)
    lock.release()
    runs.RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


# --- words and files


def test_a_home_is_expanded_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Call.read(["fit", "--output=~/x"]).output == str(tmp_path / "x")
    folder = write_run(tmp_path / "x/y/001")
    assert start(["fit", "--output=~/x", "--name=y", "--ckpt_path=last"], "fit")[0].folder == folder


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: 1\nname: \xe9t\xe9\n", "x.yaml, line 2: byte 0xe9 is no UTF-8"),
        (b"a: 1\nb: {c: 1, c: 2}\n", "x.yaml, line 2: c is given twice, first in line 2"),
        (b"a: 1\nb: 2\na: 3\n", "x.yaml, line 3: a is given twice, first in line 1"),
        (b"a: [1, 2\n  x: }", "x.yaml, line 2, column"),
        (b"", "x.yaml is empty"),
        (b"# nothing\n", "x.yaml is empty"),
        (b"just some text", "x.yaml is not a mapping of options to values, but just some text"),
        (b"a: \x07", "x.yaml: this is not YAML"),
    ],
)
def test_a_config_that_is_none(content, says):
    Path("x.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        read_config("x.yaml")


def test_a_byte_order_mark_and_merges_are_read():
    Path("x.yaml").write_bytes(b"\xef\xbb\xbfbase: &b {c: 1}\nother: {<<: *b, d: 2}\n")
    assert read_config("x.yaml")["other"] == {"c": 1, "d": 2}


def test_a_path_that_is_no_utf8_is_not_called_damaged(capsys):
    """PyTorch opens no such file, and the operating system makes them."""
    file = write_run(Path("runs/x/001")) / "checkpoints/last.ckpt"
    odd = file.rename(file.with_name("odd-\udcff.ckpt"))
    with pytest.raises(ValueError, match=r"has a name that is no UTF-8, and PyTorch opens no such file: rename it"):
        start(["test", f"--ckpt_path={odd}"], "test")


@pytest.mark.parametrize("option", ["name", "output"])
def test_a_run_takes_no_folder_that_is_no_utf8(option, capsys):
    assert main(["fit", "--data=Synthetic", "--model.backbone=paper/lenet5", f"--{option}=odd-\udcff"]) == 2
    assert f"--{option}=odd-\\udcff is no UTF-8" in capsys.readouterr().err.encode(errors="backslashreplace").decode()
    assert not list(Path().iterdir())
