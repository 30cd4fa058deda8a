"""NonsmoothPatch: anybody's LightningModule under a choice, by one callback."""

import json
import warnings

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nslightning import Jacobians, patch
from nslightning.callbacks import (
    GradientDivergence,
    NonFiniteGuard,
    NonsmoothPatch,
    StepSeed,
    TieMonitor,
    WeightDivergence,
    ZoneMonitor,
)
from nslightning.models import ImageClassifier
from nslightning.surgery import PatchWarning, UnreachedError, selections

X = torch.arange(32.0).reshape(16, 2) - 8  # whole numbers: sums are exact, so ties are sure


class Own(L.LightningModule):
    """Somebody's module, which knows nothing of this package. Its ReLU is a module, a call and a call in a step."""

    def __init__(self, built_in="init"):
        super().__init__()
        self.built_in = built_in
        self.scale = nn.Parameter(torch.ones(()))
        if built_in == "init":
            self.build()

    def build(self):
        self.net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        with torch.no_grad():
            self.net[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, -1.0]]))

    def setup(self, stage):
        if self.built_in == "setup" and not hasattr(self, "net"):
            self.build()

    def configure_model(self):
        if self.built_in == "configure_model" and not hasattr(self, "net"):
            self.build()

    def forward(self, x):
        return F.relu(self.net(x) * self.scale)

    def training_step(self, batch):  # one argument: Lightning allows it
        return F.relu(self(batch[0]).sum(1) * self.scale).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Numbered(Own):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch)


class Validated(Own):
    def validation_step(self, batch, batch_idx):
        self.log("val", self(batch[0]).sum())


def trainer(folder, *callbacks, **options):
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | options
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def batches():
    return DataLoader(TensorDataset(X), batch_size=4)


def weights_after(folder, *callbacks, module=None, **options):
    module = module or Own()
    trainer(folder, *callbacks, **options).fit(module, batches())
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def by_hand(choice):
    """Gradient descent with ReLU written out, one derivative at 0 everywhere."""

    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * torch.where(x == 0, torch.full_like(x, choice), (x > 0).to(x.dtype))

    module = Own()
    optimizer = module.configure_optimizers()
    for (x,) in batches():
        optimizer.zero_grad()
        hidden = Relu.apply(Relu.apply(module.net[0](x)) * module.scale)
        Relu.apply(hidden.sum(1) * module.scale).sum().backward()
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_module_calls_and_step_calls_take_the_choice(tmp_path, alpha):
    got = weights_after(tmp_path, NonsmoothPatch(Jacobians(relu=alpha)))
    assert same(got, by_hand(alpha))


def test_the_choices_of_that_test_differ():
    assert not same(by_hand(0.0), by_hand(1.0))


def test_the_reference_choice_trains_as_without_the_callback(tmp_path):
    assert same(weights_after(tmp_path, NonsmoothPatch()), weights_after(tmp_path))


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_networks_built_in_hooks_are_reached(tmp_path, where):
    callback, module = NonsmoothPatch(Jacobians(relu=1.0)), Own(where)
    got = weights_after(tmp_path, callback, module=module)
    assert same(got, by_hand(1.0))
    assert [(s.name, s.how) for s in callback.report.sites] == [
        ("net.1", "module"),
        ("", "functional"),
    ]
    assert callback.report.sites[1].calls == 2  # in forward and in the step


def test_a_random_choice_is_drawn_from_the_callback_s_seed(tmp_path):
    class Seen(L.Callback):
        def on_train_start(self, trainer, pl_module):
            self.seeds = [selection.seed for selection in selections(pl_module).values()]

    seen = Seen()
    weights_after(tmp_path, NonsmoothPatch({"relu": "random"}, sites=[{"stage": "net", "relu": 1.0}], seed=7), seen)
    assert seen.seeds == [7, 7]


def test_rules_decide_per_site(tmp_path):
    callback = NonsmoothPatch(Jacobians(relu=0.0), sites=[{"stage": "net", "relu": 1.0}])
    weights_after(tmp_path, callback)
    assert {s.name: s.choice for s in callback.report.sites} == {"net.1": 1.0, "": 0.0}


