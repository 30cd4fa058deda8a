"""A device that was asked for and is not here; a training that is meant for one."""

import pytest
import torch
from jsonargparse import Namespace

from nslightning.cli import main
from nslightning.commands.devices import check_accelerator, check_device
from nslightning.commands.endings import CallError
from nslightning.commands.trainer_options import say_what_hangs, say_what_is_slow


@pytest.fixture
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("name", ["gpu", "cuda", "mps"])
def test_a_gpu_that_is_not_here(name, capsys):
    status = main(["fit", "--config", "configs/quickstart.yaml", f"--trainer.accelerator={name}"])
    error = capsys.readouterr().err.partition("nslightning fit: error: ")[2]
    assert status == 2
    assert error.startswith(f"--trainer.accelerator={name}: there is no such device here")
    assert "--trainer.accelerator=auto takes what there is, cpu the processor" in error
    assert len(error.splitlines()) == 1


@pytest.mark.usefixtures("_no_gpu")
def test_what_is_here_is_taken():
    for name in ("auto", "cpu", None):
        check_accelerator(name)
    check_device("cpu")
    with pytest.raises(CallError, match=r"--device=cuda:99 is not here\. There is cpu"):
        check_device("cuda:99")
    with pytest.raises(CallError, match=r"is not an accelerator; did you mean 'cuda'\? There are: auto, cpu"):
        check_accelerator("cdua")


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize(
    ("precision", "network", "dev_run", "said"),
    [
        ("16-mixed", "timm/resnet50", False, True),
        ("16-mixed", "paper/lenet5", False, False),
        ("32-true", "timm/resnet50", False, False),
        ("16-mixed", "timm/resnet50", True, False),
    ],
)
def test_a_large_network_in_half_precision_without_a_gpu(precision, network, dev_run, said, recwarn):
    trainer = Namespace(accelerator="auto", precision=precision, fast_dev_run=dev_run)
    say_what_is_slow(trainer, network)
    assert [("timm/resnet50 in 16-mixed" in str(w.message)) for w in recwarn] == [True] * said
    for w in recwarn:
        assert "--trainer.precision=" in str(w.message)


@pytest.mark.parametrize(
    ("environment", "warns"),
    [
        ({}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}, False),
    ],
)
def test_restarts_that_may_hang_are_said(environment, warns, monkeypatch, recwarn):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    say_what_hangs()
    assert ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(w.message) for w in recwarn] == [True] * warns
