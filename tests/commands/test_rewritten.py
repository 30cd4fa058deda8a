"""jsonargparse's messages: each row of the table is met by a real mistake, in the installed version."""

from pathlib import Path
from typing import Literal

import pytest

from nslightning.commands import config_parser, rewritten


class Thing:
    def __init__(self, size: int = 1, kind: Literal["small", "large"] = "small", needed: float = 0.0) -> None:
        self.size = size


class Needy(Thing):
    def __init__(self, must: int, size: int = 1) -> None:
        super().__init__(size)


def parser() -> config_parser.HelpfulErrors:
    made = config_parser.HelpfulErrors(prog="nslightning try")
    made.add_argument("--config", action="config")
    made.add_argument("--number", type=int, default=1)
    made.add_argument("--always", type=int, required=True)
    made.add_subclass_arguments(Thing, "thing", required=False)
    made.add_class_arguments(Thing, "plain")
    made.link_arguments("number", "plain.size")
    return made


HERE = f"{__name__}."
GIVEN = ["--always=1"]
THING = f"{{class_path: {HERE}Thing, init_args: {{%s}}}}"
# Row, arguments or the text of a config file, what the answer must say.
CASES = [
    (
        "a class has no such argument",
        "always: 1\nthing: " + THING % "knd: small",
        ["--thing.knd", "did you mean '--thing.kind'"],
    ),
    ("a config has no such option", "plain: {knd: small}", ["--plain.knd", "did you mean '--plain.kind'"]),
    ("no such option", [*GIVEN, "--numbr=2"], ["no option --numbr", "did you mean '--number'"]),
    ("set by another", [*GIVEN, "--plain.size=2"], ["--plain.size cannot be given", "set by number"]),
    ("needed", ["--number=2"], ["--always is needed"]),
    ("no file", [*GIVEN, "--config=."], ["--config=", "it is a folder, and a YAML file is needed"]),
    ("no mapping", "just some text", ["not a mapping", "just some text"]),
    ("given twice", [*GIVEN, f"--thing={THING % 'kind: small, kind: large'}"], ["kind"]),
    ("no class path", [*GIVEN, "--thing=Thingg"], ["--thing", "'Thingg'"]),
    ("no such class", [*GIVEN, f"--thing={HERE}Thingg"], ["--thing", f"'{HERE}Thingg'"]),
    ("no such module", [*GIVEN, "--thing=no_such_module.Thing"], ["--thing", "no_such_module"]),
    ("an empty value", [*GIVEN, "--plain="], ["--plain= has no value"]),
    (
        "a value in place of options",
        [*GIVEN, "--plain=3"],
        ["--plain=3 is not a mapping of options", "--plain.OPTION=VALUE"],
    ),
    ("a value that is not allowed", [*GIVEN, "--number=two"], ["--number=two is not allowed; expected a whole number"]),
]


def test_every_row_has_a_case():
    assert [case[0] for case in CASES] == [row.name for row in rewritten.ROWS]


@pytest.mark.parametrize(("name", "raised", "says"), CASES, ids=[case[0] for case in CASES])
def test_row(name, raised, says, capsys, monkeypatch):
    met = []
    rejection = rewritten.rejection

    def noted(*arguments):
        said = rejection(*arguments)
        met.append(next((row.name for row in rewritten.ROWS if row.pattern.search(getattr(said, row.of))), said))
        return said

    monkeypatch.setattr(rewritten, "rejection", noted)
    if isinstance(raised, str):
        Path("config.yaml").write_text(raised)
        raised = ["--config=config.yaml"]
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(raised)
    said = capsys.readouterr().err
    assert met == [name], said
    assert stop.value.code == 2
    for part in says:
        assert part in said
    assert "Traceback" not in said
