"""Executors compute the same cells; what breaks is computed again, and an interruption loses nothing."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from nslightning.commands import experiment as command
from nslightning.experiments import Experiment, Outcome, Planned, collect, engine, run, settings
from nslightning.experiments.collecting import finished, folder_of
from nslightning.experiments.executors import Resources, make_executor, occupancy
from nslightning.experiments.executors import local as local_module
from nslightning.experiments.executors.memory import Peak, free_memory, measured_peak, processes_that_fit
from nslightning.experiments.progress import Lines, LiveTable, make_progress

FIXED = {"backbone": "paper/fc", "width": 4, "depth": 1, "data": "FashionMNISTSample", "train_images": 64, "epochs": 1}


def grid(**vary) -> Experiment:
    return Experiment("little", "train", "small", fixed=FIXED, grids=(vary,))


# The functions that the workers of these tests compute, in other processes.


def doubled(item, device):
    return 2 * item, device, os.getpid()


def killed_by_three(item, device):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return doubled(item, device)


def test_resources_that_cannot_be_are_refused():
    for wrong, message in (
        ({"workers": 0}, "workers=0"),
        ({"cpus_per_cell": 0}, "cpus_per_cell=0"),
        ({"gpus_per_cell": 0.0, "device": "cuda"}, "above 0 and at most 1"),
        ({"gpus_per_cell": 2.0, "device": "cuda"}, "computed on one GPU"),
        ({"gpus_per_cell": 0.5}, "needs a GPU; the device is cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            Resources(**wrong)
    assert [Resources(device="cuda", gpus_per_cell=share).per_gpu for share in (1.0, 0.5, 0.3, 0.25, 0.1)] == [
        1, 2, 3, 4, 10,
    ]  # fmt: skip


def test_an_executor_that_is_not_known_or_not_installed_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--executor=rai is not one of local, ray, submitit; did you mean 'ray'"):
        make_executor("rai", Resources(), tmp_path)
    with pytest.raises(ValueError, match="no option 'address'"):
        make_executor("local", Resources(options={"address": 1}), tmp_path)
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"pip install 'nslightning\[{name}\]'"):
            make_executor(name, Resources(), tmp_path)


class Pool:
    """Stands for the processes, which take long to start: computes at once, and breaks where a process would."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.running, self._processes = sizes, 0, {}
        self.broken = False

    def submit(self, function, work, item):
        future: Future = Future()
        if item in BREAKS and BREAKS[item] > 0:
            BREAKS[item] -= 1
            self.broken = True
        self.sizes.append(item)
        if self.broken:
            future.set_exception(BrokenProcessPool("terminated abruptly"))
        else:
            future.set_result((work(item, "cpu"), Peak(2**30)))
        return future

    def shutdown(self, **_):
        pass


BREAKS: dict[int, int] = {}


@pytest.mark.parametrize(
    ("breaks", "failed"), [({3: 9}, [3]), ({3: 1, 5: 1}, []), ({0: 9, 3: 9}, [0, 3]), ({0: 1}, [])]
)
def test_a_process_that_the_system_ends_costs_its_own_item_only(tmp_path, monkeypatch, breaks, failed):
    submitted: list[int] = []
    monkeypatch.setattr(local_module.LocalExecutor, "_pool", lambda self, items: Pool(submitted))
    BREAKS.clear()
    BREAKS.update(breaks)
    executor = make_executor("local", Resources(workers=2), tmp_path)
    results = list(executor.results(doubled, range(6)))
    assert sorted(r.item for r in results) == list(range(6))
    assert sorted(r.item for r in results if r.result is None) == failed
    assert all("terminated abruptly" in str(r.error) for r in results if r.result is None)
    assert max(submitted.count(item) for item in range(6)) <= 3


@pytest.mark.slow
def test_a_killed_process_costs_its_own_item_only(tmp_path):
    executor = make_executor("local", Resources(workers=2), tmp_path)
    results = list(executor.results(killed_by_three, range(6)))
    assert sorted(r.item for r in results) == list(range(6))
    (broken,) = (r for r in results if r.result is None)
    assert broken.item == 3
    assert "terminated abruptly" in str(broken.error)
    assert {r.result[0] for r in results if r.result} == {0, 2, 4, 8, 10}


