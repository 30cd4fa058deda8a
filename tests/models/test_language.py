"""LanguageModel: GPT-2 without downloads, its losses, its parameter groups, and the Jacobian choice where it kinks."""

import math
import pydoc_data.topics
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nslightning import Jacobians, using
from nslightning.callbacks import GradientDivergence, TieMonitor
from nslightning.data import TokenFile
from nslightning.data.tokens import prepare
from nslightning.models.language import SIZES, LanguageModel
from nslightning.optim import INNAprop, WarmupCosine
from nslightning.surgery import PatchWarning

pytestmark = [
    pytest.mark.skipif(
        find_spec("transformers") is None, reason="transformers, of the extra `language`, is not installed"
    ),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log..`"),  # of a step without a trainer
    pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path."),  # without the callback that saved
]
TINY = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def tiny(**options):
    settings = {"vocab_size": 257, "block_size": 32, "activation": "relu", "config": TINY}
    return LanguageModel("mini", **settings | options)


def batch(count=3, length=32, seed=0):
    tokens = torch.randint(257, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Python's language reference as bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "topics.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    prepare([text], folder / "tokens")
    return folder / "tokens"


def data(corpus, **options):
    return TokenFile(str(corpus), **{"block_size": 32, "batch_size": 8, "eval_batch_size": 8} | options)


def trainer(folder, *callbacks, **options):
    settings = {"max_steps": 4, "limit_val_batches": 2, "enable_checkpointing": False, "logger": False}
    return Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **settings | options,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the network
@pytest.mark.parametrize(
    ("size", "layers", "width", "parameters"),
    [("mini", 6, 384, None), ("small", 12, 768, 124_439_808), ("medium", 24, 1024, 354_823_168)],
)
def test_sizes(size, layers, width, parameters):
    """GPT-2's published sizes (124M and 355M), counted by hand: nothing is allocated."""
    assert (SIZES[size][0], SIZES[size][2]) == (layers, width)
    assert width % SIZES[size][1] == 0
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", PatchWarning)  # gelu: nothing to patch
        from nslightning.models.language import _gpt2

        network = _gpt2(size, 50257, 1024, "gelu_new", 0.0, {})
    count = sum(p.numel() for p in network.parameters())
    block = 12 * width**2 + 13 * width  # two norms, attention (4 d^2 + 4 d) and two layers (8 d^2 + 5 d)
    assert count == 50257 * width + 1024 * width + layers * block + 2 * width
    assert parameters in (None, count)


def test_logits_see_the_past_only():
    model = tiny().eval()
    x, _ = batch(1)
    changed = x.clone()
    changed[0, 20] = (x[0, 20] + 1) % 257
    before, after = model(x), model(changed)
    assert torch.equal(before[0, :20], after[0, :20])
    assert not torch.equal(before[0, 20:], after[0, 20:])


def test_the_same_seed_gives_the_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(tiny().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


def test_an_untrained_model_knows_nothing():
    """GPT-2's initial weights are so small that all tokens are about as likely: the loss is log(257)."""
    torch.manual_seed(0)
    assert tiny().training_step(batch(), 0).item() == pytest.approx(math.log(257), abs=0.05)


# --------------------------------------------------------------------------------------------------- losses
def test_loss_against_a_sum_by_hand():
    model = tiny().double()
    x, y = batch(2, 5)
    log_p = torch.log_softmax(model(x), -1)
    by_hand = -sum(log_p[n, t, y[n, t]] for n in range(2) for t in range(5)) / 10
    torch.testing.assert_close(model.training_step((x, y), 0), by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_is_computed_in_float32_under_autocast(dtype):
    model = tiny()
    x, y = batch()
    with torch.autocast("cpu", dtype):
        logits, loss = model(x), model.training_step((x, y), 0)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_logged_losses_are_means_over_tokens(corpus, tmp_path):
    """Also where the last batch is smaller than the others; the perplexity is the mean's exponential."""
    model, module = tiny(), data(corpus, eval_batch_size=300)
    run = trainer(tmp_path, limit_val_batches=1.0)
    (metrics,) = run.validate(model, module, verbose=False)
    module.setup("validate")
    batches = list(module.val_dataloader())
    assert len({len(x) for x, _ in batches}) > 1
    model.eval()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(x).double().flatten(0, 1), y.flatten(), reduction="sum")
            for x, y in batches
        ]
    mean = sum(losses).item() / sum(y.numel() for _, y in batches)
    assert metrics["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    (test,) = run.test(model, module, verbose=False)
    assert test["test/loss"] == pytest.approx(mean, rel=1e-5)


def test_predict_gives_the_next_token_s_probabilities():
    model = tiny().eval()
    x, y = batch()
    probabilities = model.predict_step((x, y), 0)
    assert probabilities.shape == (3, 257)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    assert torch.equal(probabilities.argmax(1), model(x)[:, -1].argmax(1))


# --------------------------------------------------------------------------------- optimizer and schedule
def test_only_the_linear_layers_matrices_decay():
    model = tiny(optimizer=lambda p: torch.optim.AdamW(p, weight_decay=0.1))
    optimizer = model.configure_optimizers()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    expected = {
        f"network.transformer.h.{i}.{layer}.weight"
        for i in range(2)
        for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert decayed == expected
    assert decayed | rest == set(names.values())  # every parameter once; the output layer is the embedding


def test_the_scheduler_is_stepped_by_the_optimizer_s_steps(corpus, tmp_path):
    rates = []

    class Rated(LanguageModel):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure=None):
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            rates.append(optimizer.param_groups[0]["lr"])

    model = Rated(
        "mini", 257, 32, "relu", config=TINY,
        optimizer=lambda p: INNAprop(p, lr=1.0), lr_scheduler=lambda o: WarmupCosine(o, 6, 2, final=0.1),
    )  # fmt: skip
    trainer(tmp_path, max_steps=8, accumulate_grad_batches=2).fit(model, data(corpus))
    by_hand = [0, 0.5, *(0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in range(5)), 0.1]
    assert rates == pytest.approx(by_hand, rel=1e-12)


def test_a_plateau_scheduler_watches_the_validation(corpus, tmp_path):
    model = tiny(lr_scheduler=lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0))
    configured = model.configure_optimizers()["lr_scheduler"]
    assert (configured["interval"], configured["monitor"]) == ("epoch", "val/loss")
    trainer(tmp_path, max_steps=-1, max_epochs=2, limit_train_batches=2).fit(model, data(corpus))


@pytest.mark.parametrize(("warmup", "total"), [(3, 3), (-1, 3), (0, 0)])
def test_impossible_schedules(warmup, total):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with pytest.raises(ValueError, match=rf"warmup is {warmup} of {total} steps"):
        WarmupCosine(optimizer, total, warmup)
    with pytest.raises(ValueError, match=r"final is 1\.5"):
        WarmupCosine(optimizer, 3, final=1.5)
    with pytest.raises(ValueError, match=r"start is -1"):
        WarmupCosine(optimizer, 3, start=-1)


def test_warm_up_from_a_fraction():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    schedule = WarmupCosine(optimizer, 12, 4, start=0.2)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_a_schedule_goes_on_from_its_state():
    def made():
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
        return optimizer, WarmupCosine(optimizer, 9, 3, 0.2, 0.1)

    (optimizer, whole), (other, resumed) = made(), made()
    for step in range(9):
        if step == 4:
            other.load_state_dict(optimizer.state_dict())
            resumed.load_state_dict(whole.state_dict())
        for schedule in (whole, resumed)[: 1 + (step >= 4)]:
            schedule.optimizer.step()
            schedule.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


# ----------------------------------------------------------------------------------------- Jacobian choices
def test_the_forward_is_transformers_own():
    from transformers import GPT2LMHeadModel

    model = tiny(jacobians=Jacobians(relu=1.0)).eval()
    stock = GPT2LMHeadModel(model.network.config).eval()
    stock.load_state_dict(model.network.state_dict())
    x, _ = batch()
    assert torch.equal(model(x), stock(x).logits)


@pytest.mark.parametrize(
    ("activation", "operation", "how"),
    [("relu", "relu", "module"), ("relu2", "relu", "functional"), ("relu6", "relu6", "module"),
     ("leaky_relu", "leaky_relu", "module")],
)  # fmt: skip
def test_kinks_are_reached_in_every_block(activation, operation, how):
    report = tiny(activation=activation).patch_report
    assert [(site.operation, site.how) for site in report.sites] == [(operation, how)] * 2


def test_gelu_has_nothing_to_patch():
    with pytest.warns(PatchWarning, match="nothing to patch"):
        model = tiny(activation="gelu_new")
    assert not model.patch_report.sites


def test_relu_s_derivative_at_zero_against_a_gradient_by_hand():
    """A block whose hidden layer is exactly 0: its weights' gradient is alpha times that of the identity."""
    torch.manual_seed(0)
    model = tiny().double()
    mlp = model.network.transformer.h[0].mlp
    with torch.no_grad():
        mlp.c_fc.weight.zero_()  # with its zero bias, every hidden unit is a tie
    inputs, outputs = [], []
    mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    mlp.register_forward_hook(lambda _, args, output: outputs.append(output))
    loss = model.training_step(batch(2, 6), 0)
    gradients = {}
    for alpha in (0.0, 0.5, 1.0):
        with using(model, Jacobians(relu=alpha)):
            (gradients[alpha],) = torch.autograd.grad(loss, mlp.c_fc.weight, retain_graph=True)
    assert gradients[0.0].abs().max() == 0
    (upstream,) = torch.autograd.grad(loss, outputs[0])
    by_hand = inputs[0].flatten(0, 1).T @ (upstream @ mlp.c_proj.weight.T).flatten(0, 1)
    assert by_hand.abs().max() > 0
    for alpha in (0.5, 1.0):
        torch.testing.assert_close(gradients[alpha], alpha * by_hand, rtol=1e-10, atol=1e-15)


def test_training_on_python_s_documentation_learns_and_is_measured(corpus, tmp_path):
    """Bytes of English are far from uniform: a few dozen steps get well below log(257)."""
    torch.manual_seed(0)
    model = tiny(optimizer=lambda p: INNAprop(p, lr=1e-2, weight_decay=0.1))
    measured = GradientDivergence({"relu1": Jacobians(relu=1.0)}, every_n_steps=20)
    run = trainer(tmp_path, measured, TieMonitor(20), max_steps=60, precision="bf16-mixed")
    run.fit(model, data(corpus))
    (metrics,) = run.validate(model, data(corpus), verbose=False)
    assert metrics["val/loss"] < 4.0 < math.log(257)
    rows = np.genfromtxt(tmp_path / "divergence.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert set(rows["step"].tolist()) == {0, 20, 40}


def test_resume_gives_the_same_weights(corpus, tmp_path):
    """Also through the optimizer's and the schedule's state."""

    def made():
        torch.manual_seed(0)
        return tiny(optimizer=lambda p: INNAprop(p, lr=1e-2), lr_scheduler=lambda o: WarmupCosine(o, 8, 2, final=0.1))

    whole, first, resumed = made(), made(), made()
    trainer(tmp_path, max_steps=6).fit(whole, data(corpus))
    keep = ModelCheckpoint(tmp_path, "half", every_n_train_steps=3)
    trainer(tmp_path, keep, max_steps=4, enable_checkpointing=True).fit(first, data(corpus))
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert content["nslightning"]["jacobians"]["relu"] == 0.0
    assert content["nslightning"]["optimizer"] == "INNAprop"
    trainer(tmp_path, max_steps=6).fit(resumed, data(corpus), ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_choice_is_named(corpus, tmp_path):
    model = tiny(jacobians=Jacobians(relu=1.0))
    run = trainer(tmp_path, max_steps=1)
    run.fit(model, data(corpus))
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = LanguageModel.load_from_checkpoint(tmp_path / "one.ckpt", optimizer=torch.optim.AdamW)
    assert again.jacobians == Jacobians(relu=1.0)
    assert torch.equal(again.network.transformer.wte.weight, model.network.transformer.wte.weight)
    with pytest.warns(PatchWarning, match=r"made under relu=1\.0, and this run has relu=0\.0"):
        trainer(tmp_path, max_steps=2).fit(tiny(), data(corpus), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.slow  # the C++ compiler takes most of a minute
@torch._functorch.config.patch(donated_buffer=False)  # the backward runs twice
def test_compiled_gradients_follow_the_choice():
    torch.manual_seed(0)
    eager, compiled = tiny(), tiny(compile=True)
    compiled.load_state_dict(eager.state_dict())
    compiled.network.compile()  # as `setup` does under a trainer
    for model in (eager, compiled):
        with torch.no_grad():
            model.network.transformer.h[0].mlp.c_fc.weight.zero_()
    losses = [model.training_step(batch(2, 6), 0) for model in (eager, compiled)]
    for alpha in (0.0, 1.0):
        recorded = []
        for model, loss in zip((eager, compiled), losses, strict=True):
            with using(model, Jacobians(relu=alpha)):
                weight = model.network.transformer.h[0].mlp.c_fc.weight
                recorded.append(torch.autograd.grad(loss, weight, retain_graph=True)[0])
        torch.testing.assert_close(*recorded, rtol=1e-4, atol=1e-7)
        assert bool(recorded[0].any()) == bool(alpha)


# -------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "smal"}, "size is 'smal'; it is one of mini, small, medium"),
        ({"activation": "relu_"}, "there is no activation 'relu_'; did you mean 'relu"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"block_size": 0}, "block_size is 0"),
        ({"dropout": 1.0}, r"dropout is 1\.0; it must be a probability"),
        ({"config": {"n_layers": 2}}, "no field 'n_layers'; did you mean 'n_layer'"),
        ({"config": {"n_embd": 10, "n_head": 4}}, "n_embd=10 must be a multiple of n_head=4"),
        ({"compile": True, "jacobians": Jacobians(max_pool="random")}, "cannot be compiled"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(**{"config": TINY} | options)


def test_sequences_that_are_too_long():
    with pytest.raises(ValueError, match="sequences of 33 tokens are longer than block_size=32"):
        tiny()(torch.zeros(1, 33, dtype=torch.long))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install nslightning\[language\]"):
        tiny()
