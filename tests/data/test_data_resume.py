"""Exact resume in the middle of an epoch, and DDP: the batches seen are the batches promised."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from multiprocessing import resource_sharer
from pathlib import Path

import fake_data
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint

import nslightning.data as data
from nslightning.data.base import _survive_the_stop

EPOCHS, BATCHES = 3, 5  # of 16 among 80 images


pytestmark = [
    # Trainings go on in the folder of the first one, without the callback that saved.
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=.*no last checkpoint"),
    pytest.mark.filterwarnings("ignore:.*fit.ckpt_path=None.. was called without a model"),
]


class Recorder(LightningModule):
    """Keeps every batch it sees, by epoch and number; fails at one of them if asked to."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.fail_at = fail_at
        self.seen = {}

    def training_step(self, batch, batch_idx):
        key = self.current_epoch, batch_idx
        if key == self.fail_at:
            raise RuntimeError("killed")
        assert key not in self.seen
        self.seen[key] = tuple(part.clone() for part in batch)
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, *callbacks, **options):
    checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    return Trainer(
        max_epochs=EPOCHS, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=checkpoints, **options,
    )  # fmt: skip


def every_step(folder, **options):
    return ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, every_n_train_steps=1, **options)


def equal(seen, expected):
    return seen.keys() == expected.keys() and all(
        torch.equal(a, b) for key in seen for a, b in zip(seen[key], expected[key], strict=True)
    )


def cifar(root, workers, **arguments):
    fake_data.write_cifar(root)
    return data.CIFAR10(str(root), verify=False, batch_size=16, workers=workers, holdout=0.0, **arguments)


def folder(root, workers):
    fake_data.write_image_folder(root, ("ant", "bee"), 20)
    return data.ImageFolder(str(root), 24, batch_size=8, workers=workers)


@pytest.mark.parametrize("make", [cifar, folder])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_uninterrupted(make, workers, tmp_path, recwarn):
    """From a checkpoint of any step: first, middle and last of an epoch, in the first epoch and later."""
    whole = Recorder()
    trainer(tmp_path, every_step(tmp_path / "steps")).fit(whole, make(tmp_path, workers))
    assert len(whole.seen) == EPOCHS * BATCHES
    pixels = [images for images, _ in whole.seen.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(pixels) for b in pixels[:i])
    steps = {int(path.stem.split("step=")[1]): path for path in (tmp_path / "steps").iterdir()}
    # A kill -9 leaves the last such file and nothing else of the run.
    for step in (1, 3, 5, 6, 8, 10, 12) if workers == 0 else (3, 7):
        resumed = Recorder()
        trainer(tmp_path).fit(resumed, make(tmp_path, workers), ckpt_path=steps[step], weights_only=False)
        left = {key: batch for i, (key, batch) in enumerate(whole.seen.items()) if i >= step}
        assert equal(resumed.seen, left), step
        assert torch.equal(resumed.weight, whole.weight)
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


@pytest.mark.parametrize(
    ("at_end", "name", "step"),
    [
        (True, "epoch=0-step=5", 5),
        (True, "epoch=1-step=10", 10),
        (False, "epoch=0-step=2", 2),
        (False, "epoch=1-step=9", 9),
    ],
)
def test_resume_from_the_end_of_an_epoch_and_from_a_validation(at_end, name, step, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=at_end)
    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path, checkpoint, val_check_interval=2).fit(whole, cifar(tmp_path, 0))
    trainer(tmp_path, val_check_interval=2).fit(
        resumed, cifar(tmp_path, 0), ckpt_path=tmp_path / f"{name}.ckpt", weights_only=False
    )
    assert equal(resumed.seen, {key: batch for i, (key, batch) in enumerate(whole.seen.items()) if i >= step})
    assert torch.equal(resumed.weight, whole.weight)