@pytest.mark.parametrize(("free", "number"), [(None, 2), (2**29, 1)])
def test_the_number_of_processes_follows_from_the_first_items_memory(tmp_path, monkeypatch, free, number):
    at_once: list[int] = []

    class Counting(Pool):
        def submit(self, function, work, item):
            at_once.append(item)
            return super().submit(function, work, item)

    monkeypatch.setattr(local_module, "cores", lambda: 2)
    monkeypatch.setattr(local_module, "free_memory", lambda: free)
    monkeypatch.setattr(local_module.LocalExecutor, "_pool", lambda self, items: Counting([]))
    BREAKS.clear()
    said = io.StringIO()
    results = make_executor("local", Resources(workers=None, say=said), tmp_path).results(doubled, range(5))
    assert next(results).item == 0
    assert at_once == [0]
    second = next(results).item
    assert at_once == list(range(1 + number))
    assert sorted([0, second, *(r.item for r in results)]) == list(range(5))  # two that end at once come in any order
    reason = "2 cores" if free is None else "memory: 1.0 GiB each, 1.5 GiB free"
    assert said.getvalue() == f"{number} processes side by side ({reason}); --workers N takes another number\n"


def test_a_share_of_a_gpu_bounds_the_processes(monkeypatch):
    monkeypatch.setattr(local_module, "_devices", lambda device: ["cuda:0", "cuda:1"])
    executor = local_module.LocalExecutor(Resources(workers=None, device="cuda", gpus_per_cell=0.25))
    assert executor._workers == 8
    executor = local_module.LocalExecutor(Resources(workers=3, device="cuda", gpus_per_cell=0.25))
    assert executor._workers == 3


def test_the_share_of_time_in_which_a_gpu_works_is_measured(monkeypatch):
    monkeypatch.setattr(occupancy, "EVERY", 0.001)
    looked = []

    def measured(percent, device="cuda:1", looks=occupancy.LEAST + 1):
        looked.clear()
        monkeypatch.setattr(torch.cuda, "utilization", lambda device: looked.append(device) or percent())
        with occupancy.Occupancy(device) as seen:
            while len(looked) < looks:
                time.sleep(0.001)
        return seen.share

    def refuses():
        raise RuntimeError("cuda driver can't be loaded, is cuda enabled?")

    assert measured(lambda: 30) == pytest.approx(0.3)
    assert set(looked) == {"cuda:1"}
    assert measured(lambda: 30, "cpu", looks=0) is None
    assert not looked
    assert measured(refuses, looks=1) is None
    with monkeypatch.context() as short:
        short.setattr(occupancy, "LEAST", 10**6)
        assert measured(lambda: 30, looks=3) is None
    gib = 2**30
    for busy, number in ((1.0, 1), (0.5, 2), (0.34, 3), (0.0, 8), (None, 4)):
        assert processes_that_fit(Peak(gib, 2 * gib, 10 * gib, busy), 8, 100 * gib)[0] == min(number, 4)


def test_memory_is_measured_and_divided():
    gib = 2**30
    peak, free = measured_peak("cpu"), free_memory()
    assert 50 * 2**20 < peak.host < 64 * gib
    assert peak.device_free is None
    assert free is None or free > 0
    assert processes_that_fit(Peak(gib), 8, 100 * gib) == (8, "8 cores")
    assert processes_that_fit(Peak(gib), 8, 2 * gib)[0] == 1
    assert processes_that_fit(Peak(4 * gib), 8, 2 * gib)[0] == 1  # one computes, whatever there is
    assert processes_that_fit(Peak(gib, 2 * gib, 10 * gib), 8, 100 * gib)[0] == 4
    assert processes_that_fit(Peak(gib, 2 * gib, 10 * gib), 8, 100 * gib, gpus=2)[0] == 8


