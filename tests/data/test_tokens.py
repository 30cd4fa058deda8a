"""Token files: what is in a batch, exact resume, preparation from text, and errors that say what mends them."""

import json
import pydoc_data.topics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nslightning.commands import tokens as command
from nslightning.data import DataError, TokenFile
from nslightning.data.tokens import TokenBlocks, prepare

BLOCK = 16


def write(folder, train=1000, val=200, vocab_size=257):
    """Token i of a file is i modulo something prime: its place can be read off it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("val", val)):
        (np.arange(count) % 251).astype("<u2").tofile(folder / f"{name}.bin")
    if vocab_size:
        meta = {"vocab_size": vocab_size, "tokens": {"train": train, "val": val}}
        (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def module(folder, **options):
    return TokenFile(str(folder), **{"block_size": BLOCK, "batch_size": 4, "eval_batch_size": 3} | options)


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


# ----------------------------------------------------------------------------------------- what is in a batch
def test_targets_are_the_next_tokens_of_the_file(tmp_path):
    data = module(write(tmp_path))
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for x, y in loader:
            assert x.dtype == y.dtype == torch.int64
            assert x.shape[1] == BLOCK
            assert torch.equal((x + 1) % 251, y)


def test_validation_goes_through_the_file_once_from_its_start(tmp_path):
    data = module(write(tmp_path))
    x = torch.cat([x for x, _ in data.val_dataloader()])
    # 199 tokens have a next one: 12 whole blocks.
    assert torch.equal(x.flatten(), torch.arange(12 * BLOCK))
    assert torch.equal(x, torch.cat([x for x, _ in data.test_dataloader()]))


@pytest.mark.parametrize("number", range(5))
def test_an_epoch_sees_each_token_at_most_once_and_leaves_out_few(number, tmp_path):
    """Against the file read by hand: the blocks are consecutive pieces of it, in another order."""
    (tmp_path / "train.bin").write_bytes(np.arange(1000, dtype="<u2").tobytes())
    (tmp_path / "val.bin").write_bytes(np.arange(100, dtype="<u2").tobytes())
    batches = epoch(module(tmp_path, vocab_size=1000, batch_size=7), number)
    x = torch.cat([x for x, _ in batches]).flatten()
    assert len(x.unique()) == len(x)
    first = int(x.min())
    assert first < BLOCK
    assert torch.equal(x.sort().values, torch.arange(first, first + len(x)))
    assert 1000 - len(x) < 2 * BLOCK  # the ends


def test_epochs_cut_and_shuffle_differently(tmp_path):
    data = module(write(tmp_path))
    firsts = {int(torch.cat([x for x, _ in epoch(data, n)])[:, 0].sort().values[0]) for n in range(8)}
    assert len(firsts) > 1
    orders = {tuple(torch.cat([x for x, _ in epoch(data, n)])[:, 0].tolist()) for n in range(8)}
    assert len(orders) == 8


def test_batches_depend_on_seed_epoch_and_position_only(tmp_path):
    write(tmp_path)
    torch.manual_seed(1)
    one = epoch(module(tmp_path), 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = epoch(module(tmp_path, workers=2), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for p, q in zip(one, two, strict=True) for a, b in zip(p, q, strict=True))
    other = epoch(module(tmp_path, seed=1), 3)
    assert not all(torch.equal(p[0], q[0]) for p, q in zip(one, other, strict=True))


def test_a_batch_can_be_told_without_reading_what_comes_before(tmp_path):
    """Item 7 of epoch 2 by the formula in the class's words: cut(seed, epoch) + index * block_size."""
    write(tmp_path)
    blocks = TokenBlocks(tmp_path / "train.bin", BLOCK, 257, seed=5)
    together, _ = blocks.__getitems__([2 * len(blocks) + i for i in range(len(blocks))])
    alone, _ = blocks[2 * len(blocks) + 7]
    assert torch.equal(alone, together[7])
    assert int(alone[0]) == (int(together[0, 0]) + 7 * BLOCK) % 251


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_an_epoch(world, tmp_path):
    class Place:
        world_size = world
        strategy = SimpleNamespace(root_device=torch.device("cpu"))

        def __init__(self, rank):
            self.global_rank = rank

    write(tmp_path, train=2000)
    shares = []
    for rank in range(world):
        data = module(tmp_path, batch_size=2)
        data.trainer = Place(rank)
        loader = data.train_dataloader()
        loader.trainer = None
        shares.append([x for x, _ in loader])
    alone = [x for x, _ in epoch(module(tmp_path, batch_size=2 * world))]
    for step, parts in enumerate(zip(*shares, strict=True)):
        union = torch.stack(parts, 1).flatten(0, 1)
        assert torch.equal(union, alone[step][: len(union)])


