"""What the data modules serve: pixels, order, splits, the record; on fake files and on real ones."""

import gzip
import hashlib
import os
import random
from collections import Counter
from importlib.resources import files
from itertools import chain
from pathlib import Path

import fake_data
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from PIL import Image, ImageOps
from torch.utils.data import DistributedSampler
from torchvision import transforms

import nslightning.data as data
from nslightning.data.sampler import EvalSampler, TrainSampler, even_batch_size

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SMALL = [
    (data.MNIST, "mnist", 10, (1, 28, 28)),
    (data.FashionMNIST, "fashion_mnist", 10, (1, 28, 28)),
    (data.CIFAR10, "cifar10", 10, (3, 32, 32)),
    (data.CIFAR100, "cifar100", 100, (3, 32, 32)),
    (data.SVHN, "svhn", 10, (3, 32, 32)),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    fake_data.write_all(folder)
    return folder


@pytest.fixture
def data_dir(root, monkeypatch):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(root))
    return root


def real(*parts):
    """A file of the real data, or a skip that says what is not there."""
    folder = os.environ.get("NSLIGHTNING_DATA_DIR")
    if not folder:
        pytest.skip("NSLIGHTNING_DATA_DIR is not set")
    if not Path(folder, *parts).exists():
        pytest.skip(f"no {'/'.join(parts)} in NSLIGHTNING_DATA_DIR")
    return Path(folder)


def fitted(module):
    module.prepare_data()
    module.setup("fit")
    return module


