"""WeightDivergence, ZoneMonitor and NonFiniteGuard: what they find is right, and training does not notice them."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callbacks import (
    CHOICES,
    OPTIONS,
    PRECISIONS,
    Manual,
    Module,
    Net,
    Plain,
    compiled,
    data,
    equal,
    fp16,
    norms_by_hand,
    state_after,
    trainer,
    unpatched,
)
from torch import nn
from torch.utils.data import DataLoader

from nslightning import Jacobians, patch, runs
from nslightning.callbacks import GradientDivergence, NonFiniteError, NonFiniteGuard, WeightDivergence, ZoneMonitor
from nslightning.exact_csv import read_exactly
from nslightning.probes import ties
from nslightning.probes.zone import zone
from nslightning.surgery import selections

NORMS = ["l1", "l2", "linf", "relative", "cosine"]
ONE = {"relu1": Jacobians(relu=1.0)}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_bit_identical(precision, options, tmp_path):
    own = Jacobians(relu=0.5, max_pool="minimal")
    without = state_after(tmp_path, precision=precision, jacobians=own, **OPTIONS[options])
    watching = [GradientDivergence(CHOICES, 1), WeightDivergence(every_n_steps=1), NonFiniteGuard()]
    with_ = state_after(
        tmp_path, *watching, ZoneMonitor(ONE, own, 1), precision=precision, jacobians=own, **OPTIONS[options]
    )
    for absent in without:
        assert equal(without[absent], with_[absent]), absent
    assert set(read_exactly(tmp_path / "zones.csv")["bifurcation"]) == {1}
    assert (read_exactly(tmp_path / "weights.csv")["l1"][1:] > 0).any()
    assert not (tmp_path / "nonfinite.json").exists()


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (lambda: ZoneMonitor(ONE), unpatched, r"patch\(model, Jacobians\(\)\)"),
        (lambda: ZoneMonitor(ONE), compiled, "model.compile=false"),
        (lambda: ZoneMonitor(ONE), lambda: Manual(Plain), "manual"),
        (lambda: NonFiniteGuard(), lambda: Manual(Plain), "manual"),
    ],
)
def test_refusals(callback, module, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback()).fit(module(), data())


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="at least one choice"):
        ZoneMonitor({})
    with pytest.raises(ValueError, match="zones/<choice>/<zone>"):
        ZoneMonitor({"a/b": Jacobians()})
    for callback in (lambda n: ZoneMonitor(ONE, every_n_steps=n), lambda n: WeightDivergence(every_n_steps=n)):
        with pytest.raises(ValueError, match="given 0"):
            callback(0)
    with pytest.raises(ValueError, match="'raise', 'stop' or 'log'"):
        NonFiniteGuard("explode")
    with pytest.raises(FileNotFoundError, match=r"checkpoints/\*.ckpt"):
        WeightDivergence(str(tmp_path))


# ------------------------------------------------------------------------------------------------ WeightDivergence
def weights_of(state):
    return {f"net.{name}": tensor.double() for name, tensor in state.items()}


def check(rows, step, state, reference):
    recorded = rows[rows["step"] == step].set_index("parameter")
    for parameter, values in norms_by_hand(weights_of(state), weights_of(reference)).items():
        # The inner product of two vectors that are nearly the same says little about their angle.
        assert recorded.loc[parameter, NORMS].to_dict() == pytest.approx(values, rel=1e-7, abs=1e-9)


def read(file):
    return read_exactly(file, keep_default_na=False)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_distance_to_the_initial_weights(accumulate, tmp_path):
    module, file = Module(Plain), runs.MetricsFile(tmp_path / "run" / "001")
    run = trainer(tmp_path, WeightDivergence(every_n_steps=2), logger=file, accumulate_grad_batches=accumulate)
    run.fit(module, data())
    states = [*[state for state, _ in module.noted][::accumulate], module.net.state_dict()]
    rows = read(tmp_path / "run" / "001" / "weights.csv")
    steps = {1: [0, 2, 4, 6], 2: [0, 2, 3]}[accumulate]
    assert sorted(set(rows["step"])) == steps
    assert not rows.duplicated(["step", "parameter"]).any()
    for step in steps:
        check(rows, step, states[step], states[0])
    logged = read_exactly(tmp_path / "run" / "001" / "metrics.csv").dropna(subset="weights/l1").set_index("step")
    assert logged["weights/l1"].to_dict() == rows[rows["parameter"] == ""].set_index("step")["l1"][steps[:-1]].to_dict()


def test_distance_to_another_run_and_to_a_file(tmp_path):
    saving = ModelCheckpoint(tmp_path / "a" / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=2)
    one = Module(Plain)
    trainer(tmp_path, saving).fit(one, data())
    two = Module(Plain, Jacobians(relu=1.0, max_pool="minimal"))
    watching = WeightDivergence(str(tmp_path / "a"), every_n_steps=1)
    trainer(tmp_path / "b", watching).fit(two, data())
    rows = read(tmp_path / "b" / "weights.csv")
    assert sorted(set(rows["step"])) == [2, 4, 6]
    assert (rows[rows["parameter"] == ""]["l1"] > 0).all()
    for step in (2, 4):
        check(rows, step, two.noted[step][0], one.noted[step][0])
    check(rows, 6, two.net.state_dict(), one.net.state_dict())

    watching = WeightDivergence(str(tmp_path / "a" / "checkpoints" / "step=4.ckpt"), 3, per_layer=False)
    again = Module(Plain)
    trainer(tmp_path / "c", watching).fit(again, data())
    rows = read(tmp_path / "c" / "weights.csv")
    assert rows["step"].tolist() == [0, 3, 6]
    total = norms_by_hand(weights_of(again.noted[3][0]), weights_of(one.noted[4][0]))[""]
    assert rows.iloc[1][NORMS].to_dict() == pytest.approx(total, rel=1e-7, abs=1e-9)

    watching = WeightDivergence(str(tmp_path / "a" / "checkpoints" / "step=4.ckpt"))
    with pytest.raises(ValueError, match="the checkpoint of another network"):
        trainer(tmp_path / "d", watching).fit(Module(Net), data())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # the second run's, with the first one's rows
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_measures_from_where_it_began(tmp_path):
    def run(folder, ckpt=None):
        saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        fit = trainer(folder, WeightDivergence(every_n_steps=1), saving, max_epochs=2)
        fit.fit(Module(Plain), data(), ckpt_path=ckpt, weights_only=True)
        return (folder / "weights.csv").read_text()

    whole = run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "weights.csv").write_text(whole)
    assert run(tmp_path / "b", tmp_path / "a" / "step=4.ckpt") == whole


# ---------------------------------------------------------------------------------------------------- ZoneMonitor
def test_zones_are_those_of_the_weights_before_each_step(tmp_path):
    module, file = Module(Plain), runs.MetricsFile(tmp_path / "run" / "001")
    choices = {"relu1": Jacobians(relu=1.0), "native": Jacobians(), "beta": Jacobians(max_pool=3.0)}
    trainer(tmp_path, ZoneMonitor(choices, every_n_steps=2), logger=file).fit(module, data())
    rows = read(tmp_path / "run" / "001" / "zones.csv").set_index(["step", "choice"])
    assert rows.index.is_unique
    logged = read_exactly(tmp_path / "run" / "001" / "metrics.csv").set_index("step")
    for step in (0, 2, 4):
        state, (x, y) = before(module, step)
        net = Plain()
        net.load_state_dict(state)
        patch(net, Jacobians(), strict=False)
        for name, choice in choices.items():
            expected = zone(net, lambda out, y=y: F.cross_entropy(out, y), (x,), choice)
            row = rows.loc[(step, name)]
            assert row[["regular", "bifurcation", "compensation"]].tolist() == [
                float(expected.kind == kind) for kind in ("regular", "bifurcation", "compensation")
            ]
            assert row["observed"] == pytest.approx(expected.observed.l2, rel=1e-6)
            assert row["difference"] == pytest.approx(expected.difference, rel=1e-6)
            for key in ("regular", "bifurcation", "compensation", "observed", "difference"):
                assert logged.loc[step, f"zones/{name}/{key}"].dropna().tolist() == [row[key]]
    assert (rows.xs("native", level="choice")["regular"] == 1).all()
    assert (rows.xs("relu1", level="choice")["bifurcation"] == 1).all()


def test_zones_compare_with_the_reference_that_is_given(tmp_path):
    choices = {"relu1": Jacobians(relu=1.0), "native": Jacobians()}
    trainer(tmp_path, ZoneMonitor(choices, Jacobians(relu=1.0)), max_steps=1).fit(Module(Plain), data())
    rows = read(tmp_path / "zones.csv").set_index("choice")
    assert rows["regular"].to_dict() == {"relu1": 1, "native": 0}


@pytest.mark.parametrize("scale", [0.5, 1024.0])
def test_zones_are_of_the_loss_without_its_scale(scale, tmp_path):
    """Accumulation over two batches, and fp16's loss scale; both are powers of two, which lose no bit."""
    measured = []
    for options in ({}, {"accumulate_grad_batches": 2} if scale < 1 else {"plugins": fp16(scale)}):
        module = Module(Plain)
        if scale > 1 and not options:
            options = {"plugins": fp16(1.0)}
        folder = tmp_path / str(len(measured))
        trainer(folder, ZoneMonitor(ONE, every_n_steps=100), **options, max_steps=1).fit(module, data())
        measured.append(read(folder / "zones.csv"))
    assert (measured[0]["observed"] > 0).all()
    for norm in ("observed", "difference"):
        assert measured[1][norm].tolist() == pytest.approx(measured[0][norm].tolist(), rel=0 if scale < 1 else 1e-2)


