"""Steps from a captured graph: the same training, and nothing watched is replayed.

There is no GPU here. In place of ``torch.cuda.make_graphed_callables`` stands what keeps its contract on a CPU: it runs
the module a few times, then copies inputs, outputs and gradients to and from memory that never moves.
"""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, TensorDataset

from nslightning import Jacobians
from nslightning.callbacks import GradientDivergence, NonFiniteGuard, StepSeed, TieMonitor, ZoneMonitor
from nslightning.models import ImageClassifier, captured
from nslightning.models.fused import FUSED, fused, takes_fused

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")  # nothing is validated

CHOICES = {"relu1": Jacobians(relu=1.0), "minimal": Jacobians(max_pool="minimal")}


def on_the_host(module, samples, allow_unused_input=False):
    """What ``torch.cuda.make_graphed_callables`` does, without graphs."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    stock = module.forward
    for _ in range(3):
        (out,), form = tree_flatten(stock(*samples))
        grads = torch.autograd.grad(out, parameters, torch.randn_like(out), allow_unused=allow_unused_input)
    static_out = torch.empty_like(out)
    static_grads = [None if grad is None else torch.empty_like(grad) for grad in grads]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            for kept, tensor in zip(samples, tensors, strict=False):
                kept.copy_(tensor)
            with torch.enable_grad():
                (ctx.out,), _ = tree_flatten(stock(*samples))
            static_out.copy_(ctx.out)
            return static_out.detach()

        @staticmethod
        def backward(ctx, g):
            grads = torch.autograd.grad(ctx.out, parameters, g, allow_unused=allow_unused_input)
            for kept, grad in zip(static_grads, grads, strict=True):
                if kept is not None:
                    kept.copy_(grad)
            return (*(None for _ in samples), *(None if kept is None else kept.detach() for kept in static_grads))

    module.forward = lambda *inputs: tree_unflatten([Replay.apply(*inputs, *parameters)], form)
    return module


@pytest.fixture
def host_graphs(monkeypatch):
    """Graphs that are captured on a CPU; the networks that were captured."""
    made = []

    class Noted(captured.CapturedNetwork):
        def __init__(self, network):
            super().__init__(network)
            made.append(self)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", on_the_host)
    monkeypatch.setattr("nslightning.models.patched.refuse_capture", lambda *_, **__: None)
    monkeypatch.setattr("nslightning.models.patched.CapturedNetwork", Noted)
    return made


def batches(n=60):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (n, 3, 32, 32), generator=g).float()  # in which much ties
    return DataLoader(TensorDataset(x, torch.randint(10, (n,), generator=g)), batch_size=8)


def fit(folder, cuda_graph, *callbacks, **options):
    torch.manual_seed(0)
    module = ImageClassifier(
        "paper/vgg11", image_shape=(3, 32, 32), cuda_graph=cuda_graph, backbone_options={"batch_norm": True},
        jacobians=Jacobians(max_pool=0.5),
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[StepSeed(0), *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, batches(), batches(10))
    return module, trainer


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}])
def test_a_captured_training_is_the_eager_one_bit_for_bit(tmp_path, host_graphs, options):
    eager, _ = fit(tmp_path / "a", False, **options)
    module, _ = fit(tmp_path / "b", True, **options)
    assert same(module.state_dict(), eager.state_dict())  # buffers of batch normalisation too
    (network,) = host_graphs
    assert network.replayed == 7  # the eighth batch is smaller
    assert module._captured is None  # nothing is kept when the training is over
    assert module.state_dict().keys() == eager.state_dict().keys()


def test_what_is_watched_runs_eagerly_and_finds_what_it_finds_without(tmp_path, host_graphs):
    watching = [
        lambda: [GradientDivergence(CHOICES, 3), TieMonitor(4)],
        lambda: [ZoneMonitor(CHOICES, every_n_steps=4), NonFiniteGuard()],
    ]
    for watch in watching:
        eager, a = fit(tmp_path / "a", False, *watch())
        module, b = fit(tmp_path / "b", True, *watch())
        assert same(module.state_dict(), eager.state_dict())
        metrics = {k: float(v) for k, v in a.callback_metrics.items() if not k.endswith(("seconds", "share"))}
        assert {k: float(b.callback_metrics[k]) for k in metrics} == metrics
        assert len(metrics) > 5
    assert [network.replayed for network in host_graphs] == [3, 7]  # without steps 0, 3, 4, 6 and the smaller batch


def test_the_choice_may_change_between_replays(host_graphs):
    from nslightning import patch, using

    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3))
    patch(network, Jacobians())
    run = captured.CapturedNetwork(network)
    x = torch.zeros(2, 3, 4, 4)
    with torch.no_grad():
        network[0].bias.zero_()

    def gradient():
        network.zero_grad()
        run(x).sum().backward()
        return network[0].bias.grad.clone()

    native = gradient()
    with using(network, Jacobians(relu=1.0)):
        other = gradient()
    assert run.replayed == 2
    assert not torch.equal(native, other)
    assert torch.equal(native, gradient())


def test_frozen_parts_and_unused_parameters_train_as_in_eager_steps(host_graphs):
    """A part that is kept in evaluation stays there, and a parameter that nothing depends on has no gradient."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.frozen, self.idle = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)

        def forward(self, x):
            return self.frozen(self.layer(x))

    network = Network()
    network.frozen.eval()
    run = captured.CapturedNetwork(network)
    x = torch.randn(4, 3) + 2
    want = network(x).detach()
    run(x).sum().backward()
    assert run.replayed == 1
    assert [part.training for part in (network, network.layer, network.frozen)] == [True, True, False]
    assert torch.equal(run(x), want)
    assert not network.frozen.running_mean.any()
    assert network.layer.weight.grad is not None
    assert network.idle.weight.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"cuda_graph=True captures steps on a CUDA device, and this training is on cpu: give --model.cuda_graph"),
        ({"device": "cuda", "compiled": True}, "compile=True and cuda_graph=True exclude each other"),
        ({"device": "cuda", "processes": 2}, "one process, and 2 train together.*--trainer.devices=1"),
        ({"device": "cuda", "accumulates": 3}, "accumulate_grad_batches=3 adds them up"),
    ],
)
def test_what_cannot_be_captured_is_refused(options, message):
    plain = {"processes": 1, "accumulates": 1, "compiled": False}
    with pytest.raises(ValueError, match=message):
        captured.refuse_capture(torch.device(options.pop("device", "cpu")), **plain | options)


