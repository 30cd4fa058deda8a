"""The warnings that the tests let pass: each is still one of another library's, and there are no others."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

# A part of each exception, the module whose call causes the warning, and words of the call.
CALLS = {
    "LeafSpec": ("lightning.pytorch.utilities._pytree", ("LeafSpec",)),
    "torch.jit.script": ("torch._decomp.decompositions_for_jvp", ("torch.jit.script(",)),
    ".grad attribute": (
        "torch._dynamo.variables.builder",
        ("hide_warnings(torch._logging._internal.safe_grad_filter)",),
    ),
    "This DataLoader will create": ("torch.utils.data.dataloader", ("suggested max number of worker",)),
    "use of fork": ("multiprocessing.popen_fork", ("os.fork(",)),
    "deprecated in v4.49.0": ("lightning.pytorch.cli", ("instantiate_classes(", "add_instantiator(", "skip_none=")),
    "only one JsonargparseDeprecationWarning": ("lightning.pytorch.cli", ("skip_none=",)),
}


def test_every_exception_is_known(repo_root):
    options = tomllib.loads((repo_root / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    first, *exceptions = options["filterwarnings"]
    assert first == "error"
    assert [[part for part in CALLS if part in line] for line in exceptions] == [[part] for part in CALLS]


@pytest.mark.parametrize(("module", "calls"), CALLS.values(), ids=CALLS)
def test_an_exception_is_needed(module, calls):
    """Where this fails, the library has mended its call: remove the line from pyproject.toml, and the case here."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text()
    assert [call for call in calls if call in source]
