"""Whole models under the oracle: Hugging Face, PyTorch Geometric, segmentation, detection, optical flow, video.

Patched with the reference choice a model does what stock does, bit for bit; under another choice its gradients are what
the oracle below autograd says, except where it has a kink that no choice reaches: that is named.
"""

import copy
import importlib
import warnings

import pytest
import torch
from oracle import OTHER, Oracle
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nslightning import Jacobians, patch, using

families = importlib.import_module("benchmarks.families")

# No unit of theirs meets its kink: a hardswish's, or that of a ReLU behind weights without dead units.
UNTIED = ("GPT-2", "LeViT", "Llama")
# It makes its coordinates in float32.
SINGLE = ("raft_small",)

pytestmark = pytest.mark.slow


def run(model, args, kwargs):
    """The floating tensors that a model returns."""
    torch.manual_seed(1)
    output = model(*args, **kwargs)
    output = dict(output) if hasattr(output, "keys") else output
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def gradients(model, outputs, **options):
    loss = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in outputs if x.grad_fn)
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, **options)


def build(name):
    torch.manual_seed(0)
    return families.MODELS[name]()


@pytest.mark.parametrize("name", families.MODELS, ids=" ".join)
def test_a_model_does_as_in_stock_and_as_the_oracle_says(name):
    model, args, kwargs = build(name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1 and not p.any():  # branches that start at 0 would stop every gradient
                p.normal_(std=0.1)
            if p.dim() > 1 or key.endswith("bias"):  # dead units, which tie wherever a ReLU follows
                p[::3] = 0
    if name[1] not in SINGLE:
        model, (args, kwargs) = model.double(), tree_map(_double, (args, kwargs))
    patched = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one with nothing to patch is a row, not a warning
        report = patch(patched, Jacobians(), strict=False)
    stock = copy.deepcopy(model)
    reference, ours = run(stock, args, kwargs), run(patched, args, kwargs)
    assert len(ours) > 0
    assert all(map(torch.equal, reference, ours))
    expected, ours_by_name = gradients(stock, reference), gradients(patched, ours, retain_graph=True)
    assert [g is None for g in ours_by_name] == [g is None for g in expected]
    assert all(torch.equal(a, b) for a, b in zip(expected, ours_by_name, strict=True) if a is not None)
    assert any(g is not None and bool(g.any()) for g in ours_by_name)

    with Oracle() as oracle:
        outputs = run(model, args, kwargs)
    unexplained = {node.name() for node in oracle.attach(outputs)}
    named = {site.operation for site in report.unreached}
    if unexplained:
        assert named, f"{unexplained} is not named"
    expected = gradients(model, outputs)
    with using(patched, OTHER):
        chosen = gradients(patched, ours)
    moved = 0
    for a, b, g in zip(expected, chosen, ours_by_name, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close = 1e-9 if a.dtype == torch.float64 else 1e-4  # sums over windows that overlap round otherwise
            moved += int(not torch.equal(a, g))
            torch.testing.assert_close(b, a, rtol=close, atol=close * float(a.abs().max()))
    assert (moved > 0) == (name[1] not in UNTIED)  # elsewhere the oracle had something to say


def _double(x):
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
