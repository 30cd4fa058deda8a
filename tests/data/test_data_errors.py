"""Missing, truncated, corrupted, repacked files: one error that names file, check and what mends it."""

import gzip
import hashlib
import pickle
import re
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import fake_data
import pytest
import torch
from torchvision import datasets

import nslightning.data as data
from nslightning.cli import main
from nslightning.data.small import _ArraysOnly
from nslightning.experiments.data import load

IMAGES = "MNIST/raw/train-images-idx3-ubyte"
LABELS = "MNIST/raw/train-labels-idx1-ubyte"


@pytest.fixture
def root(tmp_path):
    fake_data.write_all(tmp_path)
    return tmp_path


def refused(module, file, check, fix):
    with pytest.raises(data.DataError) as caught:
        module.setup("fit")
    message = str(caught.value)
    first, second = message.split("\n")
    assert first.startswith(f"{file}: {check}"), message
    assert fix in second, message
    assert module.provenance["counts"].get("train") is None


def cut(file, keep):
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (data.MNIST, IMAGES),
        (data.FashionMNIST, "FashionMNIST/raw/train-images-idx3-ubyte"),
        (data.CIFAR10, "cifar-10-batches-py/data_batch_1"),
        (data.CIFAR100, "cifar-100-python/train"),
        (data.SVHN, "extra_32x32.mat"),
    ],
)
def test_nothing_there(make, file, tmp_path):
    refused(make(root=str(tmp_path)), tmp_path / file, "missing", "--data.download=true")


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (data.MNIST, IMAGES),
        (data.CIFAR10, "cifar-10-batches-py/data_batch_1"),
        (data.CIFAR100, "cifar-100-python/train"),
        (lambda root: data.SVHN(root=f"{root}/svhn"), "svhn/extra_32x32.mat"),
    ],
    ids=["mnist", "cifar10", "cifar100", "svhn"],
)
def test_another_copy_is_refused_by_its_md5(make, file, root):
    digest = hashlib.md5((root / file).read_bytes()).hexdigest()
    refused(make(str(root)), root / file, f"md5: {digest}", "--data.verify=false")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("file", [IMAGES, LABELS])
def test_mnist_truncated(file, suffix, tmp_path):
    fake_data.write_mnist(tmp_path, suffix=suffix)
    cut(tmp_path / f"{file}{suffix}", 30 if suffix else 50)
    check = "it cannot be read (Compressed file ended" if suffix else "size: 50 bytes, its IDX header promises"
    refused(data.MNIST(str(tmp_path), verify=False), tmp_path / f"{file}{suffix}", check, "download=true")


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\x1f\x8b\x08\x00 not IDX", b"\0\0\x0d\x03" + bytes(12)])
def test_mnist_header(content, root):
    (root / IMAGES).write_bytes(content)
    refused(data.MNIST(str(root), verify=False), root / IMAGES, "IDX header: it starts with", "download=true")


def test_mnist_bytes_too_many(root):
    with (root / LABELS).open("ab") as file:
        file.write(b"\0")
    refused(
        data.MNIST(str(root), verify=False),
        root / LABELS,
        "size: 89 bytes, its IDX header promises 88",
        "Delete",
    )


def test_mnist_damaged_gzip(tmp_path):
    fake_data.write_mnist(tmp_path, suffix=".gz")
    file = tmp_path / f"{IMAGES}.gz"
    content = bytearray(file.read_bytes())
    content[-6] ^= 1  # in the checksum
    file.write_bytes(content)
    refused(data.MNIST(str(tmp_path), verify=False), file, "it cannot be read (CRC check failed", "Delete")


def test_mnist_counts_that_differ(root):
    import numpy as np

    fake_data.write_idx(root / LABELS, np.zeros(79, np.uint8))
    refused(
        data.MNIST(str(root), verify=False),
        root,
        "count: mnist, training images: 80 images, 79 labels",
        "Delete",
    )


def test_mnist_of_another_size_and_label(root):
    import numpy as np

    fake_data.write_idx(root / LABELS, np.full(80, 10, np.uint8))
    refused(data.MNIST(str(root), verify=False), root, "labels: mnist, training images: 10 to 10", "Delete")
    fake_data.write_idx(root / IMAGES, np.zeros((80, 27, 28), np.uint8))
    refused(data.MNIST(str(root), verify=False), root, "shape: mnist, training images are (1, 27, 28)", "Delete")


@pytest.mark.parametrize("keep", [0, 10, 20_000])
def test_cifar_truncated(keep, root):
    file = root / "cifar-10-batches-py/data_batch_3"
    cut(file, keep)
    refused(data.CIFAR10(str(root), verify=False), file, "pickle: no images can be read", "download=true")


def test_cifar_without_labels(root):
    file = root / "cifar-100-python/train"
    file.write_bytes(pickle.dumps({"data": [0] * 3072}))
    refused(data.CIFAR100(str(root), verify=False), file, "pickle: no images can be read", "download=true")


def test_unverified_pickle_runs_no_code(root):
    class Payload:
        def __reduce__(self):
            return (shutil.rmtree, (str(root / "MNIST"),))

    file = root / "cifar-10-batches-py/data_batch_1"
    file.write_bytes(pickle.dumps({"data": Payload(), "labels": [0]}))
    refused(data.CIFAR10(str(root), verify=False), file, "pickle: no images can be read", "download=true")
    assert (root / "MNIST").is_dir()


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_of_arrays_is_read(protocol):
    import io

    import numpy as np

    content = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, np.int64(2)]}
    loaded = _ArraysOnly(io.BytesIO(pickle.dumps(content, protocol)), encoding="latin1").load()
    assert np.array_equal(loaded["data"], content["data"])
    assert loaded["labels"] == [1, 2]


