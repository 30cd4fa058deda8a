"""Text as files of tokens, in nanoGPT's format: ``train.bin`` and ``val.bin``, bare little-endian uint16."""

import hashlib
import json
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from nslightning.data.base import ResumableDataModule, Split
from nslightning.data.sampler import AUGMENT, Batch, Draws, generator
from nslightning.data.verify import data_error, data_folder

__all__ = ["TokenBlocks", "TokenFile", "prepare"]

TOKEN = np.dtype("<u2")
END_OF_TEXT = "<|endoftext|>"  # GPT-2's name for it
_ENCODING = Callable[[Path], NDArray[np.uint16]]


def _prepare_command(folder: Path) -> str:
    return f"nslightning tokens --text FILE... --out {folder}"


class TokenBlocks(Draws):
    """A token file cut into blocks; each block's targets are its tokens moved by one.

    For training, every epoch cuts at another place, drawn from (seed, epoch): a token is seen at most once an
    epoch, and not always at the same position of its block. The file stays on disk and only what a batch
    needs is read. Tokens at the ends that do not fill a block are left out.

    Args:
        file: The tokens, uint16.
        block_size: Tokens per block.
        vocab_size: Number of different tokens; a file with others is refused when they are met.
        seed: Seed of the cuts; None always cuts from the file's first token on, for evaluation.

    Raises:
        DataError: If the file is missing, is no file of uint16, or is too short.
    """

    in_memory: ClassVar[bool] = True  # a batch is one gather from the page cache

    def __init__(self, file: Path, block_size: int, vocab_size: int, seed: int | None = None) -> None:
        self.file, self.block_size, self.vocab_size, self.seed = file, block_size, vocab_size, seed
        fix = f"Make it from text by {_prepare_command(file.parent)}"
        if not file.is_file():
            raise data_error(file, "missing: tokens are read from it and it is not there", fix)
        size = file.stat().st_size
        if size % TOKEN.itemsize:
            raise data_error(file, f"size: {size} bytes, an odd number: not a file of uint16 tokens", fix)
        self.tokens = size // TOKEN.itemsize
        # The last target lies behind the last block; a cut may come up to block_size - 1 tokens late.
        self.blocks = (self.tokens - (1 if seed is None else block_size)) // block_size
        if self.blocks < 1:
            least = block_size + 1 if seed is None else 2 * block_size
            fix = f"Use more text, or a smaller --data.block_size. {fix}"
            raise data_error(file, f"count: {self.tokens} tokens, and one block takes {least}", fix)

    def __len__(self) -> int:
        return self.blocks

    def __getitems__(self, draws: Sequence[int]) -> Batch:
        """Read a batch.

        Args:
            draws: ``epoch * len(self) + index`` for every block.

        Returns:
            Tokens and the tokens after them, both int64 ``(N, block_size)``.

        Raises:
            DataError: If a token is not in the vocabulary.
        """
        places = (divmod(draw, len(self)) for draw in draws)
        starts = [self._cut(epoch) + index * self.block_size for epoch, index in places]
        # Read, not mapped into memory: where the disk does not answer, a map ends the process by a signal.
        try:
            with self.file.open("rb", buffering=0) as file:
                read = np.stack([self._block(file, start) for start in starts]).astype(np.int64)
        except OSError as error:
            fix = "The file may be whole: go on once its disk, or its network, answers again."
            raise data_error(self.file, f"it cannot be read ({error.strerror})", fix) from None
        if (top := int(read.max())) >= self.vocab_size:
            raise data_error(
                self.file,
                f"vocabulary: it holds the token {top}, not below vocab_size={self.vocab_size}",
                "Set --data.vocab_size to that of the tokenizer that made the file (50257 for GPT-2's).",
            )
        block = torch.from_numpy(read)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def _block(self, file: FileIO, start: int) -> NDArray[np.uint16]:
        """A block of tokens and the one after it."""
        file.seek(start * TOKEN.itemsize)
        content = file.read((self.block_size + 1) * TOKEN.itemsize)
        if len(content) != (self.block_size + 1) * TOKEN.itemsize:
            raise data_error(self.file, "size: it is shorter than at the start", "Put it back and start again.")
        return np.frombuffer(content, TOKEN)

    def _cut(self, epoch: int) -> int:
        if self.seed is None:
            return 0
        return int(torch.randint(self.block_size, (), generator=generator(AUGMENT, self.seed, epoch)))


