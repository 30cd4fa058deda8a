"""Methods of a patched model that run outside the patch are named where they call a part of the model."""

import threading
import types
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from nslightning import Jacobians, PatchWarning, patch


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return F.relu(self.fc(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.fc, self.act = Block(), nn.Linear(3, 3), nn.LeakyReLU()

    def forward(self, x):
        return F.relu(self.fc(self.block(x)))

    def acted(self, x):
        return F.relu(self.act(x))

    def later(self, x):
        self.thread = threading.Thread(target=self.slowly, args=(x,))
        self.thread.start()

    def slowly(self, x):
        return self.forward(x)


def added(self, x):
    return F.relu(self.block(x))


def on_the_class(net, x):
    Net.forward(net, x)


def taken_before(net, x):
    net.taken(x)


def added_after(net, x):
    Net.added = added
    try:
        net.added(x)
    finally:
        del Net.added


def module_alone(net, x):
    Net.acted(net, x)


@pytest.mark.parametrize(
    ("run", "name"),
    [(on_the_class, "forward"), (taken_before, "forward"), (added_after, "added"), (module_alone, "acted")],
)
def test_a_method_outside_the_patch_is_named_once(run, name):
    net, x = Net(), torch.zeros(2, 3)
    before = types.SimpleNamespace(taken=net.forward)
    patch(net, Jacobians(relu=1.0))
    object.__setattr__(net, "kept", before)
    if run is taken_before:
        run = lambda _, x: before.taken(x)  # noqa: E731
    with pytest.warns(PatchWarning, match=rf"^{name} of the patched Net runs outside the patch"):
        run(net, x)


def test_a_look_keeps_no_variable_alive():
    class Watched:
        pass

    net, watched = Net(), Watched()
    patch(net, Jacobians(relu=1.0))
    reference = weakref.ref(watched)
    net(torch.zeros(2, 3))
    del watched
    assert reference() is None


def trained(net, x):
    for _ in range(3):
        net(x).sum().backward()


def of_parts(net, x):
    F.relu(net.act(net.block(x))).sum().backward()


def function_of_the_model(net, x):
    def train(model, x):
        model.block(x).sum().backward()

    train(net, x)


def in_checkpoints(net, x):
    class Steps(Net):
        def training_step(self, x):
            checkpoint(self.block, x.requires_grad_(), use_reentrant=True).sum().backward()
            checkpoint(self.block, x, use_reentrant=False).sum().backward()

    steps = Steps()
    patch(steps, Jacobians(relu=1.0), example=x)
    steps.training_step(x)


def containers(net, x):
    model = nn.Sequential(Block(), nn.ReLU())
    patch(model, Jacobians(relu=1.0))
    nn.Sequential.forward(model, x)


def lightning(net, x):
    class Trained(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def setup(self, stage):
            patch(self, Jacobians(relu=1.0), example=x)

        def forward(self, x):
            return F.relu(self.net(x))

        def training_step(self, batch):
            return self(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Trained(), DataLoader(torch.zeros(4, 3)))  # fmt: skip


def a_method_of_modules(net, x):
    class Modes(Net):
        def train(self, mode=True):
            self.block(x)
            return super().train(mode)

    model = Modes()
    patch(model, Jacobians(relu=1.0))
    model.eval()


def without_gradients(net, x):
    with torch.no_grad():
        net(x)
    net.eval()
    net.acted(x)
    with torch.no_grad():
        for _ in range(3):
            net(x)
            net.acted(x)


@pytest.mark.parametrize(
    "run",
    [
        trained,
        of_parts,
        function_of_the_model,
        in_checkpoints,
        containers,
        lightning,
        a_method_of_modules,
        without_gradients,
    ],
)
def test_ordinary_use_is_not_named(run):
    net, x = Net(), torch.zeros(2, 3)
    patch(net, Jacobians(relu=1.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*runs outside the patch")
        run(net, x)