@pytest.mark.parametrize("keep", [0, 200, 100_000])
def test_svhn_truncated(keep, root):
    file = root / "svhn/extra_32x32.mat"
    assert file.stat().st_size > keep
    cut(file, keep)
    refused(data.SVHN(root=str(root / "svhn"), verify=False), file, "mat: no images can be read", "download=true")


def test_svhn_split_is_checked(root):
    with pytest.raises(ValueError, match="'extra' or 'train'"):
        data.SVHN("test", root=str(root / "svhn"))


def test_image_folder_without_train_without_classes_and_with_odd_ones(tmp_path):
    with pytest.raises(data.DataError, match=r"train: missing.*\n.*--data.root"):
        data.ImageFolder(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(data.DataError, match=r"train: count: it holds no class folders"):
        data.ImageFolder(str(tmp_path))
    fake_data.write_image_folder(tmp_path)
    shutil.rmtree(tmp_path / "val/bee")
    module = data.ImageFolder(str(tmp_path), workers=0)
    with pytest.raises(data.DataError, match=r"val: classes: bee not in both val and train"):
        module.setup("fit")
    (tmp_path / "val/bee").mkdir()
    with pytest.raises(data.DataError, match=r"val: count: Found no valid file for the classes bee"):
        module.setup("validate")


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_jpeg_is_named(workers, tmp_path):
    fake_data.write_image_folder(tmp_path)
    file = tmp_path / "train/bee/bee_4.jpg"
    cut(file, 300)
    module = data.ImageFolder(str(tmp_path), 16, workers=workers)
    module.setup("fit")
    with pytest.raises(data.DataError, match=re.escape(f"{file}: the image cannot be decoded")):
        list(module.train_dataloader())


def test_part_of_imagenet_is_refused_unless_asked_for(root):
    with pytest.raises(data.DataError, match=r"train: count: 24 images in 3 classes, ImageNet has 1281167 in 1000"):
        data.ImageNet(str(root / "imagenet")).setup("fit")
    with pytest.raises(data.DataError, match=r"train: missing.*\n.*image-net.org.*torchvision.datasets import"):
        data.ImageNet(str(root / "nowhere")).setup("fit")


def test_two_bad_files_keep_one_record_false(root, monkeypatch):
    """One official file among others does not make a copy verified."""
    monkeypatch.setitem(
        data.MNIST.md5, "train-images-idx3-ubyte", hashlib.md5((root / IMAGES).read_bytes()).hexdigest()
    )
    module = data.MNIST(str(root), verify=False)
    module.setup("fit")
    assert module.provenance["verified"] is False
    monkeypatch.setitem(
        data.MNIST.md5, "train-labels-idx1-ubyte", hashlib.md5((root / LABELS).read_bytes()).hexdigest()
    )
    module = data.MNIST(str(root))
    module.setup("fit")
    assert module.provenance["verified"] is True
    with pytest.raises(data.DataError, match="t10k-images"):
        module.setup("test")


@pytest.fixture
def server(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "www")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path / "www", f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """A small MNIST, as if that were the published one; the folder it is sent from."""
    www, url = server
    fake_data.write_mnist(tmp_path / "made", suffix=".gz")
    resources = []
    for file in sorted((tmp_path / "made/MNIST/raw").iterdir()):
        shutil.copy(file, www)
        resources.append((file.name, hashlib.md5(file.read_bytes()).hexdigest()))
        monkeypatch.setitem(data.MNIST.md5, file.stem, hashlib.md5(gzip.decompress(file.read_bytes())).hexdigest())
    monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    return www


def test_download_checks_and_then_reads(published, tmp_path):
    module = data.MNIST(str(tmp_path / "new"), download=True)
    module.prepare_data()
    module.setup("fit")
    assert module.provenance["verified"] is True
    assert module.provenance["counts"] == {"train": 72, "val": 8}
    # A server that sends something else is found out.
    fake_data.write_idx(published / "train-labels-idx1-ubyte.gz", torch.zeros(80, dtype=torch.uint8).numpy())
    module = data.MNIST(str(tmp_path / "newer"), download=True)
    with pytest.raises(data.DataError, match="newer: mnist could not be downloaded"):
        module.prepare_data()


def test_svhn_download(server, tmp_path, monkeypatch):
    www, url = server
    fake_data.write_svhn(www)
    for split in ("train", "test"):
        name = f"{split}_32x32.mat"
        published = hashlib.md5((www / name).read_bytes()).hexdigest()
        monkeypatch.setitem(datasets.SVHN.split_list, split, [url + name, name, published])
    module = data.SVHN("train", root=str(tmp_path / "new"), download=True)
    module.prepare_data()
    module.setup("fit")
    assert module.provenance["verified"] is True
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["test_32x32.mat", "train_32x32.mat"]


def test_nothing_is_downloaded_unasked(tmp_path):
    data.CIFAR10(str(tmp_path / "new")).prepare_data()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["experiment", "zones"])
def test_commands_download_where_asked_to(command, published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path / "fetched"))
    (tmp_path / "little.yaml").write_text(
        "{kind: zones, fixed: {data: MNIST, backbone: paper/fc, against: {relu: 1}, width: 8, depth: 1, batch_size: 8},"
        " grids: [{seed: [0]}], scales: {small: {}}}"
    )
    call = {
        "experiment": ["experiment", "little.yaml", "--workers=1"],
        "zones": ["zones", "--data=MNIST", "--backbone=paper/lenet5", "--precisions=[32]", "--draws=2", "--chunk=2"],
    }[command]
    load.cache_clear()
    assert main(call) != 0
    assert "experiment and zones, --download) to download it" in capsys.readouterr().err
    assert main([*call, "--download=true"]) == 0
    assert (tmp_path / "fetched" / IMAGES).is_file()