class TokenFile(ResumableDataModule):
    """Tokenised text for a language model: ``<root>/train.bin`` and ``<root>/val.bin``, as nanoGPT has them.

    An epoch is one pass over all blocks of the training tokens, in an order that depends on (seed, epoch)
    only, and is resumed exactly. (nanoGPT draws blocks with replacement and has no epochs.) Batches are
    ``(tokens, next tokens)``: int64 ``(N, block_size)``. Validation goes through ``val.bin`` from its start,
    and is shortened by ``--trainer.limit_val_batches``.

    Args:
        root: The folder of the two files; by default openwebtext in the folder of data sets.
        block_size: Tokens per sequence.
        vocab_size: Number of different tokens; by default what ``meta.json`` beside the files says. It can be
            larger than the tokenizer's, for speed.
        batch_size: Training sequences per batch of one process.
        eval_batch_size: Sequences per batch in validation.
        workers: Processes that read tokens; served fastest with 0.
        seed: Seed of the order and of the cuts.

    Raises:
        DataError: If ``meta.json`` is needed and missing, or damaged.
        ValueError: If a number is not admissible.
    """

    name = "token_file"
    items: ClassVar[str] = "blocks of tokens"

    def __init__(
        self,
        root: str | None = None,
        block_size: int = 1024,
        vocab_size: int | None = None,
        batch_size: int = 12,
        eval_batch_size: int = 12,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, workers, seed)
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; it must be at least 1")
        self.folder: Path = data_folder() / "openwebtext" if root is None else Path(root).expanduser()
        self.block_size = block_size
        self.meta = self._read_meta()
        self.vocab_size = self._vocab_size(vocab_size)
        self.variant = "own tokens"
        self.validation = "val.bin; `test` uses the same"

    @property
    def summary(self) -> str:
        """Describe a batch in a few words.

        Returns:
            Such as ``blocks of 1024 tokens, 50257 different ones``.
        """
        return f"blocks of {self.block_size} tokens, {self.vocab_size} different ones"

    @property
    def provenance(self) -> dict[str, Any]:
        """A description of the data, with the sizes of the blocks and the vocabulary, and the maker of the files.

        Returns:
            The record.
        """
        about = {"block_size": self.block_size, "vocab_size": self.vocab_size}
        return {**super().provenance, **about, "made_from": self.meta or None}

    def _read_meta(self) -> dict[str, Any]:
        file = self.folder / "meta.json"
        if not file.is_file():
            return {}
        try:
            meta: dict[str, Any] = json.loads(file.read_text())
            int(meta["vocab_size"]), dict(meta["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            again = _prepare_command(self.folder)
            fix = f"Delete it and give --data.vocab_size, or make the files again by {again}"
            raise data_error(file, f"it cannot be read ({type(error).__name__}: {error})", fix) from None
        return meta

    def _vocab_size(self, size: int | None) -> int:
        known: int | None = self.meta.get("vocab_size")
        if size is None:
            if known is not None:
                return known
            if not self.folder.is_dir():
                fix = f"Make it from text by {_prepare_command(self.folder)}"
                raise data_error(self.folder, "missing: there is no such folder of tokens", fix)
            fix = (
                "Give --data.vocab_size: 50257 for files made with GPT-2's tokenizer, or 50304 for speed."
                f" Files made by {_prepare_command(self.folder)} come with it."
            )
            raise data_error(self.folder / "meta.json", "missing: the vocabulary's size is not known", fix)
        if not (known or 1) <= size <= 2**16:
            least = f"{known}, the tokenizer's" if known else "1"
            raise ValueError(f"vocab_size is {size}; it must be at least {least}, and at most 65536")
        return size

    def _load(self, split: Split) -> TokenBlocks:
        if split == "test":
            split = "val"
        file = self.folder / f"{split}.bin"
        blocks = TokenBlocks(file, self.block_size, self.vocab_size, self.seed if split == "train" else None)
        promised = self.meta["tokens"].get(split) if self.meta else None
        if promised not in (None, blocks.tokens):
            failed = f"size: {blocks.tokens} tokens, meta.json beside it promises {promised}"
            raise data_error(file, failed, f"Make both again by {_prepare_command(self.folder)}")
        return blocks


def prepare(texts: Sequence[Path], out: Path, tokenizer: str = "bytes", val: float = 0.1) -> dict[str, Any]:
    """Turn text files into ``train.bin``, ``val.bin`` and ``meta.json``.

    Each file is one document, followed by the end-of-text token; the last part of every file is for
    validation. A file is held in memory whole.

    Args:
        texts: The text files.
        out: The folder to be made.
        tokenizer: ``bytes`` (the file's bytes, and 256 for the end of text), or a ``tokenizer.json`` file of
            Hugging Face tokenizers, such as GPT-2's.
        val: The fraction of each file for validation.

    Returns:
        The content of ``meta.json``.

    Raises:
        DataError: If a file is missing, is not UTF-8, or there is too little text.
        ValueError: If the folder holds tokens already, or an argument is not admissible.
        ImportError: If a tokenizer file is given and tokenizers is not installed.
    """
    if not 0 < val < 1:
        raise ValueError(f"val is {val}; it must be a fraction of the text, 0 < val < 1")
    if not texts:
        raise ValueError("no text files: name at least one after --text")
    names = ("train.bin", "val.bin", "meta.json")
    if existing := [name for name in names if (out / name).exists()]:
        raise ValueError(f"{out} holds {', '.join(existing)} already: remove them, or give another --out")
    encode, about = _bytes() if tokenizer == "bytes" else _tokenizer(Path(tokenizer))
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    partial = [out / f"{name}.partial" for name in names]
    counts = {"train": 0, "val": 0}
    sources = []
    try:
        with partial[0].open("wb") as train_file, partial[1].open("wb") as val_file:
            for text in texts:
                if not text.is_file():
                    fix = "Name existing text files after --text."
                    raise data_error(text, "missing: there is no such file", fix)
                tokens = encode(text)
                kept = len(tokens) - round(val * len(tokens))
                parts = {"train": (train_file, tokens[:kept]), "val": (val_file, tokens[kept:])}
                for split, (stream, part) in parts.items():
                    stream.write(part.astype(TOKEN).tobytes())
                    counts[split] += len(part)
                digest = hashlib.sha256(text.read_bytes()).hexdigest()
                sources.append({"name": text.name, "tokens": len(tokens), "sha256": digest})
        if not all(counts.values()):
            failed = f"count: {counts['train']} training and {counts['val']} validation tokens"
            raise data_error(out, failed, "Use more text, or another --val.")
        meta = {**about, "tokens": counts, "val": val, "sources": sources}
        partial[2].write_text(json.dumps(meta, indent=2) + "\n")
        for file, name in zip(partial, names, strict=True):
            file.replace(out / name)
    except BaseException:
        for file in partial:
            file.unlink(missing_ok=True)
        if made and not any(out.iterdir()):
            out.rmdir()
        raise
    return meta


def _bytes() -> tuple[_ENCODING, dict[str, Any]]:
    def encode(file: Path) -> NDArray[np.uint16]:
        content = np.frombuffer(file.read_bytes(), np.uint8).astype(np.uint16)
        return np.append(content, np.uint16(256))

    return encode, {"tokenizer": "bytes", "vocab_size": 257, "end_of_text": 256}


def _tokenizer(file: Path) -> tuple[_ENCODING, dict[str, Any]]:
    if not file.is_file():
        fix = "Give --tokenizer bytes, or the path of a tokenizer.json file."
        raise data_error(file, "missing: there is no such tokenizer file", fix)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(
            f"a tokenizer file takes the package tokenizers, which cannot be imported ({error}):"
            " pip install nslightning[language]"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust side raises plain Exceptions
        fix = "Give a tokenizer.json file of Hugging Face tokenizers."
        raise data_error(file, f"it is not a tokenizer ({error})", fix) from None
    vocab_size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END_OF_TEXT)
    if vocab_size > 2**16:
        raise ValueError(f"{file} has {vocab_size} tokens; uint16 files hold at most 65536 different ones")

    def encode(text: Path) -> NDArray[np.uint16]:
        try:
            content = text.read_bytes().decode()
        except UnicodeDecodeError as error:
            fix = "Convert it, for instance by iconv -f LATIN1 -t UTF-8, or give --tokenizer bytes."
            raise data_error(text, f"encoding: not UTF-8 ({error})", fix) from None
        ids: list[int] = tokenizer.encode(content, add_special_tokens=False).ids
        return np.array(ids if end is None else [*ids, end], np.uint16)

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    about = {"tokenizer": file.name, "tokenizer_sha256": digest, "vocab_size": vocab_size, "end_of_text": end}
    return encode, about
