"""ImageClassifier: what it logs, trains with, stores and loads, in every precision."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nslightning import Jacobians, PatchWarning, configs
from nslightning.cli import main
from nslightning.exact_csv import read_exactly
from nslightning.models import ImageClassifier

QUICK = [
    "fit",
    "--config=configs/quickstart.yaml",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=null",
    "--data.batch_size=8",
    "--data.eval_batch_size=8",
]
RUN = Path("runs/quickstart/001")

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # nothing is validated


def loader(count: int, batch_size: int, shape=(1, 28, 28), classes: int = 10, seed: int = 0) -> DataLoader:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=draws)
    y = torch.randint(classes, (count,), generator=draws)
    return DataLoader(TensorDataset(x, y), batch_size)


def trainer(**options) -> Trainer:
    defaults = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0}
    return Trainer(**defaults | quiet | options)


class Seen(Callback):
    """Keeps the metrics logged at every step, and the model as it was before it."""

    def __init__(self):
        self.steps, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_logged_training_values(smoothing):
    torch.manual_seed(0)
    model, seen = ImageClassifier("paper/lenet5", label_smoothing=smoothing), Seen()
    batches = loader(20, 8)
    trainer(callbacks=[seen]).fit(model, batches)
    twin = ImageClassifier("paper/lenet5")
    assert len(seen.steps) == 3
    for (x, y), step, weights in zip(batches, seen.steps, seen.weights, strict=True):
        twin.load_state_dict(weights)
        log_p = twin(x).double().log_softmax(1)
        right = -log_p[torch.arange(len(y)), y]
        expected = ((1 - smoothing) * right + smoothing * -log_p.mean(1)).mean().item()
        assert step["train/loss"] == pytest.approx(expected, rel=1e-5)
        assert step["train/acc1"] == pytest.approx((log_p.argmax(1) == y).double().mean().item())
        assert set(step) == {"train/loss", "train/acc1"}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_logged_evaluation_weighs_every_image_the_same(stage):
    """Batches of 8, 8 and 3."""
    torch.manual_seed(1)
    model = ImageClassifier("paper/lenet5", label_smoothing=0.3)
    data = loader(19, 8, seed=1)
    evaluate = trainer().validate if stage == "val" else trainer().test
    (metrics,) = evaluate(model, data, verbose=False)
    x, y = data.dataset.tensors
    with torch.no_grad():
        logits = model.eval()(x).double()
    ranks = (logits > logits[torch.arange(19), y][:, None]).sum(1)
    assert set(metrics) == {f"{stage}/loss", f"{stage}/acc1", f"{stage}/acc5"}
    assert metrics[f"{stage}/acc1"] == pytest.approx((ranks < 1).double().mean().item())
    assert metrics[f"{stage}/acc5"] == pytest.approx((ranks < 5).double().mean().item())
    assert 0 < metrics[f"{stage}/acc5"] < 1
    loss = (logits.logsumexp(1) - logits[torch.arange(19), y]).mean().item()  # without smoothing
    assert metrics[f"{stage}/loss"] == pytest.approx(loss, rel=1e-5)


def test_no_acc5_where_all_classes_are_among_five():
    model = ImageClassifier("paper/lenet5", num_classes=5)
    (metrics,) = trainer().validate(model, loader(4, 4, classes=5), verbose=False)
    assert set(metrics) == {"val/loss", "val/acc1"}


def test_predictions_are_probabilities_of_images_alone():
    model = ImageClassifier("paper/lenet5").eval()
    x = torch.randn(7, 1, 28, 28)
    predicted = trainer().predict(model, DataLoader(x, 4))
    assert [p.shape for p in predicted] == [(4, 10), (3, 10)]
    probabilities = torch.cat(predicted)
    assert torch.allclose(probabilities.sum(1), torch.ones(7))
    with torch.no_grad():
        assert torch.allclose(probabilities, model(x).softmax(1), atol=1e-6)


def test_gray_images_are_repeated_for_torchvision():
    model = ImageClassifier("torchvision/resnet18", image_shape=(1, 32, 32)).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), model.backbone(torch.cat([x, x, x], 1)))


def test_channels_last():
    torch.manual_seed(0)
    last = ImageClassifier("torchvision/resnet18", 10, (3, 32, 32), channels_last=True).eval()
    first = ImageClassifier("torchvision/resnet18", 10, (3, 32, 32)).eval()
    first.load_state_dict(last.state_dict())
    seen = []
    last.backbone.layer1[0].conv1.register_forward_hook(lambda m, i, o: seen.extend([i[0], m.weight, o]))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(last(x), first(x), atol=1e-4)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)


@pytest.mark.slow
def test_compiled_backbone_trains_as_the_eager_one():
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = ImageClassifier("paper/lenet5", jacobians=Jacobians(relu=1.0, max_pool="minimal"), compile=compiled)
        trainer().fit(model, loader(16, 8))
        assert (model.backbone._compiled_call_impl is not None) == compiled
        models.append(model)
    eager, compiled = (dict(m.named_parameters()) for m in models)
    assert eager.keys() == compiled.keys()
    for name, p in eager.items():
        torch.testing.assert_close(compiled[name], p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("field", ["relu", "max_pool", "max", "maximum"])
@pytest.mark.parametrize("where", ["everywhere", "at one site"])
def test_random_choice_is_not_compiled(field, where):
    schedule = {field: "random"}
    options = {"jacobians": Jacobians(**schedule)} if where == "everywhere" else {"sites": [{"name": "*", **schedule}]}
    with pytest.raises(ValueError, match=f'{field}="random" .* compile=False'):
        ImageClassifier(compile=True, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_smoothing": 1.5}, "between 0 and 1"),
        ({"backbone": "paper/lenet"}, "did you mean"),
        ({"backbone": "torchvision/alexnet"}, r"does not take images of shape \(1, 28, 28\)"),
        ({"backbone_options": {"batchnorm": True}}, "batch_norm"),
    ],
)
def test_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ImageClassifier(**options)


# --- optimizers and schedulers


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--model.optimizer=AdamW", "--model.optimizer.lr=0.001"], "AdamW"),
        (["--model.optimizer=torch.optim.RMSprop"], "RMSprop"),
        (["--model.optimizer=timm.optim.Lamb", "--model.optimizer.lr=0.001"], "Lamb"),
        (["--model.optimizer=nslightning.optim.INNAprop", "--model.optimizer.lr=0.001"], "INNAprop"),
        (["--model.optimizer=INNA"], "INNA"),
    ],
)
def test_any_optimizer(args, name, monkeypatch):
    made = []
    original = ImageClassifier.configure_optimizers
    monkeypatch.setattr(ImageClassifier, "configure_optimizers", lambda self: made.append(original(self)) or made[-1])
    args = [*args, "--model.lr_scheduler=null", "--trainer.callbacks=null"]
    assert main([*QUICK, *args]) == 0
    assert type(made[0]).__name__ == name
    (file,) = (RUN / "checkpoints").glob("*.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(original(loaded)).__name__ == name


def rates(scheduler, **options) -> list[float]:
    """The learning rate of each of four epochs of two steps."""
    optimizer = partial(torch.optim.SGD, lr=1e-6)
    model, seen = ImageClassifier("paper/lenet5", optimizer=optimizer, lr_scheduler=scheduler), []

    class Rate(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(max_epochs=4, callbacks=[Rate()], **options).fit(model, loader(8, 4), loader(8, 4))
    assert seen[::2] == seen[1::2]
    return seen[::2]


def test_scheduler_steps_after_each_epoch():
    assert rates(partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)) == [1e-6, 1e-6, 5e-7, 5e-7]


@pytest.mark.parametrize("monitor", [None, "val/acc1"])
def test_plateau(monitor):
    """torch's own class watches val/loss; Lightning's what it is told. A threshold that nothing passes."""
    from lightning.pytorch.cli import ReduceLROnPlateau

    options = {"factor": 0.5, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
    if monitor is None:
        scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, **options)
    else:
        scheduler = partial(ReduceLROnPlateau, monitor=monitor, mode="max", **options)
    assert rates(scheduler) == [1e-6, 1e-6, 5e-7, 2.5e-7]


def test_plateau_from_the_command_line():
    scheduler = "--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"
    assert main([*QUICK, scheduler, "--trainer.callbacks=null"]) == 0


# --- checkpoints


def save(model: ImageClassifier, file: str = "model.ckpt") -> str:
    run = trainer()
    run.fit(model, loader(8, 4))
    run.save_checkpoint(file)
    return file


@pytest.mark.parametrize("choice", [Jacobians(), Jacobians(relu=0.5, relu6=(1.0, 0.5), max_pool="minimal")])
def test_checkpoint_of_the_api(choice):
    model = ImageClassifier("paper/lenet5", jacobians=choice, backbone_options={"batch_norm": True})
    file = save(model)
    content = torch.load(file, weights_only=True)
    assert content["hyper_parameters"]["jacobians"] == choice.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatchWarning)
        loaded = ImageClassifier.load_from_checkpoint(file)
    assert loaded.jacobians == choice
    assert loaded.patch_report.fingerprint == model.patch_report.fingerprint
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    save(loaded, "again.ckpt")
    assert ImageClassifier.load_from_checkpoint("again.ckpt").jacobians == choice


def test_load_under_another_choice_says_so():
    file = save(ImageClassifier("paper/lenet5"))
    with pytest.warns(PatchWarning, match=r"made under max_pool=0.0, and this run has max_pool='minimal'"):
        loaded = ImageClassifier.load_from_checkpoint(file, jacobians=Jacobians(max_pool="minimal"))
    assert loaded.jacobians == Jacobians(max_pool="minimal")


def test_callable_optimizer_is_given_again():
    file = save(ImageClassifier("paper/lenet5", optimizer=partial(torch.optim.AdamW, lr=1e-3)))
    assert "optimizer" not in torch.load(file, weights_only=True)["hyper_parameters"]
    loaded = ImageClassifier.load_from_checkpoint(file)
    with pytest.warns(PatchWarning, match=r"trained with AdamW, and this model has SGD.*optimizer="):
        loaded.configure_optimizers()
    loaded = ImageClassifier.load_from_checkpoint(file, optimizer=torch.optim.AdamW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(loaded.configure_optimizers()) is torch.optim.AdamW


def test_checkpoint_of_the_command_line():
    args = ["--model.jacobians.relu=0.5", "--model.jacobians.max_pool=10", "--trainer.callbacks=null"]
    assert main([*QUICK, *args]) == 0
    (file,) = (RUN / "checkpoints").glob("*.ckpt")
    content = torch.load(file, weights_only=True)
    assert content["nslightning"]["jacobians"]["relu"] == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatchWarning)
        loaded = ImageClassifier.load_from_checkpoint(file)
    assert loaded.jacobians == Jacobians(relu=0.5, max_pool=10.0)
    assert all(torch.equal(v, content["state_dict"][k]) for k, v in loaded.state_dict().items())
    made = loaded.configure_optimizers()
    assert made["optimizer"].param_groups[0]["weight_decay"] == 0.0005
    configured = yaml.safe_load(configs.path("quickstart").read_text())["model"]["lr_scheduler"]
    assert made["lr_scheduler"]["scheduler"].T_max == configured["init_args"]["T_max"]


def test_checkpoint_without_a_choice():
    file = save(ImageClassifier("paper/lenet5"))
    content = torch.load(file, weights_only=True)
    del content["nslightning"]
    torch.save(content, file)
    with pytest.warns(PatchWarning, match="does not say"):
        ImageClassifier.load_from_checkpoint(file)


# --- precision

DTYPES = {
    # precision: parameters, inside the network, loss
    "16-true": (torch.float16, torch.float16, torch.float32),
    "bf16-true": (torch.bfloat16, torch.bfloat16, torch.float32),
    "16-mixed": (torch.float32, torch.float16, torch.float32),
    "bf16-mixed": (torch.float32, torch.bfloat16, torch.float32),
    "32-true": (torch.float32, torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64, torch.float64),
}


@pytest.mark.parametrize("precision", DTYPES)
def test_precision(precision, monkeypatch):
    """Two steps with divergence and ties measured; dtypes as hooks see them."""
    inside, losses, scalers, parameters = set(), [], [], set()
    cross_entropy = F.cross_entropy

    def watched(logits, *args, **options):
        if logits.requires_grad:
            losses.append((logits.dtype, cross_entropy(logits, *args, **options)))
        return cross_entropy(logits, *args, **options)

    def on_fit_start(self):
        for module in self.backbone.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(lambda m, i, o: inside.add(o.dtype))

    def on_train_end(self):
        scalers.append(getattr(self.trainer.precision_plugin, "scaler", None))
        parameters.update(p.dtype for p in self.parameters())

    monkeypatch.setattr(F, "cross_entropy", watched)
    monkeypatch.setattr(ImageClassifier, "on_fit_start", on_fit_start, raising=False)
    monkeypatch.setattr(ImageClassifier, "on_train_end", on_train_end, raising=False)
    assert main([*QUICK, f"--trainer.precision={precision}"]) == 0

    of_parameters, of_activations, of_loss = DTYPES[precision]
    assert parameters == {of_parameters}
    assert inside == {of_activations}
    assert [dtype for dtype, _ in losses] == [of_loss, of_loss]
    assert all(loss.dtype == of_loss and loss.isfinite() for _, loss in losses)
    assert (scalers[0] is not None) == (precision == "16-mixed")
    if precision == "16-mixed":
        assert scalers[0].is_enabled()
        assert scalers[0].get_scale() > 1
    divergence = read_exactly(RUN / "divergence.csv", keep_default_na=False, na_values=["nan"])
    assert divergence["l2"].notna().all()
    metrics = read_exactly(RUN / "metrics.csv")
    assert metrics["ties/total"].dropna().between(0, 1).all()
    assert metrics["train/loss"].notna().sum() == 2
