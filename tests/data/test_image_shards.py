"""Shards give the images of the folder that they were made of: to the byte, and in the same order."""

import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import fake_data
import pytest
import s3_server
import torch
from test_data_resume import EPOCHS, Recorder, equal, every_step, run, trainer

from nslightning import cli, data
from nslightning.data import shards as shards_module
from nslightning.data.sharding import convert, verify
from nslightning.data.shards import Shards

COUNT = 40  # training images; 20 for validation
SMALL = 12_000  # bytes: several shards of these images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fake_data.write_image_folder(tmp_path / "images", ("ant", "bee"), COUNT // 2)
    return tmp_path / "images"


@pytest.fixture
def out(folder: Path) -> Path:
    convert(folder, folder.parent / "shards", SMALL)
    return folder.parent / "shards"


def module(root: object, workers: int = 0, batch_size: int = 8) -> data.ImageFolder:
    return data.ImageFolder(str(root), 24, batch_size=batch_size, workers=workers)


def epochs(made: data.ImageFolder, count: int = 2):
    """The training batches of some epochs, and those of the validation."""
    loader = made.train_dataloader()
    batches = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
    return batches, list(made.val_dataloader())


def same(one, other) -> bool:
    return len(one) == len(other) > 0 and all(
        torch.equal(a, b) for batch, pair in zip(one, other, strict=True) for a, b in zip(batch, pair, strict=True)
    )


def test_every_image_is_its_file(folder, out):
    manifest = Shards(str(out)).manifest
    assert manifest.classes == ["ant", "bee"]
    assert manifest.images == {"train": COUNT, "val": COUNT // 2}
    assert len(manifest.splits["train"]) > 2
    assert all(shard.bytes == (out / shard.file).stat().st_size for s in manifest.splits.values() for shard in s)
    for split in ("train", "val"):
        expected = [
            (path, label)
            for label, name in enumerate(("ant", "bee"))
            for path in sorted((folder / split / name).iterdir())
        ]
        read_back = [(image.read(), label) for image, label in Shards(str(out)).samples(split)]
        assert read_back == [(path.read_bytes(), label) for path, label in expected]


def test_hugging_face_opens_them(folder, out, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    loaded = datasets.load_from_disk(out)["train"]
    assert loaded.features["label"].names == ["ant", "bee"]
    plain = loaded.cast_column("image", datasets.Image(decode=False))
    for row, (image, label) in zip(plain, Shards(str(out)).samples("train"), strict=True):
        assert (row["image"]["bytes"], row["label"]) == (image.read(), label)
        assert row["image"]["path"].startswith(("ant/", "bee/"))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(folder, out, workers):
    (train, val), (expected, expected_val) = epochs(module(out, workers)), epochs(module(folder))
    assert same(train, expected)
    assert same(val, expected_val)


def test_processes_share_the_batches_of_one(folder, out):
    whole, _ = epochs(module(folder, batch_size=16))
    parts = []
    for rank in (0, 1):
        mine = module(out, batch_size=8)
        mine._place = lambda items, rank=rank: (rank, 2)
        parts.append(epochs(mine)[0])
    union = [
        [torch.stack(pair, 1).flatten(0, 1) for pair in zip(*batches, strict=True)]
        for batches in zip(*parts, strict=True)
    ]
    assert same(union, whole)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # the rest is trained without saving
@pytest.mark.parametrize("workers", [1, 3])
def test_goes_on_in_the_middle_of_an_epoch_with_other_workers(folder, out, workers, tmp_path):
    """Interrupted on files that one process read; the rest is read from shards."""
    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path, every_step(tmp_path / "steps")).fit(whole, module(folder, 0))
    assert len(whole.seen) == EPOCHS * COUNT // 8
    trainer(tmp_path).fit(
        resumed, module(out, workers), ckpt_path=tmp_path / "steps/epoch=1-step=7.ckpt", weights_only=False
    )
    assert equal(resumed.seen, {key: batch for i, (key, batch) in enumerate(whole.seen.items()) if i >= 7})


DDP = """
    import sys, torch
    from pathlib import Path
    from test_image_shards import *
    root = Path(sys.argv[1])
    class Kept(Recorder):
        def on_train_end(self):
            torch.save(self.seen, root / f"{self.name}-{self.global_rank}.pt")
    for name in ("images", "shards"):
        model = Kept()
        model.name = name
        trainer(root, devices=2, strategy="ddp_fork").fit(model, module(root / name, workers=2))
"""


@pytest.mark.slow
def test_two_processes_with_workers_read_what_they_read_from_the_folder(folder, out, tmp_path):
    ran = run(DDP, tmp_path)
    assert ran.returncode == 0, ran.stderr
    for rank in (0, 1):
        files, read = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("images", "shards"))
        assert len(files) == EPOCHS * 3  # of 8, 8 and 4 images
        assert equal(read, files)


