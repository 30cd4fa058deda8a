"""Images on the device that trains: the bits of a loader on the CPU, an order that resumes, no transfer in a step."""

import pytest
import torch
from device_steps import CUDA, META, Device, HostWork
from lightning.pytorch import Callback, Trainer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from nslightning.callbacks import LossWatch, StepSeed
from nslightning.data import Synthetic
from nslightning.data.base import Loader, TrainLoader
from nslightning.data.images import Normalisation, TensorImages
from nslightning.data.sampler import EvalSampler, TrainSampler
from nslightning.models import ImageClassifier


def images(count=70, seed=3, augmented=True):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 6), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, 10, (count,), generator=g)
    return TensorImages(pixels, labels, (0.49, 0.48, 0.45), (0.2, 0.19, 0.21), 2 * augmented, augmented, seed)


def whole(batch):
    return batch


@pytest.mark.parametrize("place", [(0, 1), (1, 3)])
@pytest.mark.parametrize("train", [True, False])
def test_batches_are_bit_for_bit_those_of_a_plain_loader(place, train):
    data = images(augmented=train)
    sampler = TrainSampler(data, 8, 5, *place) if train else EvalSampler(data, *place)
    ours = (TrainLoader if train else Loader)(data, batch_size=8, sampler=sampler, collate_fn=whole)
    plain = DataLoader(images(augmented=train), batch_size=8, sampler=sampler, collate_fn=whole)
    for epoch in (0, 1, 4):
        sampler.set_epoch(epoch)
        pairs = list(zip(ours, plain, strict=True))
        assert len(pairs) == len(ours)
        for (x, y), (x0, y0) in pairs:
            assert torch.equal(x, x0)
            assert torch.equal(y, y0)
            assert (x.dtype, x.device) == (torch.float32, torch.device("cpu"))


def test_bytes_are_divided_and_not_multiplied_by_a_reciprocal():
    """CUDA multiplies where it is to divide by a number; what is divided by a tensor is divided."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    exact = pixels.double() / 255
    values = Normalisation([0.0], [1.0])(pixels)
    assert torch.equal(values, exact.float())
    assert not torch.equal(pixels.float() * (1 / torch.tensor(255.0)), exact.float())
    with FakeTensorMode(), HostWork() as work:
        made = Normalisation([0.1], [0.2], CUDA)
        work.met.clear()
        divisors = [made.white, made.mean, made.std]
        assert all(t.device == CUDA for t in divisors)
        assert made(torch.empty(1, 1, 2, 2, dtype=torch.uint8, device=CUDA)).device == CUDA
        assert work.met == []


def test_an_epoch_on_a_device_transfers_its_order_and_nothing_else():
    with FakeTensorMode(allow_non_fake_inputs=True), HostWork() as work:
        data = images().to(CUDA)
        sampler = TrainSampler(data, 8, 5)
        loader = iter(TrainLoader(data, batch_size=8, sampler=sampler, collate_fn=whole))
        x, _ = next(loader)
        assert x.device == CUDA
        work.met.clear()
        assert len(list(loader)) == 8
        assert work.met == []
        assert work.calls > 0


class Steps(Callback):
    """Has the host's work of each step but the first, which sets up."""

    reads_step_metrics = False

    def __init__(self, work):
        self.work, self.found = work, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert batch[0].device == META
        self.found.append(self.work.met[:])
        self.work.met.clear()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("backbone", ["paper/lenet5", "paper/vgg11"])
@pytest.mark.filterwarnings(
    "ignore:Total length of `(TrainLoader|CombinedLoader)` across ranks is zero"
)  # on a device without values
@pytest.mark.filterwarnings("ignore:the loss was not finite")
@pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported")
def test_a_step_of_fit_on_a_device_waits_for_nothing_and_transfers_nothing(tmp_path, backbone, precision):
    shape = (1, 28, 28) if backbone == "paper/lenet5" else (3, 32, 32)
    with HostWork() as work:
        module = ImageClassifier(backbone, image_shape=shape)
        data = Synthetic(shape, images=60, eval_images=8, batch_size=8)
        steps = Steps(work)
        trainer = Trainer(
            strategy=Device(), precision=precision, max_epochs=2, limit_val_batches=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=[StepSeed(0), LossWatch(), steps],
        )  # fmt: skip
        trainer.fit(module, data)
    assert len(steps.found) == 16
    assert all(p.device == META for p in module.parameters())
    inner = [met for i, met in enumerate(steps.found) if i % 8 not in (0, 7)]  # an epoch's first takes the order
    assert inner == [[]] * len(inner)
