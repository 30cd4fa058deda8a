"""Speed, waiting and memory of a training; batches on their way to a device while it works."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import fake_data
import pytest
import torch
from device_steps import META
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from nslightning.callbacks import Performance, performance
from nslightning.data import ImageFolder
from nslightning.data.ahead import ahead
from nslightning.exact_csv import read_exactly
from nslightning.runs import MetricsFile


class Clocked(LightningModule):
    """By its own clock a step takes a second, and a batch a quarter."""

    def __init__(self, clock):
        super().__init__()
        self.weight, self.clock = torch.nn.Parameter(torch.ones(())), clock

    def training_step(self, batch, batch_idx):
        self.clock[0] += 1.0
        return self.weight * batch.mean()

    def validation_step(self, batch, batch_idx):
        self.clock[0] += 1000.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_speed_and_waiting_are_those_of_the_steps_alone(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(performance.time, "perf_counter", lambda: clock[0])

    def slow(items):
        clock[0] += 0.25
        return torch.stack(items)

    # As Lightning reads one batch ahead, each wait but the first two falls between two steps.
    data = DataLoader(torch.ones(80, 3), batch_size=8, collate_fn=slow)
    folder = tmp_path / "run/001"
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=MetricsFile(folder), log_every_n_steps=5, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[Performance()],
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(Clocked(clock), data, DataLoader(torch.ones(8, 3), batch_size=8))
    rows = read_exactly(folder / "metrics.csv")
    rows = rows[rows["perf/data_wait"].notna()]
    assert rows["step"].tolist() == [4, 9, 14, 19]
    for _, row in rows.iterrows():
        waits = row["perf/data_wait"] * 40 / row["perf/images_per_second"]  # seconds of five steps
        assert waits == pytest.approx(round(4 * waits) / 4)
        assert 0.7 < waits < 1.3
        assert row["perf/images_per_second"] == pytest.approx(40 / (5 + waits))
        assert 0.01 < row["perf/memory_gib"] < 1000


def test_the_images_of_all_processes_count():
    counting = Performance()
    for processes, images in ((1, 8), (2, 24)):
        trainer = SimpleNamespace(world_size=processes, loggers=())
        counting.on_train_batch_end(trainer, None, None, (torch.ones(8, 3), torch.ones(8)), 0)
        assert counting._items == images


def test_memory_is_the_device_s_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert performance._peak_memory(torch.device("cuda:0")) == 3 * 2**30
    monkeypatch.setattr(performance.sys, "platform", "win32")
    assert performance._peak_memory(torch.device("cpu")) is None


# ---------------------------------------------------------------------------------------- on the way to a device
class Streams:
    """In place of ``torch.cuda``: notes what happens on which stream."""

    def __init__(self):
        self.events = []
        outer = self

        class Stream:
            def __init__(self, device=None):
                self.name = "copies" if device is not None else "current"

            def record_event(self):
                outer.events.append("copied")
                return sum(e == "copied" for e in outer.events)

            def wait_event(self, event):
                outer.events.append(f"wait for {event}")

        self.Stream, self._current = Stream, Stream()

    def current_stream(self, device):
        return self._current

    @contextmanager
    def stream(self, stream):
        assert stream.name == "copies"
        yield


def test_the_next_batch_is_copied_before_the_one_before_is_worked_on(monkeypatch):
    streams, kept = Streams(), []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: kept.append(stream.name))
    batches = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.long)) for _ in range(3)]
    for x, y in ahead(iter(batches), META, streams):
        assert (x.device, y.device) == (META, META)
        streams.events.append("step")
    assert streams.events == [
        "copied", "copied", "wait for 1", "step", "copied", "wait for 2", "step", "wait for 3", "step",
    ]  # fmt: skip
    assert kept == ["current"] * 6
    assert list(ahead([], META, Streams())) == []


def test_images_from_files_are_normalised_where_they_are_used(tmp_path):
    """As bytes, normalised by the loader, they are bit for bit what workers would have normalised."""
    fake_data.write_image_folder(tmp_path, ("ant", "bee"), 6)

    def batches(as_bytes, workers):
        module = ImageFolder(str(tmp_path), 24, batch_size=4, workers=workers)
        loader = module.train_dataloader()
        loader.dataset.as_bytes = as_bytes
        loader.sampler.set_epoch(2)
        raw = next(iter(DataLoader.__iter__(loader)))
        assert raw[0].dtype == (torch.uint8 if as_bytes else torch.float32)
        return list(loader)

    want = batches(False, 0)
    assert math.isfinite(float(want[0][0].sum()))
    for workers in (0, 1):
        for (x, y), (x0, y0) in zip(batches(True, workers), want, strict=True):
            assert torch.equal(x, x0)
            assert torch.equal(y, y0)
