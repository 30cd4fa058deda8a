"""The surroundings of every test: its own folder to write into, and a process like a fresh one."""

import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

# torch is imported inside the fixtures: collecting the tests stays quick.

# Tensors are tiny here: more threads than one only wait for each other, in the processes that tests start as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
# A developer's W&B account, launcher or seed must not reach the tests.
FOREIGN_PREFIXES = ("WANDB_", "SLURM_", "PL_", "TORCHELASTIC_", "MASTER_")
FOREIGN_NAMES = {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `cuda` where there is no CUDA device."""
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: torch.cuda.is_available() is False")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the cases of `aminmax` where this PyTorch has no derivative of it."""
    named = [item for item in items if "aminmax" in item.name.lower()]
    if not named:
        return
    from torch_samples import no_derivative_of_aminmax

    if why := no_derivative_of_aminmax():
        for item in named:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout, for tests that read its files: the working directory is a temporary one."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real data sets; a test still has to skip when its own data set is absent there."""
    if not (folder := os.environ.get("NSLIGHTNING_DATA_DIR")):
        pytest.skip("needs real data: set NSLIGHTNING_DATA_DIR to the folder that holds it")
    if not Path(folder).is_dir():
        pytest.skip(f"needs real data: NSLIGHTNING_DATA_DIR={folder} is not a folder")
    return Path(folder)


@pytest.fixture(autouse=True)
def _own_folder_and_environment(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Run in a temporary folder, offline, and take back what the test does to the environment variables."""
    before = dict(os.environ)
    for name in before:
        if name in FOREIGN_NAMES or name.startswith(FOREIGN_PREFIXES):
            monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp()
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("NETRC", str(home / "no-netrc"))  # where wandb would find a developer's API key
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    yield
    monkeypatch.undo()
    now = os.environ.get("PYTEST_CURRENT_TEST")  # pytest's own, which it removes itself
    os.environ.clear()
    os.environ.update(before | ({"PYTEST_CURRENT_TEST": now} if now else {}))


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """Start every test from one random state; take back torch's process-wide settings and process group."""
    import numpy as np
    import torch

    settings = [
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        *(
            (partial(getattr, torch.backends.cudnn, flag), partial(setattr, torch.backends.cudnn, flag))
            for flag in ("benchmark", "deterministic")
        ),
    ]
    before = [get() for get, _ in settings]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the legacy global state is what has to be the same
    torch.manual_seed(0)
    yield
    for (get, put), value in zip(settings, before, strict=True):
        if get() != value:
            put(value)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # Not a test's untidiness but a bug of the code: a mode left active reaches every later call.
    left = torch._C._len_torch_function_stack()
    for _ in range(left):
        torch.overrides._pop_mode()
    assert left == 0, f"{left} TorchFunctionMode left active"
