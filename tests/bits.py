"""Comparing tensors by their bits."""

import torch


def bits(x):
    """The bit pattern of a floating tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
