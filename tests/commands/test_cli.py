"""The command line: answers, runs, checkpoints, W&B and mistakes, in process through `nslightning.cli.main`."""

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch  # noqa: F401 # its messages go to the standard error of its import: not to a test's
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from nslightning.cli import COMMANDS, main

TINY = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.enable_progress_bar=false",
]
QUICK = ["--config", "configs/quickstart.yaml", *TINY]
NO_LOGGER = "--trainer.logger=false"
NO_CALLBACKS = "--trainer.callbacks=null"

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")  # two, of quickstart's interval of ten


@pytest.fixture(autouse=True)
def _fresh_wandb() -> Iterator[None]:
    """W&B's process does not outlive the environment of the test that started it."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def run(capfd: pytest.CaptureFixture, *args: str) -> tuple[int, str]:
    """Exit status and all that was said; Lightning's messages keep the standard error they were made with."""
    said = io.StringIO()
    handler, logger = logging.StreamHandler(said), logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        status = main(list(args))
    finally:
        logger.removeHandler(handler)
    out, err = capfd.readouterr()
    return status, said.getvalue() + out + err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that a finished quickstart of 40 steps ran in, its runs in `runs`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("WANDB_MODE", "disabled")
        args = ["--config", "configs/quickstart.yaml", "--trainer.max_epochs=1", "--trainer.limit_train_batches=40"]
        assert main(["fit", *args, "--trainer.enable_progress_bar=false", "--model.optimizer.lr=0.1"]) == 0
    return folder


