"""A trained network as a folder of a model hub: safetensors, a config, a model card; and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nslightning.files import replacing, write_text
from nslightning.models.backbones import create_backbone
from nslightning.models.weights import network_of_checkpoint, read_checkpoint
from nslightning.surgery import PatchReport, Plan, patch

__all__ = ["load_hub_folder", "write_hub_folder"]

_CONFIG, _WEIGHTS, _CARD = "config.json", "model.safetensors", "README.md"

#: The hyperparameters that a network is made from.
_NETWORK = ("backbone", "backbone_options", "num_classes", "image_shape")


def write_hub_folder(checkpoint: Path, folder: Path, run: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    """Write the folder.

    Args:
        checkpoint: A checkpoint of ``nslightning fit``.
        folder: The folder to write; files of an earlier call in it are replaced, others stay.
        run: The run's record. The card has its settings and versions.
        metrics: The metrics that the run logged at this checkpoint's step, by name.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint does not say which network it holds, and under which choice; if the folder has
            files of these names that another program wrote.
    """
    from safetensors.torch import save_file

    content = read_checkpoint(checkpoint)
    network, _, _ = network_of_checkpoint(content, str(checkpoint))
    note = content.get("nslightning")
    if note is None:
        raise ValueError(f"{checkpoint} does not say under which Jacobian choice it was trained")
    _refuse_foreign(folder)
    made = content["hyper_parameters"]
    config = {
        "library_name": "nslightning",
        **{name: made.get(name) for name in _NETWORK},
        **{name: note[name] for name in ("jacobians", "sites", "fingerprint", "torch")},
    }
    report = _patched(network, config)
    # A copy of each: tied weights share memory, which the format refuses.
    weights = {name: value.detach().clone().contiguous() for name, value in network.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / _WEIGHTS) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    write_text(folder / _CONFIG, json.dumps(config, indent=1) + "\n")
    write_text(folder / _CARD, _card(config, report, run, metrics))


def _refuse_foreign(folder: Path) -> None:
    """Raise rather than overwrite a file that an earlier call did not write."""
    present = [name for name in (_CARD, _CONFIG, _WEIGHTS) if (folder / name).exists()]
    if present and not _is_own(folder / _CONFIG):
        raise ValueError(
            f"{folder} has {' and '.join(present)}, which nslightning push did not write: name another folder"
        )


def _is_own(config: Path) -> bool:
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("library_name") == "nslightning"


def load_hub_folder(folder: str | Path) -> nn.Module:
    """The network of a folder that :func:`write_hub_folder` wrote, under its choice, in evaluation mode.

    Args:
        folder: The folder. Nothing that it names is run: backbones are those of the libraries, weights are plain data.

    Returns:
        The patched network.

    Raises:
        ValueError: If the folder holds something else, or the weights of another network.
        FileNotFoundError: If a file is missing.
    """
    from nslightning.models.weights import load_weights

    folder = Path(folder)
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    if config.get("library_name") != "nslightning":
        raise ValueError(f"{folder} was not written by nslightning push: {_CONFIG} does not name it")
    shape = tuple(config["image_shape"])
    network = create_backbone(config["backbone"], config["num_classes"], shape, **(config["backbone_options"] or {}))
    load_weights(network, read_checkpoint(folder / _WEIGHTS)["state_dict"], str(folder))
    _patched(network, config)
    return network.eval()


def _patched(network: nn.Module, config: Mapping[str, Any]) -> PatchReport:
    from nslightning.jacobians import Jacobians

    choice: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config["jacobians"].items()
    }
    plan = Plan([Jacobians(**choice), *config["sites"]])
    return patch(network, plan, example=torch.zeros(2, *config["image_shape"]))


def _card(config: Mapping[str, Any], report: PatchReport, run: Mapping[str, Any], metrics: Mapping[str, float]) -> str:
    from nslightning.runs import segments

    last = next(reversed(segments(run)), None)
    lines = ["---", "library_name: nslightning", "tags: [image-classification, nonsmooth-autodiff]", "---", ""]
    lines += [
        f"# {config['backbone']}",
        "",
        f"{config['num_classes']} classes, images of shape {config['image_shape']}.",
    ]
    lines += ["", "## Metrics", "", "| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    lines += ["", "## Jacobian choice", "", "```json", json.dumps(config["jacobians"]), "```", ""]
    lines += ["## Patched sites", "", "```", str(report), "```", "", "## Provenance", ""]
    if last is not None:
        facts = {**last.settings, **last.versions, "git": last.git, "started": last.started}
        lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Use", "", "```python", "from nslightning.models.hub import load_hub_folder", ""]
    lines += ['network = load_hub_folder("FOLDER")', "```", ""]
    return "\n".join(lines)
