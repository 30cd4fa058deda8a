"""The report page: what runs recorded is in it, it asks for nothing else, and mistakes are named."""

import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import pandas as pd
import pytest

from nslightning.commands.report import main
from nslightning.report import ReportError, chart, find_runs, page, read_run
from nslightning.report.pages import Figure, Section, render
from nslightning.report.pages import Page as DrawnPage
from nslightning.report.run_folders import choice_label, flatten

VEGA = {  # sha256 of the files in build/ of the packages on npm
    "vega.min.js": "ea6a5936381d06f912466354e2b6a20eb66c4d41f1ca9dff1e0236dfee6ee392",
    "vega-lite.min.js": "6d5035fdd429b4bc6f91f3754426c3f516f3dbd8e08b105cfc2496bed4ebd254",
    "vega-embed.min.js": "c7111a41190080938b14c1de00074d9bda16ef2199e2919dd038cddf97d87354",
}
CHARTS = ("curves", "dots", "log_series", "layers", "ties", "zones")


def write_run(folder, *, relu=0.0, lr=0.1, steps=(0, 10, 20), **files):
    """A run folder as `fit` leaves it, of known numbers; a file given as None is left out."""
    folder.mkdir(parents=True)
    jacobians = {"relu": relu, "relu6": [0.0, 0.0], "max_pool": 0.0, "rule": "exact"}
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": lr}}
    site = {"name": "relu1", "operation": "relu", "choice": relu, "how": "module", "kind": "ReLU", "aliases": [],
            "inplace": False, "calls": 1}  # fmt: skip
    lost = site | {"name": "head", "operation": "prelu", "how": "unreached", "kind": "<PReLU>"}
    patch = {"model": "Sequential", "jacobians": jacobians, "fingerprint": f"abc{relu}"}
    content = {
        "run.json": json.dumps({"seed": 0, "precision": "32-true", "git": "1234abcd", "versions": {"torch": "2.15.0"},
                                "data": {"dataset": "made_up"}, "patch": patch}),
        "config.yaml": json.dumps({"model": {"backbone": "paper/lenet5", "jacobians": jacobians,
                                             "optimizer": optimizer},
                                   "trainer": {"max_epochs": 3}}),
        "patch_report.json": json.dumps(patch | {"sites": [site, lost]}),
        "metrics.csv": "epoch,step,train/loss,val/loss,val/acc1,ties/relu1,ties/total\n"
        + "".join(f"0,{s},{1 / (s + 1)},,,0.25,0.125\n" for s in steps) + "0,20,,0.75,0.5,,\n",
        "divergence.csv": "step,choice,parameter,l1,l2,linf,relative,cosine\n" + "".join(
            f"{s},{choice},{parameter},1,1,1,{value},1\n"
            for s in steps
            for choice, value in (("zero", 0.0), ("small", 1e-7 * (s + 1)), ("lost", "nan"))
            for parameter in ("", "backbone.conv.weight", "backbone.fc.bias")
        ),
    }  # fmt: skip
    for name, text in (content | {k.replace("__", "."): v for k, v in files.items()}).items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


