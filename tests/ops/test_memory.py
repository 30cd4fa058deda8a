"""What a choice keeps for the backward, and the benchmark that counts it."""

import importlib

import pytest
import torch
from torch import nn

from nslightning import patch

memory = importlib.import_module("benchmarks.memory")


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(32 * 64, 10),
    )  # fmt: skip


X = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_kept_is_what_stock_pytorch_saves():
    """The input is the caller's; ReLU's outputs are the pools' inputs, and the pools' outputs those of the layers."""
    first, second = 8 * 16 * 32 * 32, 8 * 32 * 16 * 16
    values = first + first // 4 + second + second // 4
    model = network()
    assert memory.kept(model, X, model.parameters()) == 4 * values + 8 * (first // 4 + second // 4)


def test_peak_is_what_lives_at_once():
    def step():
        a = torch.empty(1_000_000)
        b = torch.empty(500_000, dtype=torch.float64)
        del a
        c = torch.empty(1_000_000, dtype=torch.uint8)
        del b, c

    assert memory.peak(step, 64, "cpu") == 64 + 8_000_000


@pytest.mark.parametrize("choice", [name for name in memory.CHOICES if name != "stock"])
@pytest.mark.parametrize("dead", [False, True])
def test_within_three_percent_of_stock(choice, dead):
    kept = []
    for jacobians in (None, memory.CHOICES[choice]):
        torch.manual_seed(0)
        model = network()
        if dead:
            memory.kill_half(model)
            assert (model[:1](X) == 0).float().mean() == 0.5  # ties, and many
        if jacobians is not None:
            patch(model, jacobians)
        kept.append(memory.kept(model, X, model.parameters()))
    assert kept[1] <= 1.03 * kept[0]
    if not dead:
        assert kept[1] <= kept[0]
