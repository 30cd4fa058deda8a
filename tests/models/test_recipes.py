"""What today's recipes are made of: parameter groups, schedules by step, mixed batches, timm's optimizers."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from fake_data import write_image_folder
from lightning.pytorch import Callback, Trainer
from timm.optim import param_groups_layer_decay
from torch import nn

from nslightning.cli import main
from nslightning.data import ImageFolder
from nslightning.exact_csv import read_exactly
from nslightning.models import ImageClassifier, Mixing
from nslightning.optim import TimmSchedule, parameter_groups


def named(network, groups):
    names = {id(p): name for name, p in network.named_parameters()}
    return [
        {**{k: v for k, v in g.items() if k != "params"}, "names": [names[id(p)] for p in g["params"]]} for g in groups
    ]


def lenet(**options):
    return ImageClassifier("paper/lenet5", backbone_options={"batch_norm": True}, **options)


# -- parameter groups --------------------------------------------------------------------------------------------------


def test_weight_decay_stays_off_norms_and_biases():
    network = lenet().backbone
    decayed, rest = parameter_groups(network, [{"match": "vectors", "weight_decay": 0.0}])
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in rest["params"])
    assert rest["weight_decay"] == 0
    assert "weight_decay" not in decayed
    together = [*decayed["params"], *rest["params"]]
    assert {id(p) for p in together} == {id(p) for p in network.parameters()}
    assert len(together) == len(list(network.parameters()))


def test_later_rules_win_and_learning_rates_multiply():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    rules = [
        {"match": "*", "weight_decay": 0.1, "lr_scale": 0.5},
        {"match": ["1.*", "0.bias"], "weight_decay": 0.0, "lr_scale": 0.1},
    ]
    groups = named(network, parameter_groups(network, rules))
    assert groups == [
        {"weight_decay": 0.1, "lr_scale": 0.5, "names": ["0.weight"]},
        {"weight_decay": 0.0, "lr_scale": 0.05, "names": ["0.bias", "1.weight", "1.bias"]},
    ]


def test_frozen_parameters_are_in_no_group():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[0].requires_grad_(False)
    (group,) = named(network, parameter_groups(network))
    assert group["names"] == ["1.weight", "1.bias"]


def test_layer_decay_is_timms():
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    expected = {}
    for group in param_groups_layer_decay(network, layer_decay=0.7):
        expected |= {id(p): group["lr_scale"] for p in group["params"]}
    got = {id(p): g.get("lr_scale", 1.0) for g in parameter_groups(network, layer_decay=0.7) for p in g["params"]}
    assert got == expected
    assert len(set(got.values())) == 14  # 12 blocks, what lies before them, the head


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        (nn.Linear(1, 1), {"rules": [{"weight_decay": 0}]}, "says which parameters it is for by match"),
        (nn.Linear(1, 1), {"rules": [{"match": "wieght", "weight_decay": 0}]}, "did you mean 'weight'"),
        (nn.Linear(1, 1), {"rules": [{"match": "vector", "weight_decay": 0}]}, "did you mean 'vectors'"),
        (nn.Linear(1, 1), {"layer_decay": 0.5}, "Linear does not say it"),
        (nn.Linear(1, 1), {"layer_decay": 1.5}, "from 0 to 1"),
    ],
)
def test_a_mistaken_rule_is_named(network, arguments, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(network, **arguments)


def test_a_model_refuses_a_mistaken_rule_at_once():
    with pytest.raises(ValueError, match="no trained parameter matches 'clasifier"):
        lenet(parameter_rules=[{"match": "clasifier.*", "lr_scale": 2}])


def test_scaled_learning_rates_hold_under_a_scheduler():
    model = lenet(
        parameter_rules=[{"match": "classifier.*", "lr_scale": 10}],
        optimizer=lambda groups: torch.optim.SGD(groups, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )
    made = model.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.1])
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.005, 0.05])


# -- schedules ---------------------------------------------------------------------------------------------------------


def interval(scheduler, **options):
    model = lenet(lr_scheduler=scheduler, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options)
    return model.configure_optimizers()["lr_scheduler"]["interval"]


def test_a_scheduler_made_for_steps_is_stepped_by_step():
    schedulers = torch.optim.lr_scheduler
    assert interval(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=4)) == "step"
    assert interval(lambda o: schedulers.CyclicLR(o, 0.01, 0.1)) == "step"
    assert interval(lambda o: schedulers.StepLR(o, 1)) == "epoch"
    assert interval(lambda o: schedulers.StepLR(o, 1), lr_interval="step") == "step"
    assert interval(lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=4), lr_interval="epoch") == "epoch"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cosine", {"warmup_epochs": 3, "warmup_lr": 0.01, "min_lr": 0.001, "warmup_prefix": True}),
        ("tanh", {"warmup_epochs": 2}),
        ("step", {"decay_epochs": 3, "decay_rate": 0.5}),
        ("multistep", {"decay_milestones": [2, 5], "decay_rate": 0.1}),
        ("poly", {"noise": [0.3, 0.6]}),
    ],
)
def test_timms_schedules_give_timms_rates_and_resume(name, options):
    from timm.scheduler import create_scheduler_v2

    def optimizer():
        return torch.optim.SGD(
            [{"params": [nn.Parameter(torch.zeros(1))]}, {"params": [nn.Parameter(torch.zeros(1))], "lr": 0.2}], lr=1.0
        )

    theirs, ours = optimizer(), optimizer()
    reference, _ = create_scheduler_v2(theirs, name, num_epochs=8, **options)
    schedule = TimmSchedule(ours, name, 8, **options)
    expected, rates, state = [], [], None
    for step in range(10):
        reference.step(step)
        expected.append([g["lr"] for g in theirs.param_groups])
        rates.append([g["lr"] for g in ours.param_groups])
        if step == 4:
            state = json.loads(json.dumps(schedule.state_dict())), ours.state_dict()["param_groups"]
        ours.step()
        schedule.step()
    assert rates == expected
    again = optimizer()
    resumed = TimmSchedule(again, name, 8, **options)
    resumed.load_state_dict(state[0])
    again.load_state_dict({"state": {}, "param_groups": state[1]})
    tail = []
    for _ in range(4, 10):
        tail.append([g["lr"] for g in again.param_groups])
        again.step()
        resumed.step()
    assert tail == expected[4:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("cosin", 4), "did you mean 'cosine'"), (("plateau", 4), "There are cosine")],
)
def test_a_schedule_that_is_not_there_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmSchedule(torch.optim.SGD([torch.zeros(1)], lr=0.1), *arguments)


def test_a_mistaken_option_of_a_schedule_is_named():
    with pytest.raises(ValueError, match="warmup_epoch"):
        TimmSchedule(torch.optim.SGD([torch.zeros(1)], lr=0.1), "cosine", 4, warmup_epoch=1)


# -- mixing ------------------------------------------------------------------------------------------------------------


def batch(count=6, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 8, 8, generator=g), torch.arange(count) % classes


def test_mixup_mixes_images_and_labels_by_one_share():
    images, labels = batch()
    torch.manual_seed(3)
    mixed, shares = Mixing(mixup=1.0)(images, labels, 4)
    partner_images, partner = images.roll(1, 0), nn.functional.one_hot(labels.roll(1, 0), 4).double()
    own = nn.functional.one_hot(labels, 4).double()
    # From the labels the share, and by it the images.
    share = ((shares[0].double() - partner[0]) * (own[0] - partner[0])).sum() / (own[0] - partner[0]).square().sum()
    assert 0 < share < 1
    assert torch.allclose(shares.double(), share * own + (1 - share) * partner, atol=1e-6)
    assert torch.allclose(mixed.double(), share * images.double() + (1 - share) * partner_images.double(), atol=1e-6)


def test_cutmix_pastes_a_rectangle_and_counts_its_area():
    images, labels = batch()
    torch.manual_seed(1)
    mixed, shares = Mixing(cutmix=1.0)(images, labels, 4)
    pasted = (mixed[0] != images[0]).all(0)
    rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
    assert 0 < pasted.sum() < 64
    assert pasted.sum() == len(rows) * len(columns)
    assert torch.equal(mixed[0][:, pasted], images[-1][:, pasted])
    assert shares[0, labels[0]] == pytest.approx(1 - pasted.sum().item() / 64)


def test_a_share_of_batches_is_mixed_and_a_share_of_those_cut():
    images, labels = batch()
    kinds = {"plain": 0, "cut": 0, "mixed": 0}
    torch.manual_seed(0)
    for _ in range(400):
        mixed, shares = Mixing(mixup=1.0, cutmix=1.0, probability=0.75, switch=1 / 3)(images, labels, 4)
        if shares.ndim == 1:
            kinds["plain"] += 1
            assert torch.equal(mixed, images)
        else:
            # A pasted image has entries of two images alone.
            of_two = ((mixed == images) | (mixed == images.roll(1, 0))).all()
            kinds["cut" if of_two else "mixed"] += 1
    assert kinds["plain"] == pytest.approx(100, abs=30)
    assert kinds["cut"] == pytest.approx(100, abs=30)
    assert kinds["mixed"] == pytest.approx(200, abs=35)


def test_the_loss_of_a_mixed_batch_is_the_mean_over_both_labels(monkeypatch):
    model = ImageClassifier("paper/lenet5", num_classes=4, image_shape=(3, 16, 16), mixing=Mixing(mixup=1.0))
    images, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 4
    monkeypatch.setattr(model, "log", lambda *a, **k: None)
    monkeypatch.setattr(model, "log_step", lambda *a: None, raising=False)
    torch.manual_seed(5)
    loss = model.training_step([images, labels], 0)
    torch.manual_seed(5)
    mixed, shares = Mixing(mixup=1.0)(images, labels, 4)
    expected = -(shares * model(mixed).log_softmax(1)).sum(1).mean()
    assert torch.allclose(loss, expected, atol=1e-6)


@pytest.mark.parametrize(
    "setting", [{}, {"mixup": -1.0}, {"mixup": 1, "probability": 2.0}, {"cutmix": 1, "switch": -0.1}]
)
def test_a_mistaken_mixing_is_named(setting):
    with pytest.raises(ValueError, match="mixing"):
        Mixing(**setting)


# -- from the command line ---------------------------------------------------------------------------------------------

RECIPE = """
seed_everything: 1
model:
  backbone: timm/resnet10t
  jacobians: {relu: 0.5}
  optimizer:
    class_path: timm.optim.Lamb
    init_args: {lr: 0.01, weight_decay: 0.05}
  lr_scheduler:
    class_path: nslightning.optim.TimmSchedule
    init_args: {name: cosine, total: 8, dict_kwargs: {}}
  lr_interval: step
  parameter_rules:
    - {match: vectors, weight_decay: 0}
  layer_decay: 0.8
  mixing: {mixup: 0.2, cutmix: 1}
  label_smoothing: 0.1
