"""The names that are checked before PyTorch is loaded: they are those of the networks and the data sets."""

import subprocess
import sys

import pytest

from nslightning import data, names
from nslightning.data import ImageDataModule, ImageFolder
from nslightning.models import paper


def test_the_networks():
    assert sorted(names.PAPER_NETWORKS) == sorted(paper.NETWORKS)


def test_the_data_sets():
    classes = [getattr(data, name) for name in data.__all__]
    images = [c for c in classes if isinstance(c, type) and issubclass(c, ImageDataModule)]
    needing_no_folder = {c.__name__ for c in images} - {ImageDataModule.__name__, ImageFolder.__name__}
    assert sorted(names.DATA_SETS) == sorted(needing_no_folder)


@pytest.mark.parametrize("typed", [["paper/lenet"], ["papr/lenet5"], ["paper/lenet5", "--data", "MNSIT"]])
def test_a_typo_is_noticed_without_pytorch(typed):
    code = "import sys; from nslightning.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code, "audit", *typed], capture_output=True, text=True, check=True)
    assert ended.stdout == "2 False\n"
    assert "did you mean" in ended.stderr
