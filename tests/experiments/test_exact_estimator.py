"""The chance of a zero, counted: against enumeration of all biases, sampling, and what the command says of it."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
from torch import nn

from nslightning.arithmetic import linear
from nslightning.cli import main
from nslightning.experiments import exact, settings
from nslightning.experiments.exact import Lattice, layer_chances
from nslightning.experiments.zones import zones


def test_the_lattice_holds_every_bias_that_is_drawn() -> None:
    for fan_in in (784, 256, 17):
        bound = 1 / math.sqrt(fan_in)
        lattice = Lattice(bound)
        torch.manual_seed(3)
        drawn = nn.Linear(fan_in, 5000).bias.detach()
        k = lattice.nearest(drawn)
        near = torch.stack([lattice(k + d) for d in (-2, -1, 0, 1, 2)])
        assert bool((near == drawn).any(0).all())
        assert float(lattice(torch.tensor(0))) == pytest.approx(-bound)


@pytest.mark.parametrize("order", ["native", "bias_last", "sequential", "blocks=2", "split_k=3"])
def test_what_is_counted_is_what_an_enumeration_of_all_biases_finds(order: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.ReLU())
    images = torch.rand(12, 1, 1, 4)
    images[6:] = images[:6]  # the same zeros: a union is counted
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    biases = Lattice(1 / 2)(torch.arange(2**24))
    (chance,) = layer_chances(network, images, order, 12)
    hit, zeros = torch.zeros(2**24, dtype=torch.bool), 0
    for x in images.flatten(1):
        if chance.order.startswith("blocks"):  # the bias first, then one sum after another
            size, y = int(chance.order.partition("=")[2]), biases
            for k in range(0, 4, size):
                y = y + nn.functional.linear(x[None, k : k + size], layer.weight[:, k : k + size])[0]
        else:
            y = linear(x[None], layer.weight, None, chance.order)[0] + biases
        zero_places = (y == 0).nonzero()
        hit[zero_places] = True
        zeros += len(zero_places)
    assert zeros > int(hit.sum()) > 0
    assert chance.probability == pytest.approx(int(hit.sum()) / 2**24, rel=1e-9)
    assert chance.zeros == zeros / 2**24


def test_the_librarys_own_kernel_is_asked_where_its_order_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(300, 16), nn.ReLU())
    images = torch.rand(500, 300)
    (known,) = layer_chances(network, images, "native", 500)
    monkeypatch.setattr(exact, "_library_order", lambda *_: "native")
    (asked,) = layer_chances(network, images, "native", 500)
    assert asked.order == "native"
    assert asked.probability == pytest.approx(known.probability, rel=1e-12)
    assert asked.zeros == known.zeros


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 256])
@pytest.mark.parametrize("order", ["native", "bias_last", "split_k=3"])
def test_each_bias_that_is_counted_gives_a_zero_on_batches_of_that_size(order: str, batch_size: int) -> None:
    """The library's kernels for one and two images add up otherwise than those for many."""
    torch.manual_seed(4)
    layer, images = nn.Linear(300, 24), torch.rand(100, 300)
    network = nn.Sequential(nn.Flatten(), layer, nn.ReLU())

    def outputs() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([linear(part, layer.weight, layer.bias, order) for part in images.split(batch_size)])

    hits: dict[int, list[int]] = {}
    lattice = Lattice(1 / math.sqrt(300))
    with torch.no_grad():
        resolved = exact._library_order(layer, images, outputs(), batch_size) if order == "native" else order
        for keys in exact._hits(layer, images, outputs(), resolved, lattice, batch_size):
            for unit, k in zip((keys // 2**24).tolist(), (keys % 2**24).tolist(), strict=True):
                hits.setdefault(unit, []).append(k)
    count = sum(map(len, hits.values()))
    assert count > 50
    (chance,) = layer_chances(network, images, order, batch_size)
    assert chance.zeros == count / 2**24
    for turn in range(3):  # one bias of each unit at a time: a zero, where it was counted, and none beside it
        chosen = {unit: ks[(7 * turn) % len(ks)] for unit, ks in hits.items()}
        with torch.no_grad():
            layer.bias[list(chosen)] = lattice(torch.tensor(list(chosen.values())))
        met = (outputs() == 0).any(0)
        assert all(bool(met[unit]) for unit in chosen)
        free = {unit: next(k for k in range(min(ks), 2**24) if k not in set(ks)) for unit, ks in hits.items()}
        with torch.no_grad():
            layer.bias[list(free)] = lattice(torch.tensor(list(free.values())))
        met = (outputs() == 0).any(0)
        assert not any(bool(met[unit]) for unit in free)


@pytest.mark.parametrize("order", ["native", "bias_last"])
def test_counting_agrees_with_sampling(order: str) -> None:
    """Weights that stay, 1,000 draws of the biases."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU())
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    images = torch.rand(10_000, 64)
    (chance,) = layer_chances(network, images, order, 10_000)
    hit, draws = 0, 600
    bias = torch.empty(256)
    with torch.no_grad():
        for _ in range(draws):
            nn.init.uniform_(bias, -1 / 8, 1 / 8)
            hit += bool((linear(images, layer.weight, bias, order) == 0).any())
    sd = math.sqrt(chance.probability * (1 - chance.probability) / draws)
    assert 0.005 < chance.probability < 0.2
    assert abs(hit / draws - chance.probability) < 3.5 * sd


def test_a_cell_counts_by_depth_and_the_same_again() -> None:
    options = {"backbone": "paper/fc", "width": 16, "depth": 2, "data": "FashionMNISTSample", "against": {"relu": 1}}
    options |= {"estimator": "exact", "shuffle": False, "thetas": 2, "arithmetic": "bias_last"}
    rows = pd.DataFrame(zones(settings("zones", options), "cpu").rows)
    table = rows.pivot_table(index="theta", columns="metric", values="value")
    assert len(table) == 2
    assert bool((table["probability"] == table["probability_depth2"]).all())
    assert bool((table["probability_depth1"] < table["probability_depth2"]).all())
    assert bool((table["expected_zeros"] >= table["probability"]).all())
    again = zones(settings("zones", options), "cpu")
    assert [row["value"] for row in again.rows] == rows["value"].tolist()
    assert again.provenance["orders"] == "bias_last"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precisions=[16]"], "it counts float32 numbers; given precision=16"),
        (["--choices=m:max_pool=1"], "the choices differ in relu alone"),
        (["--backbone=paper/lenet5"], "it knows fully connected networks"),
        (["--options={batch_norm: true}"], "networks without batch norm"),
        (["--batches=3"], "give batches: null"),
        (["--arithmetic=random_order"], "it needs an arithmetic that repeats itself"),
        (["--arithmetic=bias_frst"], "arithmetic='bias_frst'"),
    ],
)
def test_the_command_refuses_what_cannot_be_counted(options, message, tmp_path, capsys) -> None:
    call = ["--data=FashionMNISTSample", "--precisions=[32]", "--batches=null", "--estimator=exact", "--draws=1"]
    assert main(["zones", *call, f"--output={tmp_path / 'z'}", *options]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command_tells_the_mean_chance_with_students_interval(tmp_path, capsys) -> None:
    call = ["--data=FashionMNISTSample", "--precisions=[32]", "--batches=null", "--estimator=exact", "--draws=3"]
    call += ["--chunk=1", "--options={hidden: [64]}", "--arithmetic=bias_last", "--half_width=1e-9"]
    assert main(["zones", *call, f"--output={tmp_path / 'z'}"]) == 0
    assert "zeros expected" in capsys.readouterr().out
    row = pd.read_csv(tmp_path / "z" / "zones.csv").iloc[0]
    results = pd.read_csv(tmp_path / "z" / "zones" / "results.csv")
    each = results[results["metric"] == "probability"]["value"]
    assert len(each) == 3
    assert row["share"] == pytest.approx(each.mean(), rel=1e-4)
    assert row["high"] - row["share"] == pytest.approx(4.302653 * each.std() / math.sqrt(3), rel=1e-3)


@pytest.mark.slow  # MNIST, about a minute
def test_the_shares_of_a_first_layer_on_mnist() -> None:
    """5.0 % with the bias last and 13.6 % with MKL's blocks of 192, to 0.7 points, from an independent program."""
    import os

    from nslightning.data import DataError

    options = {"backbone": "paper/fc", "width": 256, "depth": 1, "data": "MNIST", "data_options": {"holdout": 0}}
    options |= {"normalise": False, "against": {"relu": 1}, "estimator": "exact", "shuffle": False, "thetas": 4}
    for arithmetic, share in (("bias_last", 0.050), ("blocks=192", 0.136)):
        try:
            rows = zones(settings("zones", {**options, "arithmetic": arithmetic}), "cpu").rows
        except DataError:
            pytest.skip(f"no MNIST in NSLIGHTNING_DATA_DIR={os.environ.get('NSLIGHTNING_DATA_DIR')}")
        probabilities = [row["value"] for row in rows if row["metric"] == "probability"]
        assert sum(probabilities) / len(probabilities) == pytest.approx(share, abs=0.007)