def test_resume_after_an_exception_repeats_the_failed_batch(tmp_path):
    whole = Recorder()
    trainer(tmp_path).fit(whole, cifar(tmp_path, 0))
    failed = Recorder(fail_at=(1, 3))
    with pytest.raises(RuntimeError, match="killed"):
        trainer(tmp_path, OnExceptionCheckpoint(tmp_path, "failed")).fit(failed, cifar(tmp_path, 0))
    resumed = Recorder()
    trainer(tmp_path).fit(resumed, cifar(tmp_path, 0), ckpt_path=tmp_path / "failed.ckpt", weights_only=False)
    assert not failed.seen.keys() & resumed.seen.keys()
    assert equal(failed.seen | resumed.seen, whole.seen)


def test_resume_with_another_batch_is_refused(tmp_path):
    trainer(tmp_path, every_step(tmp_path / "steps"), max_steps=3).fit(Recorder(), cifar(tmp_path, 0))
    module = cifar(tmp_path, 0)
    module.batch_size = 8
    checkpoint = tmp_path / "steps/epoch=0-step=3.ckpt"
    with pytest.raises(ValueError, match=r"after 3 batches of an epoch with .*'batch_size x processes': 16"):
        trainer(tmp_path).fit(Recorder(), module, ckpt_path=checkpoint, weights_only=False)
    with pytest.raises(ValueError, match="'seed': 0"):
        trainer(tmp_path).fit(Recorder(), cifar(tmp_path, 0, seed=1), ckpt_path=checkpoint, weights_only=False)


def test_another_loader_of_the_same_module_starts_at_the_beginning(tmp_path):
    """What a callback reads while an interrupted epoch is trained does not depend on the interruption."""
    trainer(tmp_path, every_step(tmp_path / "steps"), max_steps=3).fit(Recorder(), cifar(tmp_path, 0))
    module = cifar(tmp_path, 0)

    class Peeking(Recorder):
        def on_train_batch_start(self, batch, batch_idx):
            self.peeked = next(iter(module.train_dataloader()))

    peeking = Peeking()
    trainer(tmp_path, limit_train_batches=4).fit(
        peeking, module, ckpt_path=tmp_path / "steps/epoch=0-step=3.ckpt", weights_only=False
    )
    module.trainer = None
    assert torch.equal(peeking.peeked[0], next(iter(module.train_dataloader()))[0])


@pytest.mark.filterwarnings("ignore:You requested to overfit")  # no shuffling then, which is what is meant
def test_overfit_batches_still_works(tmp_path):
    model = Recorder()
    trainer(tmp_path, overfit_batches=2).fit(model, cifar(tmp_path, 0))
    assert list(model.seen) == [(epoch, i) for epoch in range(EPOCHS) for i in range(2)]
    assert torch.equal(model.seen[0, 1][0], model.seen[2, 1][0])


def test_predict_reads_the_test_images_in_order(tmp_path):
    class Predicting(Recorder):
        def predict_step(self, batch, batch_idx):
            return batch[1]

    module = cifar(tmp_path, 0, eval_batch_size=7)
    labels = torch.cat(trainer(tmp_path).predict(Predicting(), module))
    assert labels.tolist() == [i % 10 for i in range(40)]