def test_only_and_skip_limit_it(tmp_path):
    callback = NonsmoothPatch(Jacobians(relu=1.0), only="net.*")
    weights_after(tmp_path, callback)
    assert [s.name for s in callback.report.reached] == ["net.1"]


def test_the_module_is_what_it_was_afterwards_and_fits_again(tmp_path):
    callback, module = NonsmoothPatch(Jacobians(relu=1.0)), Own()
    before = (type(module), repr(module))
    first = weights_after(tmp_path, callback, module=module)
    assert not selections(module)
    assert (type(module), repr(module)) == before
    plain = Own()
    weights_after(tmp_path, module=plain)
    assert set(module.__dict__) == set(plain.__dict__)
    again = Own()
    again.load_state_dict(first)
    weights_after(tmp_path, callback, module=module)
    weights_after(tmp_path, callback, module=again)
    assert same(dict(module.named_parameters()), dict(again.named_parameters()))


def test_an_exception_gives_the_module_back(tmp_path):
    class Fails(Own):
        def training_step(self, batch):
            raise RuntimeError("of the user's")

    module = Fails()
    with pytest.raises(RuntimeError, match="of the user's"):
        trainer(tmp_path, NonsmoothPatch(Jacobians(relu=1.0))).fit(module, batches())
    assert not selections(module)
    assert type(module) is Fails


def test_a_failing_hook_gives_the_hook_back(tmp_path):
    class Fails(Own):
        def setup(self, stage):
            raise RuntimeError("of the user's")

    module = Fails()
    with pytest.raises(RuntimeError, match="of the user's"):
        trainer(tmp_path, NonsmoothPatch()).fit(module, batches())
    assert "setup" not in module.__dict__


