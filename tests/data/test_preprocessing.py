"""Images are prepared as the weights expect, and augmented the same way whoever reads them and when."""

import math
import random
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from fake_data import write_image_folder
from PIL import Image

from nslightning.data import Augmentation, ImageFolder, preprocessing_of
from nslightning.data.images import FileImages, normalise
from nslightning.data.preprocessing import HE2016
from nslightning.data.sampler import TrainSampler


def picture(size=(301, 217), seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def samples(tmp_path):
    for number in range(6):
        picture(seed=number).save(tmp_path / f"{number}.png")
    return [(str(tmp_path / f"{number}.png"), number) for number in range(6)]


# Bicubic and bilinear, shares of 0.875, 0.9, 0.95 and 1, another mean, another size, and `squash`.
TIMM = [
    "resnet50.a1_in1k",
    "resnet18",
    "vit_base_patch16_224",
    "convnext_tiny.fb_in22k_ft_in1k_384",
    "efficientnet_b3",
    "vit_so400m_patch14_siglip_gap_384.webli",
]


@pytest.mark.parametrize("name", TIMM)
def test_timm_weights_get_timms_own_preprocessing(name):
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    config = resolve_data_config(pretrained_cfg=get_pretrained_cfg(name).to_dict())
    own = preprocessing_of(f"timm/{name}")
    bytes_ = own.evaluation()(picture())
    assert torch.equal(normalise(bytes_[None], own.mean, own.std)[0], create_transform(**config)(picture()))


def test_the_timm_networks_that_are_compared_differ():
    prepared = [preprocessing_of(f"timm/{name}") for name in TIMM]
    assert len({(p.size, p.crop, p.interpolation, p.mean, p.fit) for p in prepared}) >= 5
    assert {p.fit for p in prepared} >= {"center", "squash"}


def test_images_that_are_padded_are_padded_as_timm_does():
    from dataclasses import replace

    from timm.data import create_transform

    own = replace(preprocessing_of("timm/resnet50.a1_in1k"), fit="border")
    expected = create_transform(
        224, crop_pct=own.crop, crop_mode="border", interpolation="bicubic", mean=own.mean, std=own.std
    )
    bytes_ = own.evaluation()(picture())
    assert torch.equal(normalise(bytes_[None], own.mean, own.std)[0], expected(picture()))


@pytest.mark.parametrize("name", ["resnet50", "alexnet", "efficientnet_b1", "vit_b_16", "swin_t", "inception_v3"])
def test_torchvision_weights_get_their_own_transforms(name):
    weights = torchvision.models.get_model_weights(name)["DEFAULT"]
    own = preprocessing_of(f"torchvision/{name}")
    bytes_ = own.evaluation()(picture())
    assert torch.equal(normalise(bytes_[None], own.mean, own.std)[0], weights.transforms()(picture()))


def test_he2016_keeps_224_of_256():
    expected = torchvision.transforms.v2.functional.center_crop(
        torchvision.transforms.v2.functional.resize(picture(), [256]), [224]
    )
    assert np.array_equal(HE2016.evaluation()(picture()).permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("he2015", "did you mean 'he2016'"),
        ("timm/resnet50.a1_in2k", r"did you mean 'resnet50\.a\d_in1k'"),
        ("torchvision/resnet5", "did you mean 'resnet50'"),
        ("paper/vgg11", "timm/<name> or torchvision/<name>"),
    ],
)
def test_a_preprocessing_that_is_not_known_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        preprocessing_of(name)