@pytest.fixture
def in_trained(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The trained run's folder, seen from where it was started."""
    monkeypatch.chdir(trained)
    return Path("runs/quickstart/001")


def own(folder: Path) -> list[str]:
    return ["--config", str(folder / "config.yaml"), "--trainer.enable_progress_bar=false"]


# --- answers that need no torch


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["--version"], ["fti"], ["fit", "--config", "nope"]])
def test_quick_answers_import_nothing_heavy(args, repo_root):
    code = (
        "import sys; from nslightning.cli import main; main(sys.argv[1:]);"
        "print('HEAVY', {'torch', 'lightning', 'torchvision', 'timm', 'wandb', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY set()"


def test_help_names_every_command_and_config(capsys, repo_root):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == text
    for name in [*COMMANDS, *(f"configs/{f.name}" for f in (repo_root / "configs").glob("*.yaml"))]:
        assert name in text
    assert max(map(len, text.splitlines())) <= 110


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"nslightning \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# --- mistakes


def check_mistake(status: int, text: str, said: list[str], expected: int) -> None:
    assert status == expected, text
    error = text[text.index("nslightning fit: error:") :]
    for part in said:
        assert part in error
    assert "Traceback" not in error
    assert "Union subtypes" not in text
    assert len(error.splitlines()) <= 4
    assert not Path("runs").exists(), sorted(Path("runs").rglob("*"))


@pytest.mark.parametrize("data", ["MNIST", "CIFAR10", "SVHN", "ImageNet", "ImageFolder"])
def test_missing_data(data, capfd):
    args = ["fit", "--model.backbone=timm/resnet10t", f"--data={data}", "--data.root=empty", *TINY, NO_LOGGER]
    check_mistake(*run(capfd, *args), ["empty", "missing", "--data.root"], 1)


def test_damaged_image_read_by_a_worker(capfd):
    from fake_data import write_image_folder

    write_image_folder(Path("photos"))
    for file in Path("photos/train").rglob("*.jpg"):
        file.write_bytes(b"no jpeg")
    args = ["--data=ImageFolder", "--data.root=photos", "--data.workers=1", "--data.batch_size=2", *TINY]
    status, text = run(capfd, "fit", "--model.backbone=timm/resnet10t", *args, NO_LOGGER)
    check_mistake(status, text, ["photos/train", "cannot be decoded"], 1)


def test_unknown_command(capsys):
    assert main(["fti"]) == 2
    assert "'fti'; did you mean 'fit'?" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    from nslightning.models import ImageClassifier

    def fails(*_):
        raise ValueError("a bug in a step")

    monkeypatch.setattr(ImageClassifier, "training_step", fails)
    with pytest.raises(ValueError, match="a bug in a step"):
        main(["fit", *QUICK, NO_LOGGER])


# --- runs


def test_fit_then_test_validate_predict(in_trained, capfd):
    """The checkpoint evaluates to what fit logged; predictions are the images' in order."""
    metrics = pd.read_csv(in_trained / "metrics.csv")
    logged = metrics["val/acc1"].dropna().iloc[-1]
    assert logged > 0.3  # it learnt something: chance is 0.1

    status, text = run(capfd, "validate", *own(in_trained), "--ckpt_path=last")
    assert status == 0
    assert "best.ckpt" in text
    assert "initial" not in text
    shown = float(re.search(r"val/acc1\D+([\d.]+)", text)[1])
    assert shown == pytest.approx(logged, abs=1e-6)

    status, text = run(capfd, "predict", *own(in_trained), "--ckpt_path=best")
    assert status == 0
    predictions = pd.read_csv(in_trained / "predictions.csv")

    from nslightning.data import FashionMNISTSample
    from nslightning.models import ImageClassifier

    model = ImageClassifier.load_from_checkpoint(in_trained / "checkpoints/best.ckpt").eval()
    data = FashionMNISTSample()
    data.setup("test")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # the config's precision
        pairs = [(model(x).float().softmax(1), y) for x, y in data.test_dataloader()]
    probabilities, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    assert predictions["image"].tolist() == list(range(len(labels)))
    assert predictions["class"].tolist() == probabilities.argmax(1).tolist()
    assert predictions["probability"].tolist() == pytest.approx(probabilities.amax(1).tolist(), abs=1e-5)

    status, text = run(capfd, "test", *own(in_trained), f"--ckpt_path={in_trained}/checkpoints/best.ckpt")
    assert status == 0
    accuracy = (probabilities.argmax(1) == labels).double().mean().item()
    assert float(re.search(r"test/acc1\D+([\d.]+)", text)[1]) == pytest.approx(accuracy, abs=1e-6)
    top5 = (probabilities.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    assert float(re.search(r"test/acc5\D+([\d.]+)", text)[1]) == pytest.approx(top5, abs=1e-6)
    loss = F.nll_loss(probabilities.double().log(), labels).item()
    assert float(re.search(r"test/loss\D+([\d.]+)", text)[1]) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_without_a_checkpoint_the_weights_are_initial(command, capfd):
    args = ["--config", "configs/quickstart.yaml", f"--trainer.limit_{command[:3]}_batches=1"]
    args = [a.replace("limit_tes_", "limit_test_") for a in args]
    with pytest.warns(UserWarning, match="the weights are the initial ones"):
        status, _ = run(capfd, command, *args, "--trainer.enable_progress_bar=false")
    assert status == 0
    assert not Path("wandb").exists()


def test_flags_win_over_the_checkpoint(in_trained, capfd, monkeypatch):
    """...and what differs is told, on the terminal."""
    from nslightning.models import ImageClassifier

    used = []
    monkeypatch.setattr(ImageClassifier, "on_test_start", lambda self: used.append(self.jacobians), raising=False)
    args = [*own(in_trained), f"--ckpt_path={in_trained}/checkpoints/best.ckpt", "--trainer.limit_test_batches=1"]
    with pytest.warns(UserWarning, match=r"made under relu=0.0, and this run has relu=0.5"):
        assert main(["test", *args, "--model.jacobians.relu", "0.5"]) == 0
    assert main(["test", *args]) == 0
    assert [j.relu for j in used] == [0.5, 0.0]


def test_changed_choice_is_seen_by_a_user(in_trained):
    """In a separate process, where no test framework collects warnings."""
    args = [*own(in_trained), "--ckpt_path=last", "--trainer.limit_test_batches=1", "--model.jacobians.max_pool=10"]
    command = [sys.executable, "-m", "nslightning", "test", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(x for x in done.stderr.splitlines() if "max_pool" in x)
    assert line == ("PatchWarning: the checkpoint was made under max_pool=0.0, and this run has max_pool=10.0"), (
        done.stderr
    )
    for noise in ("litlogger", "TPU", "treespec", "anonymous", "site-packages"):
        assert noise not in done.stdout + done.stderr


def test_checkpoint_of_another_network(in_trained, capfd):
    args = [*own(in_trained), "--ckpt_path=last", "--model.backbone_options={batch_norm: true}"]
    status, text = run(capfd, "test", *args)
    assert status == 2
    assert "paper/lenet5 for 10 classes" in text
    assert len(text[text.index("error:") :].splitlines()) == 1


def test_last_is_the_run_whose_config_is_given(in_trained, capfd):
    """Not the newest of that name."""
    other = in_trained.parent / "002"
    shutil.copytree(in_trained, other)
    os.utime(other / "checkpoints/best.ckpt", (2e9, 2e9))
    try:
        last = ["--ckpt_path=last", "--trainer.limit_test_batches=1"]
        assert "001/checkpoints" in run(capfd, "test", *own(in_trained), *last)[1]
        assert "002/checkpoints" in run(capfd, "test", "--config", "configs/quickstart.yaml", *last)[1]
    finally:
        shutil.rmtree(other)


def test_resume_goes_on_in_the_same_folder(trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    args = ["--config", "configs/quickstart.yaml", "--trainer.limit_train_batches=40", "--trainer.max_epochs=2"]
    args += ["--model.optimizer.lr=0.1", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=10"]
    status, _ = run(capfd, "fit", *args, "--ckpt_path=last")
    assert status == 0
    assert [p.name for p in Path("runs/quickstart").iterdir()] == ["001"]
    steps = pd.read_csv("runs/quickstart/001/metrics.csv")["step"]
    assert steps.max() == 79
    assert "ckpt_path: null" in Path("runs/quickstart/001/config.yaml").read_text()  # it makes the run again


@pytest.mark.parametrize("which", ["last", "runs/quickstart/001/checkpoints/best.ckpt"])
def test_a_checkpoint_of_another_choice_is_refused_before_anything_is_written(trained, tmp_path, capfd, which):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {f: f.read_bytes() for f in Path("runs").rglob("*") if f.is_file()}
    args = ["--config", "configs/quickstart.yaml", "--model.jacobians.relu=1", "--model.on_mismatch=refuse"]
    status, text = run(capfd, "fit", *args, f"--ckpt_path={which}")
    assert status == 2
    assert "error: the checkpoint was made under relu=0.0, and this run has relu=1.0; give the choice" in text
    assert {f: f.read_bytes() for f in Path("runs").rglob("*") if f.is_file()} == before


def test_a_run_that_cannot_go_on_overwrites_nothing(trained, tmp_path, capfd, monkeypatch):
    """Whatever refuses before the first step."""
    from nslightning.models import ImageClassifier

    def refuses(*_):
        raise ValueError("another order of the images")

    monkeypatch.setattr(ImageClassifier, "on_fit_start", refuses)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {f: f.read_bytes() for f in Path("runs").rglob("*") if f.is_file()}
    args = ["--config", "configs/quickstart.yaml", "--trainer.max_epochs=2", "--ckpt_path=last", NO_LOGGER]
    status, text = run(capfd, "fit", *args)
    assert status == 2
    assert "error: another order of the images" in text
    assert {f: f.read_bytes() for f in before} == before


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("configs/quickstart.yaml", "quickstart"),
        ("/somewhere/nslightning/configs/innaprop/cifar10_vgg11.yaml", "innaprop-cifar10_vgg11"),
        ("mine.yaml", "mine"),
        ("experiments/mine.yaml", "mine"),
        (None, "timm-resnet18"),
    ],
)
def test_default_name(config, name):
    from nslightning.commands.going_on import Call

    words = [f"--config={config}"] if config else ["--model.backbone", "timm/resnet18"]
    assert Call.read(["fit", *words]).name == name


def test_config_file_keeps_nothing_of_the_run(in_trained):
    """A new run of it must not take the old one's place in W&B."""
    text = (in_trained / "config.yaml").read_text()
    assert "    id: null" in text.replace("      ", "    ")
    assert "001" not in text
    assert (in_trained / "wandb_id").read_text().strip() not in text


def test_two_commands_in_one_process_are_two_runs(monkeypatch):
    environment, arguments = dict(os.environ), list(sys.argv)
    for _ in range(2):
        assert main(["fit", *QUICK, NO_CALLBACKS]) == 0
    assert sorted(p.name for p in Path("runs/quickstart").iterdir()) == ["001", "002"]
    ids = {p.read_text() for p in Path("runs").rglob("wandb_id")}
    assert len(ids) == 2
    for folder in Path("runs/quickstart").iterdir():
        assert len(list(folder.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"} == environment
    assert sys.argv == arguments


@pytest.mark.parametrize(
    ("args", "metrics"),
    [
        ([NO_LOGGER], False),
        (["--trainer.logger=true"], True),
        (["--trainer.logger=null"], True),
        (["--trainer.logger=[CSVLogger,CSVLogger]", "--trainer.logger.save_dir=other"], True),
    ],
)
def test_loggers(args, metrics):
    args = [a.replace("[CSVLogger,CSVLogger]", "CSVLogger") for a in args]
    assert main(["fit", *QUICK, *args]) == 0
    folder = Path("runs/quickstart/001")
    assert (folder / "metrics.csv").exists() == metrics
    for name in ("config.yaml", "run.json", "divergence.csv", "patch_report.json", "checkpoints/best.ckpt"):
        assert (folder / name).exists()
    assert not list(Path().rglob("*.wandb"))
    assert {p.name for p in Path().iterdir()} <= {"runs", "other"}


@pytest.mark.filterwarnings("ignore:There is a wandb run already in progress")  # which is what is asked for
def test_two_wandb_loggers_make_one_run():
    text = """
trainer:
  logger:
    - {class_path: WandbLogger, init_args: {project: one}}
    - {class_path: WandbLogger, init_args: {project: two}}
"""
    Path("two.yaml").write_text(text)
    assert main(["fit", *QUICK, NO_CALLBACKS, "--config", "two.yaml", "--name=both"]) == 0
    assert len(list(Path("runs/both/001").glob("wandb/offline-run-*/*.wandb"))) == 1
    assert "val/acc1" in pd.read_csv("runs/both/001/metrics.csv")


def test_fast_dev_run_leaves_nothing():
    assert main(["fit", *QUICK, "--trainer.fast_dev_run=true"]) == 0
    assert list(Path().iterdir()) == []


# --- W&B


def wandb_modes(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """Replaces `wandb.init`, so that nothing is started; the modes it was called under."""
    import wandb

    real, seen = wandb.init, []

    def init(**options):
        seen.append(os.environ.get("WANDB_MODE"))
        return real(**options | {"mode": "disabled"})

    monkeypatch.setattr(wandb, "init", init)
    return seen


@pytest.mark.parametrize(("mistake", "ends"), [("--data=MNIST", 1), ("--model.optimizer.lr=-1", 2)])
def test_a_run_that_does_not_begin_is_not_offered_for_upload(mistake, ends, capfd, monkeypatch):
    wandb_modes(monkeypatch)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(Path("nowhere").absolute()))
    status, text = run(capfd, "fit", *QUICK, NO_CALLBACKS, mistake)
    assert status == ends
    assert "wandb sync" not in text
    assert not Path("runs").exists()


@pytest.mark.parametrize("key", [None, "variable", "netrc", "other host", "token"])
def test_wandb_goes_offline_without_a_key(key, capfd, monkeypatch):
    seen = wandb_modes(monkeypatch)
    monkeypatch.delenv("WANDB_MODE")
    if key == "variable":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    elif key == "token":
        monkeypatch.setenv("WANDB_IDENTITY_TOKEN_FILE", "token")
    elif key:
        host = "api.wandb.ai" if key == "netrc" else "example.org"
        Path("netrc").write_text(f"machine {host}\n  login user\n  password {'x' * 40}\n")
        monkeypatch.setenv("NETRC", str(Path("netrc").absolute()))
    status, text = run(capfd, "fit", *QUICK, NO_CALLBACKS)
    assert status == 0
    if key in (None, "other host"):
        assert seen == ["offline"]
        assert text.count("W&B has no API key here and stays offline") == 1
        assert "wandb sync runs/quickstart/001/wandb/offline-run-*" in text
    else:
        assert seen == [None]
        assert "stays offline" not in text
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("mode", ["disabled", "offline", "online"])
def test_wandb_mode_is_left_alone(mode, capfd, monkeypatch):
    seen = wandb_modes(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    status, text = run(capfd, "fit", *QUICK, NO_CALLBACKS)
    assert status == 0
    assert seen == [mode]
    assert "no API key" not in text
    assert ("W&B is offline" in text) == (mode == "offline")


# --- seeds


def weights(run: int) -> dict[str, torch.Tensor]:
    (file,) = Path(f"runs/quickstart/{run:03d}/checkpoints").glob("*.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]


def test_one_config_gives_one_result_and_another_seed_another():
    for seed in (0, 0, 1):
        args = [*QUICK, NO_LOGGER, NO_CALLBACKS, f"--seed_everything={seed}"]
        assert main(["fit", *args]) == 0
    first, again, other = (weights(i) for i in (1, 2, 3))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first if first[k].is_floating_point())


def test_seed_sets_initial_weights_and_order(monkeypatch):
    from nslightning.models import ImageClassifier

    seen = []

    def record(self, batch, batch_idx):
        if batch_idx == 0:
            seen.append((next(self.parameters()).detach().clone(), batch[0].clone()))

    monkeypatch.setattr(ImageClassifier, "on_train_batch_start", record, raising=False)
    for seed in (0, 0, 7):
        assert main(["fit", *QUICK, NO_LOGGER, NO_CALLBACKS, f"--seed_everything={seed}"]) == 0
    (w0, x0), (w1, x1), (w7, x7) = seen
    assert torch.equal(w0, w1)
    assert torch.equal(x0, x1)
    assert not torch.equal(w0, w7)
    assert not torch.equal(x0, x7)


def test_record_tells_seed_and_command(in_trained):
    record = json.loads((in_trained / "run.json").read_text())
    assert record["seed"] == 0
    assert record["precision"] == "bf16-mixed"  # as the config asks
    assert record["data"]["dataset"] == "fashion_mnist_sample"


@pytest.mark.slow
def test_quickstart_learns():
    """The README's promise."""
    assert main(["fit", "--config", "configs/quickstart.yaml", "--trainer.enable_progress_bar=false"]) == 0
    assert pd.read_csv("runs/quickstart/001/metrics.csv")["val/acc1"].dropna().iloc[-1] > 0.75


def test_our_optimizers_are_known_by_their_bare_names():
    """In a separate process: elsewhere a test has imported nslightning.optim already."""
    words = [*QUICK, "--model.optimizer=INNAprop", "--model.optimizer.lr=0.001", "--trainer.fast_dev_run=true"]
    ran = subprocess.run([sys.executable, "-m", "nslightning", "fit", *words], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