def test_a_training_on_a_cpu_and_a_random_choice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="this training is on cpu"):
        fit(tmp_path, True)
    with pytest.raises(ValueError, match='max_pool="random" is drawn inside the backward, which cannot be captured'):
        ImageClassifier(jacobians=Jacobians(max_pool="random"), cuda_graph=True)


def test_twins_may_be_captured(host_graphs, tmp_path):
    from nslightning.models import Twins

    losses = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        twins = Twins({"native": Jacobians(), "beta10": Jacobians(max_pool=10)}, backbone="paper/lenet5",
                      image_shape=(3, 28, 28), cuda_graph=cuda_graph)  # fmt: skip
        g = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.rand(20, 3, 28, 28, generator=g), torch.randint(10, (20,), generator=g))
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(twins, DataLoader(data, batch_size=8))
        losses.append(twins.state_dict())
    assert same(*losses)
    assert [network.replayed for network in host_graphs] == [2, 2, 2]


def test_a_language_model_may_be_captured(host_graphs, tmp_path):
    from nslightning.models import LanguageModel

    tokens = torch.randint(17, (20, 9), generator=torch.Generator().manual_seed(0))
    weights = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        model = LanguageModel(
            "mini", vocab_size=17, block_size=8, activation="relu", jacobians=Jacobians(relu=1.0),
            config={"n_layer": 1, "n_head": 2, "n_embd": 8}, cuda_graph=cuda_graph,
        )  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_size=8))
        weights.append(model.state_dict())
    assert same(*weights)
    (network,) = host_graphs
    assert network.replayed == 2  # the third batch is smaller


# ------------------------------------------------------------------------------------------------- fused optimizers
def test_pytorch_s_optimizers_are_made_again_with_their_fused_kernel(monkeypatch):
    monkeypatch.setattr("nslightning.models.fused.takes_fused", lambda parameters: bool(list(parameters)))
    layer, options = nn.Linear(3, 2), {"lr": 0.1, "weight_decay": 0.01}
    for kind in FUSED:
        optimizer = kind([{"params": [layer.weight], "lr": 0.5}, {"params": [layer.bias]}], **options)
        made = fused(optimizer)
        assert type(made) is kind
        assert [g["fused"] for g in made.param_groups] == [True, True]
        assert [g["lr"] for g in made.param_groups] == [0.5, 0.1]
        plain = [{k: v for k, v in g.items() if k != "fused"} for g in optimizer.param_groups]
        assert [{k: v for k, v in g.items() if k != "fused"} for g in made.param_groups] == plain
        assert made.param_groups[0]["params"][0] is layer.weight
        chosen = kind(layer.parameters(), foreach=True)
        assert fused(chosen) is chosen
    other = torch.optim.RMSprop(layer.parameters())
    assert fused(other) is other


def test_optimizers_on_a_cpu_stay_what_they_are():
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    assert fused(optimizer) is optimizer
    assert not takes_fused(layer.parameters())


def test_scaled_gradients_that_are_clipped_are_not_left_to_a_fused_kernel(tmp_path):
    module = ImageClassifier("paper/lenet5")
    assert not module._reads_gradients_before_step()
    for options, reads in (({}, False), ({"gradient_clip_val": 1.0}, True)):
        from lightning.pytorch.plugins.precision import MixedPrecision

        trainer = Trainer(
            accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu")], logger=False, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_checkpointing=False, **options,
        )  # fmt: skip
        trainer.strategy.connect(module)
        module.trainer = trainer
        assert module._reads_gradients_before_step() is reads