AUGMENTATIONS = {
    "plain": Augmentation(),
    "rand": Augmentation(auto_augment="rand-m9-mstd0.5-inc1", erasing=0.9),
    "augmix": Augmentation(auto_augment="augmix-m3-w3"),
    "original": Augmentation(auto_augment="original"),
    "v2": Augmentation(transforms=[torchvision.transforms.v2.TrivialAugmentWide()], erasing=0.9),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_is_augmented_by_seed_epoch_and_index_alone(name, samples):
    data = FileImages(samples, HE2016.at(32), AUGMENTATIONS[name], seed=3)
    whole, labels = data.__getitems__([6 + 0, 6 + 1, 6 + 2])
    random.seed(99)
    np.random.seed(98)  # noqa: NPY002 # the global stream is what is tested
    torch.manual_seed(97)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 # the global stream is what is tested
    alone, _ = FileImages(samples, HE2016.at(32), AUGMENTATIONS[name], seed=3).__getitems__([6 + 2])
    assert torch.equal(alone[0], whole[2])
    assert labels.tolist() == [0, 1, 2]
    # What else draws from the global streams is not disturbed.
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002 # the global stream is what is tested
    assert torch.equal(torch.get_rng_state(), states[2])
    other_epoch, _ = data.__getitems__([12 + 2])
    other_seed, _ = FileImages(samples, HE2016.at(32), AUGMENTATIONS[name], seed=4).__getitems__([6 + 2])
    assert not torch.equal(other_epoch[0], whole[2])
    assert not torch.equal(other_seed[0], whole[2])


def test_the_policies_change_images(samples):
    plain = FileImages(samples, HE2016.at(32), Augmentation()).__getitems__(range(6))[0]
    for name in ("rand", "augmix", "original", "v2"):
        assert not torch.equal(FileImages(samples, HE2016.at(32), AUGMENTATIONS[name]).__getitems__(range(6))[0], plain)


def test_erasing_replaces_a_rectangle_by_noise(samples):
    plain = FileImages(samples, HE2016.at(64), Augmentation()).__getitems__(range(6))[0]
    erased = FileImages(samples, HE2016.at(64), Augmentation(erasing=1.0)).__getitems__(range(6))[0]
    for before, after in zip(plain, erased, strict=True):
        changed = (before != after).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        box = changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()
        assert 0.02 * 0.9 <= box.numel() / changed.numel() <= 0.33 * 1.1
        assert after[:, changed].std() == pytest.approx(1, abs=0.15)


def test_crops_take_the_interpolation_of_the_weights(samples):
    whole = Augmentation(scale=(1.0, 1.0), ratio=(301 / 217, 301 / 217), flip=0)
    cubic = FileImages(samples, preprocessing_of("timm/resnet50.a1_in1k").at(50), whole).__getitems__([0])[0]
    expected = torch.from_numpy(np.array(picture().resize((50, 50), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    mean, std = HE2016.mean, HE2016.std
    assert torch.equal(cubic, normalise(expected[None], mean, std))


def test_training_images_grow_with_the_epoch(samples):
    data = FileImages(samples, HE2016.at(64), Augmentation(sizes=[(0, 16), (2, 24), (5, 32)]))
    sizes = [data.__getitems__([epoch * 6])[0].shape[-1] for epoch in range(7)]
    assert sizes == [16, 16, 24, 24, 24, 32, 32]
    evaluated = FileImages(samples, HE2016.at(64)).__getitems__([0])[0]
    assert evaluated.shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("repeats", "world"), [(2, 1), (3, 2), (3, 4), (1, 3)])
def test_an_epoch_repeats_few_images_with_other_draws(repeats, world):
    items, seed = 50, 7
    draws: Counter[int] = Counter()
    parts = [TrainSampler(range(items), 16, seed, rank, world, repeats) for rank in range(world)]
    for part in parts:
        part.set_epoch(3)
        draws.update(part)
    assert set(draws.values()) == {1}  # no draw twice: the same image never with the same augmentation
    assert {draw // items for draw in draws} <= set(range(3 * repeats, 4 * repeats))
    images = Counter(draw % items for draw in draws)
    assert len(images) <= math.ceil(items / repeats)
    left_out = items // repeats * repeats - sum(images.values())
    assert 0 <= left_out < world + world  # what the processes do not divide, and a last batch of one image
    # The union over processes is what one process sees, up to what is left out.
    (alone,) = [TrainSampler(range(items), 16, seed, repeats=repeats)]
    alone.set_epoch(3)
    together = [draw for row in zip(*(list(part) for part in parts), strict=True) for draw in row]
    assert together == list(alone)[: len(together)]


def test_the_repeats_of_an_image_are_other_crops(samples):
    data = FileImages(samples, HE2016.at(32), Augmentation(repeats=3))
    (first, second, third), labels = data.__getitems__([2, 6 + 2, 12 + 2])
    assert labels.tolist() == [2, 2, 2]
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert data.augmentation.size(0, 32) == 32


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"flip": 1.5}, "augmentation.flip"),
        ({"erasing": -0.1}, "augmentation.erasing"),
        ({"scale": (0.5, 0.2)}, "augmentation.scale"),
        ({"ratio": (0.0, 1.0)}, "augmentation.ratio"),
        ({"repeats": 0}, "augmentation.repeats"),
        ({"sizes": [(1, 32)]}, "begins with epoch 0"),
        ({"sizes": [(0, 32), (0, 64)]}, "epochs grow"),
        ({"sizes": [(0, 0)]}, "at least 1 pixel"),
    ],
)
def test_a_mistaken_augmentation_is_named(setting, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**setting)


def test_a_policy_that_timm_does_not_know_is_named(samples):
    with pytest.raises(ValueError, match="does not know the policy auto_augment='randd-m9'"):
        FileImages(samples, HE2016, Augmentation(auto_augment="randd-m9"))


class Pretrained(torch.nn.Module):
    """Stands for a module with pretrained weights, which would have to be downloaded."""

    hparams = {"backbone": "timm/resnet50.a1_in1k", "pretrained": True}  # noqa: RUF012 # of a stand-in class


def test_pretrained_weights_with_another_preprocessing_are_named(tmp_path):
    write_image_folder(tmp_path)

    class Around:
        lightning_module = Pretrained()
        global_rank, world_size = 0, 1

    data = ImageFolder(str(tmp_path), workers=0)
    data.trainer = Around()
    with pytest.warns(UserWarning, match=r"--data\.preprocessing=timm/resnet50\.a1_in1k"):
        data.setup("fit")
    right = ImageFolder(str(tmp_path), image_size=64, workers=0, preprocessing="timm/resnet50.a1_in1k")
    right.trainer = Around()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right.setup("fit")
        Pretrained.hparams["pretrained"] = False
        data.setup("fit")