def test_a_file_that_cannot_be_read_interrupts_a_conversion(folder, tmp_path):
    out, bad = tmp_path / "shards", folder / "train/bee/bee_9.jpg"
    whole = convert(folder, tmp_path / "other", SMALL)
    content = bad.read_bytes()
    bad.unlink()
    bad.symlink_to("/proc/self/mem")  # reading it is EIO, its size is 0
    with pytest.raises(data.DataError, match=r"bee_9.jpg: it cannot be read \(Input/output error\)"):
        convert(folder, out, SMALL)
    written = {file.name: file.stat().st_mtime_ns for file in (out / "train").glob("*.arrow")}
    assert 0 < len(written) < len(whole.splits["train"])
    with pytest.raises(
        data.DataError, match=r"is not finished\.\nThe same command goes on with it: nslightning shards FOLDER"
    ):
        module(out)
    bad.unlink()
    bad.write_bytes(content)
    with pytest.raises(data.DataError, match="was begun there, with other files"):
        convert(folder, out, SMALL)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from nslightning.data.sharding import convert
    root = Path(sys.argv[1])
    def tell(line):
        if ", 2 of " in line:
            os.kill(os.getpid(), signal.SIGKILL)
    convert(root / "images", root / "killed", int(sys.argv[2]), tell)
