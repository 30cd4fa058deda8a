"""Where a step's time goes, by a clock that only the parts themselves move."""

import re

import pytest
import torch
from torch import nn

from nslightning import Jacobians
from nslightning.cli import main
from nslightning.probes import step_cost as module
from nslightning.probes.step_cost import PARTS, step_cost

CHOICES = {"relu1": Jacobians(relu=1.0)}


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_each_part_has_its_own_time(clock, monkeypatch):
    def data():
        clock[0] += 0.5
        return torch.zeros(4, 3), torch.arange(4) % 2

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.relu = nn.Linear(3, 2), nn.ReLU()

        def forward(self, x):
            clock[0] += 1.0
            y = self.relu(self.linear(x))
            y.register_hook(lambda g: clock.__setitem__(0, clock[0] + 2.0))
            return y

    class SGD(torch.optim.SGD):
        def step(self, closure=None):
            clock[0] += 4.0

    stock = module.measure_differences

    def measured(differences, base):
        clock[0] += 8.0
        return stock(differences, base)

    monkeypatch.setattr(module, "measure_differences", measured)
    times = step_cost(Slow, data, CHOICES, optimizer=SGD, repetitions=3)
    plain = {"data": 500.0, "forward": 1000.0, "backward": 2000.0, "optimizer": 4000.0}
    assert times.stock == times.patched == plain
    assert times.measured == plain | {"measuring": 8000.0}
    assert times.host is None  # the host is the device
    text = str(times)
    assert re.search(r"^step +7500.000 +7500.000 +15500.000$", text, re.M)
    assert "patching adds +0.0 % to a step, measuring +106.7 % to that" in text


def test_a_step_is_a_step(clock):
    """The optimizer moves the weights, and gradients do not add up."""
    made = []

    def build():
        torch.manual_seed(0)
        made.append(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        return made[-1]

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    step_cost(build, lambda: (x, torch.arange(4) % 2), CHOICES, repetitions=2, warmup=1)
    by_hand = build()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand(x), torch.arange(4) % 2).backward()
        optimizer.step()
    for network in made[:3]:
        assert all(torch.equal(a, b) for a, b in zip(network.parameters(), by_hand.parameters(), strict=True))


def test_patched_networks_train_under_the_choice(clock):
    """Weights of 0 tie: under ReLU'(0) = 1 they move as without the ReLU, and the stock network's stay."""
    made = []

    def build():
        made.append(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        for p in made[-1].parameters():
            nn.init.zeros_(p)
        return made[-1]

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    choices = {"relu0": Jacobians(relu=0.0)}
    one = Jacobians(relu=1.0)
    step_cost(build, lambda: (x, torch.zeros(4).long()), choices, jacobians=one, repetitions=1, warmup=0)
    linear = build()[0]
    nn.functional.cross_entropy(linear(x), torch.zeros(4).long()).backward()
    torch.optim.SGD(linear.parameters(), lr=1e-3).step()
    stock, patched, measured = (network[0].weight for network in made[:3])
    assert torch.equal(patched, linear.weight)
    assert torch.equal(measured, linear.weight)
    assert not stock.any()


def test_the_rounds_that_count_are_those_after_the_warmup(clock):
    """The n-th batch takes n seconds: rounds 2, 3 and 4 have the batches 4 to 6, 7 to 9 and 10 to 12."""
    batches = []

    def data():
        batches.append(0)
        clock[0] += len(batches)
        return torch.zeros(4, 3), torch.arange(4) % 2

    times = step_cost(lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()), data, CHOICES, repetitions=3, warmup=1)
    assert [times.stock["data"], times.patched["data"], times.measured["data"]] == [7e3, 8e3, 9e3]
    batches.clear()
    times = step_cost(lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()), data, CHOICES, repetitions=2, warmup=1)
    assert times.stock["data"] == 5.5e3  # of 4 and 7: none is left out


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="repetitions=0: at least one round"):
        step_cost(nn.Identity, lambda: None, CHOICES, repetitions=0)


def test_the_command_prints_the_parts_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["cost", "--backbone=paper/lenet5", "--image-shape=[1,28,28]", "--batch-size=4", "--repetitions=2"]
    assert main([*words, "--step=true"]) == 0
    out = capsys.readouterr().out
    for part in (*PARTS, "measuring", "step"):
        assert re.search(rf"^{part} .*\d\.\d{{3}}", out, re.M), part
    assert list(tmp_path.iterdir()) == []
    assert main([*words, "--step=true", "--widths=4"]) == 2


def test_lightning_s_profiler_works(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    words = ["fit", "--data=Synthetic", "--data.image_shape=[1,28,28]", "--data.images=8", "--data.batch_size=4"]
    words += ["--trainer.limit_val_batches=0.0", "--trainer.max_epochs=1", "--trainer.profiler=simple"]
    words.append("--trainer.log_every_n_steps=1")
    assert main([*words, "--trainer.accelerator=cpu", "--trainer.enable_checkpointing=false"]) == 0
    said = "".join(capfd.readouterr()) + caplog.text
    assert "Profiler Report" in said
    assert "Performance.on_train_batch_end" in said