def before(module, step):
    """Weights and batch of a step: the module notes them at the step and at each of its replays, some in float64."""
    distinct = []
    for state, batch in module.noted:
        single = state["conv1.weight"].dtype == torch.float32
        if single and not (distinct and equal(state, distinct[-1][0])):
            distinct.append((state, batch))
    return distinct[step]


# -------------------------------------------------------------------------------------------------- NonFiniteGuard
class Explode(nn.Module):
    """Infinite for inputs above 100."""

    def forward(self, x):
        return x / (x.detach() < 100).all()


class Roll(nn.Module):
    """Infinite for one draw in five."""

    def forward(self, x):
        return x / (torch.rand(()) > 0.2)


class Root(nn.Module):
    """The identity, whose derivative is infinity times 0 for a batch of numbers above 3."""

    def forward(self, x):
        return x + ((x - x.detach()).square().sqrt() if (x.detach() > 3).all() else 0)


class Chain(nn.Module):
    """A chain of named parts between two linear layers; the first is the identity, with a dead unit."""

    def __init__(self, middle):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.relu = nn.ReLU()
        self.middle = middle
        self.act = nn.ReLU()
        self.last = nn.Linear(4, 2)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(4))
            self.first.bias.zero_()

    def forward(self, x):
        return self.last(self.act(self.middle(self.relu(self.first(x)))))