def test_a_large_grid_is_planned_and_collected_with_few_looks(tmp_path, monkeypatch):
    """Counts what grows with a grid: checks are made once per kind, and the folder is read once."""
    from nslightning.experiments import cells

    made = []
    stock = cells.TypeAdapter
    monkeypatch.setattr(cells, "TypeAdapter", lambda allowed: made.append(allowed) or stock(allowed))
    cells._types.cache_clear()
    large = grid(seed=list(range(100)), relu=[0, 1, "random"])
    assert len(large.cells()) == 300
    assert large.cells()[0] is large.cells()[0]  # planned once, for the run and for the table
    assert len(made) == len(cells._types("train"))
    folder = folder_of(large, tmp_path) / "cells"
    folder.mkdir(parents=True)
    content = '{"settings": {}, "seconds": 1, "provenance": {}, "rows": [{"metric": "nan", "value": 0}]}'
    for planned in large.cells()[:200]:
        (folder / f"{planned.id}.json").write_text(content)
    looks = []
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self, **_: looks.append(self) or exists(self))
    opened, read = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: opened.append(self) or read(self, *a, **k))
    assert len(collect(large, tmp_path)) == len(finished(folder.parent)) == 200
    assert sum(file.suffix == ".json" and file.parent == folder for file in opened) == 200
    assert len(looks) < 10


def test_the_file_says_what_a_cell_takes(tmp_path):
    file = tmp_path / "x.yaml"
    text = "kind: train\nfixed: {backbone: paper/lenet5}\nvary: {seed: [0]}\nscales: {small: {}}\n"
    file.write_text(text)
    plain = Experiment.read(file)
    file.write_text(text + "resources: {gpus_per_cell: 0.25, submitit: {timeout_min: 30}}\n")
    experiment = Experiment.read(file)
    assert (experiment.gpus_per_cell, experiment.executor_options) == (0.25, {"submitit": {"timeout_min": 30}})
    assert [p.id for p in experiment.cells()] == [p.id for p in plain.cells()]
    file.write_text(text + "resources: {gpu_per_cell: 0.25}\n")
    with pytest.raises(ValueError, match="did you mean 'gpus_per_cell'"):
        Experiment.read(file)


def test_a_live_table_shows_who_computes_what(tmp_path):
    planned = grid(seed=[0, 1, 2]).cells()
    (tmp_path / f"{planned[2].id}.running").write_text('{"host": "gone", "pid": 1, "began": 1.0}')  # of a killed worker
    console = Console(file=io.StringIO(), width=100)
    table = LiveTable(console, planned, tmp_path)
    (tmp_path / f"{planned[1].id}.running").write_text(json.dumps({"host": "node7", "pid": 12, "began": time.time()}))
    with table:
        table.ended(planned[0], 1.5, None)
        table.ended(planned[2], 0.0, "RuntimeError: no luck")
    console.print(table.render())
    said = console.file.getvalue()
    for part in ("2/3 done, 1 failed, 1 running", "seed=1", "node7:12", "last: seed=0: 1.5 s", "seed=2 failed: Runt"):
        assert part in said
    assert "gone" not in said
    assert isinstance(make_progress(io.StringIO(), planned, tmp_path), Lines)


def test_a_live_table_outlives_a_clock_that_is_set_back(tmp_path, monkeypatch):
    planned, now = grid(seed=[0, 1, 2]).cells(), time.time()
    console = Console(file=io.StringIO(), width=100)
    table = LiveTable(console, planned, tmp_path)
    (tmp_path / f"{planned[1].id}.running").write_text(json.dumps({"host": "node7", "pid": 12, "began": now}))
    table.ended(planned[0], 1.5, None)
    monkeypatch.setattr(time, "time", lambda: now - 24 * 3600)
    console.print(table.render())
    said = console.file.getvalue()
    assert re.search(r" 0:\d\d:\d\d left", said)
    assert re.search(r"node7:12 +0:00:00", said)


def test_a_cell_that_no_machine_sees_here_is_no_finished_one(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "compute_cell", lambda *_: engine.Ended(1.0))
    report = run(grid(seed=[0]), tmp_path)
    ((_, reason),) = report.failed
    assert "all machines need to see the same --output" in reason
    assert report.computed == 0


class OtherRay:
    """Stands for Ray, which answers SIGTERM itself from its start on."""

    def __init__(self, sigterm_while_it_starts: bool) -> None:
        self._early = sigterm_while_it_starts

    def is_initialized(self):
        return False

    def init(self, **_):
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))
        if self._early:
            os.kill(os.getpid(), signal.SIGTERM)

    def remote(self, **_):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("early", [True, False], ids=["while Ray starts", "later"])
