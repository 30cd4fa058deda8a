"""The released procedure as a whole: its steps as they were recorded, its quirks together, its poolings by the norm."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from released_steps import CASES, FILE, RATE, batches, start

from nslightning import configs
from nslightning.experiments import Experiment, settings
from nslightning.experiments.cells import TrainCell
from nslightning.experiments.data import load
from nslightning.experiments.networks import build
from nslightning.experiments.training import Run
from nslightning.jacobians import Jacobians
from nslightning.models.backbones import create_backbone
from nslightning.ops import norm_pool2d
from nslightning.surgery import patch

CPU = torch.device("cpu")
RECORDED: dict[str, list[float]] = json.loads(FILE.read_text())


def steps(case: dict[str, Any], *, as_published: bool) -> list[float]:
    cell = settings("train", {**case, "learning_rate": RATE})
    assert isinstance(cell, TrainCell)
    cell = cell.as_published() if as_published else cell
    shape = (1, 28, 28) if "lenet" in cell.backbone else (3, 32, 32)
    network = create_backbone(cell.backbone, 10, shape, False, **cell.options)
    start(network, cell.backbone)
    patch(network, cell.jacobians)
    half = cell.precision == 16
    run = Run(cell, network.half() if half else network, CPU)
    return [float(run.step(x.half() if half else x, y)[0]) for x, y in batches(cell.backbone)]


@pytest.mark.parametrize("control", ["lenet5, 32 bit", "lenet5, 16 bit", "vgg11, 32 bit"])
def test_twenty_steps_are_those_of_the_released_code(control: str) -> None:
    """To the bit where this machine adds up as the one of the record; elsewhere as near as the rounding noise is.

    The published pooling makes noise of the last bits, so that another order of summation is another noise.
    """
    network, _, bits = control.partition(", ")
    cases = [name for name in CASES if name.startswith(network) and name.endswith(bits) and name != control]
    assert cases
    same_sums = steps(CASES[control], as_published=True) == RECORDED[control]
    for name in cases:
        ours, expected = steps(CASES[name], as_published=True), RECORDED[name]
        if same_sums:
            assert ours == expected, name
        else:
            assert ours == pytest.approx(expected, abs=0.05 if bits == "16 bit" else 0.02), name
        if network == "lenet5":  # the exact rule is another training
            assert steps(CASES[name], as_published=False) != expected


def test_the_quirks_are_set_together() -> None:
    cell = settings("train", {"backbone": "paper/lenet5", "precision": 24, "learning_rate": "searched"}).as_published()
    assert isinstance(cell, TrainCell)
    assert cell.rule == "published"
    assert cell.half_loss
    assert cell.eval_float32
    assert cell.shared_scaler
    assert cell.shared_lr
    assert cell.data_options == {"holdout": 0}
    other = settings("train", {"backbone": "paper/fc", "paper": "A", "data": "Synthetic"}).as_published()
    assert isinstance(other, TrainCell)
    assert not other.shared_lr  # paper A searched a rate for each alpha
    assert other.data_options == {}
    volume = settings("zones", {"backbone": "paper/fc", "against": {"relu": 1}}).as_published()
    assert volume.nan_differs
    norms = settings("zones", {"backbone": "paper/lenet5", "against": {"max_pool": 1}, "norm": "linf_sum"})
    assert not norms.as_published().nan_differs  # type: ignore[attr-defined] # NaN compares as not above
    with pytest.raises(ValueError, match="zones over the reals are of the exact rule"):
        dataclasses.replace(norms, norm="zone").as_published()


def test_an_experiment_as_published_has_a_folder_of_its_own_and_each_cell_once() -> None:
    file = configs.path("quickstart").parent / "experiments" / "mnist_lenet_beta.yaml"
    plain, quirks = Experiment.read(file, "paper"), Experiment.read(file, "paper", as_published=True)
    assert quirks.name == "mnist_lenet_beta+as-published"
    assert len(plain.cells()) == 2 * len(quirks.cells())  # the rule is no longer a choice
    assert {p.cell.rule for p in quirks.cells()} == {"published"}
    assert {p.varied["rule"] for p in quirks.cells()} == {"published"}


# -------------------------------------------------------------------------------------------------------- NormPool
def test_published_norms_are_formed_in_the_inputs_precision() -> None:
    x = torch.tensor([1e-4, 200.0, 3.0]).half().view(1, 3, 1, 1).expand(1, 3, 2, 2).contiguous()
    published = norm_pool2d(x, 2, rule="published").flatten()
    assert published[0] == 0  # 1e-8 is no half
    assert published[1] == torch.inf  # 40,000 + 40,000 is none either
    assert published[2] == 6
    exact = norm_pool2d(x, 2).flatten()
    assert torch.equal(exact, torch.tensor([2e-4, 400.0, 6.0]).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("version", [0.0, 1.0])
def test_published_norms_have_their_own_gradient(dtype: torch.dtype, version: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 6, generator=g).to(dtype)
    x[0, 0, :2, :2] = 0
    incoming = torch.randn(2, 3, 2, 3, generator=g).to(dtype)
    x.requires_grad_()
    norm_pool2d(x, 2, at_zero=version, rule="published").backward(incoming)
    expected = torch.zeros_like(x)
    for i in range(2):
        for c in range(3):
            for r in range(2):
                for k in range(3):
                    window = x.detach()[i, c, 2 * r : 2 * r + 2, 2 * k : 2 * k + 2]
                    norm = (window * window).sum().sqrt()
                    factor = window / norm if norm != 0 else torch.full_like(window, version)
                    expected[i, c, 2 * r : 2 * r + 2, 2 * k : 2 * k + 2] = factor * incoming[i, c, r, k]
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert bool((x.grad[..., 4:, :] == 0).all())  # rows that are left over


def test_a_cell_with_norms_takes_the_published_rule_and_its_two_versions() -> None:
    options = {"backbone": "paper/lenet5", "pool": "norm", "against": {"norm": 1.0}, "norm": "l1_sum", "relu": 1.0}
    cell = settings("zones", {**options, "precision": 16, "rule": "published"})
    images = load("FashionMNISTSample", (), CPU)
    network, _ = build(cell, images, CPU, None)
    with torch.no_grad():
        network.conv1.weight.mul_(1e-4)
        network.conv1.bias.zero_()
    x, _ = next(images.train.batches(4, torch.float16))
    values = []
    for norm in (0.0, 1.0):
        pooled = network.pool1(network.relu1(network.conv1(x)))
        network.pool1.selection.set(dataclasses.replace(cell.jacobians, norm=norm))
        network.zero_grad()
        pooled.float().sum().backward()
        values.append(network.conv1.weight.grad.clone())
    assert not torch.equal(*values)  # windows whose squares underflow
    assert network.pool1.selection.jacobians.rule == "published"
    assert isinstance(cell.jacobians, Jacobians)
