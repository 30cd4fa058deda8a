"""Callbacks in company: steps of every signature, two of a class, one object twice, choices in every spelling."""

import csv
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MeanMetric, MetricCollection, SumMetric

from nslightning import Jacobians, patch
from nslightning.callbacks import (
    GradientDivergence,
    NonFiniteError,
    NonFiniteGuard,
    TieMonitor,
    WeightDivergence,
    ZoneMonitor,
)
from nslightning.callbacks.replay import silent
from nslightning.choices import named_choices, to_jacobians

RELU1 = {"relu1": Jacobians(relu=1.0)}


class Net(LightningModule):
    """Two layers with a ReLU that meets zeros; one argument in its step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.relu, self.last = nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 1)
        nn.init.ones_(self.first.weight[0])
        nn.init.zeros_(self.first.weight[1])  # ties at every image, with a gradient that the choice decides
        patch(self, Jacobians())

    def loss(self, batch):
        return self.last(self.relu(self.first(batch))).square().mean()

    def training_step(self, batch):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Skips(Net):
    """Returns no loss for its second batch."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else self.loss(batch)


class Fetches(Net):
    """Takes an iterator, and two batches of it a step."""

    def training_step(self, dataloader_iter):
        both = [next(dataloader_iter)[0] for _ in range(2)]
        return sum(self.loss(batch) for batch in both)