def run(script, *arguments):
    """Run a script that imports this file."""
    folders = (*(str(Path(__file__).parents[k]) for k in (0, 1)), os.environ.get("PYTHONPATH"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_kill_9(tmp_path):
    killed = run(
        """
        import os, signal, sys, torch
        from pathlib import Path
        from test_data_resume import *
        root = Path(sys.argv[1])
        class Killed(Recorder):
            def on_train_batch_start(self, batch, batch_idx):
                if (self.current_epoch, batch_idx) == (1, 3):
                    os.kill(os.getpid(), signal.SIGKILL)
        checkpoint = ModelCheckpoint(root, "last", every_n_train_steps=2, enable_version_counter=False)
        trainer(root, checkpoint).fit(Killed(), cifar(root, 2))
        """,
        tmp_path,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path).fit(whole, cifar(tmp_path, 0))
    checkpoint = tmp_path / "last.ckpt"
    trainer(tmp_path).fit(resumed, cifar(tmp_path, 0), ckpt_path=checkpoint, weights_only=False)
    assert next(iter(resumed.seen)) == (1, 3)  # steps 6 and 8 were written, step 9 was not
    assert equal(resumed.seen, {key: batch for key, batch in whole.seen.items() if key >= (1, 3)})
    assert torch.equal(resumed.weight, whole.weight)


DDP = """
    import sys, torch
    from pathlib import Path
    from test_data_resume import *
    root = Path(sys.argv[1])
    class Ranked(Recorder):
        def __init__(self, name):
            super().__init__()
            self.name = name
            # Its buffers are broadcast in every forward, evaluation included.
            self.norm = torch.nn.BatchNorm2d(3)
            self.evaluated = []
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return self.norm(batch[0]).square().mean() * self.weight
        def validation_step(self, batch, batch_idx):
            self.norm(batch[0])
            self.evaluated.append(batch[0].clone())
        def on_train_end(self):
            torch.save((self.seen, self.evaluated), root / f"{self.name}-{self.global_rank}.pt")
    fake_data.write_cifar(root, test=41)
    arguments = dict(batch_size=8, eval_batch_size=10, workers=0, holdout=0.0)
    for name, steps, checkpoint in (
        ("whole", [every_step(root / "steps")], None), ("resumed", [], root / "steps/epoch=1-step=7.ckpt")
    ):
        module = data.CIFAR10(str(root), verify=False, **arguments)
        trainer(root, *steps, devices=2, strategy="ddp_fork").fit(
            Ranked(name), module, ckpt_path=checkpoint, weights_only=False
        )
"""


def test_two_processes_share_the_batches_of_one(tmp_path):
    """Union of the ranks' batches == the batch of one process with twice the size; also when resumed."""
    ran = run(DDP, tmp_path)
    assert ran.returncode == 0, ran.stderr
    alone = Recorder()
    module = data.CIFAR10(str(tmp_path), verify=False, batch_size=16, holdout=0.0)
    trainer(tmp_path).fit(alone, module)
    for name, step in (("whole", 0), ("resumed", 7)):
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)]
        union = {
            key: tuple(torch.stack(parts, 1).flatten(0, 1) for parts in zip(mine, ranks[1][0][key], strict=True))
            for key, mine in ranks[0][0].items()
        }
        assert equal(union, {key: batch for i, (key, batch) in enumerate(alone.seen.items()) if i >= step})
        # 41 images are 21 and 20: 3 batches of 10 against 2, unless the batch is made smaller.
        assert len(ranks[0][1]) == len(ranks[1][1])
        evaluations = EPOCHS if name == "whole" else EPOCHS - 1
        images = torch.cat(ranks[0][1] + ranks[1][1])
        test = torch.cat([images for images, _ in module.test_dataloader()])
        counted = sorted(map(bytes, images.flatten(1).numpy()))
        assert counted == sorted(evaluations * list(map(bytes, test.flatten(1).numpy())))


def _serve_and_lose_the_reader(prepare, log):
    """A worker's thread offers a file, and the one who asked for it is gone before it is handed over."""
    sys.stderr = log.open("w", buffering=1)
    sys.excepthook = sys.__excepthook__
    prepare(0)
    resource_sharer.DupFd(0)
    with socket.socket(socket.AF_UNIX) as reader:
        reader.connect(resource_sharer._resource_sharer._address)
    time.sleep(0.3)  # the thread reads from a connection that is closed
    sys.excepthook(ValueError, ValueError("an error of its own"), None)


@pytest.mark.parametrize("prepare", [_survive_the_stop, lambda worker: None], ids=["a worker's", "Python's own"])
def test_a_worker_says_nothing_of_a_reader_that_stopped(tmp_path, prepare):
    process = multiprocessing.get_context("fork").Process(
        target=_serve_and_lose_the_reader, args=(prepare, tmp_path / "log")
    )
    process.start()
    process.join(30)
    assert process.exitcode == 0
    log = (tmp_path / "log").read_text()
    assert "ValueError: an error of its own" in log
    assert ("Error" in log.replace("ValueError", "")) is (prepare is not _survive_the_stop)
