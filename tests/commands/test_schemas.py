"""The JSON schemas: what is packaged fits them, mistakes do not, and an editor finds them."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from nslightning import configs
from nslightning.cli import main
from nslightning.commands.schema import schema

FOLDER = Path(configs.__file__).parent
FILES = sorted(FOLDER.rglob("*.yaml"))


@pytest.fixture(scope="module")
def validators() -> dict[str, jsonschema.Draft202012Validator]:
    """Of the packaged schemas."""
    made = {}
    for kind in ("config", "experiment"):
        content = json.loads((FOLDER / "schemas" / f"{kind}.json").read_text(encoding="utf-8"))
        jsonschema.Draft202012Validator.check_schema(content)
        made[kind] = jsonschema.Draft202012Validator(content)
    return made


def kind_of(file: Path) -> str:
    return "experiment" if file.parent.name == "experiments" else "config"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(FOLDER).as_posix())
def test_packaged_files_fit_and_name_their_schema(file, validators):
    text = file.read_text(encoding="utf-8")
    validators[kind_of(file)].validate(yaml.safe_load(text))
    named = re.search(r"^# yaml-language-server: \$schema=(.*)$", text, re.MULTILINE)
    assert named is not None
    assert (file.parent / named[1]).resolve() == (FOLDER / "schemas" / f"{kind_of(file)}.json").resolve()


OPTIMIZER = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
GOOD = {
    "a preset": {"model": {"backbone": "paper/lenet5", "jacobians": "jax"}},
    "fields": {"model": {"jacobians": {"relu": 1, "relu6": [0, 1], "max_pool": "minimal"}}},
    "a bare name": {"model": {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}}},
    "the user's own class": {"trainer": {"callbacks": [{"class_path": "mine.Watch", "init_args": {"x": 1}}]}},
    "the user's own module": {"model": {"class_path": "mine.Net"}, "data": {"class_path": "mine.Data"}},
    "text": {"task": "text", "model": {"size": "mini"}},
    "W&B's own": {"trainer": {"logger": {"class_path": "WandbLogger", "dict_kwargs": {"group": "a"}}}},
}
BAD = {
    "a mistyped option": {"model": {"backbne": "paper/lenet5"}},
    "a mistyped field": {"model": {"jacobians": {"rleu": 1}}},
    "a name that is none": {"model": {"jacobians": {"max_pool": "minmal"}}},
    "a word for a number": {"trainer": {"max_epochs": "many"}},
    "a mistyped argument": {"trainer": {"callbacks": [{"class_path": "TieMonitor", "init_args": {"every_n_step": 2}}]}},
    "another group": {"modle": {}},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_fit_takes_fits(name, validators):
    validators["config"].validate(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_mistakes_do_not_fit(name, validators):
    assert not validators["config"].is_valid(BAD[name])


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "tain"},
        {"fixed": {"epoch": 3}},
        {"fixed": {"epochs": "three"}},
        {"fixed": {"epochs": 0}},
        {"vary": {"relu": 1}},
        {"scales": {"medium": {}}},
        {"scales": {"smoke": {"vary": {"max_pool": ["minmal"]}}}},
        {"note": 3},
    ],
)
def test_mistakes_in_experiments_do_not_fit(change, validators):
    good = {"kind": "train", "fixed": {"backbone": "paper/fc"}, "vary": {"relu": [0, 1]}, "scales": {"smoke": None}}
    validators["experiment"].validate(good)
    assert not validators["experiment"].is_valid(good | change)


def test_settings_are_described():
    """By the words of the docstrings."""
    described = schema("experiment")["$defs"]["twins"]["properties"]
    assert all(setting.get("description") for setting in described.values())
    assert described["momentum"]["description"] == "Momentum of ``sgd``."


def plain(node):
    """A schema without what says nothing: pydantic 2.9 leaves some of it out, and writes a constant twice."""
    if isinstance(node, list):
        return [plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    idle = {"enum"} if "const" in node else set()
    idle |= {"additionalProperties"} if node.get("additionalProperties") is True else set()
    return {key: plain(value) for key, value in node.items() if key not in idle}


@pytest.mark.parametrize("kind", ["config", "experiment"])
def test_the_packaged_schemas_are_of_this_source(kind, repo_root):
    """Other versions of torch or Lightning have other classes: only what is this package's is compared."""
    made, packaged = (
        json.loads(text)
        for text in (
            json.dumps(schema(kind), sort_keys=True),
            (FOLDER / "schemas" / f"{kind}.json").read_text(encoding="utf-8"),
        )
    )
    words = f"run: nslightning schema {kind} --out configs/schemas/{kind}.json"
    if kind == "experiment":
        assert plain(made) == plain(packaged), words
        return
    for one, other in zip(made["anyOf"], packaged["anyOf"], strict=True):
        for part in ("model", "data", "name", "output", "seed_everything", "task", "arithmetic", "ckpt_path"):
            assert one["properties"].get(part) == other["properties"].get(part), (part, words)
    own = {name: of for name, of in made["$defs"].items() if "nslightning." in json.dumps(of) and "test" not in name}
    assert {"Jacobians"} <= {name.rpartition(".")[2] for name in made["$defs"]} or own
    for name in own:
        assert name in packaged["$defs"], (name, words)


def test_the_command_says_where_they_are_and_makes_them(capsys):
    assert main(["schema", "experiment"]) == 0
    assert json.loads(Path(capsys.readouterr().out.strip()).read_text())["title"].startswith("An experiment")
    assert main(["schema", "experiment", "--out", "x.json"]) == 0
    assert json.loads(Path("x.json").read_text()) == schema("experiment")
    with pytest.raises(SystemExit, match="2"):
        main(["schema", "confg"])
    assert main(["schema", "config", "--import", "no_such_module"]) == 2
    assert "no_such_module" in capsys.readouterr().err


def test_what_is_packaged_names_no_place_of_a_machine():
    """W&B's settings have the working folder and the home folder as defaults: other packages' defaults are left out."""
    text = (FOLDER / "schemas" / "config.json").read_text(encoding="utf-8")
    assert re.findall(r'"/\w+/[^"]*"', text) == []
    made = schema("config")
    assert str(Path.cwd()) not in json.dumps(made)
    settings = made["$defs"]["Settings"]["properties"]
    assert "root_dir" in settings
    assert all(not {"default", "description"} & settings[name].keys() for name in settings)
    ours = made["$defs"]["Jacobians"]
    assert ours["description"]
    assert ours["properties"]["relu"]["description"]


class Base:
    def __init__(self, size: int = 1):
        self.size = size


def test_jsonargparse_s_own_schema_still_fails_for_a_class_that_no_module_holds():
    """All that a report upstream needs. Where this fails, jsonargparse is mended: `_Schema.class_path_schema` goes."""
    from jsonargparse import ArgumentParser
    from jsonargparse._completions_jsonschema import ParserJsonschema

    made = type("Made", (Base,), {})  # as Lightning makes optimizers, while a program runs
    assert made.__module__ == __name__
    parser = ArgumentParser()
    parser.add_subclass_arguments(Base, "base")
    with pytest.raises(AttributeError, match="Made"):
        ParserJsonschema().generate(parser)