def batches(special=None, at=3, n=6):
    torch.manual_seed(0)
    x = torch.rand(n, 8, 4) + 0.5
    x[:, :, 3] = 0  # a tie at every image
    if special is not None:
        x[at] = special
    y = torch.randint(0, 2, (n, 8))
    return DataLoader(list(zip(x.flatten(0, 1), y.flatten(), strict=True)), batch_size=8)


class Small(Module):
    def __init__(self, middle=None, jacobians=Jacobians(), lr=1e-3):  # noqa: B008 - frozen
        super().__init__(lambda: Chain(middle or nn.Identity()), jacobians, lr)


def fit(folder, guard, module, loader, *callbacks, **options):
    torch.manual_seed(11)
    run = trainer(folder, guard, *callbacks, **options)
    # Lightning warns of a module that validates without data; no batch of these is read.
    run.fit(module, loader, *([] if isinstance(loader, LightningDataModule) else [loader]))
    return run


def found_in(folder):
    return json.loads((Path(folder) / "nonfinite.json").read_text())


def test_finite_training_is_not_reported(tmp_path):
    guard = NonFiniteGuard()
    fit(tmp_path, guard, Small(), batches())
    assert guard.finding is None
    assert not (tmp_path / "nonfinite.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight(value, tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                pl_module.net.last.weight.data[0, 0] = value

    with pytest.raises(NonFiniteError, match=r"step 3, batch 3: .* is the weight net.last.weight$"):
        fit(tmp_path, NonFiniteGuard(), Small(), batches(), Break())
    assert found_in(tmp_path)["kind"] == "weight"


def test_a_batch(tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 3, batch 3: .* is the batch$"):
        fit(tmp_path, NonFiniteGuard(), Small(), batches(float("nan")))


def test_an_activation_and_the_ties_above_it(tmp_path):
    module = Small(Explode())
    with pytest.raises(NonFiniteError, match=r"is the output of net.middle; ties fed it: 8 at relu"):
        fit(tmp_path, NonFiniteGuard(), module, batches(torch.tensor([200.0, 1.0, 1.0, 0.0])))
    findings = found_in(tmp_path)
    assert (findings["kind"], findings["where"], findings["step"], findings["batch"]) == (
        "activation",
        "net.middle",
        3,
        3,
    )
    # A tie for each image at the dead unit; what the activation after the explosion met is not counted.
    assert findings["ties"] == {"relu": ties(module.net, torch.tensor([[200.0, 1.0, 1.0, 0.0]]))["relu"].tied * 8}


def test_a_function_between_modules_and_the_loss(tmp_path):
    class Functional(Chain):
        def forward(self, x):
            return self.last(Explode.forward(None, self.relu(self.first(x))))

    module = Module(lambda: Functional(nn.Identity()), lr=1e-3)
    with pytest.raises(NonFiniteError, match=r"a function that runs before net.last"):
        fit(tmp_path, NonFiniteGuard(), module, batches(200.0))

    class BadLoss(Small):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) / (batch[0].amax() < 100)

    with pytest.raises(NonFiniteError, match="is the loss"):
        fit(tmp_path, NonFiniteGuard(), BadLoss(), batches(200.0))


def test_the_same_random_numbers_are_drawn_again(tmp_path):
    guard = NonFiniteGuard("log")
    module = Small(Roll())
    with pytest.warns(UserWarning, match="the output of net.middle"):
        fit(tmp_path, guard, module, batches())
    torch.manual_seed(11)
    assert guard.finding.where == "net.middle"


def test_a_gradient_that_no_choice_made(tmp_path):
    """sqrt(x^2) at 0: infinity times 0."""
    with pytest.raises(NonFiniteError, match=r"a gradient, from the backward of net.middle"):
        fit(tmp_path, NonFiniteGuard(), Small(Root()), batches(5.0))
    assert found_in(tmp_path)["finite_under_reference"] is False


class Kinked(nn.Module):
    """A ReLU of its own, whose result is infinite for inputs above 100."""

    def forward(self, x):
        return Explode.forward(None, F.relu(x))


def test_the_ties_of_the_module_that_overflows_count(tmp_path):
    """Whole images of 200 tie nowhere but at the dead unit: once in the ReLU, once in the module itself."""
    with pytest.raises(NonFiniteError, match=r"is the output of net.middle"):
        fit(tmp_path, NonFiniteGuard(), Small(Kinked()), batches(torch.tensor([200.0, 1.0, 1.0, 0.0])))
    assert found_in(tmp_path)["ties"] == {"relu": 8, "middle:relu": 8}


class Two(nn.Module):
    """Adds two parameters; the gradient of the bad one is infinity times 0, that of the input is finite."""

    def __init__(self, bad):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.bad = bad

    def forward(self, x):
        p = getattr(self, self.bad)
        return x + self.a + self.b + (p - p.detach()).square().sqrt()


@pytest.mark.parametrize("bad", ["a", "b"])
def test_of_two_modules_with_a_bad_gradient_the_one_that_ran_backward_first_is_named(bad, tmp_path):
    """Each hands on three gradients, of which one is bad, whichever comes last."""
    middle = nn.Sequential(Two(bad), Two(bad))
    with pytest.raises(NonFiniteError, match=r"a gradient, from the backward of net.middle.1;"):
        fit(tmp_path, NonFiniteGuard(), Small(middle), batches())


def test_training_goes_on_after_a_finding_as_without_the_guard(tmp_path):
    """One bias has the gradient NaN once, which is set to 0. The replay draws dropout and ties, and counts a batch."""

    class Once(Small):
        def training_step(self, batch, batch_idx):
            p = self.net.last.bias.sum()
            return super().training_step(batch, batch_idx) + ((p - p.detach()).square().sqrt() if batch_idx == 2 else 0)

        def on_before_optimizer_step(self, optimizer):
            self.net.last.bias.grad.nan_to_num_(0.0)

    ends = []
    for callback in (NonFiniteGuard("log"), Callback()):
        middle = nn.Sequential(nn.Dropout(0.5), nn.MaxPool1d(2), nn.ConstantPad1d(1, 0), nn.BatchNorm1d(4))
        module = Once(middle, Jacobians(relu=1.0, max_pool="random"), lr=0.1)  # the dead unit ties with a dropped one
        with (
            pytest.warns(UserWarning, match="is a gradient") if isinstance(callback, NonFiniteGuard) else nullcontext()
        ):
            fit(tmp_path, callback, module, batches())
        (pool,) = (s for s in selections(module).values() if s.jacobians.max_pool == "random")
        ends.append((module.state_dict(), pool.generator(torch.device("cpu")).get_state()))
    assert equal(*ends)
    assert not equal(ends[0][1], torch.Generator().manual_seed(pool.seed).get_state())  # ties drew from it


def test_a_gradient_that_the_choice_at_a_tie_made(tmp_path):
    module = Small(nn.Identity(), Jacobians(relu=3e38))
    module.net.unused = nn.Linear(2, 2)
    with torch.no_grad():
        module.net.last.weight.mul_(1e3)
    with pytest.raises(NonFiniteError, match=r"the backward of net.act; ties fed it: 8 at act; under .* is finite"):
        fit(tmp_path, NonFiniteGuard(), module, batches())
    findings = found_in(tmp_path)
    assert (findings["kind"], findings["where"], findings["step"]) == ("gradient", "net.act", 0)
    assert findings["ties"] == {"act": 8}
    assert findings["finite_under_reference"] is True


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")  # it goes on
@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # without what saved it
def test_actions_and_state(tmp_path):
    file = runs.MetricsFile(tmp_path / "run" / "001")
    guard, saving = NonFiniteGuard("log"), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    with pytest.warns(UserWarning, match="the output of net.middle"):
        fit(tmp_path, guard, Small(Explode()), batches(200.0), saving, logger=file)
    assert guard.batches == 3  # the weights are lost from then on
    rows = read_exactly(tmp_path / "run" / "001" / "metrics.csv")
    assert rows["nonfinite/batches"].dropna().tolist() == [1, 2, 3]
    assert guard.finding.step == 3
    again = NonFiniteGuard("log")
    trainer(tmp_path, again).fit(
        Small(Explode()), batches(), batches(), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True
    )
    assert (again.batches, again.finding) == (3, guard.finding)

    with pytest.warns(UserWarning, match="the output of net.middle"):
        run = fit(tmp_path, NonFiniteGuard("stop"), Small(Explode()), batches(200.0))
    assert run.global_step == 4


def test_a_scaler_at_work_is_not_reported(tmp_path):
    guard, scales = NonFiniteGuard(), []

    class Scales(Callback):
        def on_train_batch_end(self, trainer, *_):
            scales.append(trainer.precision_plugin.scaler.get_scale())

    fit(tmp_path, guard, Module(Plain), data(), Scales(), plugins=fp16(2.0**24))
    assert min(scales) < 2.0**24  # it did overflow
    assert guard.finding is None
    with pytest.raises(NonFiniteError, match="the batch"):
        fit(tmp_path, NonFiniteGuard(), Small(), batches(float("inf")), plugins=fp16(2.0**8))


@pytest.mark.parametrize(("scale", "looked_at"), [(2.0, False), (0.5, True)])
def test_gradients_are_looked_at_where_no_scaler_would_shrink_further(scale, looked_at, tmp_path):
    """Accumulation divides the loss besides; that is no reason to look: at a scale of 2 the scaler skips the step."""
    module = Small()
    module.net.last.weight.register_hook(lambda g: g * float("inf"))
    guard = NonFiniteGuard("log")
    options = {"plugins": fp16(scale), "accumulate_grad_batches": 4, "max_steps": 1}
    with pytest.warns(UserWarning, match="not finite") if looked_at else nullcontext():
        fit(tmp_path, guard, module, batches(), **options)
    assert (guard.batches > 0) == looked_at


def test_compiled_code_is_run_eagerly_for_the_replay(tmp_path):
    module = Small(Explode())
    module.net.compile(backend="aot_eager")
    with pytest.raises(NonFiniteError, match=r"the output of net.middle"):
        fit(tmp_path, NonFiniteGuard(), module, batches(200.0))
    copied = copy.deepcopy(Small())
    copied.net.compile(backend="aot_eager")
    fit(tmp_path, NonFiniteGuard(), copied, batches())
