"""Private names of torch stand in one module, nslightning/_torch.py."""

import ast

import pytest

# Names with an underscore that PyTorch documents: the tree of containers, and the base of dispatch modes.
OFFERED = {"torch.utils._pytree", "torch.utils._python_dispatch"}
PREFIXES = ("_foreach_", "_fused_")  # operators, documented with the optimizers


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def private_names(source: str) -> set[str]:
    """Names of torch with a part that begins with an underscore, however they are spelled."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(dotted(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_raw_saved_"):
            names.add(f"torch.{node.value}")
    private = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "torch" and any(p.startswith("_") and not p.startswith(("__", *PREFIXES)) for p in parts[1:]):
            private.add(name)
    return {name for name in private if not any(name == o or name.startswith(o + ".") for o in OFFERED)}


@pytest.mark.parametrize(
    "source",
    ["import torch._dynamo", "from torch._C import x", "torch._C._functorch.peek()", "n = '_raw_saved_self'"],
)
def test_private_names_are_seen(source):
    assert private_names(source)


def test_what_is_offered_is_allowed():
    assert not private_names("from torch.utils._pytree import tree_map; torch._foreach_norm([]); torch.__version__")


def test_no_other_module_names_private_parts_of_torch(repo_root):
    files = [*(repo_root / "nslightning").rglob("*.py"), *(repo_root / "callbacks").rglob("*.py")]
    assert len(files) > 100
    used = {
        str(file.relative_to(repo_root)): private
        for file in files
        if file.name != "_torch.py" and (private := private_names(file.read_text()))
    }
    assert used == {}
