"""What a run measured, in words, and for every logger."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from test_callbacks_shared import RELU1, Net, Skips, batches, train

from nslightning import Jacobians, patch, unpatch
from nslightning.callbacks import GradientDivergence, LossWatch
from nslightning.callbacks.verdict import divergence_in_words


def words(precision, **choices):
    rows = [{"choice": name, "relative": value} for name, values in choices.items() for value in values]
    return divergence_in_words(pd.DataFrame(rows), precision)


def test_words_are_the_numbers():
    lines = words("bf16-mixed", relu1=[0.0] * 4, beta10=[0.0, 0.04, 0.05, 0.14], sum=[float("nan"), 0.5, 12.5, 13.0])
    assert lines[:4] == [
        "relu1: exactly the same gradient on 4 of 4 steps",
        "beta10: another gradient on 3 of 4 steps; it differs by 5 % (median; at most 14 %) in bf16",
        "sum: not finite on 1 of 4 steps",
        "sum: another gradient on 3 of 4 steps; it differs by 12.5 times (median; at most 13 times) in bf16",
    ]
    assert lines[4].startswith("why: bf16 keeps 8 bits of a number")
    assert len(lines) == 5


def test_the_least_difference_is_another_gradient():
    assert words("64-true", tiny=[1e-18])[0].startswith("tiny: another gradient on 1 of 1 step")


def test_rounding_is_called_rounding():
    lines = words("32-true", beta10=[1e-8, 3e-8, 2e-8])
    assert lines[0] == "beta10: another gradient on 3 of 3 steps; it differs by 2e-08 (median; at most 3e-08) in fp32"
    assert "with 24 bits" in lines[1]
    assert "rounding" in lines[1]
    assert words("32-true", a=[0.0]) == ["a: exactly the same gradient on 1 of 1 step"]
    assert len(words("32-true", a=[0.3])) == 1  # a true difference needs no word about rounding


def test_the_choice_that_trains_is_named_where_it_is_not_pytorchs():
    rows = pd.DataFrame({"choice": ["relu1", "beta10"], "relative": [0.0, 0.05]})
    assert divergence_in_words(rows, "bf16-mixed", "max_pool=minimal")[:2] == [
        "relu1: exactly the gradient that trains (max_pool=minimal) on 1 of 1 step",
        "beta10: another gradient on 1 of 1 step; it differs by 5 % (median; at most 5 %) in bf16 "
        "from the gradient that trains (max_pool=minimal)",
    ]
    assert divergence_in_words(rows, "bf16-mixed", "native") == divergence_in_words(rows, "bf16-mixed")


def test_the_end_of_a_training_with_another_choice_names_it(tmp_path, caplog):
    module = Net()
    unpatch(module)
    patch(module, Jacobians(relu=1.0))
    train(tmp_path, GradientDivergence({"stock": Jacobians()}, 1), module=module, loader=batches(1))
    assert " in fp32 from the gradient that trains (relu=1)\n" in caplog.text


class Noted(TensorBoardLogger):
    """TensorBoard's logger, which notes what it is given instead of writing it."""

    def __init__(self, folder):
        self.folder, self.given = str(folder), {}
        self.writer = SimpleNamespace(
            add_text=lambda name, text, step: self.given.update({name: text}),
            add_image=lambda name, pixels, step, dataformats: self.given.update({name: pixels}),
        )

    name = version = ""
    log_dir = save_dir = root_dir = property(lambda self: self.folder)
    experiment = property(lambda self: self.writer)

    def log_metrics(self, metrics, step=None):
        self.given.update(metrics)

    def log_hyperparams(self, *_, **__):
        pass

    log_graph = save = finalize = log_hyperparams


@pytest.mark.filterwarnings("ignore:The number of training batches")  # six
def test_the_end_of_a_training_says_what_it_measured_and_shows_it(tmp_path, caplog):
    choices = RELU1 | {"same": Jacobians()}
    train(tmp_path, GradientDivergence(choices, 1), logger=(logger := Noted(tmp_path)))
    text = caplog.text
    assert "same: exactly the same gradient on 6 of 6 steps" in text
    assert "relu1: another gradient on 6 of 6 steps; it differs by" in text
    assert f"figure: {tmp_path / 'divergence.png'}" in text
    head, _, *lines = logger.given["divergence/per_layer"].splitlines()
    assert head.startswith("| step | choice | parameter | l1 |")
    assert len(lines) == 6 * len(choices) * 3  # steps, choices, parameters
    assert logger.given["divergence/figure"].shape[2] == 3
    assert logger.given["divergence/relu1/l2"] > 0


def test_a_choice_that_changes_nothing_changes_nothing(tmp_path):
    trainer = train(tmp_path, GradientDivergence({"same": Jacobians()}, 1))
    assert trainer.callback_metrics["divergence/same/relative"] == torch.tensor(0.0)


def test_a_loss_that_is_not_finite_is_told_at_the_end(tmp_path, recwarn):
    watch = LossWatch()
    train(tmp_path / "a", watch, loader=batches(bad=3))
    (warning,) = [str(w.message) for w in recwarn if "not finite" in str(w.message)]
    assert "on 3 of 6 batches, at step 3 first" in warning  # the weights are not finite afterwards
    assert "NonFiniteGuard" in warning
    recwarn.clear()
    train(tmp_path / "b", watch)
    train(tmp_path / "c", watch, module=Skips())
    assert not [w for w in recwarn if "not finite" in str(w.message)]
