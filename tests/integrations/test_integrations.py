"""Other people's training loops: Hugging Face's Trainer, Accelerate, a loop as timm's script has it."""

import json
import runpy

import pytest
import torch
from torch import nn

from nslightning import Jacobians, patch
from nslightning.exact_csv import read_exactly
from nslightning.probes import divergence
from nslightning.probes.measured_backward import measured_backward
from nslightning.surgery import selections

ONE = {"relu1": Jacobians(relu=1.0)}
X = torch.arange(32.0).reshape(16, 2) - 8


def network():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, -1.0], [0.0, 1.0], [-1.0, 1.0]]))
        net[0].bias.copy_(torch.tensor([0.0, 1.0, 0.0, -1.0]))
        net[2].weight.copy_(torch.tensor([[1.0, -1.0, 0.5, 2.0], [0.5, 1.0, -1.0, 1.0]]))
        net[2].bias.zero_()
    return net


def test_the_backward_of_a_loop_is_measured_and_left_as_it_was():
    plain, watched = network(), network()
    patch(plain, Jacobians())
    patch(watched, Jacobians())
    loss = plain(X).logsumexp(1).mean()
    expected = divergence(loss, plain, ONE)["relu1"]
    loss.backward()
    with measured_backward(watched, ONE) as measured:
        watched(X).logsumexp(1).mean().backward()
        second = watched(X).sum()  # only the first backward is measured
        second.backward()
    assert measured["relu1"].norms() == pytest.approx(expected.norms(), rel=1e-6)
    assert expected.l2 > 0.1
    watched.zero_grad()
    with measured_backward(watched, ONE):
        watched(X).logsumexp(1).mean().backward()
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_graph_that_the_loop_keeps_stays():
    net = network()
    patch(net, Jacobians())
    with measured_backward(net, ONE) as measured:
        loss = net(X).logsumexp(1).mean()
        loss.backward(retain_graph=True)
    assert measured["relu1"].l2 > 0
    loss.backward()


def test_a_model_without_a_patch_or_with_a_random_choice_is_refused():
    net = network()
    with pytest.raises(ValueError, match="Sequential is not patched"), measured_backward(net, ONE):
        pass
    patch(net, Jacobians(relu="random"))
    with pytest.raises(ValueError, match="another choice at each backward"), measured_backward(net, ONE):
        pass


EXAMPLES = ["plain_pytorch.py", "accelerate_loop.py", "timm_loop.py", "hugging_face_trainer.py"]


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run_and_measure_something(example, repo_root, capsys, monkeypatch):
    if example in ("accelerate_loop.py", "hugging_face_trainer.py"):
        pytest.importorskip("accelerate", reason="needs the extra huggingface: accelerate")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runpy.run_path(str(repo_root / "examples" / example), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("relative divergence")]
    assert lines
    assert float(lines[-1].rpartition(" ")[2]) > 0


def test_every_example_is_tested(repo_root):
    assert sorted(f.name for f in (repo_root / "examples").glob("*.py")) == sorted(EXAMPLES)


# ------------------------------------------------------------------------------------------------- transformers
transformers = pytest.importorskip("transformers", reason="needs the extra huggingface: transformers")


class Classifier(nn.Module):
    """A model as Trainer takes it: returns its loss."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels):
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(folder, *callbacks, model=None, resume=None, **options):
    pytest.importorskip("accelerate", reason="needs the extra huggingface: accelerate")
    model = model or Classifier()
    data = [{"x": x, "labels": int(i % 2)} for i, x in enumerate(X)]
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True}
    settings |= {"save_strategy": "no"} | options
    args = transformers.TrainingArguments(
        str(folder), disable_tqdm=True, learning_rate=0.1, optim="sgd", seed=0, **settings
    )
    trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_trainer_is_patched_and_measured(tmp_path):
    from nslightning.integrations.transformers import NonsmoothTrainerCallback

    plain, _ = train(tmp_path / "plain")
    reference = NonsmoothTrainerCallback(choices=ONE, every_n_steps=2)
    watched, trainer = train(tmp_path / "watched", reference)
    assert same(plain, watched)
    assert selections(watched)
    other, _ = train(tmp_path / "other", NonsmoothTrainerCallback(Jacobians(relu=1.0)))
    assert not same(plain, other)

    rows = read_exactly(tmp_path / "watched" / "divergence.csv")
    assert rows["step"].tolist() == [0, 2]
    assert rows["reference"].tolist() == ["native"] * 2
    assert rows["l2"].max() > 0
    assert [e["step"] for e in trainer.state.log_history if "divergence/relu1/relative" in e] == [0, 2]
    report = json.loads((tmp_path / "watched" / "patch_report.json").read_text())
    assert [(s["name"], s["operation"]) for s in report["sites"]] == [("net.1", "relu")]

    again, _ = train(tmp_path / "again", reference, model=watched)
    reference.unpatch()
    assert not selections(again)


def test_a_table_has_the_rows_of_one_training(tmp_path):
    """A second training in the folder begins a table; one that goes on writes its steps again."""
    from nslightning.integrations.transformers import NonsmoothTrainerCallback

    def steps(name):
        return read_exactly(tmp_path / name)["step"].tolist()

    train(tmp_path, NonsmoothTrainerCallback(choices=ONE, every_n_steps=2), save_strategy="steps", save_steps=3)
    assert steps("divergence.csv") == [0, 2]
    train(tmp_path, NonsmoothTrainerCallback(choices=ONE, every_n_steps=1))
    assert (steps("divergence.1.csv"), steps("divergence.csv")) == ([0, 2], [0, 1, 2, 3])
    once_more = NonsmoothTrainerCallback(choices=ONE, every_n_steps=1)
    train(tmp_path, once_more, resume=str(tmp_path / "checkpoint-3"), max_steps=5)
    assert steps("divergence.csv") == [0, 1, 2, 3, 4]


def test_mixed_precision_is_taken_off_before_the_patch(tmp_path):
    from nslightning.integrations.transformers import NonsmoothTrainerCallback

    callback = NonsmoothTrainerCallback(choices=ONE)
    with pytest.raises(ValueError, match="has patched no model yet"):
        callback.unpatch()
    model, _ = train(tmp_path, callback, bf16=True, max_steps=1)
    callback.unpatch()
    assert not selections(model)
    assert "forward" not in model.__dict__
    assert model(X, torch.zeros(16, dtype=torch.long))["logits"].dtype == torch.float32


def test_accumulated_batches_and_a_model_made_later(tmp_path):
    from nslightning.integrations.transformers import NonsmoothTrainerCallback

    pytest.importorskip("accelerate", reason="needs the extra huggingface: accelerate")
    callback = NonsmoothTrainerCallback(choices=ONE, every_n_steps=1)
    plain, _ = train(tmp_path / "plain", gradient_accumulation_steps=2, max_steps=2)
    watched, _ = train(tmp_path / "watched", callback, gradient_accumulation_steps=2, max_steps=2)
    assert same(plain, watched)
    assert read_exactly(tmp_path / "watched" / "divergence.csv")["step"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="every_n_steps is a number of steps from 1 on"):
        NonsmoothTrainerCallback(every_n_steps=0)