class Page(HTMLParser):
    """What a page shows and asks for."""

    def __init__(self, source):
        super().__init__()
        self.addresses, self.headings, self.ids, self.texts, self.scripts, self._in = [], [], [], [], {}, []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [(tag, attributes[a]) for a in ("src", "href", "action", "data", "srcset") if a in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in ("meta", "wbr"):
            self._in.append((tag, attributes))

    def handle_endtag(self, tag):
        self._in.pop()

    def handle_data(self, data):
        tag, attributes = self._in[-1] if self._in else ("", {})
        if tag == "script":
            self.scripts[attributes.get("id", len(self.scripts))] = data
        elif tag == "h2":
            self.headings.append(data)
        elif tag != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def figures(self):
        return json.loads(self.scripts["figures"])["figures"] if self.scripts else []  # without figures, without Vega

    def rows(self, spec):
        """The data of the one figure with that spec, decoded as the page's script does."""
        (figure,) = (f for f in self.figures if f["spec"] == spec)
        columns = {
            n: [c["values"][i] for i in c["codes"]] if isinstance(c, dict) else c for n, c in figure["columns"].items()
        }
        return pd.DataFrame(columns, dtype=object)


def build(*folders):
    return Page(page([read_run(folder) for folder in find_runs(folders)]))


def test_the_page_asks_for_nothing(tmp_path):
    made = build(write_run(tmp_path / "runs" / "a" / "001"))
    assert made.addresses != []
    assert [(tag, where) for tag, where in made.addresses if tag != "a" or not where.startswith("#")] == []
    assert {where.removeprefix("#") for _, where in made.addresses} <= set(made.ids)  # the contents lead somewhere
    source = page([read_run(tmp_path / "runs" / "a" / "001")])
    assert "default-src 'none'" in source  # and the browser would refuse
    assert not re.search(r"@import|url\(\s*['\"]?https?:", source.partition("</style>")[0])
    assert len(source) < 1.5e6


def test_every_section_is_there_and_the_numbers_are_those_of_the_files(tmp_path):
    made = build(write_run(tmp_path / "runs" / "a" / "001"))
    assert made.headings == [
        "Runs", "Loss and accuracy by choice", "Divergence by choice", "Divergence by layer and step", "Ties by site",
        "Zones", "Weights", "Settings", "Provenance", "Patch report",
    ]  # fmt: skip
    totals = made.rows("log_series")
    assert list(totals["series"]) == ["zero", "small", "lost"] * 3
    assert list(totals[totals["series"] == "zero"]["value"]) == [0, 0, 0]
    assert list(totals[totals["series"] == "small"]["value"]) == pytest.approx([1e-7, 1.1e-6, 2.1e-6])
    assert list(totals[totals["series"] == "lost"]["value"]) == [None] * 3  # JSON has no NaN
    layers = made.rows("layers")
    assert len(layers) == 18
    assert set(layers["parameter"]) == {"conv.weight", "fc.bias"}
    ties = made.rows("ties")
    assert list(zip(ties["site"], ties["step"], ties["fraction"], strict=True)) == [
        *(("relu1", s, 0.25) for s in (0, 10, 20)), *(("total", s, 0.125) for s in (0, 10, 20)),
    ]  # fmt: skip
    for word in ("1234abcd", "made_up", "2.15.0", "abc0.0", "paper/lenet5", "head (<PReLU>)"):
        assert word in made.text
    # choice, measured, exactly 0, not finite, median, largest, its step
    assert "zero 3 3 0 0 0 0" in made.text
    assert "small 3 0 0 1.10e-06 2.10e-06 20" in made.text
    assert "lost 3 0 3 - - -" in made.text


def test_curves_tell_training_from_validation(tmp_path):
    made = build(write_run(tmp_path / "runs" / "a" / "001"))
    loss, accuracy = (f["columns"] for f in made.figures if f["spec"] == "curves")
    assert loss["value"] == [1, pytest.approx(1 / 11, rel=1e-4), pytest.approx(1 / 21, rel=1e-4), 0.75]
    assert [loss["part"]["values"][i] for i in loss["part"]["codes"]] == ["training"] * 3 + ["validation"]
    assert accuracy["value"] == [0.5]


def test_runs_side_by_side_are_named_by_what_differs(tmp_path):
    write_run(tmp_path / "runs" / "a" / "001")
    write_run(tmp_path / "runs" / "a" / "002", relu=1.0, lr=0.5)
    source = page([read_run(folder) for folder in find_runs([tmp_path / "runs"])])
    made = Page(source)
    loss = next(f["columns"] for f in made.figures if f["spec"] == "curves")
    assert loss["label"]["values"] == ["native · lr=0.1", "relu=1 · lr=0.5"]
    differing = re.findall(r"<tr class=\"differs\"><th scope=\"row\">(.*?)</th>", source)
    names = [name.replace("<wbr>", "") for name in differing]
    assert names == ["model.jacobians", "model.optimizer.lr", "patch fingerprint"]
    assert set(made.rows("log_series")["line"]) == {
        f"{choice} · a/00{i}" for choice in ("zero", "small", "lost") for i in (1, 2)
    }


def test_repeats_share_a_label(tmp_path):
    for i in (1, 2):
        write_run(tmp_path / "runs" / "a" / f"00{i}")
    loss = next(f["columns"] for f in build(tmp_path / "runs").figures if f["spec"] == "curves")
    assert loss["label"]["values"] == ["native"]
    assert loss["name"]["values"] == ["a/001", "a/002"]


def test_twins_have_their_own_lines(tmp_path):
    metrics = (
        "epoch,step,train/beta10/loss,train/control/loss,train/native/loss,weights/control/l1,weights/beta10/l1\n"
        "0,0,2.5,2.5,2.5,0.0,0.0\n0,1,2.25,2.0,2.0,0.0,0.5\n"
    )
    choices = {name: {"relu": 0.0, "max_pool": beta, "rule": "exact"} for name, beta in (("native", 0), ("beta10", 10))}
    made = build(write_run(tmp_path / "twins" / "001", metrics__csv=metrics, divergence__csv=None,
                           config__yaml=json.dumps({"model": {"choices": choices}})))  # fmt: skip
    loss = next(f["columns"] for f in made.figures if f["spec"] == "curves")
    assert loss["label"]["values"] == ["native", "beta10", "control"]  # as in the config
    distances = made.rows("log_series")
    assert list(zip(distances["series"], distances["value"], strict=True)) == [
        ("beta10", 0), ("beta10", 0.5), ("control", 0), ("control", 0),
    ]  # fmt: skip


ZONES = """step,zones/a/regular,zones/a/bifurcation,zones/a/compensation,zones/a/observed,zones/a/difference
0,1.0,0.0,0.0,0.0,0.0
1,0.25,0.5,0.25,0.125,0.0625
2,nan,nan,nan,nan,nan
"""


def test_zones_are_shares_of_the_processes(tmp_path):
    made = build(write_run(tmp_path / "a" / "001", metrics__csv=ZONES))
    zones = made.rows("zones")
    assert set(zip(zones["step"], zones["zone"], zones["share"], strict=True)) == {
        (0, "regular", 1), (1, "regular", 0.25), (1, "bifurcation", 0.5), (1, "compensation", 0.25),
        (2, "not finite", 1),
    }  # fmt: skip
    assert " a 3 42 % 8 % 17 % 33 %" in made.text


def test_where_values_stopped_being_finite_is_told(tmp_path):
    finding = {"step": 7, "batch": 7, "kind": "gradient", "where": "relu1", "ties": {"relu1": 1200}}
    made = build(write_run(tmp_path / "a" / "001", nonfinite__json=json.dumps(finding)))
    assert " 7 gradient relu1 1,200 at relu1" in made.text


def test_weights_compared_with_a_reference(tmp_path):
    config = json.dumps({"trainer": {"callbacks": [{"class_path": "x.WeightDivergence",
                                                    "init_args": {"reference": "initial"}}]}})  # fmt: skip
    made = build(write_run(tmp_path / "a" / "001", metrics__csv="step,weights/l1,weights/l2\n0,0,0\n1,3,2\n",
                           divergence__csv=None, config__yaml=config))  # fmt: skip
    rows = made.rows("log_series")
    assert list(zip(rows["series"], rows["value"], strict=True)) == [("to initial", 0), ("to initial", 3)]


def test_a_run_that_has_only_begun(tmp_path):
    run = write_run(tmp_path / "a" / "001", metrics__csv=None, divergence__csv=None, patch_report__json=None,
                    config__yaml=None)  # fmt: skip
    made = build(run)
    assert made.figures == []
    for who in ("GradientDivergence", "TieMonitor", "ZoneMonitor", "nslightning twins", "No patch_report.json"):
        assert who in made.text


def test_a_line_that_a_killed_run_left_unfinished_does_not_count(tmp_path):
    run = write_run(tmp_path / "a" / "001")
    for name in ("metrics.csv", "divergence.csv"):
        whole = (run / name).read_text()
        (run / name).write_text(whole + whole.splitlines()[-1][:-3])
    read, clean = read_run(run), read_run(write_run(tmp_path / "b" / "001"))
    pd.testing.assert_frame_equal(read.metrics, clean.metrics)
    pd.testing.assert_frame_equal(read.divergence, clean.divergence)


def test_an_empty_cell_is_not_a_nan(tmp_path):
    run = read_run(
        write_run(tmp_path / "a" / "001", metrics__csv="epoch,step,train/loss,val/loss\n0,0,nan,\n0,1,inf,2\n")
    )
    values = {
        (m, s): v for m, s, v in zip(run.metrics["metric"], run.metrics["step"], run.metrics["value"], strict=True)
    }
    assert set(values) == {("train/loss", 0), ("train/loss", 1), ("val/loss", 1)}
    assert math.isnan(values["train/loss", 0])
    assert values["train/loss", 1] == math.inf
    assert run.last("val/loss") == 2
    assert run.last("val/acc1") is None


def test_names_from_files_cannot_leave_their_place(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = write_run(
        tmp_path / "a" / "001",
        divergence__csv=f'step,choice,parameter,relative\n0,"{evil}",,1\n0,"{evil}",w,1\n',
        run__json=json.dumps({"git": evil}),
    )
    made = build(run)
    assert made.rows("log_series")["series"].tolist() == [evil]
    assert evil in made.text
    assert len(made.scripts) == 5  # the figures' data, Vega's three, and the page's own
    assert [tag for tag, _ in made.addresses if tag != "a"] == []


def test_long_runs_are_thinned_evenly_and_keep_both_ends(tmp_path):
    steps = range(0, 35_000, 5)
    made = build(write_run(tmp_path / "a" / "001", steps=steps))
    shown = sorted(set(made.rows("log_series")["step"]))
    assert len(shown) == 1500
    assert (shown[0], shown[-1]) == (0, 34_995)
    gaps = {b - a for a, b in pairwise(shown)}
    assert max(gaps) - min(gaps) <= 5
    assert len(made.rows("layers")) <= 40_000
    assert "small 7000 0 0" in made.text  # the table counts all


@pytest.mark.parametrize("name", CHARTS)
@pytest.mark.parametrize("version", ["5.8", "5.21", "6.4"])  # W&B draws an older generation than the page
def test_specs_compile(name, version):
    from vl_convert import vegalite_to_vega

    spec = chart(name)
    assert spec["data"] == {"name": "wandb"}
    assert vegalite_to_vega(spec, vl_version=version)["marks"]


@pytest.mark.parametrize("name", [name for name in CHARTS if name != "dots"])  # which audits draw: test_audit.py
def test_specs_draw_the_columns_that_the_page_gives_them(tmp_path, name):
    made = build(write_run(tmp_path / "a" / "001", **({"metrics__csv": ZONES} if name == "zones" else {})))
    columns = next(set(f["columns"]) for f in made.figures if f["spec"] == name)
    spec = chart(name)
    computed = {t["as"] for t in spec["transform"]} if "transform" in spec else set()
    drawn = set(re.findall(r'"field": "([^"]+)"', json.dumps(spec)))
    assert drawn - computed <= columns
    assert set(re.findall(r"datum\.(\w+)", json.dumps(spec))) - computed <= columns


def test_zeros_and_lost_values_are_drawn(tmp_path):
    """Drawn by Vega itself: bars for exact zeros, crosses for what is not finite, points for the rest."""
    from vl_convert import vegalite_to_svg

    made = build(write_run(tmp_path / "a" / "001"))
    spec = chart("log_series") | {"datasets": {"wandb": made.rows("log_series").to_dict("records")}}
    svg = vegalite_to_svg(spec, vl_version="6.4")
    marks = re.findall(r'aria-label="([^"]*)" role="graphics-symbol" aria-roledescription="(tick|point)"', svg)
    shown = [(*re.search(r"choice: (\w+);.*value: (.+)", label).groups(), kind) for label, kind in marks]
    assert sorted(shown) == sorted(
        [("zero", "exactly 0", "tick")] * 3
        + [("lost", "not finite", "point")] * 3
        + [("small", value, "point") for value in ("1e-7", "1.1e-6", "2.1e-6")]
    )


def test_vega_is_the_build_that_its_authors_published():
    folder = files("nslightning.report").joinpath("vega")
    sums = {name: hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() for name in VEGA}
    assert sums == VEGA
    readme, licences = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("README.md", "LICENSES.txt"))
    for name in VEGA:
        version = re.search(rf"{name.removesuffix('.min.js')} (\d+\.\d+\.\d+)", readme)[0]
        assert f"{version} (BSD-3-Clause)" in licences
    assert "Redistribution and use in source and binary forms" in licences


def test_a_figure_says_what_it_shows_and_takes_the_keyboard(tmp_path):
    write_run(tmp_path / "runs" / "a" / "001")
    source = page([read_run(folder) for folder in find_runs([tmp_path / "runs"])])
    made = Page(source)
    assert all(len(figure["alt"]) > 20 for figure in made.figures)
    assert {f["focus"] for f in made.figures if f["spec"] in ("curves", "log_series")} == {"label", "series"}
    regions = re.findall(r'<div class="scroll" tabindex="0" role="region" aria-label="(Table: [^"]+)"><table>', source)
    assert len(regions) == source.partition("<script")[0].count("<table>") > 5
    assert source.index('<a class="skip" href="#content">') < source.index("<h1>")


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: neither chromium nor google-chrome is on the PATH")
def test_a_browser_draws_every_figure(tmp_path):
    """The page's own script and Vega at work: a drawing for each figure, with its description."""
    write_run(tmp_path / "a" / "001")
    write_run(tmp_path / "a" / "002", metrics__csv=ZONES)
    source = page([read_run(folder) for folder in find_runs([tmp_path / "a"])])
    (tmp_path / "page.html").write_text(source, encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=10000", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    figures = Page(source).figures
    assert {f["spec"] for f in figures} == set(CHARTS) - {"dots"}
    shown = shown.partition("<script")[0]
    assert "could not be drawn" not in shown
    assert shown.count('class="marks"') == len(figures)
    for figure in figures:
        assert f'aria-label="{figure["alt"]}' in shown


@pytest.mark.skipif(CHROMIUM is None, reason="no browser: neither chromium nor google-chrome is on the PATH")
def test_names_that_differ_in_the_middle_stay_apart_on_a_phone(tmp_path):
    names = [f"encoder.stage{i // 10}.{i}.attention.projection.weight" for i in range(30)]
    rows = pd.DataFrame([{"row": name, "series": "32", "value": 0.1, "rounding": math.nan} for name in names])
    section = Section("Ties", [Figure("dots", rows, "A mark for each site.", extent=300)])
    (tmp_path / "page.html").write_text(render(DrawnPage("Sites", "", [section])), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=390,900", "--virtual-time-budget=10000", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    labels = re.findall(r"<text[^>]*>([^<]*weight)</text>", shown.partition("<script")[0])
    assert [label.split(".")[:4] for label in labels] == [["e", f"s{i // 10}", str(i), "a"] for i in range(30)]


def test_choices_in_short():
    assert choice_label(None) == "unknown"
    assert choice_label({"relu": 0.0, "relu6": [0.0, 1.0], "max_pool": 10.0, "rule": "published"}) == (
        "relu6=[0, 1], max_pool=10, rule=published"
    )
    callbacks = [{"class_path": "x.TieMonitor", "init_args": {"every_n_steps": 5}}, {"class_path": "x.Other"}]
    assert flatten({"callbacks": callbacks}) == {
        "callbacks.TieMonitor": "yes", "callbacks.TieMonitor.every_n_steps": 5, "callbacks.Other": "yes",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------- the command
def test_command_writes_one_page_for_a_folder_of_runs(tmp_path, capsys):
    for i in (1, 2):
        write_run(tmp_path / "runs" / "a" / f"00{i}")
    assert main(["report", "runs", "runs/a/001"]) == 0  # a run named twice is shown once
    out = capsys.readouterr().out
    assert re.fullmatch(r"report.html: 2 runs, \d\.\d MB; open it in any browser\n", out)
    assert len(Page((tmp_path / "report.html").read_text()).figures) == 5
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"run__json": "{"}, r"run\.json cannot be read"),
        ({"run__json": "[]"}, r"run\.json is not the record of a run: it holds a list"),
        ({"config__yaml": "a: ["}, r"config\.yaml cannot be read"),
        ({"metrics__csv": "a,b\n1,2\n"}, r"metrics\.csv has no column 'step'; it has 'a', 'b'"),
        ({"metrics__csv": "step,train/loss\n0,much\n"}, r"'train/loss' is to hold numbers.*much"),
        ({"divergence__csv": "step,choice\n0,a\n"}, r"has no column 'parameter' nor 'relative'"),
        ({"divergence__csv": "step,choice,parameter,relative\n0,a,,x\n"}, r"'relative' is to hold numbers"),
        ({"divergence__csv": 'step,"\n'}, r"divergence\.csv cannot be read as CSV"),
    ],
)
def test_damaged_files_are_named(tmp_path, capsys, damage, message):
    write_run(tmp_path / "runs" / "001", **damage)
    assert main(["report", "runs"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nslightning report: error: runs/001/")
    assert re.search(message, error)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist; give the folder of a run, such as runs/quickstart/001"),
        (["file"], "file is a file; give the folder"),
        (["empty"], "empty holds no run: a run's folder has a run.json, which `nslightning fit` writes"),
        (["run", "--out", "empty"], "--out takes a file; empty is a folder"),
        (["run", "--out", "none/page.html"], "there is no folder none; make it first"),
    ],
)
def test_mistaken_calls_are_refused(tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_run(tmp_path / "run")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("opens", [True, False])
def test_open_shows_the_page_in_the_browser(tmp_path, capsys, monkeypatch, opens):
    import webbrowser

    addresses = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(addresses.append(address)) or opens)
    write_run(tmp_path / "run")
    assert main(["report", "run", "--open"]) == 0
    assert addresses == [(tmp_path / "report.html").resolve().as_uri()]
    out = capsys.readouterr()
    assert ("there is no browser here" in out.err) == (not opens)


