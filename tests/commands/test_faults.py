"""Faults from outside end in one line and the right status, and nothing is half-written. Real processes and signals."""

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb_server
from ddp_helpers import start
from fake_data import write_image_folder
from test_two_processes import config

from nslightning import runs
from nslightning.commands import wandb_run
from nslightning.commands.endings import ending_of
from nslightning.commands.run_place import RunPlace
from nslightning.runs import record

FIT = [
    *(sys.executable, "-m", "nslightning", "fit", "--model.backbone=paper/lenet5", "--data=ImageFolder"),
    *("--data.root=images", "--data.image_size=32", "--data.batch_size=2", "--trainer.max_epochs=400"),
    *("--trainer.enable_progress_bar=false", "--trainer.logger=false", "--name=x"),
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    *("--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.filename=last"),
]


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_image_folder(tmp_path / "images")
    return tmp_path


def until(condition, process: subprocess.Popen, limit: float = 240) -> None:
    """Wait for something that a process does."""
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(group: int) -> list[str]:
    """The processes of a group that run still; what has ended and was not waited for does not count."""
    stats = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            stats.append(file.read_text().rpartition(")")[2].split())
    return [" ".join(stat[:4]) for stat in stats if int(stat[2]) == group and stat[0] != "Z"]


def ended(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    return str(errors)


def goes_on(folder: Path) -> None:
    """The run in a folder goes on from its last checkpoint, to two steps more."""

    def steps() -> int:
        checkpoints = (folder / "checkpoints").glob("*.ckpt")  # whole ones: each is read
        return max(torch.load(file, weights_only=True)["global_step"] for file in checkpoints)

    step = steps()
    more = subprocess.run(
        [*FIT[:3], "fit", "--config", folder / "config.yaml", "--ckpt_path=last", "--trainer.max_epochs=-1",
         f"--trainer.max_steps={step + 2}"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert more.returncode == 0, more.stderr
    assert steps() == step + 2


@pytest.mark.slow
def test_a_reading_process_that_is_killed_ends_the_run_in_one_line(images):
    run = subprocess.Popen([*FIT, "--data.workers=1"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until(lambda: list(images.glob("runs/x/001/checkpoints/*.ckpt")), run)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    errors = ended(run)
    assert re.search(
        r"nslightning fit: error: a process that reads the data was ended from outside \(.*\); .*--data\.workers",
        errors,
    )
    assert "go on with: nslightning fit --config runs/x/001/config.yaml --ckpt_path=last" in errors
    goes_on(images / "runs/x/001")


@pytest.mark.slow
def test_a_file_that_disappears_is_named(images):
    run = subprocess.Popen([*FIT, "--data.workers=0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until(lambda: list(images.glob("runs/x/001/checkpoints/*.ckpt")), run)
    gone = images / "images/train/ant/ant_3.jpg"
    content = gone.read_bytes()
    gone.unlink()
    errors = ended(run)
    assert "ant_3.jpg: it was there at the start and is gone" in errors
    gone.write_bytes(content)
    goes_on(images / "runs/x/001")


@pytest.mark.slow
def test_a_checkpoint_larger_than_files_may_be_leaves_the_one_before(images):
    limit = 2_000_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    # LeNet-5's checkpoint is about 0.5 MB, this network's 50.
    run = subprocess.Popen(
        [*FIT, "--data.workers=0", "--model.backbone=paper/vgg11"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, preexec_fn=limited,
    )  # fmt: skip
    errors = ended(run)
    assert "larger than the system allows" in errors
    assert not list(images.glob("runs/x/001/checkpoints/*.ckpt"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(images):
    """A small disk, which fills up between two checkpoints."""
    place = images / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("a small disk takes `mount -t tmpfs`, which this user may not call")
    try:
        run = subprocess.Popen(
            [*FIT, "--data.workers=0", f"--output={place}/runs"],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        until(lambda: list(place.glob("runs/x/001/checkpoints/*.ckpt")), run)
        with suppress(OSError), (place / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(2**14))
        errors = ended(run)
        assert "cannot be written: the disk is full" in errors
        assert f"go on with: nslightning fit --config {place}/runs/x/001/config.yaml --ckpt_path=last" in errors
        assert not list(place.rglob(".partial*"))
        (place / "ballast").unlink()
        goes_on(place / "runs/x/001")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_folder_that_goes_away_is_not_begun_again(devices, images):
    """Files that were written into a folder of the same name would be half a run."""
    processes = [f"--trainer.devices={devices}", f"--trainer.strategy={'auto' if devices == 1 else 'ddp'}"]
    run = subprocess.Popen(
        [*FIT, "--data.workers=0", "--trainer.accelerator=cpu", *processes],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    folder, elsewhere = images / "runs/x/001", images / "elsewhere"
    until(lambda: list(folder.glob("checkpoints/*.ckpt")), run)
    folder.rename(elsewhere)
    _, errors = run.communicate(timeout=240)
    assert run.returncode != 0
    assert "Traceback" not in errors
    assert errors.count("the run's folder runs/x/001 is gone: it was moved or deleted, or its disk went away") == 1
    assert alive(run.pid) == []
    shutil.rmtree(folder, ignore_errors=True)  # a step that was taken meanwhile may have written a checkpoint
    elsewhere.rename(folder)
    goes_on(folder)


@pytest.mark.slow
def test_a_reading_process_that_hangs_ends_the_run_in_one_line(images):
    """A file that never answers: a FIFO that nothing is written into."""
    run = subprocess.Popen(
        [*FIT, "--data.workers=1", "--data.timeout=3"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    until(lambda: list(images.glob("runs/x/001/checkpoints/*.ckpt")), run)
    hanging = images / "images/train/ant/ant_3.jpg"
    content = hanging.read_bytes()
    os.mkfifo(images / "fifo")
    (images / "fifo").rename(hanging)
    reader = children(run.pid)[-1]
    errors = ended(run)
    assert "a process that reads the data does not answer" in errors
    assert "--data.timeout=SECONDS waits longer" in errors
    assert not Path(f"/proc/{reader}").exists()
    hanging.unlink()
    hanging.write_bytes(content)
    goes_on(images / "runs/x/001")


#: A library in front of the system's: where the file of its environment exists, no file reaches the disk.
NO_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
int fsync(int number) {
  if (!access(getenv("NO_DISK"), F_OK)) { errno = EIO; return -1; }
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(number);
}
"""


@pytest.mark.slow
def test_a_disk_that_takes_no_checkpoint_leaves_the_one_before(images):
    """As a network's file system answers whose server is gone: EIO when a file is to be safe on it."""
    source, library, switch = (images / name for name in ("no_disk.c", "no_disk.so", "switch"))
    source.write_text(NO_DISK)
    try:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a disk that fails takes a library that `gcc` makes, which fails here: {error}")
    run = subprocess.Popen(
        [*FIT, "--data.workers=0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env={**os.environ, "LD_PRELOAD": str(library), "NO_DISK": str(switch)},
    )  # fmt: skip
    checkpoint = images / "runs/x/001/checkpoints/last.ckpt"
    until(checkpoint.exists, run)
    switch.touch()
    errors = ended(run)
    assert re.search(r"error: \S*checkpoints/last\.ckpt cannot be read or written: the disk does not answer", errors)
    assert "go on with: nslightning fit --config runs/x/001/config.yaml --ckpt_path=last" in errors
    assert not list(images.rglob(".partial*"))
    goes_on(images / "runs/x/001")


def two_processes(folder: Path, fault: str, *callbacks: str, **data: object) -> str:
    """What a training on two processes says that goes wrong in one of them; both have ended."""
    options = config()
    del options["trainer"]["logger"]
    options["data"]["init_args"] |= {"batch_size": 8}
    if data:
        options["data"] = {"class_path": "ImageFolder", "init_args": data}
        del options["trainer"]["precision"]
    options["trainer"] |= {"devices": 2, "strategy": "ddp"}
    options["trainer"]["callbacks"] = [{"class_path": name} for name in (*callbacks, "ddp_helpers.Fault")]
    options["trainer"]["callbacks"].append(
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"every_n_train_steps": 2, "filename": "last"},
        }
    )
    run = start("fit", options, folder / "runs", FAULT=f"{fault} {folder / 'happened'}")
    said, _ = run.communicate(timeout=240)
    assert (folder / "happened").exists(), said
    assert run.returncode != 0
    end = time.monotonic() + 60
    while alive(run.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert alive(run.pid) == []
    assert "Traceback" not in said, said
    assert said.count("error: ") == 1 or "another process of this training ended" in said, said
    assert list(folder.glob("runs/run/001/checkpoints/last.ckpt"))
    return str(said)


@pytest.mark.slow
def test_a_nan_in_one_process_ends_both_with_one_message(tmp_path):
    said = two_processes(tmp_path, "nan 1 3", "nslightning.callbacks.NonFiniteGuard")
    assert said.count("error: ") == 1
    assert re.search(r"nslightning fit: error: .*step 3", said)


@pytest.mark.slow
def test_a_process_that_is_out_of_memory_ends_both(tmp_path):
    said = two_processes(tmp_path, "memory 1 3")
    assert said.count("a smaller batch, or --trainer.accumulate_grad_batches, needs less") == 1


@pytest.mark.slow
def test_a_reading_process_of_one_of_two_that_is_killed_ends_both(images):
    said = two_processes(
        images, "reader 1 3", root=str(images / "images"), image_size=32, batch_size=2, workers=1, timeout=60
    )
    assert said.count("a process that reads the data was ended from outside") == 1


@pytest.mark.slow
def test_a_file_that_disappears_for_one_of_two_processes_ends_both(images):
    (images / "images/train/ant/ant_3.jpg").rename(images / "ant_3.jpg")
    (images / "images/train/ant/ant_3.jpg").symlink_to(images / "ant_3.jpg")
    said = two_processes(
        images,
        f"remove={images / 'ant_3.jpg'} 0 3",
        root=str(images / "images"),
        image_size=32,
        batch_size=2,
        workers=0,
    )
    assert said.count("ant_3.jpg: it was there at the start and is gone") == 1


def with_wandb(folder: Path, url: str, **environment: str) -> subprocess.Popen:
    """A run that logs to a W&B server, with a checkpoint after every second step."""
    options = config()
    options["data"]["init_args"]["batch_size"] = 8
    checkpoint = {"every_n_train_steps": 2, "filename": "last"}
    options["trainer"]["callbacks"] = [
        {"class_path": "ddp_helpers.Slow"},
        {"class_path": "ddp_helpers.Dump"},
        {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
    ]
    return start(
        "fit", options, folder / "runs", WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40, WANDB_MODE="online",
        WANDB_FINISH_TIMEOUT="5", **environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("port", ["silent", "closed"])
def test_wandb_that_is_gone_in_mid_run_costs_no_step(port, tmp_path):
    """The run ends well, W&B's own file has all of its steps, and one line says how to upload it."""
    with wandb_server.Server() as server:
        run = with_wandb(tmp_path, server.url, SECONDS_PER_STEP="0.3")
        folder = tmp_path / "runs/run/001"
        until((folder / "checkpoints/last.ckpt").exists, run)
        if port == "silent":
            server.silent.set()
        else:
            server.stop()
        said, _ = run.communicate(timeout=480)
    assert "UpsertBucket" in server.seen
    assert run.returncode == 0, said
    assert "Traceback" not in said
    assert (folder / "weights-0.pt").exists()
    (record,) = folder.glob("wandb/run-*")
    (file,) = record.glob("*.wandb")
    assert f"W&B has not taken all of this run; its own file is whole: wandb sync {record}\n" in said
    assert sorted(set(wandb_server.logged(file, "trainer/global_step"))) == list(range(24))


@pytest.mark.slow
def test_wandb_that_never_answers_ends_the_run_before_its_first_step(tmp_path):
    with wandb_server.Server() as server:
        server.silent.set()
        run = with_wandb(tmp_path, server.url, WANDB_INIT_TIMEOUT="5")
        said, _ = run.communicate(timeout=480)
    assert run.returncode == 1, said
    assert "Traceback" not in said
    assert "nslightning fit: error: W&B: " in said
    assert "set WANDB_MODE=offline to train without an account" in said


@pytest.mark.slow
@pytest.mark.parametrize("online", [False, True])
def test_wandbs_process_that_is_killed_late_is_said_and_the_run_is_whole(online, tmp_path):
    options = config()
    options["trainer"]["callbacks"] = [{"class_path": "ddp_helpers.NoWandb"}]
    with wandb_server.Server() as server:
        here = {"WANDB_MODE": "offline"}
        if online:
            here = {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        run = start("fit", options, tmp_path / "runs", KILL_WANDB="done", **here)
        said, _ = run.communicate(timeout=480)
    folder = tmp_path / "runs/run/001"
    assert run.returncode == 0, said
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if "W&B's record of this run is not whole" in line)
    assert f"{folder} has all of it" in line
    (record,) = folder.glob("wandb/run-*" if online else "wandb/offline-run-*")
    assert f"wandb sync {record}" in line
    assert runs.ended(folder) == "finished"


@pytest.mark.slow
def test_wandbs_process_that_is_killed_in_mid_run_ends_it_in_one_line(tmp_path):
    options = config()
    options["trainer"]["callbacks"] = [{"class_path": "ddp_helpers.NoWandb"}]
    run = start("fit", options, tmp_path / "runs", KILL_WANDB="2", WANDB_MODE="offline")
    said, _ = run.communicate(timeout=480)
    assert run.returncode == 1, said
    assert "Traceback" not in said
    assert said.count("wandb-core") == 1
    assert "nslightning fit: error: W&B's own process, wandb-core, was ended from outside" in said


@pytest.mark.parametrize("kind", ["HandleAbandonedError", "MailboxClosedError"])
def test_wandbs_mailbox_that_is_closed_means_that_its_process_is_gone(kind, monkeypatch, capsys):
    from wandb.sdk import mailbox

    error = getattr(mailbox, kind)()
    ending = ending_of(error, began=True)
    assert ending is not None
    assert (ending.status, "wandb-core, was ended from outside" in ending.message) == (1, True)

    def fail(**_: object) -> None:
        raise error

    monkeypatch.setitem(
        sys.modules,
        "wandb",
        SimpleNamespace(run=SimpleNamespace(dir="runs/x/001/wandb/run-1/files"), finish=fail, teardown=fail),
    )
    wandb_run.finish(failed=True)
    assert capsys.readouterr().err == ""
    wandb_run.finish()
    assert "runs/x/001 has all of it, and this uploads what W&B has: wandb sync runs/x/001/wandb/run-1\n" in (
        capsys.readouterr().err
    )


def test_wandbs_process_that_is_killed_is_known():
    code = compile("raise ConnectionResetError('Connection lost')", "/packages/wandb/sdk/lib/client.py", "exec")
    with pytest.raises(ConnectionResetError) as raised:
        exec(code)
    ending = ending_of(raised.value, began=True)
    assert ending is not None
    assert (ending.status, "wandb-core, was ended from outside" in ending.message) == (1, True)
    assert ending_of(ConnectionResetError("Connection lost"), began=True) is None  # from elsewhere: a bug


@pytest.mark.parametrize("code", ["EIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "ETIMEDOUT"])
def test_a_file_system_that_does_not_answer_is_known(code):
    """ENOTCONN is FUSE's, EHOSTDOWN that of Windows' shares; without a file they are a socket's."""
    number = getattr(errno, code)
    ending = ending_of(
        OSError(number, os.strerror(number), "runs/x/001/metrics.csv"), began=True, go_on="nslightning x"
    )
    assert ending is not None
    assert ending.status == 1
    assert re.match(r"runs/x/001/metrics.csv cannot be read or written: the (disk does|network's file)", ending.message)
    assert ending.message.endswith("go on with: nslightning x")
    named = ending_of(OSError(number, os.strerror(number)), began=True)
    assert (named is None) == (code in ("ENOTCONN", "EHOSTDOWN", "ETIMEDOUT"))


def test_a_run_folder_that_is_gone_is_told_from_another_missing_file(tmp_path):
    place = RunPlace()
    folder = place.take(str(tmp_path), "x", None)
    record.write_record(folder, {"seed": 1})
    record.check_record(folder)
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "elsewhere")
    assert place.gone(missing, "fit") is None
    folder.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        record.check_record(folder)
    said = place.gone(missing, "fit")
    assert said is not None
    assert f"the run's folder {folder} is gone" in said
    assert f"nslightning fit --config {folder}/config.yaml --ckpt_path=last" in said
    assert place.gone(ValueError("no file"), "fit") is None
    place.leave(keep=True)
    assert not folder.exists()


def test_a_wandb_that_takes_too_long_is_uploaded_later(monkeypatch, capsys):
    def finish(exit_code):
        raise TimeoutError("Timed out finishing run.")

    run = SimpleNamespace(dir="my runs/x/001/wandb/run-7/files")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=run, finish=finish))
    wandb_run.finish()
    said = capsys.readouterr().err
    assert said == (
        "W&B has not taken all of this run; its own file is whole: wandb sync 'my runs/x/001/wandb/run-7'\n"
    )


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40", "ended; its own message says why"),
        ("[tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete", "does not answer"),
        ("Application timeout caused pair closure", "does not answer"),
        ("Timed out after 61 seconds waiting for clients. 1/2 clients joined.", "does not answer"),
        ("The client socket has timed out after 15000ms while trying to connect to (h, 29500).", "does not answer"),
    ],
)
def test_a_process_that_another_one_waits_for_is_known(said, reason):
    """As gloo and the store of torch 2.15 say it."""
    ending = ending_of(RuntimeError(said), began=True)
    assert ending is not None
    assert ending.status == 1
    assert f"another process of this training {reason}" in ending.message
    assert said in ending.message


def test_a_processor_without_memory_is_known():
    """As torch 2.15 says it."""
    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    ending = ending_of(RuntimeError(said), began=True)
    assert ending is not None
    assert ending.status == 1
    assert "a smaller batch" in ending.message


def test_the_newest_checkpoint_is_the_one_that_was_written_last(tmp_path):
    """Though the clock was set back in between: the times of files follow it."""
    write, folder = runs.WholeCheckpoints().save_checkpoint, tmp_path / "checkpoints"
    for name in ("a", "b", "c"):
        write({"state_dict": {}, "name": name}, folder / f"{name}.ckpt")
        later = time.time_ns() + 3600 * 10**9
        if name == "a":
            os.utime(folder / "a.ckpt", ns=(later, later))
    assert [file.stem for file in runs.checkpoints_in(tmp_path)] == ["c", "b", "a"]
    write({"state_dict": {}}, folder / "a.ckpt")
    assert runs.last_checkpoint(tmp_path) == folder / "a.ckpt"
