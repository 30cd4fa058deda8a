"""A Jacobian choice is one word, its fields or a preset, wherever a command or a model takes one."""

import pytest
import yaml

from nslightning import Jacobians
from nslightning.commands.config_parser import HelpfulErrors
from nslightning.models import ImageClassifier, Twins

JAX = Jacobians.preset("jax")


class Taker:
    def __init__(self, jacobians: Jacobians = Jacobians(), choices: dict[str, Jacobians] | None = None):  # noqa: B008 # a frozen default
        self.jacobians, self.choices = jacobians, choices


def given(*words, content=None, tmp_path=None):
    parser = HelpfulErrors()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Taker, "model")
    if content is not None:
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
        words = (f"--config={tmp_path / 'a.yaml'}", *words)
    return parser.instantiate(parser.parse_args(list(words))).model


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        (["--model.jacobians=jax"], JAX),
        (["--model.jacobians", "jax"], JAX),
        (["--model.jacobians=relu=1,max_pool=minimal,relu6=[0,1]"], Jacobians(1.0, (0.0, 1.0), max_pool="minimal")),
        (["--model.jacobians=relu=1", "--model.jacobians.max_pool=10"], Jacobians(relu=1.0, max_pool=10.0)),
        (['--model.jacobians={"relu": 1}'], Jacobians(relu=1.0)),
    ],
)
def test_a_word_on_the_command_line(words, choice):
    assert given(*words).jacobians == choice


def test_words_in_a_config(tmp_path):
    content = {"model": {"jacobians": "jax", "choices": {"a": "tensorflow", "b": "relu=1", "c": {"relu": 0.5}}}}
    model = given(content=content, tmp_path=tmp_path)
    assert model.jacobians == JAX
    assert model.choices == {"a": Jacobians.preset("tensorflow"), "b": Jacobians(relu=1.0), "c": Jacobians(relu=0.5)}
    assert given("--model.jacobians.relu=1", content=content, tmp_path=tmp_path).jacobians.relu == 1


@pytest.mark.parametrize(
    ("word", "said"), [("jaxx", "did you mean 'jax'"), ("rely=1", "did you mean 'relu'"), ("relu6=1", "two numbers")]
)
def test_a_wrong_word_is_one_line(word, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        given(f"--model.jacobians={word}")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        given(content={"model": {"jacobians": word}}, tmp_path=tmp_path)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_models_take_words():
    assert ImageClassifier("paper/lenet5", jacobians="jax").jacobians == JAX
    assert ImageClassifier("paper/lenet5", jacobians={"relu": 1}).jacobians == Jacobians(relu=1.0)
    twins = Twins({"a": "jax", "b": {"relu": 1}}, backbone="paper/lenet5", control=False)
    assert [twin.jacobians for twin in twins.named_twins().values()] == [JAX, Jacobians(relu=1.0)]
