"""Models of the zoo that take other inputs than a batch of images, made from configurations, without network.

Each entry of :data:`MODELS` builds a small model, in the mode that it is measured in, and what one call of it takes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, optical_flow, segmentation, video

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def images(*shape: int) -> Tensor:
    """Random images, the last of them black."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    x[-1] = 0
    return x


# ---------------------------------------------------------------------------------------------------- Hugging Face
def _hugging_face(name: str, inputs: Callable[[], dict[str, Any]], **settings: Any) -> Callable[[], Built]:
    """A model of transformers from a small configuration."""

    def build() -> Built:
        transformers = importlib.import_module("transformers")
        model = getattr(transformers, name)
        return model(model.config_class(**settings)).eval(), (), inputs()

    return build


def _words(**more: int) -> dict[str, Any]:
    tokens = torch.arange(1, 15).view(2, 7)
    return {"input_ids": tokens, **{name: tokens % n for name, n in more.items()}}


def _pixels(size: int = 64) -> dict[str, Any]:
    return {"pixel_values": images(2, 3, size, size)}


_BERT = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
_BART = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
}  # fmt: skip
_T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
HUGGING_FACE = {
    "T5": _hugging_face(
        "T5ForConditionalGeneration", lambda: _words(labels=30), decoder_start_token_id=0, pad_token_id=0, **_T5
    ),
    "OPT": _hugging_face(
        "OPTForCausalLM", _words, vocab_size=32, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16,
    ),
    "BERT": _hugging_face("BertForSequenceClassification", _words, hidden_act="relu", **_BERT),
    "GPT-2": _hugging_face(
        "GPT2LMHeadModel", _words, vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2,
        activation_function="relu",
    ),
    "BART": _hugging_face("BartForConditionalGeneration", _words, activation_function="relu", **_BART),
    "Llama": _hugging_face("LlamaForCausalLM", _words, hidden_act="relu", num_key_value_heads=2, **_BERT),
    "Funnel": _hugging_face(
        "FunnelForSequenceClassification", _words, vocab_size=32, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8,
        d_inner=32, hidden_act="relu", pooling_type="max",
    ),
    "Segformer": _hugging_face(
        "SegformerForSemanticSegmentation", _pixels, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
        hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "ResNet": _hugging_face("ResNetForImageClassification", _pixels, layer_type="basic", **_RESNET),
    "RegNet": _hugging_face("RegNetForImageClassification", _pixels, groups_width=4, **_RESNET),
    "MobileNetV2": _hugging_face("MobileNetV2ForImageClassification", _pixels, depth_multiplier=0.25),
    "LeViT": _hugging_face(
        "LevitForImageClassification", _pixels, image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 1, 2],
        depths=[1, 1, 1], key_dim=[8, 8, 8],
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- PyTorch Geometric
class Graph(nn.Module):
    """Two layers on the nodes of a graph, with a ReLU between them."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.act, self.other = one, nn.ReLU(), other

    def forward(self, *args: Tensor) -> Tensor:
        """Run both layers on features, and whatever else they take."""
        x, *rest = args
        y: Tensor = self.other(self.act(self.one(x, *rest)), *rest)
        return y


def _edges() -> Tensor:
    """Six nodes in a ring, with a few chords."""
    ring = [(i, (i + 1) % 6) for i in range(6)]
    return torch.tensor([*ring, *((b, a) for a, b in ring), (0, 3), (1, 4)]).T


def _geometric(make: Callable[[Any], tuple[nn.Module, nn.Module]], places: bool = False) -> Callable[[], Built]:
    """A graph network of torch_geometric."""

    def build() -> Built:
        layers = importlib.import_module("torch_geometric.nn")
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).round()
        where = (torch.randn(6, 3, generator=torch.Generator().manual_seed(1)),) if places else ()
        return Graph(*make(layers)), (x, *where, _edges()), {}

    return build


GEOMETRIC = {
    "SAGEConv": _geometric(lambda g: (g.SAGEConv(4, 8, aggr="max"), g.SAGEConv(8, 2, aggr="max"))),
    "GATConv": _geometric(lambda g: (g.GATConv(4, 8), g.GATConv(8, 2))),
    "EdgeConv": _geometric(
        lambda g: (
            g.EdgeConv(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), aggr="max"),
            g.EdgeConv(nn.Sequential(nn.Linear(16, 2), nn.ReLU()), aggr="max"),
        )
    ),
    "PointNetConv": _geometric(
        lambda g: (
            g.PointNetConv(nn.Sequential(nn.Linear(7, 8), nn.ReLU())),
            g.PointNetConv(nn.Sequential(nn.Linear(11, 2), nn.ReLU())),
        ),
        places=True,
    ),
}


# ------------------------------------------------------------------------------------------------------ torchvision
_BARE: dict[str, Any] = {"weights": None, "weights_backbone": None}


def _segmentation(name: str) -> Callable[[], Built]:
    return lambda: (getattr(segmentation, name)(**_BARE, num_classes=3).eval(), (images(2, 3, 64, 64),), {})


def _detection(name: str) -> Callable[[], Built]:
    """A detector in training mode, where it returns its losses."""

    def build() -> Built:
        model = getattr(detection, name)(**_BARE, num_classes=3, min_size=64, max_size=64)
        boxes = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
        return model.train(), ([images(3, 64, 64)], [boxes]), {}

    return build


def _flow() -> Built:
    return optical_flow.raft_small(weights=None).eval(), (images(1, 3, 128, 128), images(1, 3, 128, 128).flip(-1)), {}


def _video() -> Built:
    return video.r3d_18(weights=None, num_classes=3).eval(), (images(2, 3, 4, 32, 32),), {}


TORCHVISION = {
    "segmentation": {
        name: _segmentation(name)
        for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
    },
    "detection": {
        name: _detection(name) for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn")
    },
    "optical flow": {"raft_small": _flow},
    "video": {"r3d_18": _video},
}
#: The functions that build a model, by its family and its name.
MODELS: dict[tuple[str, str], Callable[[], Built]] = {
    **{("transformers", name): build for name, build in HUGGING_FACE.items()},
    **{("torch_geometric", name): build for name, build in GEOMETRIC.items()},
    **{(f"torchvision/{kind}", name): build for kind, some in TORCHVISION.items() for name, build in some.items()},
}
