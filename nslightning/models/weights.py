"""The user's own weights: checkpoints of any training, and folders that Hugging Face's ``save_pretrained`` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nslightning.models.backbones import create_backbone

__all__ = ["HuggingFaceLogits", "is_hugging_face_folder", "load_weights", "network_of_checkpoint", "read_checkpoint"]


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint: ``.safetensors``, or what ``torch.save`` wrote, of plain data only.

    Args:
        file: The file.

    Returns:
        Its content; a bare state dict stands under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or holds no weights.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(str(file))
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged bytes raises anything
        raise ValueError(
            f"{file} cannot be read as a checkpoint of plain data ({_reason(file, error)}). Save the weights alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    for key in ("state_dict", "model", "model_state_dict"):  # Lightning's and two habits
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            return {**content, "state_dict": dict(content[key])}
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{file} holds no weights: neither a state dict nor one under 'state_dict' or 'model'")
    return {"state_dict": dict(content)}


def _reason(file: Path, error: Exception) -> str:
    """The reason why a file is no checkpoint."""
    with file.open("rb") as stream:
        start = stream.read(2)
    # A zip archive, or a pickle as torch.save wrote it before PyTorch 1.6.
    if file.suffix != ".safetensors" and start != b"PK" and not start.startswith(b"\x80"):
        return "torch.save did not write it"
    if isinstance(error, KeyError | IndexError | EOFError) or not str(error):  # how pickle stumbles
        return "it is damaged"
    return str(error).splitlines()[0]


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a network, whatever prefix a training module or a compiler gave their names.

    Args:
        network: The network.
        weights: Tensors by name; those of other parts (a loss, a metric) are left out.
        source: Name of the weights in an error, such as their file.

    Raises:
        ValueError: If a tensor of the network is missing, or has another shape.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> load_weights(layer, {"model._orig_mod.weight": torch.tensor([[2.0]])}, "example")
        >>> layer.weight.item()
        2.0
    """
    wanted = network.state_dict()
    plain = {name.replace("_orig_mod.", ""): value for name, value in weights.items()}
    first = next(iter(wanted), None)
    if first is None:
        return
    prefixes = [name[: -len(first)] for name in plain if name == first or name.endswith(f".{first}")] or [""]
    best = max(prefixes, key=lambda prefix: sum(f"{prefix}{name}" in plain for name in wanted))
    odd = [name for name, value in wanted.items() if getattr(plain.get(f"{best}{name}"), "shape", None) != value.shape]
    if odd:
        stored = plain.get(f"{best}{odd[0]}")
        fault = "is missing" if stored is None else f"has shape {tuple(stored.shape)}"
        raise ValueError(
            f"{source} holds the weights of another network: {len(odd)} of {len(wanted)} tensors differ, as {odd[0]}, "
            f"which {fault}, and is {tuple(wanted[odd[0]].shape)} here"
        )
    network.load_state_dict({name: plain[f"{best}{name}"] for name in wanted})


def network_of_checkpoint(content: Mapping[str, Any], source: str) -> tuple[nn.Module, tuple[int, ...], int]:
    """The network that a checkpoint of ``nslightning fit`` holds.

    Args:
        content: The checkpoint's content.
        source: Name of the checkpoint in an error, such as its file.

    Returns:
        The network with its weights, the shape of its images, and its number of classes.

    Raises:
        ValueError: If the checkpoint does not name a backbone.
    """
    made = content.get("hyper_parameters", {})
    if "backbone" not in made:
        raise ValueError(
            f"{source} does not say which network it holds: name the network, and the checkpoint by --weights={source}"
        )
    shape, classes = tuple(made["image_shape"]), int(made["num_classes"])
    network = create_backbone(made["backbone"], classes, shape, **(made.get("backbone_options") or {}))
    load_weights(network, content["state_dict"], source)
    return network, shape, classes


def is_hugging_face_folder(name: str) -> bool:
    """Return whether a name is a folder that ``save_pretrained`` wrote.

    Args:
        name: A path.

    Returns:
        True where it holds a ``config.json``.
    """
    return Path(name, "config.json").is_file()


class HuggingFaceLogits(nn.Module):
    """A Hugging Face model from a local folder, as a function from its input to logits.

    Args:
        folder: A folder that ``save_pretrained`` wrote. Nothing is downloaded.

    Attributes:
        image_shape: (channels, height, width) where it takes images, else None.
        vocab_size: Number of tokens where it takes text, else None.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the folder names no architecture that transformers has.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ImportError(
                f"a Hugging Face folder needs transformers ({error}): pip install 'nslightning[huggingface]'"
            ) from error
        names = json.loads(Path(folder, "config.json").read_text(encoding="utf-8")).get("architectures") or []
        cls = getattr(transformers, names[0], None) if names else None
        if cls is None:
            raise ValueError(
                f"{folder}/config.json names {names[0] if names else 'no architecture'}, which transformers "
                f"{transformers.__version__} does not have; use package.module:factory, which makes it in your own code"
            )
        self.model = cls.from_pretrained(folder, local_files_only=True)
        config = self.model.config
        self.image_shape: tuple[int, int, int] | None = None
        self.vocab_size: int | None = None
        if self.model.main_input_name == "pixel_values":
            size = getattr(config, "image_size", None) or 224
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            self.image_shape = (int(getattr(config, "num_channels", 3)), int(height), int(width))
        elif self.model.main_input_name == "input_ids":
            self.vocab_size = int(config.get_text_config().vocab_size)
        else:
            raise ValueError(f"{folder} takes {self.model.main_input_name}; an audit takes images or text")

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, or predict tokens.

        Args:
            x: Images of shape (N, C, H, W), or token ids of shape (N, T).

        Returns:
            Logits of shape (N, K), or (N, K, T) where there is one per token.

        Raises:
            ValueError: If the model returns no logits.
        """
        output = self.model(**{self.model.main_input_name: x})
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise ValueError(f"{type(self.model).__name__} returns no logits: take a model with a head")
        return logits.transpose(1, 2) if logits.dim() == 3 else logits