def test_steps_that_are_not_written_stay_unwritten(tmp_path, capsys):
    """Lightning validates where validation_step is overridden, and patching must not look like it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*validation_step.*")
        weights_after(tmp_path, NonsmoothPatch())
    fitted = trainer(tmp_path, NonsmoothPatch())
    fitted.fit(Validated(), batches(), batches())
    assert fitted.callback_metrics["val"] > 0


def test_measuring_callbacks_work_beside_it_in_any_order(tmp_path):
    one = {"relu1": Jacobians(relu=1.0)}
    measuring = [
        GradientDivergence(one, every_n_steps=1),
        TieMonitor(every_n_steps=1),
        ZoneMonitor(one, every_n_steps=2),
        WeightDivergence(every_n_steps=2),
        NonFiniteGuard(),
        StepSeed(0),
    ]
    plain = weights_after(tmp_path / "plain", module=Numbered())
    for order in (lambda c: [*measuring, c], lambda c: [c, *measuring]):
        folder = tmp_path / str(order(None).index(None))
        folder.mkdir()
        assert same(weights_after(folder, *order(NonsmoothPatch()), module=Numbered()), plain)
        rows = [line.split(",") for line in (folder / "divergence.csv").read_text().splitlines()]
        assert max(float(row[rows[0].index("l2")]) for row in rows[1:]) > 0
        assert "bifurcation" in (folder / "zones.csv").read_text()


def test_records_are_written_as_for_our_own_modules(tmp_path, capsys):
    callback = NonsmoothPatch(Jacobians(relu=1.0))
    L.seed_everything(7, verbose=False)
    weights_after(tmp_path, callback, max_epochs=1)
    report = json.loads((tmp_path / "patch_report.json").read_text())
    assert report["fingerprint"] == callback.report.fingerprint
    assert {(s["name"], s["how"]) for s in report["sites"]} == {("net.1", "module"), ("", "functional")}
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["seed"] == 7
    assert record["patch"]["jacobians"]["relu"] == 1.0
    assert record["versions"]["torch"] == torch.__version__
    assert (record["ended"], record["ended_at_step"]) == ("finished", 4)


@pytest.mark.parametrize(("error", "end"), [(RuntimeError("broken"), "failed"), (SystemExit(143), "stopped")])
def test_the_record_says_how_a_run_ended(tmp_path, error, end):
    class Broken(Own):
        def training_step(self, batch):
            if self.global_step == 2:
                raise error
            return super().training_step(batch)

    module = Broken()
    with pytest.raises(type(error)):
        trainer(tmp_path, NonsmoothPatch()).fit(module, batches())
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["ended"], record["ended_at_step"]) == (end, 2)
    assert not selections(module)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
def test_a_checkpoint_names_the_choice_and_another_one_is_refused(tmp_path):
    def fit(choice, ckpt_path=None, max_epochs=1, **options):
        run = trainer(tmp_path, NonsmoothPatch(choice, **options), max_epochs=max_epochs, enable_checkpointing=True)
        run.fit(Own(), batches(), ckpt_path=ckpt_path)
        run.save_checkpoint(tmp_path / "now.ckpt")
        return run

    made = fit(Jacobians(relu=1.0))
    file = tmp_path / "made.ckpt"
    made.save_checkpoint(file)
    note = torch.load(file, weights_only=True)["nslightning"]
    assert note["jacobians"]["relu"] == 1.0
    assert note["optimizer"] == "SGD"
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatchWarning)
        fit(Jacobians(relu=1.0), file, 2, on_mismatch="refuse")
    differs = r"made under relu=1.0, and this run has relu=0.5"
    with pytest.warns(PatchWarning, match=differs):
        fit(Jacobians(relu=0.5), file, 2)
    with pytest.raises(ValueError, match=differs):
        fit(Jacobians(relu=0.5), file, 2, on_mismatch="refuse")
    with pytest.raises(ValueError, match="made under sites="):
        fit(Jacobians(relu=1.0), file, 2, sites=[{"stage": "net", "relu": 0.5}], on_mismatch="refuse")


def test_what_cannot_be_reached_is_refused_or_named(tmp_path):
    class Ranked(Own):
        def training_step(self, batch):
            return self(batch[0]).topk(1).values.sum()

    with pytest.raises(UnreachedError, match="topk"):
        weights_after(tmp_path, NonsmoothPatch(Jacobians(relu=1.0)), module=Ranked())
    callback = NonsmoothPatch(Jacobians(relu=1.0), strict=False)
    weights_after(tmp_path, callback, module=Ranked())
    assert [s.operation for s in callback.report.unreached] == ["topk"]


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # nothing is validated
def test_misuse_is_refused_with_the_way_out(tmp_path):
    patched = Own()
    patch(patched.net, Jacobians())
    with pytest.raises(ValueError, match=r"patched already\. Leave NonsmoothPatch out"):
        trainer(tmp_path, NonsmoothPatch()).fit(patched, batches())
    with pytest.raises(ValueError, match=r"patched already\. Leave NonsmoothPatch out"):
        trainer(tmp_path, NonsmoothPatch()).fit(ImageClassifier(), batches())
    with pytest.raises(TypeError, match="compiled already"):
        trainer(tmp_path, NonsmoothPatch()).fit(torch.compile(Own(), backend="eager"), batches())
    twice = Own()
    with pytest.raises(ValueError, match="twice"):
        trainer(tmp_path, NonsmoothPatch(), NonsmoothPatch(only="net.*")).fit(twice, batches())
    assert not selections(twice)
    with pytest.raises(ValueError, match="on_mismatch is 'warn' or 'refuse'"):
        NonsmoothPatch(on_mismatch="ask")
    with pytest.raises(ValueError, match="is for all sites"):
        NonsmoothPatch(sites=[{"relu": 1.0}])


def test_evaluation_is_patched_and_given_back(tmp_path):
    callback, module = NonsmoothPatch(Jacobians(relu=1.0)), Validated()
    trainer(tmp_path, callback).validate(module, batches(), verbose=False)
    assert callback.report.reached
    assert not selections(module)