def test_this_process_answers_sigterm_whatever_ray_sets(early, tmp_path, monkeypatch):
    def stop(signum, frame):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "ray", OtherRay(early))
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(make_executor("ray", Resources(), tmp_path).results(doubled, [1]))
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_submitit_refuses_what_it_does_not_take(tmp_path):
    pytest.importorskip("submitit", reason="the extra `submitit` is not installed")
    for options, message in (
        ({"timeout_mn": 3}, "Unknown executor 'timeout'"),
        ({"timeout_min": "x"}, "expected type"),
        ({"cells_per_job": 0}, "cells_per_job=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_executor("submitit", Resources(options={"cluster": "local", **options}), tmp_path)


@pytest.mark.filterwarnings("ignore:unclosed file .*_log:ResourceWarning")  # submitit's log, in this process
def test_a_job_computes_its_cells_and_says_where_its_log_is(tmp_path):
    pytest.importorskip("submitit", reason="the extra `submitit` is not installed")
    options = {"cluster": "debug", "cells_per_job": 2}
    executor = make_executor("submitit", Resources(options=options), tmp_path)
    results = list(executor.results(doubled, [1, 2, 3]))
    assert [(r.item, r.result[0]) for r in results] == [(1, 2), (2, 4), (3, 6)]


@pytest.mark.slow
def test_all_executors_one_after_the_other_leave_one_table(tmp_path, capfd):
    """Twelve cells: an interruption in the middle, then each executor goes on, and each computes a grid alone."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    pytest.importorskip("submitit", reason="the extra `submitit` is not installed")
    file = tmp_path / "twelve.yaml"
    file.write_text(
        "kind: train\n"
        "fixed: {backbone: paper/lenet5, data: FashionMNISTSample, train_images: 512, epochs: 2,"
        " learning_rate: 0.01, batch_size: 64}\n"
        "vary: {max_pool: [0, 10, minimal], relu: [0, 1], seed: [0, 1]}\n"
        "scales: {small: {}}\n"
    )
    experiment = Experiment.read(file)
    whole = run(experiment, tmp_path / "whole", workers=2)
    assert (whole.computed, whole.failed) == (12, [])
    mixed = tmp_path / "mixed"
    options = {
        "ray": {},
        "submitit": {"cluster": "local", "cells_per_job": 2},
        "local": {},
    }
    only = {"ray": {"max_pool": [0]}, "submitit": {"max_pool": [0, 10]}, "local": None}
    interrupted = False
    for executor in ("ray", "submitit", "local"):
        if executor == "submitit":  # Ctrl-C in the middle: what is finished stays, jobs are ended
            with pytest.raises(KeyboardInterrupt) as stop:
                run(experiment, mixed, workers=1, executor=executor, executor_options=options[executor],
                    only=only[executor], progress=Interrupting(after=2))  # fmt: skip
            assert "of 8 cells of twelve" in stop.value.__notes__[0]
            interrupted = True
            assert 6 <= len(finished(folder_of(experiment, mixed))) < 8
        report = run(
            experiment, mixed, workers=2, executor=executor, executor_options=options[executor], only=only[executor]
        )
        assert report.failed == []
    assert interrupted
    assert report.skipped + report.computed == 12
    for name in ("results.csv",):
        one, other = (folder_of(experiment, out) / name for out in (tmp_path / "whole", mixed))
        assert one.read_bytes() == other.read_bytes()
    for executor in ("ray", "submitit"):
        alone = run(
            experiment, tmp_path / executor, workers=2, executor=executor, executor_options=options[executor],
            only={"relu": [1], "max_pool": ["minimal"]},
        )  # fmt: skip
        assert (alone.computed, alone.failed) == (2, [])
        rows = pd.read_csv(alone.folder / "results.csv")
        table = pd.read_csv(whole.folder / "results.csv").query("relu == 1 and max_pool == 'minimal'")
        pd.testing.assert_frame_equal(
            rows.drop(columns="max_pool"), table.drop(columns="max_pool").reset_index(drop=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor", "signum", "status"),
    [("local", signal.SIGINT, 130), ("ray", signal.SIGINT, 130), ("ray", signal.SIGTERM, 143),
     ("submitit", signal.SIGINT, 130), ("submitit", signal.SIGTERM, 143)],
)  # fmt: skip
def test_the_command_is_stopped_whoever_computes(executor, signum, status, tmp_path):
    """Ctrl-C of a terminal, and SIGTERM of the command alone: one line, the status, and no process is left."""
    if executor != "local":
        pytest.importorskip(executor, reason=f"the extra `{executor}` is not installed")
    file = tmp_path / "twelve.yaml"
    file.write_text(
        "kind: train\n"
        "fixed: {backbone: paper/lenet5, data: FashionMNISTSample, train_images: 512, epochs: 2,"
        " learning_rate: 0.01, batch_size: 64}\n"
        "vary: {max_pool: [0, 10], seed: [0, 1, 2, 3, 4, 5]}\n"
        "scales: {small: {}}\n"
    )
    words = [sys.executable, "-m", "nslightning", "experiment", str(file), "--device=cpu", f"--output={tmp_path}"]
    words += [f"--executor={executor}", *["--executor-option=cluster=local"] * (executor == "submitit")]
    mark = f"NSLIGHTNING_TEST_MARK={tmp_path}"
    environment = {**os.environ, **dict([mark.split("=", 1)])}
    started = subprocess.Popen(
        [*words, "--workers=1"], env=environment, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    while len(list(tmp_path.glob("twelve/small/cells/*.json"))) < 2:
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    (os.killpg if signum == signal.SIGINT else os.kill)(started.pid, signum)
    _, said = started.communicate(timeout=240)
    assert started.returncode == status, said
    assert "Traceback" not in said
    assert re.search(r"stopped by \S+ after \d+ of 12 cells of twelve; the same command goes on", said)

    def left():
        """The processes that the command started, and those that they started, wherever they went."""
        pids = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it ended meanwhile
                if mark.encode() in environ.read_bytes().split(b"\0"):
                    pids.append(environ.parent.name)
        return pids

    end = time.monotonic() + 60
    while left() and time.monotonic() < end:
        time.sleep(0.2)
    assert left() == []
    done = len(list(tmp_path.glob("twelve/small/cells/*.json")))
    assert 2 <= done < 12
    words += ["--executor-option=cells_per_job=5"] * (executor == "submitit")  # each job imports torch
    again = subprocess.run([*words, "--workers=2"], env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"12 cells, {done} finished before, {12 - done} computed" in again.stdout
    whole = run(Experiment.read(file), tmp_path / "whole", workers=1)
    files = [folder / "results.csv" for folder in (tmp_path / "twelve/small", whole.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


class Interrupting(io.StringIO):
    """A stream on which somebody presses Ctrl-C after some lines."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def write(self, text: str) -> int:
        if "[" in text:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return super().write(text)


@pytest.mark.filterwarnings("ignore:unclosed file .*_log:ResourceWarning")  # submitit's log, in this process
def test_the_command_takes_an_executor(tmp_path, capsys):
    file = tmp_path / "little.yaml"
    file.write_text(f"kind: train\nfixed: {FIXED}\nvary: {{seed: [0]}}\nscales: {{small: {{}}}}\n".replace("'", ""))
    assert command.main(["experiment", str(file), "--executor", "slurm", "--workers=1", "--output", str(tmp_path)]) == 2
    assert "--executor=slurm is not one of local, ray, submitit" in capsys.readouterr().err
    words = ["experiment", str(file), "--device=cpu", "--output", str(tmp_path)]
    assert command.main([*words, "--gpus-per-cell=0.5"]) == 2
    assert "gpus_per_cell=0.5 needs a GPU" in capsys.readouterr().err
    submitit = ["--executor=submitit", "--executor-option=cluster=debug"]
    pytest.importorskip("submitit", reason="the extra `submitit` is not installed")
    assert command.main([*words, *submitit]) == 0
    assert "1 cells, 0 finished before, 1 computed" in capsys.readouterr().out


def test_a_warning_in_a_worker_s_process_names_no_source(tmp_path, monkeypatch):
    written = []

    def warned(*_):
        written.append(warnings.formatwarning("few images", UserWarning, "data.py", 3))
        return Outcome([], {})

    monkeypatch.setattr(warnings, "formatwarning", lambda message, category, file, line, *_: f"{file}:{line}")
    monkeypatch.setattr(engine, "compute", warned)
    cell = settings("train", {"backbone": "paper/fc"})
    ended = engine.compute_cell("train", tmp_path, Planned("a", {}, cell), "cpu")
    assert (ended.error, written) == (None, ["UserWarning: few images\n"])