data:
  class_path: ImageFolder
  init_args:
    root: images
    image_size: 32
    batch_size: 5
    workers: 0
    augmentation: {auto_augment: rand-m9-mstd0.5-inc1, erasing: 0.25, repeats: 2, sizes: [[0, 24], [1, 32]]}
trainer:
  max_epochs: 2
  log_every_n_steps: 1
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: csv}}
  enable_progress_bar: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
      init_args: {logging_interval: step}
    - class_path: lightning.pytorch.callbacks.EMAWeightAveraging
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 1, save_top_k: -1}
    - class_path: nslightning.callbacks.GradientDivergence
      init_args: {every_n_steps: 2, choices: {relu1: {relu: 1}}}
"""


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # in another folder
def test_a_recipe_of_all_parts_trains_stops_and_goes_on_to_the_same_bits(monkeypatch):
    write_image_folder(Path("images"))
    Path("recipe.yaml").write_text(RECIPE.replace(", dict_kwargs: {}", ""))
    assert main(["fit", "--config", "recipe.yaml"]) == 0
    whole = Path("runs/recipe/001")
    metrics = read_exactly(whole / "metrics.csv")
    rates = metrics.filter(like="lr-").dropna()
    assert len(rates) == 8
    assert (rates.iloc[0] > rates.iloc[-1]).all()  # stepped by step: a cosine down to the end
    assert rates.iloc[0].nunique() > 3  # layers have their own rates
    assert metrics["train/loss"].notna().sum() == 8
    divergence = read_exactly(whole / "divergence.csv")
    assert (divergence["l2"] > 0).any()
    # From the middle of the second epoch, in another folder.
    checkpoints = sorted((whole / "checkpoints").glob("*step=6*.ckpt"))
    assert main(["fit", "--config", "recipe.yaml", "--name", "again", f"--ckpt_path={checkpoints[0]}"]) == 0
    ends = [
        torch.load(next(Path(f"runs/{name}/001/checkpoints").glob("*step=8*.ckpt")), weights_only=True)["state_dict"]
        for name in ("recipe", "again")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize(("interval", "length"), [("step", 8), ("epoch", 2)])
def test_a_cosine_fits_the_training(interval, length, tmp_path):
    from nslightning.optim import WarmupCosine

    write_image_folder(tmp_path)
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = ImageClassifier(
        "paper/lenet5",
        num_classes=2,
        image_shape=(3, 32, 32),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-3),
        lr_scheduler=lambda o: WarmupCosine(o, warmup=0.25 if interval == "step" else 0),
        lr_interval=interval,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, callbacks=[Rates()], default_root_dir=tmp_path, **quiet)
    trainer.fit(model, ImageFolder(str(tmp_path), image_size=32, batch_size=5, workers=0))
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    expected = [0.0, 0.5, *cosine] if interval == "step" else [1.0] * 4 + [0.5] * 4
    assert rates == pytest.approx([1e-3 * share for share in expected])
    assert trainer.lr_scheduler_configs[0].scheduler.total == length


def test_a_cosine_without_an_end_is_refused(tmp_path):
    from nslightning.optim import WarmupCosine

    write_image_folder(tmp_path)
    model = ImageClassifier(
        "paper/lenet5", num_classes=2, image_shape=(3, 32, 32), lr_scheduler=lambda o: WarmupCosine(o)
    )
    trainer = Trainer(max_epochs=-1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"give --trainer\.max_epochs"):
        trainer.fit(model, ImageFolder(str(tmp_path), image_size=32, batch_size=5, workers=0))
