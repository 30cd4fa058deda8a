"""docs/operations.md is what its generator makes; its plots are there, and are what the code returns."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nslightning import Jacobians
from nslightning.ops.record import OPERATIONS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("make_operations", DOCS / "make_operations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_code_says(generator):
    assert (DOCS / "operations.md").read_text(encoding="utf-8") == generator.page(), (
        "run: python docs/make_operations.py"
    )


def test_one_description_one_entry_one_plot(generator):
    fields = [name for name in Jacobians.__dataclass_fields__ if name != "rule"]
    assert list(OPERATIONS) == fields
    assert all(operation.example is not None for operation in OPERATIONS.values())
    assert {path.stem for path in generator.PLOTS.glob("*.svg")} == set(fields)
    for name in fields:
        assert generator.spellings(name)
        assert generator.chosen_by(name)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("relu", "norm") else pytest.mark.slow) for n in OPERATIONS]
)
def test_plots_are_current(generator, name, tmp_path):
    generator.plot(name, tmp_path / "plot.svg")
    drawn, committed = (path.read_text() for path in (tmp_path / "plot.svg", generator.PLOTS / f"{name}.svg"))
    assert drawn == committed, "run: python docs/make_operations.py"


# Parameters beside those of the example, with the function that has them.
OTHERS = {
    "leaky_relu": ((0.375,), lambda x: F.leaky_relu(x, 0.375)),
    "prelu": ((torch.tensor([-0.5]),), lambda x: F.prelu(x, torch.tensor([-0.5], dtype=x.dtype))),
    "rrelu": ((0.25, 0.75, False), lambda x: F.rrelu(x, 0.25, 0.75)),
    "hardtanh": ((-3.0, 2.0), lambda x: F.hardtanh(x, -3, 2)),
    "clamp": ((-3.0, 2.0), lambda x: x.clamp(-3, 2)),
    "hardshrink": ((1.5,), lambda x: F.hardshrink(x, 1.5)),
    "softshrink": ((1.5,), lambda x: F.softshrink(x, 1.5)),
    "threshold": ((2.0, 7.0), lambda x: F.threshold(x, 2.0, 7.0)),
    "elu": ((3.0,), lambda x: F.elu(x, 3.0)),
}


@pytest.mark.parametrize("other", [False, True], ids=["example", "other parameters"])
@pytest.mark.parametrize("name", [name for name, op in OPERATIONS.items() if all(k.sides for k in op.kinks)])
def test_the_record_tells_what_stock_returns_beside_and_at_each_kink(name, other):
    """The derivatives on both sides, the one at the kink, and whether the function jumps, from stock PyTorch alone."""
    operation = OPERATIONS[name]
    parameters, f = OTHERS.get(name, (operation.at, operation.example)) if other else (operation.at, operation.example)
    for i, (kink, position) in enumerate(zip(operation.kinks, operation.positions(*parameters) or [0.0], strict=True)):
        x = torch.tensor([position - 1e-12, position, position + 1e-12], dtype=torch.float64, requires_grad=True)
        y = f(x)
        left, at, right = torch.autograd.grad(y.sum(), x)[0].tolist()
        assert [left, right] == pytest.approx([float(side) for side in kink.sides(*parameters)], abs=1e-8)
        reference = operation.stock(*parameters)[i]
        assert at == pytest.approx(float(kink.sides(*parameters)[0]) if reference is None else reference, abs=1e-8)
        assert kink.jumps(*parameters) == bool((y[2] - y[0]).abs() > 1e-6)