def seen(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# ------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(("cls", "name", "classes", "shape"), SMALL)
def test_attributes_batches_and_record(cls, name, classes, shape, data_dir):
    module = cls(verify=False, batch_size=16, eval_batch_size=10)
    assert isinstance(module, data.ImageDataModule)
    assert (module.name, module.num_classes, module.image_shape) == (name, classes, shape)
    fitted(module)
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (16, *shape)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    count = {"cifar100": 200}.get(name, 80)
    record = module.provenance
    assert record["counts"] == {"train": count * 9 // 10, "val": count // 10}
    assert record["dataset"] == name
    assert record["verified"] is False
    assert "repacked" in record["variant"]
    assert record["folder"].startswith(str(data_dir))
    assert record["validation"] == "0.1 of the training images, held out"
    assert len(seen(module.test_dataloader())[1]) == 40


def test_image_folder_and_imagenet(data_dir):
    folder = data.ImageFolder(str(data_dir / "imagenet"), image_size=32, batch_size=5, workers=0)
    assert (folder.num_classes, folder.image_shape) == (3, (3, 32, 32))
    fitted(folder)
    assert next(iter(folder.train_dataloader()))[0].shape == (5, 3, 32, 32)
    assert folder.provenance["counts"] == {"train": 24, "val": 12}
    net = data.ImageNet(verify=False, workers=0)
    assert (net.name, net.num_classes, net.image_shape) == ("imagenet", 1000, (3, 224, 224))
    assert net.folder == data_dir / "imagenet"
    fitted(net)
    assert net.provenance["verified"] is False
    assert net.provenance["variant"] == "not the official counts"
    assert next(iter(net.val_dataloader()))[0].shape == (12, 3, 224, 224)


def test_default_folder(monkeypatch):
    monkeypatch.delenv("NSLIGHTNING_DATA_DIR", raising=False)
    assert data.MNIST().folder == Path.home() / ".cache/nslightning/data"
    assert data.SVHN().folder == Path.home() / ".cache/nslightning/data/svhn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"holdout": 1.0}, "holdout is 1.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.MNIST(**arguments)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")  # pytest's own arguments
@pytest.mark.filterwarnings("ignore:No seed found")  # Lightning draws one
def test_driven_by_lightning_cli(data_dir):
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.demos.boring_classes import BoringModel

    def configured(*args):
        cli = LightningCLI(
            BoringModel, data.ImageDataModule, subclass_mode_data=True, run=False, save_config_callback=None,
            args=["--trainer.logger=false", "--trainer.enable_checkpointing=false", *args],
        )  # fmt: skip
        assert isinstance(cli.datamodule, LightningDataModule)
        return cli.datamodule

    module = configured("--data=MNIST", "--data.batch_size=32", "--data.holdout=0")
    assert (type(module), module.batch_size, module.holdout) == (data.MNIST, 32, 0)
    module = configured("--data=SVHN", "--data.split=train", "--data.verify=false")
    assert (type(module), module.split, module.verify) == (data.SVHN, "train", False)
    module = configured("--data=Synthetic", "--data.image_shape=[1, 8, 8]", "--data.constant=0.5")
    assert (module.image_shape, module.constant) == ((1, 8, 8), 0.5)
    module = configured("--data=ImageFolder", f"--data.root={data_dir / 'imagenet'}")
    assert module.num_classes == 3


# ------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize(("cls", "mean", "std"), [
    (data.MNIST, (0.5,), (0.5,)),
    (data.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    (data.SVHN, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
])  # fmt: skip
def test_evaluation_pixels_are_torchvisions(cls, mean, std, data_dir):
    """Bit for bit torchvision's reader, ToTensor and Normalize, in the files' order."""
    from torchvision import datasets

    class Unchecked(getattr(datasets, cls.__name__)):
        def _check_integrity(self):
            return True

        def _load_meta(self):
            pass

    Unchecked.__name__ = cls.__name__  # MNIST's folder is called after its class
    where, split = (data_dir / "svhn", {"split": "test"}) if cls is data.SVHN else (data_dir, {"train": False})
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    reference = Unchecked(where, **split, transform=to_tensor)
    images, labels = seen(cls(verify=False, eval_batch_size=7).test_dataloader())
    assert torch.equal(images, torch.stack([image for image, _ in reference]))
    assert labels.tolist() == [int(label) for _, label in reference]


def test_augmentation_is_a_padded_crop_and_flip(data_dir):
    """Every augmented image is one of the 2 x 81 that Pillow makes of the original, and all kinds occur."""
    module = data.CIFAR10(verify=False, holdout=0.0)
    images = fitted(module)._loaded["train"]
    counts = Counter()
    for epoch in range(3):
        batch, _ = images.__getitems__([epoch * 80 + i for i in range(80)])
        pixels = batch * torch.tensor(module.std).view(3, 1, 1) + torch.tensor(module.mean).view(3, 1, 1)
        pixels = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for i in range(80):
            original = Image.fromarray(images.images[i].permute(1, 2, 0).numpy())
            matches = []
            for flip in (False, True):
                padded = ImageOps.expand(original, 4)
                for top in range(9):
                    for left in range(9):
                        crop = padded.crop((left, top, left + 32, top + 32))
                        if np.array_equal(ImageOps.mirror(crop) if flip else crop, pixels[i]):
                            matches.append((flip, top, left))
            assert len(matches) == 1
            counts.update(zip(("flip", "top", "left"), matches[0], strict=True))
    assert {value for key, value in counts if key == "top"} == set(range(9))
    assert {value for key, value in counts if key == "left"} == set(range(9))
    # 240 draws: mean 120, standard deviation 7.7
    assert 80 < counts["flip", True] < 160


def test_validation_and_test_are_never_augmented(data_dir):
    module = fitted(data.CIFAR10(verify=False, seed=1))
    assert torch.equal(seen(module.val_dataloader())[0], seen(module.val_dataloader())[0])
    held = module._loaded["val"]
    direct = held.images.float() / 255
    direct = (direct - torch.tensor(module.mean).view(3, 1, 1)) / torch.tensor(module.std).view(3, 1, 1)
    assert torch.equal(seen(module.val_dataloader())[0], direct)


def test_image_folder_evaluation_is_resize_and_centre_crop(data_dir):
    module = data.ImageFolder(str(data_dir / "imagenet"), image_size=28, workers=0)
    images, labels = seen(module.val_dataloader())
    paths = sorted((data_dir / "imagenet/val").glob("*/*"))
    steps = transforms.Compose([
        transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    assert torch.equal(images, torch.stack([steps(Image.open(path).convert("RGB")) for path in paths]))
    assert labels.tolist() == [i // 4 for i in range(12)]


# ------------------------------------------------------------------------------------------- order


def cifar(**arguments):
    return fitted(data.CIFAR10(verify=False, batch_size=16, **arguments))


def folder(root, **arguments):
    return fitted(data.ImageFolder(str(root / "imagenet"), 24, batch_size=8, **arguments))


def epoch_of(module, epoch):
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return seen(loader)


@pytest.mark.parametrize("make", [lambda root, **a: cifar(**a), folder], ids=["memory", "files"])
def test_epoch_is_a_function_of_seed_and_number(make, data_dir):
    first = epoch_of(make(data_dir, seed=3, workers=0), 5)
    torch.manual_seed(99)
    again = epoch_of(make(data_dir, seed=3, workers=2), 5)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], epoch_of(make(data_dir, seed=3, workers=0), 6)[0])
    assert not torch.equal(first[0], epoch_of(make(data_dir, seed=4, workers=0), 5)[0])


@pytest.mark.parametrize("make", [lambda root, **a: cifar(**a), folder], ids=["memory", "files"])
def test_image_does_not_depend_on_its_neighbours(make, data_dir):
    images = make(data_dir, workers=0)._loaded["train"]
    together = images.__getitems__([2 * len(images) + i for i in (7, 3, 11)])[0]
    assert torch.equal(together[1], images.__getitems__([2 * len(images) + 3])[0][0])
    assert torch.equal(together[1], images[2 * len(images) + 3][0])
    assert not torch.equal(together[1], images[3 * len(images) + 3][0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [lambda root, **a: cifar(**a), folder], ids=["memory", "files"])
def test_global_random_streams_are_left_alone(make, workers, data_dir):
    numpys = np.random.get_state
    before = torch.get_rng_state(), numpys()[1].copy(), random.getstate()
    module = make(data_dir, workers=workers)
    seen(module.train_dataloader())
    seen(module.val_dataloader())
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], numpys()[1])
    assert before[2] == random.getstate()


@pytest.mark.parametrize("images", [16, 17, 19, 64, 65, 67, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_processes_share_a_permutation(images, world, batch):
    """The ranks' batches interleave to pieces of one permutation; what is left out is as documented."""
    shares = []
    for rank in range(world):
        sampler = TrainSampler(range(images), batch, seed=7, rank=rank, world=world)
        assert isinstance(sampler, DistributedSampler)  # else Lightning would wrap it
        sampler.set_epoch(2)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    assert len({len(share) for share in shares}) == 1
    union = [draw for together in zip(*shares, strict=True) for draw in together]
    alone = TrainSampler(range(images), images, seed=7)
    alone.set_epoch(2)
    assert union == list(alone)[: len(union)]
    assert all(2 * images <= draw < 3 * images for draw in union)
    assert len(set(union)) == len(union)
    each = images // world
    left_out = images - len(union) - images % world
    assert left_out == (world if batch > 1 and each % batch == 1 else 0)


def test_all_images_are_trained_on_by_one_process():
    assert sorted(TrainSampler(range(50), 16, seed=0)) == list(range(50))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [1, 2, 9, 100])
def test_every_image_is_evaluated_once_in_equally_many_batches(world, batch):
    for images in [*range(world, 60), 1000, 1001, 1003]:
        size = even_batch_size(images, world, batch)
        shares = [list(EvalSampler(range(images), rank, world)) for rank in range(world)]
        assert sorted(chain.from_iterable(shares)) == list(range(images))
        assert len({-(-len(share) // size) for share in shares}) == 1, (images, world, size)
        if images % (world * batch) == 0:
            assert size == batch


def test_holdout_is_a_fixed_partition(data_dir):
    first, second = cifar(holdout=0.25), cifar(holdout=0.25, seed=5)
    whole = cifar(holdout=0.0)._loaded["train"].images
    assert torch.equal(first._loaded["val"].images, second._loaded["val"].images)
    parts = torch.cat([first._loaded["train"].images, first._loaded["val"].images]).flatten(1)
    assert len(first._loaded["val"]) == 20
    assert sorted(map(bytes, parts.numpy())) == sorted(map(bytes, whole.flatten(1).numpy()))
    alone = data.CIFAR10(verify=False, holdout=0.25)
    alone.setup("validate")
    assert torch.equal(alone._loaded["val"].images, first._loaded["val"].images)


def test_no_holdout_validates_on_the_test_images(data_dir):
    module = cifar(holdout=0.0)
    assert module.provenance["validation"] == "the official test images"
    assert module.provenance["counts"] == {"train": 80, "val": 40, "test": 40}
    assert torch.equal(seen(module.val_dataloader())[0], seen(module.test_dataloader())[0])


def test_holdout_that_leaves_nothing(data_dir):
    with pytest.raises(ValueError, match="leaves nothing"):
        cifar(holdout=0.001)


# ------------------------------------------------------------------------------------- synthetic and sample


def test_synthetic_plants_ties():
    module = fitted(data.Synthetic((2, 8, 8), 4, images=40, eval_images=8, constant=0.5, seed=1))
    images, labels = module._loaded["train"].__getitems__(range(40))
    constant = (images == images[:, :1, :1, :1]).flatten(1).all(1)
    assert int(constant.sum()) == 20
    assert int((images == 0).flatten(1).all(1).sum()) == 10
    assert 0 <= images.min() <= images.max() <= 1
    assert labels.min() >= 0
    assert labels.max() <= 3
    assert (module.image_shape, module.num_classes) == ((2, 8, 8), 4)
    again = fitted(data.Synthetic((2, 8, 8), 4, images=40, eval_images=8, constant=0.5, seed=1))
    assert torch.equal(again._loaded["train"].images, module._loaded["train"].images)
    assert not torch.equal(module._loaded["val"].images, module._loaded["train"].images[:8])
    pixels = fitted(data.Synthetic((2, 8, 8), images=40))._loaded["train"].images.flatten(1)
    assert bool((pixels.amin(1) < pixels.amax(1)).all())


def test_sample_is_balanced_and_small():
    module = fitted(data.FashionMNISTSample())
    module.setup("test")
    assert module.provenance == {
        "dataset": "fashion_mnist_sample",
        "variant": "embedded sample",
        "verified": True,
        "counts": {"train": 6000, "val": 1000, "test": 1000},
        "folder": None,
        "validation": "1,000 of the official test images; `test` uses the same",
    }
    assert module._loaded["train"].labels.bincount().tolist() == [600] * 10
    assert module._loaded["val"].labels.bincount().tolist() == [100] * 10
    assert module._loaded["train"].images.shape == (6000, 1, 28, 28)
    folder = files("nslightning.data") / "fashion_mnist_sample"
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir()) < 3_500_000
    assert "Copyright (c) 2017 Zalando SE" in (folder / "LICENSE").read_text()


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_sample_is_rows_of_the_originals():
    for part in ("train", "t10k"):
        folder = files("nslightning.data") / "fashion_mnist_sample"

        def rows(where, part=part):
            images = gzip.decompress((where / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
            labels = gzip.decompress((where / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
            return Counter((images[784 * i : 784 * (i + 1)], label) for i, label in enumerate(labels))

        assert rows(folder) <= rows(DEBIAN)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_sample_is_what_its_script_draws(tmp_path):
    import subprocess
    import sys

    script = Path(__file__).parents[2] / "docs/make_fashion_mnist_sample.py"
    subprocess.run([sys.executable, script, DEBIAN, tmp_path], check=True)
    for drawn in tmp_path.iterdir():
        shipped = (files("nslightning.data") / "fashion_mnist_sample" / drawn.name).read_bytes()
        # Unpacked: another zlib may compress the same bytes differently.
        assert gzip.decompress(drawn.read_bytes()) == gzip.decompress(shipped)


# ------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_fashion_mnist_repacked_by_debian_is_verified(tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    (tmp_path / "FashionMNIST/raw").symlink_to(DEBIAN)
    module = fitted(data.FashionMNIST(str(tmp_path), holdout=0.0))
    assert module.provenance["verified"] is True
    assert module.provenance["counts"] == {"train": 60000, "val": 10000, "test": 10000}


def test_real_mnist_is_verified():
    module = data.MNIST(str(real("MNIST", "raw")), holdout=0.0)
    fitted(module)
    assert module.provenance["verified"] is True
    assert module.provenance["variant"] == "official"
    assert module.provenance["counts"] == {"train": 60000, "val": 10000, "test": 10000}
    # Class 1 is 11.35 % of the test images: the published share.
    assert int((module._loaded["test"].labels == 1).sum()) == 1135


def test_real_cifar10_decoded_from_jpeg_is_refused_unless_asked_for():
    root = real("cifar-10-batches-py")
    file = root / "cifar-10-batches-py/data_batch_1"
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "md5").hexdigest() == "c99cafc152244af753f735de768cd75f":
            pytest.skip("the CIFAR-10 in NSLIGHTNING_DATA_DIR is the official one")
    with pytest.raises(data.DataError, match=r"data_batch_1: md5: \w+ \(\d+ bytes\).*\n.*--data.verify=false"):
        data.CIFAR10(str(root)).setup("fit")
    module = fitted(data.CIFAR10(str(root), verify=False))
    assert module.provenance["verified"] is False
    assert module.provenance["counts"] == {"train": 45000, "val": 5000}


def test_real_imagenette_is_a_folder():
    module = data.ImageFolder(str(real("imagenette2-224-subset") / "imagenette2-224-subset"), 64, workers=0)
    fitted(module)
    assert module.num_classes == 10
    assert module.provenance["counts"] == {"train": 2500, "val": 600}
    images, _ = next(iter(module.train_dataloader()))
    assert images.shape == (128, 3, 64, 64)
    assert bool(images.isfinite().all())


def test_real_svhn_digits():
    root = real("svhn-tiny") / "svhn-tiny"
    with pytest.raises(data.DataError, match=r"train_32x32\.mat: md5"):
        data.SVHN("train", root=str(root)).setup("fit")
    module = data.SVHN("train", root=str(root), verify=False, holdout=0.0)
    fitted(module)
    assert module.provenance["counts"] == {"train": 10, "val": 7, "test": 7}
    assert module.provenance["split"] == "train"


def test_a_worker_survives_the_first_sigterm_and_ends_with_the_second():
    """A batch system sends SIGTERM to all processes of a job; the training itself decides at which step it stops."""
    import multiprocessing
    import os
    import signal
    import time
    from contextlib import suppress

    def module(workers):
        made = data.Synthetic((1, 4, 4), 2, 64, batch_size=4, workers=workers, seed=1)
        made.setup("fit")
        return made.train_dataloader()

    before = set(multiprocessing.active_children())
    loader = module(1)  # which its workers live as long as
    batches = iter(loader)
    read = [next(batches)]
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGTERM)
    read += [*batches]
    assert worker.is_alive()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(read, module(0), strict=True))

    alive = True
    for attempt in range(200):
        with suppress(RuntimeError):  # PyTorch's word that a worker was killed, in whichever line it hears of it
            if attempt == 0:
                os.kill(worker.pid, signal.SIGTERM)
            time.sleep(0.05)
            alive = worker.is_alive()
        if not alive:
            break
    assert not alive