"""


@pytest.mark.slow
def test_a_killed_conversion_goes_on(folder, out, tmp_path):
    assert run(KILLED, tmp_path, SMALL).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").rglob("*.arrow"))) == 2
    assert convert(folder, tmp_path / "killed", SMALL) == Shards(str(out)).manifest
    assert verify(tmp_path / "killed", folder)


def test_what_was_written_before_a_kill_stays(folder, tmp_path):
    out = tmp_path / "shards"
    whole = convert(folder, out, SMALL)
    (out / "shards.json").unlink()
    (out / "conversion.json").write_text(json.dumps({"listing": whole.listing, "shard_bytes": SMALL}))
    last = out / whole.splits["train"][-1].file
    last.unlink()
    cut = out / whole.splits["train"][0].file
    cut.write_bytes(cut.read_bytes()[:1000])
    (out / "train/.partial-x.arrow").write_text("cut")
    kept = out / whole.splits["train"][1].file
    before = kept.stat().st_mtime_ns
    assert convert(folder, out, SMALL) == whole
    assert kept.stat().st_mtime_ns == before
    assert not list(out.rglob(".partial*"))
    assert not (out / "conversion.json").exists()
    assert verify(out, folder) == whole
    assert convert(folder, out, SMALL) == whole  # once more does nothing


def test_a_conversion_is_not_mixed_with_something_else(folder, out, tmp_path):
    (folder / "train/ant/one_more.jpg").write_bytes((folder / "train/ant/ant_0.jpg").read_bytes())
    with pytest.raises(data.DataError, match="holds shards already, of other files"):
        convert(folder, out, SMALL)
    with pytest.raises(data.DataError, match="not empty, and holds no shards"):
        convert(folder, folder, SMALL)
    begun = tmp_path / "begun"
    begun.mkdir()
    listing = convert(folder, tmp_path / "third", SMALL).listing
    (begun / "conversion.json").write_text(json.dumps({"listing": listing, "shard_bytes": SMALL}))
    with pytest.raises(data.DataError, match="shards of another size"):
        convert(folder, begun, 2 * SMALL)


def change_a_byte(out, folder):
    file = next(iter((out / "train").glob("*.arrow")))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "sum: it is not the file that was written"


def change_an_image(out, folder):
    file = folder / "train/bee/bee_3.jpg"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    return r"image \d+ \(bee/bee_3.jpg\): it is not .*bee_3.jpg"


def remove_an_image(out, folder):
    (folder / "val/ant/ant_3.jpg").unlink()
    return "count: 20 images, and .*val has 19"


def rename_a_class(out, folder):
    for split in ("train", "val"):
        (folder / split / "bee").rename(folder / split / "cat")
    return "classes: 2, not the 2 of"


def rename_an_image(out, folder):
    (folder / "val/ant/ant_3.jpg").rename(folder / "val/ant/ant_3x.jpg")
    return "ant_3.jpg.*it is not .*ant_3x.jpg"


def add_a_split(out, folder):
    shutil.copytree(folder / "val", folder / "test")
    return "splits: train, val, and .* has train, val, test"


@pytest.mark.parametrize(
    "change", [change_a_byte, change_an_image, remove_an_image, rename_a_class, rename_an_image, add_a_split]
)
def test_verification_names_what_differs(folder, out, change):
    assert verify(out, folder) == verify(out)
    message = change(out, folder)
    with pytest.raises(data.DataError, match=message):
        verify(out, folder)


def test_damaged_shards_are_named(folder, out):
    file = out / Shards(str(out)).manifest.splits["train"][0].file
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(data.DataError, match=r"train/00000.arrow: size: .* bytes, shards.json promises"):
        module(out).setup("fit")
    file.write_bytes(bytes(len(content)))
    with pytest.raises(data.DataError, match=r"train/00000.arrow: it is not a shard"):
        module(out).setup("fit")
    file.unlink()
    with pytest.raises(data.DataError, match=r"train/00000.arrow: missing"):
        module(out).setup("fit")
    (out / "shards.json").write_text('{"format": 2}')
    with pytest.raises(data.DataError, match="it is not a list of shards"):
        module(out)


def test_a_disk_that_does_not_answer_is_named(out, monkeypatch):
    images = module(out)._split("train")

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shards_module, "_read_at", fails)
    with pytest.raises(data.DataError, match=r"arrow, image 3 \(ant/.*\): it cannot be read \(Input/output error\)"):
        images[3]


def test_few_files_are_open_at_once(out, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 2)
    samples = Shards(str(out)).samples("train")
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 # a listing of numbers
    contents = [samples[i][0].read() for i in (*range(COUNT), *range(0, COUNT, 7))]
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # noqa: PTH208 # a listing of numbers
    assert contents[COUNT] == contents[0]
    again = pickle.loads(pickle.dumps(samples))
    assert again._open == {}
    assert [again[i][0].read() for i in range(COUNT)] == contents[:COUNT]


def test_shards_at_an_address_are_copied_once(folder, out, tmp_path, monkeypatch):
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path / "here"))
    made = module(f"file://{out}")
    assert made.num_classes == 2
    made.prepare_data()
    assert same(epochs(made)[0], epochs(module(folder))[0])
    assert made.provenance["address"] == f"file://{out}"
    assert made.folder.is_relative_to(tmp_path / "here")
    files = {file: file.stat().st_mtime_ns for file in made.folder.rglob("*.arrow")}
    assert len(files) > 3
    module(f"file://{out}/").prepare_data()
    assert files == {file: file.stat().st_mtime_ns for file in made.folder.rglob("*.arrow")}
    change_a_byte(out, folder)
    shutil.rmtree(tmp_path / "here")
    with pytest.raises(data.DataError, match="its bytes are not those that were converted"):
        made.prepare_data()
    assert not [file for file in (tmp_path / "here").rglob("*") if file.name.startswith(".partial")]
    with pytest.raises(data.DataError, match=r"shards.json: it cannot be read"):
        module(f"file://{tmp_path}/nowhere")


def test_shards_in_an_object_store_are_copied_once(folder, out, tmp_path, monkeypatch):
    """By the calls of S3, with an address of the store's own as MinIO and others have it."""
    monkeypatch.setenv("NSLIGHTNING_DATA_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    shutil.copytree(out, tmp_path / "store/bucket/shards")
    with s3_server.Server(tmp_path / "store") as store:
        options = f"?scheme=http&endpoint_override={store.address}&region=us-east-1"
        made = module(f"s3://bucket/shards{options}")
        made.prepare_data()
        assert same(epochs(made)[0], epochs(module(folder))[0])
        files = sorted(str(file.relative_to(made.folder)) for file in made.folder.rglob("*.arrow"))
        assert sorted(set(store.seen)) == sorted(f"bucket/shards/{name}" for name in (*files, "shards.json"))
        assert store.signed == {"somebody"}
        store.seen.clear()
        module(f"s3://bucket/shards{options}").prepare_data()
        assert set(store.seen) == {"bucket/shards/shards.json"}
        with pytest.raises(data.DataError, match=r"bucket/nowhere.*shards.json: it cannot be read"):
            module(f"s3://bucket/nowhere{options}")


def test_imagenet_counts_what_shards_hold(tmp_path):
    fake_data.write_imagenet(tmp_path / "images")
    convert(tmp_path / "images", tmp_path / "shards", SMALL)
    made = data.ImageNet(str(tmp_path / "shards"), workers=0, verify=False)
    made.setup("fit")
    assert made.provenance["counts"]["train"] > 0
    assert made.provenance["shards"]
    with pytest.raises(data.DataError, match="ImageNet has 1281167 in 1000"):
        data.ImageNet(str(tmp_path / "shards")).setup("fit")


def test_without_pyarrow_the_extra_is_named(folder, out, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install nslightning\[shards\]"):
        module(out)
    assert cli.main(["shards", str(folder), str(folder.parent / "more")]) == 2
    assert "pip install nslightning[shards]" in capsys.readouterr().err
    assert not (folder.parent / "more").exists()


def test_the_command(folder, tmp_path, capsys):
    out = str(tmp_path / "shards")
    assert cli.main(["shards", str(folder), out, "--shard-mb=1", "--verify"]) == 0
    assert "40 images of train in 1 file, 20 images of val in 1 file, 2 classes, as in" in capsys.readouterr().out
    assert cli.main(["shards", out, "--verify"]) == 0
    assert "whole by their sums" in capsys.readouterr().out
    for words, message in (
        ([out], "name the folder to be made"),
        ([str(folder), out, "--shard-mb=5000"], "from 1 to 1024"),
    ):
        assert cli.main(["shards", *words]) == 2
        assert message in capsys.readouterr().err
    change_a_byte(Path(out), folder)
    assert cli.main(["shards", out, "--verify"]) == 1
    assert "sum: it is not the file" in capsys.readouterr().err
    assert cli.main(["shards", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 1
    assert "nowhere" in capsys.readouterr().err