class Counts(Net):
    """Holds metrics as parts, in a collection and in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.seen, self.group = SumMetric(), MetricCollection({"mean": MeanMetric(), "sum": SumMetric()})
        object.__setattr__(self, "aside", {"list": [SumMetric()]})

    def training_step(self, batch):
        self.seen(torch.tensor(float(len(batch))))
        self.group.update(torch.tensor(1.0))
        self.aside["list"][0].update(torch.tensor(2.0))
        return self.loss(batch)


def batches(n=6, bad=None):
    """Batches of four images; one may hold an infinity in the making."""
    images = torch.randn(4 * n, 4, generator=torch.Generator().manual_seed(1))
    if bad is not None:
        images[4 * bad + 1] = 3e38  # finite; the first layer makes an infinity of it
    return DataLoader(images, batch_size=4)


def train(folder, *callbacks, module=None, loader=None, ckpt_path=None, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    module = module or Net()
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, loader or batches(), ckpt_path=ckpt_path)
    return trainer


def rows(file):
    with Path(file).open() as opened:
        return list(csv.DictReader(opened))


# ------------------------------------------------------------------------------------------- steps of every signature
@pytest.mark.parametrize(("module", "step"), [(Net, 3), (Skips, 3), (Fetches, 1)])
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # which Lightning allows
def test_the_origin_is_found_whatever_the_step_takes_and_returns(module, step, tmp_path):
    guard = NonFiniteGuard()
    with pytest.raises(NonFiniteError, match="the output of first"):
        train(tmp_path, guard, module=module(), loader=batches(bad=3))
    assert (guard.finding.step, guard.finding.kind, guard.finding.where) == (step, "activation", "first")


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter`")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")  # which Lightning allows
def test_an_iterator_is_given_back_as_it_was(tmp_path):
    module = Fetches()
    before = vars(module).get("training_step")  # surgery may have put one there
    train(tmp_path, NonFiniteGuard(), module=module)
    assert vars(module).get("training_step") is before
    other = Fetches()
    train(tmp_path, module=other)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="iterator"):
        train(tmp_path, ZoneMonitor(RELU1), module=Fetches())


def test_a_skipped_step_is_measured_as_nothing(tmp_path):
    train(tmp_path, ZoneMonitor(RELU1, every_n_steps=1), GradientDivergence(RELU1, 1), module=Skips())
    zones = {row["step"]: row for row in rows(tmp_path / "zones.csv")}
    assert zones["1"]["regular"] == "nan"
    assert zones["2"]["bifurcation"] == "1.0"
    measured = [row["step"] for row in rows(tmp_path / "divergence.csv") if not row["parameter"]]
    assert measured == ["0", "2", "3", "4", "5"]


def test_weights_that_diverged_lie_in_no_zone_and_what_cannot_be_measured_is_said(tmp_path):
    train(tmp_path, ZoneMonitor(RELU1, every_n_steps=1), loader=batches(bad=3))
    first, *_, last = rows(tmp_path / "zones.csv")
    assert first["bifurcation"] == "1.0"
    assert last["regular"] == last["bifurcation"] == last["difference"] == "nan"


class Mapped(Net):
    """Its ReLU runs under a transform."""

    def loss(self, batch):
        return self.last(torch.vmap(self.relu)(self.first(batch))).square().mean()


class Single(Net):
    """It makes a tensor of 32 bits on the way, which no layer of 64 bits takes."""

    def loss(self, batch):
        return self.last(self.relu(self.first(batch)) @ torch.eye(self.last.in_features)).square().mean()


@pytest.mark.parametrize(("module", "reason"), [(Mapped, r"torch\.vmap"), (Single, "dtype")])
def test_a_step_that_cannot_be_run_again_has_no_zone_and_trains_on(module, reason, tmp_path):
    weights = []
    for name in ("watched", "alone"):
        net = module()
        if name == "watched":
            with pytest.warns(UserWarning, match=f"measures no zone of such a step.*{reason}") as said:
                train(tmp_path / name, ZoneMonitor(RELU1, every_n_steps=1), TieMonitor(1), module=net)
            assert sum("measures no zone" in str(w.message) for w in said) == 1
        else:
            train(tmp_path / name, module=net)
        weights.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert torch.equal(*weights)
    assert {row["regular"] for row in rows(tmp_path / "watched" / "zones.csv")} == {"nan"}


def test_metrics_of_the_module_count_every_batch_once(tmp_path):
    watched, alone = Counts(), Counts()
    metric, total = watched.seen, watched.aside["list"][0]
    train(tmp_path, ZoneMonitor(RELU1, every_n_steps=1), module=watched)
    train(tmp_path, module=alone)
    assert watched.seen is metric
    assert watched.seen.compute() == alone.seen.compute() == 24
    assert watched.group.compute() == alone.group.compute() == {"mean": 1.0, "sum": 6.0}
    assert watched.seen.update_count == alone.seen.update_count == 6
    assert total.compute() == alone.aside["list"][0].compute() == 12


def test_a_metric_that_keeps_a_list_counts_nothing_in_a_step_that_runs_again():
    module = LightningModule()
    module.seen = CatMetric()
    module.seen.update(1.0)
    with silent(module):
        module.seen.update(2.0)
    assert len(module.seen.value) == 1


@pytest.mark.parametrize(("scale", "reported"), [(2.0, False), (1.0, False), (0.5, True)])
def test_the_scale_that_counts_is_the_scalers_own(scale, reported, tmp_path):
    """Whatever the accumulation: 2 over 4 batches is a scaler at work."""
    plugin = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))
    trainer = SimpleNamespace(precision_plugin=plugin, accumulate_grad_batches=4, world_size=1)
    module, guard = Net(), NonFiniteGuard("log")
    guard._look = lambda *_: pytest.fail("reported") if not reported else (_ for _ in ()).throw(NonFiniteError)
    for p in module.parameters():
        p.grad = torch.full_like(p, float("inf"))
    guard.on_before_backward(trainer, module, torch.tensor(1.0))
    with pytest.raises(NonFiniteError) if reported else nullcontext():
        guard.on_after_backward(trainer, module)
    assert guard.batches == reported


# --------------------------------------------------------------------------------------------------- two of one class
def test_two_divergences_measure_what_each_measures_alone(tmp_path):
    def one():
        return GradientDivergence(RELU1, every_n_steps=2)

    def other():
        return GradientDivergence({"half": Jacobians(relu=0.5)}, every_n_steps=3)

    def third():
        return GradientDivergence(RELU1, every_n_steps=1, method="subtract")

    (both := tmp_path / "both").mkdir()
    modules = [Net() for _ in range(4)]
    trainer = train(both, one(), other(), third(), module=modules[0])
    for i, callback in enumerate((one(), other(), third())):
        train(tmp_path / str(i), callback, module=modules[i + 1])
        assert rows(both / f"divergence{('', '-2', '-3')[i]}.csv") == rows(tmp_path / str(i) / "divergence.csv")
        assert (both / f"divergence{('', '-2', '-3')[i]}.png").exists()
    assert {"divergence/relu1/l2", "divergence-2/half/l2", "divergence-3/relu1/l2"} <= set(trainer.callback_metrics)
    assert len({c.state_key for c in (one(), other(), third())}) == 3
    for module in modules[1:]:
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), modules[0].parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # other callbacks, on purpose
def test_two_weight_divergences_keep_files_and_states_of_their_own(tmp_path):
    def two():
        return WeightDivergence("initial", every_n_steps=2), WeightDivergence("initial", every_n_steps=3)

    saving = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=6, save_top_k=-1)
    train(tmp_path / "whole", *two(), saving, enable_checkpointing=True, max_epochs=2)
    for name, steps in (("weights.csv", range(0, 13, 2)), ("weights-2.csv", range(0, 13, 3))):
        measured = [r["step"] for r in rows(tmp_path / "whole" / name) if not r["parameter"]]
        assert measured == [str(step) for step in steps]
    file = tmp_path / "saved" / "step=6.ckpt"
    train(tmp_path / "resumed", *two(), ckpt_path=file, max_epochs=2)
    for name in ("weights.csv", "weights-2.csv"):
        whole = [r for r in rows(tmp_path / "whole" / name) if int(r["step"]) >= 6]
        assert rows(tmp_path / "resumed" / name) == whole
    # Another interval from here on: the initial weights are the run's all the same.
    train(tmp_path / "changed", WeightDivergence("initial", every_n_steps=5), ckpt_path=file, max_epochs=2)
    assert rows(tmp_path / "changed" / "weights.csv")[-1] == rows(tmp_path / "whole" / "weights.csv")[-1]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # other callbacks, on purpose
def test_initial_weights_that_no_checkpoint_holds_are_not_made_up(tmp_path):
    saving = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=4)
    train(tmp_path, saving, enable_checkpointing=True)
    with pytest.raises(ValueError, match="step 4 from a checkpoint without initial weights"):
        train(tmp_path, WeightDivergence("initial"), ckpt_path=tmp_path / "saved" / "step=4.ckpt")


# ------------------------------------------------------------------------------------------------------ used twice
@pytest.mark.filterwarnings("ignore:step 2, batch 2. the first value that is not finite")  # the guard's own
def test_one_object_serves_two_trainings(tmp_path):
    callbacks = (
        GradientDivergence(RELU1, budget=1e-9),  # after its first measurement, none for a long time
        WeightDivergence(every_n_steps=1),
        ZoneMonitor(RELU1, every_n_steps=1),
        TieMonitor(every_n_steps=1),
    )
    guard = NonFiniteGuard("log")
    train(tmp_path / "bad", guard, loader=batches(bad=2))
    assert guard.batches
    for name in ("a", "b"):
        train(tmp_path / name, *callbacks, guard)
    assert (guard.finding, guard.batches) == (None, 0)
    for file in ("divergence.csv", "weights.csv", "zones.csv"):
        assert rows(tmp_path / "a" / file) == rows(tmp_path / "b" / file) != []


def test_trainings_in_one_folder_keep_each_others_rows(tmp_path):
    for batch_count in (6, 5, 4):
        train(tmp_path, GradientDivergence(RELU1, 1), WeightDivergence(every_n_steps=1), loader=batches(batch_count))
    for stem, extra in (("divergence", 0), ("weights", 1)):
        last = [rows(tmp_path / f"{stem}{which}.csv")[-1]["step"] for which in (".1", ".2", "")]
        assert last == [str(n - 1 + extra) for n in (6, 5, 4)]


def test_a_trainer_that_goes_on_keeps_its_rows_and_its_account(tmp_path):
    divergence = GradientDivergence(RELU1, 1)
    trainer = train(tmp_path, divergence)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, batches())
    assert [r["step"] for r in rows(tmp_path / "divergence.csv") if not r["parameter"]] == [str(i) for i in range(12)]


# -------------------------------------------------------------------------------------------------------- monitoring
@pytest.mark.parametrize(
    ("callback", "metric"),
    [
        (GradientDivergence(RELU1, 1), "divergence/relu1/relative"),
        (WeightDivergence(every_n_steps=1), "weights/l2"),
        (ZoneMonitor(RELU1, every_n_steps=1), "zones/relu1/bifurcation"),
        (TieMonitor(1), "ties/total"),
    ],
)
def test_what_callbacks_measure_can_be_monitored(callback, metric, tmp_path):
    saving = ModelCheckpoint(tmp_path / "saved", monitor=metric, mode="max", filename="best", every_n_epochs=1)
    stopping = EarlyStopping(metric, mode="min", patience=1, check_on_train_epoch_end=True)
    trainer = train(tmp_path, callback, saving, stopping, enable_checkpointing=True)
    assert (tmp_path / "saved" / "best.ckpt").exists()
    assert saving.best_model_score == trainer.callback_metrics[metric] == stopping.best_score
    assert trainer.callback_metrics[metric] > 0


# ------------------------------------------------------------------------------------------------------- spellings
@pytest.mark.parametrize("spelled", [{"c": {"relu": 1}}, {"c": "relu=1"}, ["c:relu=1"], {"c": Jacobians(relu=1.0)}])
def test_choices_are_written_in_one_way_everywhere(spelled):
    for callback in (GradientDivergence(spelled), ZoneMonitor(spelled, reference="jax")):
        assert callback.choices == {"c": Jacobians(relu=1.0)}
    assert callback.reference == Jacobians.preset("jax")


def test_presets_stand_under_their_own_name():
    assert GradientDivergence({"jax": "jax"}).choices == GradientDivergence(["jax"]).choices == named_choices(["jax"])
    assert named_choices(["mine:tensorflow"]) == {"mine": Jacobians.preset("tensorflow")}


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ({"c": {"max_pol": 1}}, "choice 'c': there is no field 'max_pol'; did you mean 'max_pool'"),
        ({"c": "jaxx"}, "choice 'c': preset 'jaxx' is not known; did you mean 'jax'"),
        ({"c": {"relu6": 1}}, "relu6 takes two numbers"),
        (["relu=1"], "write NAME:FIELD=VALUE"),
        (["c:relu=1", "c:relu=2"], "two choices have one name"),
        (["c:relu=1,relu=2"], "relu is given twice"),
        ({"c": 1}, "preset such as 'jax'; given 1"),
        ("c:relu=1", "a mapping of names to choices, or a list"),
        ({"c/d": "jax"}, "letters, digits"),
        ({}, "at least one choice"),
    ],
)
def test_what_is_no_choice_is_refused_in_words(spelled, said):
    with pytest.raises((ValueError, TypeError)) as error:
        GradientDivergence(spelled)
    assert said in str(error.value)


def test_a_choice_is_read_as_it_is_written():
    assert to_jacobians({"relu": 1, "clamp": [0, 1]}) == Jacobians(relu=1.0, clamp=(0.0, 1.0))
    assert to_jacobians("max_pool=10,relu6=[0,1],leaky_relu=null") == Jacobians(max_pool=10.0, relu6=(0.0, 1.0))


@pytest.mark.parametrize("steps", [0, -3, 1.5, True, "2"])
@pytest.mark.parametrize(
    "made", [lambda n: GradientDivergence(RELU1, n), lambda n: WeightDivergence(every_n_steps=n), TieMonitor]
)
def test_an_interval_is_a_number_of_steps(steps, made):
    with pytest.raises(ValueError, match="whole number of steps from 1 on"):
        made(steps)
