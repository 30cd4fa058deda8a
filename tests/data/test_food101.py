"""Food-101 from a small set in its on-disk format: what is read, what is held out, and what is refused."""

import shutil

import pytest
import torch
from fake_data import write_food101
from PIL import Image

from nslightning.data import DataError, Food101


def module(root, **options):
    settings = {"image_size": 24, "batch_size": 4, "workers": 0, "verify": False}
    return Food101(str(root), **settings | options)


@pytest.fixture
def folder(tmp_path):
    return write_food101(tmp_path)


def test_batches(folder, tmp_path):
    data = module(tmp_path, holdout=0)
    data.setup("fit")
    batches = list(data.train_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.shape == (18, 3, 24, 24)
    assert images.dtype == torch.float32
    assert labels.bincount().tolist() == [6, 6, 6]
    assert data.provenance["counts"] == {"train": 18, "val": 6}
    assert data.provenance["variant"] == "not the official counts"
    assert (data.num_classes, data.image_shape) == (101, (3, 24, 24))
    # Label 0 is the first class in the alphabet, whatever the lists' order.
    assert {path.split("/")[-2] for path, label in data._split("train").samples if label == 0} == {"apple_pie"}


def test_without_augmentation_training_sees_what_evaluation_sees(folder, tmp_path):
    """The INNAprop experiments: resize and centre crop for both, against torchvision's own transforms."""
    from torchvision.transforms import v2

    data = module(tmp_path, holdout=0, augment=False)
    data.setup("fit")
    path, label = data._split("train").samples[0]
    image, read = data._split("train")[0]
    steps = [v2.Resize(27), v2.CenterCrop(24), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(image, v2.Compose(steps)(Image.open(path).convert("RGB")), rtol=0, atol=1e-6)
    assert read == label
    again, _ = data._split("train")[len(data._split("train"))]  # the same image, one epoch later
    assert torch.equal(image, again)
    augmented = module(tmp_path, holdout=0)._split("train")
    assert not torch.equal(augmented[0][0], augmented[len(augmented)][0])


def test_the_held_out_images_are_not_trained_on(folder, tmp_path):
    one, two = (module(tmp_path, holdout=1 / 3, seed=seed) for seed in (0, 1))
    parts = [{path for path, _ in one._split(split).samples} for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [12, 6, 6]
    assert not parts[0] & parts[1]
    assert not (parts[0] | parts[1]) & parts[2]
    assert one._split("val").samples == two._split("val").samples  # always the same ones
    assert torch.equal(one._split("val")[0][0], one._split("val")[6][0])  # not augmented
    assert "held out" in one.provenance["validation"]
    assert module(tmp_path, holdout=0).provenance["validation"] == "the official test images"


def refused(data, start, fix="--data.download=true"):
    with pytest.raises(DataError) as caught:
        data.setup("fit")
    first, second = str(caught.value).split("\n")
    assert first.startswith(start), first
    assert fix in second, second


def test_nothing_there(tmp_path):
    refused(module(tmp_path), f"{tmp_path}/food-101/meta/train.json: missing: the images are listed in it")


def test_a_part_is_refused_unless_admitted(folder, tmp_path):
    start = f"{folder}/meta/train.json: count: 18 images in 3 classes, Food-101 has 75750 in 101"
    refused(module(tmp_path, verify=True), start, "--data.verify=false")


def test_images_that_are_listed_and_not_there(folder, tmp_path):
    (folder / "images/bibimbap/1001.jpg").unlink()
    refused(module(tmp_path), f"{folder}/images/bibimbap/1001.jpg: missing: 1 images that train.json lists")
    shutil.rmtree(folder / "images/bibimbap")
    refused(module(tmp_path), f"{folder}/images/bibimbap/1000.jpg: missing: 6 images that train.json lists")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}'])
def test_damaged_list(content, folder, tmp_path):
    (folder / "meta/train.json").write_text(content)
    refused(module(tmp_path), f"{folder}/meta/train.json: it cannot be read")


def test_empty_list(folder, tmp_path):
    (folder / "meta/train.json").write_text("{}")
    refused(module(tmp_path), f"{folder}/meta/train.json: count: 0 images in 0 classes")


def test_undecodable_image(folder, tmp_path):
    file = folder / "images/waffles/1000.jpg"
    file.write_bytes(file.read_bytes()[:100])
    data = module(tmp_path, holdout=0)
    with pytest.raises(DataError, match=r"waffles/1000.jpg: the image cannot be decoded"):
        list(data.train_dataloader())


def test_a_failed_download_says_so(tmp_path, monkeypatch):
    from torchvision import datasets

    def fail(*_, **__):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(datasets, "Food101", fail)
    with pytest.raises(DataError, match=r"could not be downloaded .*corrupted"):
        module(tmp_path, download=True).prepare_data()
    module(tmp_path).prepare_data()  # does nothing unless asked to


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"holdout": 1.0}, "holdout is 1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_impossible_numbers(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


def test_a_holdout_of_nothing(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holdout=0.01 of 18 images leaves nothing"):
        module(tmp_path, holdout=0.01).setup("fit")
