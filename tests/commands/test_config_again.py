"""A run's own config makes the run again, whatever objects Lightning's Trainer was given by it."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch
import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import lightning.pytorch.plugins
import lightning.pytorch.profilers
import lightning.pytorch.strategies
import pytest
import yaml
from lightning.pytorch import Trainer

import nslightning.callbacks
from nslightning.commands.run_callbacks import makes_again
from nslightning.commands.training_cli import Parser

KINDS = {
    "callbacks": (lightning.pytorch.callbacks, nslightning.callbacks),
    "plugins": (lightning.pytorch.plugins,),
    "logger": (lightning.pytorch.loggers,),
    "profiler": (lightning.pytorch.profilers,),
    "strategy": (lightning.pytorch.strategies,),
}
# What a class cannot do without, and what objects it may be given.
NEEDED = {
    "EarlyStopping": {"monitor": "val/loss"},
    "GradientAccumulationScheduler": {"scheduling": {4: 2}},
    "GradientDivergence": {"choices": {"relu1": {"relu": 1.0}}},
    "ModelCheckpoint": {"train_time_interval": "00:01:00"},
    "NonsmoothPatch": {"jacobians": {"relu": 1.0}},
    "OnExceptionCheckpoint": {"dirpath": "out"},
    "StepSeed": {"seed": 0},
    "RunRecord": {"config": {"a": 1}},
    "StochasticWeightAveraging": {"swa_lrs": 0.01},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
    "ZoneMonitor": {"choices": {"relu1": {"relu": 1.0}}},
    "BitsandbytesPrecision": {"mode": "nf4"},
    "MixedPrecision": {"precision": "16-mixed", "device": "cpu"},
    "FSDPPrecision": {"precision": "32-true"},
    "TensorBoardLogger": {"save_dir": "logs"},
    "CSVLogger": {"save_dir": "logs"},
    "SingleDeviceStrategy": {"device": "cpu"},
    "SingleDeviceXLAStrategy": {"device": 0},
}
# Classes that need a package which is not installed here, and a class that no config can name.
PACKAGES = {
    "DeepSpeedPrecision": "deepspeed",
    "TransformerEnginePrecision": "transformer_engine",
    "LitLogger": "litlogger",
}
BASES = {"callbacks": lightning.pytorch.Callback, "logger": lightning.pytorch.loggers.Logger}


def classes(kind: str) -> list[type]:
    settings = {}
    for module in KINDS[kind]:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) and not inspect.isabstract(value) and issubclass(value, BASES.get(kind, object)):
                settings[name] = value
    settings.pop("Callback", None)
    settings.pop("ModelPruning", None)  # the parser refuses its pruning_fn, however it is written
    return list(settings.values())


@pytest.fixture(scope="module")
def parser() -> Parser:
    made = Parser(prog="nslightning fit", exit_on_error=False)
    made.add_lightning_class_args(Trainer, "trainer")
    return made


CASES = [(kind, c) for kind in KINDS for c in classes(kind)]


@pytest.mark.parametrize(("kind", "made"), CASES, ids=[f"{kind}-{c.__name__}" for kind, c in CASES])
def test_a_dumped_config_parses_to_itself(kind, made, parser):
    package = PACKAGES.get(made.__name__)
    if package and find_spec(package) is None:
        pytest.skip(f"needs {package}, which is not installed")
    item = {"class_path": f"{made.__module__}.{made.__name__}", "init_args": NEEDED.get(made.__name__, {})}
    wanted = [item] if kind in ("callbacks", "plugins") else item
    first = parser.parse_object({"trainer": {kind: wanted}})
    text = yaml.safe_dump(makes_again(yaml.safe_load(parser.dump(first, skip_unset=False))), sort_keys=False)
    assert "Unable to serialize" not in text
    Path("config.yaml").write_text(text)
    again = parser.parse_path("config.yaml")
    dumped = makes_again(yaml.safe_load(parser.dump(again, skip_unset=False)))
    assert yaml.safe_dump(dumped, sort_keys=False) == text
