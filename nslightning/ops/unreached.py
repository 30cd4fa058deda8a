"""Nonsmooth functions of PyTorch that no operation has a choice for: named by the surgery, never passed over."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SMOOTH", "UNREACHED", "UNSUPPORTED_FUNCTIONS", "UNSUPPORTED_MODULES"]

#: Smooth functions that PyTorch composes of kinks: their derivatives at these cancel.
SMOOTH: frozenset[Callable] = frozenset((F.softsign,))  # x / (1 + |x|)

_RANKED = (
    "no choice yet: PyTorch ranks equal entries in its own order, and the result names the index of the one that "
    "it takes"
)
_ROOT = "PyTorch computes it with a root, whose derivative at 0 is infinite; ops.norm_pool2d is p = 2 with a choice"
UNREACHED: dict[str, str] = {
    **dict.fromkeys(("median", "nanmedian", "kthvalue", "topk", "sort", "msort", "quantile", "nanquantile"), _RANKED),
    **dict.fromkeys(("cummax", "cummin"), "no choice yet: each result is a separate maximum"),
    **dict.fromkeys(("lp_pool1d", "lp_pool2d", "lp_pool3d"), _ROOT),
    "norm": "p-norms are reached for 1 <= p < inf; with p = inf two kinks meet, and a matrix norm is a singular value",
    "normalize": "reached for 1 <= p < inf",
    "dist": "reached for 1 <= p < inf without autocast",
    "pairwise_distance": "reached for 1 <= p < inf",
    "cdist": "one kernel computes its norms",
    "multilabel_margin_loss": "one kernel computes its hinges, one for each pair of classes",
    "triplet_margin_with_distance_loss": "the caller brings the function that computes its distances",
}
_NAMES = {"vector_norm": "norm", "linalg_norm": "norm"}
UNSUPPORTED_MODULES: dict[type[nn.Module], str] = {
    nn.LPPool1d: "lp_pool1d", nn.LPPool2d: "lp_pool2d", nn.LPPool3d: "lp_pool3d",
    nn.MultiLabelMarginLoss: "multilabel_margin_loss", nn.PairwiseDistance: "pairwise_distance",
    nn.TripletMarginWithDistanceLoss: "triplet_margin_with_distance_loss",
}  # fmt: skip
UNSUPPORTED_FUNCTIONS: dict[Callable, str] = {
    f: _NAMES.get(name, name)
    for name in (
        *UNREACHED, *UNSUPPORTED_MODULES.values(), "vector_norm",
    )
    for home in (F, torch, Tensor, torch.linalg)
    for spelling in (name, f"{name}_")
    if (f := getattr(home, spelling, None)) is not None
}  # fmt: skip