# --------------------------------------------------------------------------------------------- exact resume
class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = {}

    def training_step(self, batch, batch_idx):
        self.seen[self.current_epoch, batch_idx] = batch[0].clone()
        return self.weight * batch[0].float().mean()

    def validation_step(self, batch, batch_idx):
        """Nothing: the data are what is tested."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(folder, data, *callbacks, **options):
    model = Recorder()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), logger=False,
        enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, data, weights_only=False, **options)
    return model


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path.")  # the rest is trained without saving
def test_resume_in_the_middle_of_an_epoch(tmp_path):
    write(tmp_path)
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(tmp_path, module(tmp_path), keep)
    per_epoch = len(whole.seen) // 3
    resumed = fit(tmp_path, module(tmp_path), ckpt_path=tmp_path / f"kept/epoch=1-step={per_epoch + 4}.ckpt")
    expected = {key: x for key, x in whole.seen.items() if key >= (1, 4)}
    assert resumed.seen.keys() == expected.keys()
    assert all(torch.equal(resumed.seen[key], expected[key]) for key in expected)
    assert torch.equal(resumed.weight, whole.weight)


# -------------------------------------------------------------------------------------------------- errors
def refused(data, file, check, fix):
    with pytest.raises(DataError) as caught:
        data.setup("fit")
    first, second = str(caught.value).split("\n")
    assert first.startswith(f"{file}: {check}"), first
    assert fix in second, second


COMMAND = "nslightning tokens --text FILE... --out"


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"missing: there is no such folder") as caught:
        module(tmp_path / "none")
    assert COMMAND in str(caught.value)
    refused(module(tmp_path / "none", vocab_size=9), tmp_path / "none/train.bin", "missing: tokens", COMMAND)


def test_vocabulary_not_known(tmp_path):
    write(tmp_path, vocab_size=None)
    with pytest.raises(DataError, match=r"meta.json: missing: the vocabulary's size is not known") as caught:
        module(tmp_path)
    assert "--data.vocab_size: 50257" in str(caught.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_odd_size(split, tmp_path):
    write(tmp_path)
    with (tmp_path / f"{split}.bin").open("ab") as file:
        file.write(b"\0")
    size = 2 * {"train": 1000, "val": 200}[split] + 1
    refused(module(tmp_path), tmp_path / f"{split}.bin", f"size: {size} bytes, an odd number", COMMAND)


def test_another_size_than_meta_promises(tmp_path):
    write(tmp_path)
    np.arange(900, dtype="<u2").tofile(tmp_path / "train.bin")
    refused(module(tmp_path), tmp_path / "train.bin", "size: 900 tokens, meta.json beside it promises 1000", COMMAND)


@pytest.mark.parametrize(("train", "val", "split", "least"), [(31, 200, "train", 32), (1000, 16, "val", 17)])
def test_too_short(train, val, split, least, tmp_path):
    write(tmp_path, train, val)
    count = {"train": train, "val": val}[split]
    check = f"count: {count} tokens, and one block takes {least}"
    refused(module(tmp_path), tmp_path / f"{split}.bin", check, "--data.block_size")
    write(tmp_path, max(train, 32), max(val, 17))
    data = module(tmp_path)
    data.setup("fit")
    assert min(data.provenance["counts"].values()) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"vocab_size": "many", "tokens": {}}', '{"vocab_size": 3}'])
def test_damaged_meta(content, tmp_path):
    write(tmp_path)
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DataError, match=r"meta.json: it cannot be read") as caught:
        module(tmp_path)
    assert COMMAND in str(caught.value)


def test_a_token_outside_the_vocabulary(tmp_path):
    write(tmp_path, vocab_size=None)
    with pytest.raises(DataError, match=r"train.bin: vocabulary: it holds the token \d+, not below vocab_size=100"):
        epoch(module(tmp_path, vocab_size=100))


def test_impossible_numbers(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="block_size is 0; it must be at least 1"):
        module(tmp_path, block_size=0)
    with pytest.raises(ValueError, match="vocab_size is 256; it must be at least 257, the tokenizer's"):
        module(tmp_path, vocab_size=256)
    with pytest.raises(ValueError, match="at most 65536"):
        module(tmp_path, vocab_size=65537)
    assert module(tmp_path, vocab_size=320).vocab_size == 320


# ---------------------------------------------------------------------------------------- preparation
def corpus(folder):
    """The language reference that comes with Python: 400 kB of English and code, one file per topic."""
    folder.mkdir()
    files = []
    for name, text in pydoc_data.topics.topics.items():
        file = folder / f"{name}.txt"
        file.write_text(text, encoding="utf-8")
        files.append(file)
    return files


def test_python_s_own_documentation_becomes_bytes(tmp_path, capsys):
    files = corpus(tmp_path / "text")
    assert command.main(["tokens", "--text", *map(str, files), "--out", str(tmp_path / "out"), "--val", "0.2"]) == 0
    assert "vocabulary 257" in capsys.readouterr().out
    data = module(tmp_path / "out", block_size=64)
    data.setup("fit")
    assert data.vocab_size == 257
    assert data.provenance["made_from"]["tokenizer"] == "bytes"
    read = {split: np.fromfile(tmp_path / f"out/{split}.bin", "<u2") for split in ("train", "val")}
    total = sum(file.stat().st_size + 1 for file in files)
    assert len(read["train"]) + len(read["val"]) == total > 300_000
    assert len(read["val"]) / total == pytest.approx(0.2, abs=1e-3)
    assert (read["train"] == 256).sum() + (read["val"] == 256).sum() == len(files)
    # The first document, put together again from its two parts.
    first = files[0].read_bytes()
    end = int(np.flatnonzero(read["val"] == 256)[0])
    kept = len(first) - end
    assert bytes(read["train"][:kept].tolist()) + bytes(read["val"][:end].tolist()) == first


@pytest.mark.skipif(find_spec("tokenizers") is None, reason="tokenizers, of the extra `language`, is not installed")
def test_a_tokenizer_file(tmp_path):
    """A byte-pair tokenizer trained here, GPT-2's kind: decoding the files gives the text back."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    files = corpus(tmp_path / "text")
    trained = ByteLevelBPETokenizer()
    trained.train([str(f) for f in files[:20]], vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save(str(tmp_path / "bpe.json"))
    meta = prepare(files[:5], tmp_path / "out", str(tmp_path / "bpe.json"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "bpe.json"))
    assert meta["vocab_size"] == tokenizer.get_vocab_size() == 600
    assert meta["end_of_text"] == tokenizer.token_to_id("<|endoftext|>")
    read = {split: np.fromfile(tmp_path / f"out/{split}.bin", "<u2") for split in ("train", "val")}
    end = int(np.flatnonzero(read["val"] == meta["end_of_text"])[0])
    first = tokenizer.encode(files[0].read_text(encoding="utf-8")).ids
    assert [*read["train"][: len(first) - end], *read["val"][:end]] == first
    assert tokenizer.decode(first) == files[0].read_text(encoding="utf-8")
    data = module(tmp_path / "out")
    data.setup("fit")
    assert data.vocab_size == 600


def test_what_prepare_refuses_leaves_nothing_behind(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text, long enough to be split")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"b.txt: missing"):
        prepare([text, tmp_path / "b.txt"], out)
    with pytest.raises(ValueError, match=r"val is 1\.5"):
        prepare([text], out, val=1.5)
    with pytest.raises(ValueError, match="no text files"):
        prepare([], out)
    with pytest.raises(DataError, match="no such tokenizer file"):
        prepare([text], out, str(tmp_path / "gpt2.json"))
    text.write_text("a")
    with pytest.raises(DataError, match="count: 2 training and 0 validation tokens"):
        prepare([text], out)
    assert not out.exists()


def test_prepare_does_not_overwrite(tmp_path, capsys):
    write(tmp_path)
    before = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "a.txt").write_text("text" * 100)
    with pytest.raises(ValueError, match=r"holds train.bin, val.bin, meta.json already"):
        prepare([tmp_path / "a.txt"], tmp_path)
    assert command.main(["tokens", "--text", str(tmp_path / "a.txt"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"nslightning tokens: error: {tmp_path} holds")
    assert (tmp_path / "train.bin").read_bytes() == before


@pytest.mark.skipif(find_spec("tokenizers") is None, reason="tokenizers, of the extra `language`, is not installed")
def test_text_that_is_not_utf8_and_a_file_that_is_no_tokenizer(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    latin = tmp_path / "latin.txt"
    latin.write_bytes("déjà".encode("latin-1"))
    ByteLevelBPETokenizer().save(str(tmp_path / "bpe.json"))
    with pytest.raises(DataError, match=r"latin.txt: encoding: not UTF-8") as caught:
        prepare([latin], tmp_path / "out", str(tmp_path / "bpe.json"))
    assert "iconv" in str(caught.value)
    with pytest.raises(DataError, match=r"latin.txt: it is not a tokenizer"):
        prepare([latin], tmp_path / "out", str(latin))
    assert not (tmp_path / "out").exists()


def test_the_command_that_errors_name_runs(tmp_path):
    (tmp_path / "a.txt").write_text("a text of some length, for both files\n" * 10)
    words = [sys.executable, "-m", "nslightning", "tokens", "--text", "a.txt", "--out", "out"]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert sorted(f.name for f in Path(tmp_path, "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]