def test_a_run_that_changed_its_choice_shows_its_segments(tmp_path):
    """The table, the choice by its steps, and a line of the figure for each reference."""
    folder = write_run(tmp_path / "x" / "001", relu=0.5)
    record = json.loads((folder / "run.json").read_text())
    record["segments"] = [
        {"from_step": 0, "to_step": 15, "choice": "relu=1", "git": "aaaa", "resumed_at": [10]},
        {"from_step": 15, "choice": "relu=0.5", "git": "bbbb", "changed": {"model.jacobians.relu": [1.0, 0.5]}},
    ]
    (folder / "run.json").write_text(json.dumps(record))
    rows = ["step,choice,reference,parameter,l1,l2,linf,relative,cosine"]
    rows += [f"{step},zero,{'relu=1' if step < 15 else 'relu=0.5'},,1,1,1,0.1,1" for step in (0, 10, 20)]
    (folder / "divergence.csv").write_text("\n".join(rows) + "\n")
    run = read_run(folder)
    assert run.choice == "relu=1 from step 0; then relu=0.5 from step 15"
    source = page([run])
    section = source[source.index('id="segments"') : source.index('id="settings"')]
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", section)
    assert {"0 to 15", "15", "relu=1", "relu=0.5", "the beginning", "10", "bbbb"} <= set(cells)
    assert "model.jacobians.relu: 1 to 0.5" in cells
    assert "zero against relu=1" in source
    assert "zero against relu=0.5" in source
    assert 'id="segments"' not in page([read_run(write_run(tmp_path / "plain"))])


def test_runs_are_found_at_any_depth_of_an_experiment(tmp_path):
    deep = write_run(tmp_path / "grid" / "precision" / "a" / "001")
    with pytest.raises(ReportError, match="does not exist"):
        find_runs([deep, tmp_path / "no"])
    assert find_runs([tmp_path / "grid"]) == [deep]
