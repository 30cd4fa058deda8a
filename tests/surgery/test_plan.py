"""Plans: which rule decides at which site, and gradients that are the ones of the choices decided."""

import copy
import doctest
import itertools
import json
import pickle
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
import yaml
from bits import bits
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from nslightning import Jacobians, PatchWarning, patch, unpatch, using
from nslightning.cli import main
from nslightning.models import ImageClassifier, LanguageModel
from nslightning.probes import divergence, gradients, ties
from nslightning.surgery import Plan, Rule, UnreachedError, choices, preview, selections


class Probe(nn.Module):
    """Sums of kinks at 0, one per site: parameter ``i`` gets site i's alpha as its gradient."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(8, dtype=torch.float64))
        self.layer1 = nn.ModuleList([nn.ReLU(), nn.ReLU()])
        self.layer2 = nn.ModuleList([Functional(), nn.LeakyReLU(0.5)])
        self.shared = nn.ReLU()

    def forward(self):
        p = self.at
        values = (
            self.layer1[0](p[0]),
            self.layer1[1](p[1]),
            self.layer2[0](p[2]),
            self.layer2[1](p[3]),
            self.shared(p[4]),
            self.shared(p[5]),
            F.relu(p[6]),
            p[7].abs(),
        )
        return sum(values)


class Functional(nn.Module):
    def forward(self, x):
        return F.relu(x)


def alphas(model):
    """The derivative that each of the probe's sites returns."""
    return torch.autograd.grad(model(), model.at)[0].tolist()


STOCK = [0, 0, 0, 0.5, 0, 0, 0, 0]
HALF = Jacobians(relu=0.5)


@pytest.mark.parametrize(
    ("rules", "want"),
    [
        ([], STOCK),
        ([HALF], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0]),
        ([{"relu": 1}], [1, 1, 1, 0.5, 1, 1, 1, 0]),
        # by place
        ([{"name": "layer1.0", "relu": 1}], [1, 0, 0, 0.5, 0, 0, 0, 0]),
        ([{"name": "layer1.*", "relu": 1}], [1, 1, 0, 0.5, 0, 0, 0, 0]),
        ([{"name": "/^layer[12]/", "relu": 1, "leaky_relu": 2}], [1, 1, 1, 2, 0, 0, 0, 0]),
        ([{"name": "", "relu": 1}], [0, 0, 0, 0.5, 0, 0, 1, 0]),
        ([{"name": ["layer1.0", "shared"], "relu": 1}], [1, 0, 0, 0.5, 1, 1, 0, 0]),
        ([Rule({"relu": 1}, name=re.compile("1$"))], [0, 1, 0, 0.5, 0, 0, 0, 0]),
        ([{"stage": "layer1", "relu": 1}], [1, 1, 0, 0.5, 0, 0, 0, 0]),
        ([{"stage": "layer1-2", "relu": 1}], [1, 1, 1, 0.5, 0, 0, 0, 0]),
        ([{"stage": "layer1.1-7", "relu": 1}], [0, 1, 0, 0.5, 0, 0, 0, 0]),
        ([{"stage": "*.0", "relu": 1}], [1, 0, 1, 0.5, 0, 0, 0, 0]),
        ([{"stage": "layer", "relu": 1}], STOCK),
        # by kind
        ([{"module": "ReLU", "relu": 1}], [1, 1, 0, 0.5, 1, 1, 0, 0]),
        ([Rule({"relu": 1}, module=nn.ReLU)], [1, 1, 0, 0.5, 1, 1, 0, 0]),
        ([{"module": "torch.nn.modules.activation.ReLU", "relu": 1}], [1, 1, 0, 0.5, 1, 1, 0, 0]),
        ([{"module": ["Functional"], "relu": 1}], [0, 0, 1, 0.5, 0, 0, 0, 0]),
        ([Rule(Jacobians(relu=1, abs=1, leaky_relu=3), operation="abs")], [0, 0, 0, 0.5, 0, 0, 0, 1]),
        # by call
        ([{"call": 1, "relu": 1}], [0, 0, 0, 0.5, 0, 1, 0, 0]),
        ([{"name": "shared", "call": 0, "relu": 1}], [0, 0, 0, 0.5, 1, 0, 0, 0]),
        ([{"name": "", "call": 0, "relu": 1, "abs": 1}], [0, 0, 0, 0.5, 0, 0, 1, 1]),  # each operation's calls
        ([{"name": "shared", "call": "1:", "relu": 1}], [0, 0, 0, 0.5, 0, 1, 0, 0]),
        ([{"call": "1:", "relu": 1}], [0, 0, 0, 0.5, 0, 1, 0, 0]),
        ([Rule({"relu": 1}, name="shared", call=range(2))], [0, 0, 0, 0.5, 1, 1, 0, 0]),
        ([{"call": ":1", "relu": 1}], [1, 1, 1, 0.5, 1, 0, 1, 0]),
        # all that is given has to match
        ([{"stage": "layer1", "module": "LeakyReLU", "relu": 1}], STOCK),
        # later rules win, field by field; whole Jacobians decide on every operation
        ([HALF, {"stage": "layer1", "relu": 1}, {"name": "layer1.1", "relu": 2}], [1, 2, 0.5, 0.5, 0.5, 0.5, 0.5, 0]),
        ([{"stage": "layer2", "leaky_relu": 3}, {"stage": "layer2", "relu": 1}], [0, 0, 1, 3, 0, 0, 0, 0]),
        ([{"stage": "layer2", "leaky_relu": 3}, Rule(Jacobians(relu=1), stage="layer2")], [0, 0, 1, 0.5, 0, 0, 0, 0]),
        ([{"stage": "layer1", "relu": 1}, HALF], [0.5] * 7 + [0]),
    ],
    ids=str,
)
def test_every_site_takes_what_the_rules_decide(rules, want):
    model = Probe()
    stock = model().detach()
    with pytest.warns(PatchWarning) if want == STOCK and rules else nullcontext():
        patch(model, Plan(rules))
    assert alphas(model) == want
    assert torch.equal(model().detach(), stock)
    with using(model, Jacobians(relu=0.25)):
        assert alphas(model) == [0.25, 0.25, 0.25, 0.5, 0.25, 0.25, 0.25, 0]
    assert alphas(model) == want
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert alphas(twin) == want
        with using(twin, HALF):
            assert alphas(model) == want
    unpatch(model)
    assert alphas(model) == STOCK


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(bits(a[k]), bits(b[k])) for k in a)


def planted():
    """A small ResNet with a dead channel behind every batch norm."""
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight[0] = module.bias[0] = 0
    return model.eval(), torch.randn(2, 3, 32, 32, dtype=torch.float64)


def test_a_plan_of_one_rule_is_the_plain_choice_bit_for_bit():
    choice = Jacobians(relu=0.75, max_pool="minimal")
    gradients_seen = []
    for spelling in (choice, Plan([choice]), Plan([choice.to_dict()]), Plan([{"relu": 0.75}, {"max_pool": "minimal"}])):
        model, x = planted()
        report = patch(model, spelling)
        out = model(x)
        gradients_seen.append(
            (out, gradients(out.sum(), model, {"": spelling, "reference": Jacobians()}, retain_graph=True))
        )
        assert list(selections(model)) == [""]
        assert report.jacobians == choice
        assert all(site.decided == "" for site in report.sites) or len(spelling.rules) == 2
    for out, grads in gradients_seen[1:]:
        assert torch.equal(out, gradients_seen[0][0])
        assert same(grads[""], gradients_seen[0][1][""])
        assert same(grads["reference"], gradients_seen[0][1]["reference"])
    assert not same(gradients_seen[0][1][""], gradients_seen[0][1]["reference"])


def test_rules_for_stages_are_the_choices_of_models_patched_stage_by_stage():
    stages = {"layer1": Jacobians(relu=1.0), "layer3": Jacobians(relu=-0.5)}
    base = Jacobians(relu=0.25, max_pool="minimal")
    plan = Plan([base, *(Rule(choice, stage=name) for name, choice in stages.items())])
    model, x = planted()
    patch(model, plan)
    (gradient,) = gradients(model(x).sum(), model, {"": plan}).values()
    apart, _ = planted()  # every part with its own patch
    for name, module in apart.named_children():
        with pytest.warns(PatchWarning) if name in ("conv1", "bn1", "avgpool", "fc") else nullcontext():
            patch(module, stages.get(name, base))
    with pytest.warns(PatchWarning, match="nothing to patch"):  # the same parts, in their first forward
        loss = apart(x).sum()
    want = dict(zip(gradient, torch.autograd.grad(loss, list(apart.parameters())), strict=True))
    assert same(gradient, want)


def test_divergence_between_a_plan_and_other_choices():
    plan = Plan([Jacobians(), {"stage": "layer2", "relu": 1.0}])
    model, x = planted()
    patch(model, plan)
    loss = model(x).sum()
    differences = divergence(
        loss, model, {"plan": plan, "same": Jacobians(), "all": Jacobians(relu=1.0)}, retain_graph=True
    )
    assert differences["same"].l1 == 0
    assert differences["all"].l1 > differences["plan"].l1 > 0
    moved = {name for name, d in differences["plan"].per_layer.items() if d.l1 > 0}
    # What is above has no part in it, and below a batch norm of weight 0 no gradient passes.
    assert moved == {f"layer2.0.{bn}.{p}" for bn in ("bn1", "bn2", "downsample.1") for p in ("weight", "bias")}
    back = divergence(loss, model, {"reference": Jacobians()}, reference=plan)
    assert back["reference"].l1 == differences["plan"].l1
    with pytest.raises(ValueError, match="a choice for each site: only method='subtract'"):
        divergence(loss, model, {"plan": plan}, method="propagate")


def test_selections_have_names_of_their_own_and_share_observers():
    model = nn.ModuleDict({"a": Probe(), "b": Probe()})
    patch(model["a"], Plan([HALF, {"stage": "layer1", "relu": 1}, {"call": 1, "relu": 0}]))
    patch(model["b"], HALF)
    selected = selections(model)
    assert list(selected) == ["a", "a#0+1", "a#0+1+2", "a#0+2", "b"]
    assert len({id(s) for s in selected.values()}) == 5
    one = Probe()
    patch(one, Plan([{"stage": "layer1", "relu": 1}]))
    assert {k: (t.tied, t.total) for k, t in ties(one).items()} == {
        "layer1.0": (1, 1),
        "layer1.1": (1, 1),
        "layer2.0:relu": (1, 1),
        "layer2.1": (1, 1),
        "shared": (2, 2),
        ":relu": (1, 1),
        ":abs": (1, 1),
    }


def test_using_a_plan_needs_sites_that_were_told_apart():
    finer = Plan([{"stage": "layer1", "relu": 1}])
    model = Probe()
    patch(model, Jacobians())
    model()
    with (
        pytest.raises(ValueError, match=r"relu=0\.0 at the model.*1\.0 at layer1\.0.*patch the model with a plan"),
        using(model, finer),
    ):
        pass
    assert alphas(model) == STOCK
    with using(model, Plan([Rule({"relu": 1}, operation="relu"), {"abs": 2}])):  # tells operations apart only
        assert alphas(model) == [1, 1, 1, 0.5, 1, 1, 1, 2]
    later = Plan([{"name": "shared", "call": 1, "relu": 1}])
    with pytest.raises(ValueError, match=r"1\.0 at shared, call 1, which were patched as one"), using(model, later):
        pass
    with using(model, Plan([{"stage": "layer2.1", "leaky_relu": 3}])):  # one site
        assert alphas(model) == [0, 0, 0, 3, 0, 0, 0, 0]
    unpatch(model)
    patch(model, Plan([Jacobians(), {"stage": "layer1", "relu": 0}, {"name": "layer1.0", "relu": 0}]))
    assert alphas(model) == STOCK
    with using(model, finer):
        assert alphas(model) == [1, 1, 0, 0.5, 0, 0, 0, 0]
    assert [c.relu for c in choices(model, finer).values()] == [0, 1, 1]
    other = Plan([{"stage": "layer1", "relu": 2, "rule": "published"}])
    assert [(c.relu, c.rule) for c in choices(model, other).values()] == [(0, "exact"), *[(2, "published")] * 2]
    # Before the first forward nobody knows which modules call functions: the answer errs on the safe side.
    fresh = Probe()
    patch(fresh, Jacobians())
    with pytest.raises(ValueError, match="tell them apart"), using(fresh, Plan([{"name": "layer2.0", "relu": 1}])):
        pass
    with pytest.raises(TypeError, match="a choice is a Jacobians"):
        patch(Probe(), 1.0)


def test_only_and_skip_limit_a_plan():
    model = Probe()
    patch(model, Plan([HALF, {"stage": "layer1", "relu": 1}]), only=["layer*"], skip="/0$/")
    assert alphas(model) == [0, 1, 0, 0.5, 0, 0, 0, 0]


def test_a_stage_holds_what_any_of_its_names_says():
    rule, relu = Rule({"relu": 1}, stage="layer1-2"), nn.ReLU()
    assert rule.matches(["stem.act", "layer2.act"], relu)  # a module that two stages share
    assert not rule.matches(["1.act"], relu)  # a number alone


def test_the_report_explains_conflicts():
    model = Probe()
    plan = Plan([HALF, {"stage": "layer1", "relu": 1}, {"name": "layer1.1", "relu": 2}, {"call": 1, "relu": 3}])
    report = patch(model, plan)
    model()
    assert {(s.name, s.kind): s.choice for s in report.sites if s.name.startswith("layer1")} == {
        ("layer1.0", "ReLU"): 1.0,
        ("layer1.1", "ReLU"): 2.0,
    }
    why = {(s.name, s.choice): s.decided for s in report.sites}
    assert why["layer1.1", 2.0] == "rule 2 (name='layer1.1') over rule 1 (1.0), the choice for all sites (0.5)"
    assert why["shared", 0.5] == ""
    assert Plan([{"stage": "a", "relu": 1}, HALF]).explain((0, 1), "relu") == "rule 2 (everywhere) over rule 1 (1.0)"
    assert Plan([HALF, {"stage": "a", "relu": 1}]).explain((0, 1), "relu") == (
        "rule 1 (stage='a') over the choice for all sites (0.5)"  # the only rule of the `sites` of a config
    )
    assert why["shared", 3.0] == "rule 3 (call=1) over the choice for all sites (0.5)"
    assert [s.calls for s in report.sites if s.name == "shared"] == [1, 1]
    assert "rule 2 (name='layer1.1') over rule 1 (1.0), the choice for all sites (0.5)" in str(report)
    assert "with Jacobians(relu=0.5) and 3 rules for some sites" in report.summary()
    assert report.to_dict()["rules"] == [
        {"stage": "layer1", "relu": 1.0},
        {"name": "layer1.1", "relu": 2.0},
        {"call": 1, "relu": 3.0},
    ]
    json.dumps(report.to_dict())


def test_preview_changes_nothing():
    model = Probe()
    types, keys = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    report = preview(model, Plan([{"stage": "layer1", "relu": 1}]), example=())
    assert [(s.name, s.choice) for s in report.sites if s.operation == "relu"] == [
        ("layer1.0", 1.0),
        ("layer1.1", 1.0),
        ("shared", 0.0),
        ("layer2.0", 0.0),
        ("", 0.0),
    ]
    assert [type(m) for m in model.modules()] == types
    assert [set(m.__dict__) for m in model.modules()] == keys
    assert alphas(model) == STOCK


def test_plain_data_and_pickles_give_the_plan_back():
    plan = Plan(
        [
            Jacobians(relu=0.5, relu6=(1.0, 0.5)),
            Rule({"relu": 1, "relu6": [0, 1]}, operation="relu", module=nn.ReLU, name=["a.*", re.compile("b$")]),
            Rule({"max_pool": "last"}, stage=["layer1", "blocks.0-3"], call=range(1, 3)),
            {"call": "2:", "rule": "published"},
            {"call": 4, "max_pool": 10},
        ]
    )
    again = Plan(json.loads(json.dumps(plan.to_list())))
    assert again.to_list() == plan.to_list()
    assert again.base == plan.base
    for i in itertools.chain.from_iterable(itertools.combinations(range(5), n) for n in (1, 2, 5)):
        assert again.choice(i) == plan.choice(i)
    for i, call in itertools.product(range(1, 5), range(6)):
        for operation in ("relu", "max_pool"):
            assert again.covering([i], operation, call) == plan.covering([i], operation, call)
    for names in (["a.b"], ["x.b"], ["layer1.act"], ["blocks.3.act"], ["blocks.4"], [""]):
        assert again.matching(names, nn.ReLU()) == plan.matching(names, nn.ReLU())
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert "stage=['layer1', 'blocks.0-3']" in repr(plan)
    assert repr(Plan([HALF])) == "Jacobians(relu=0.5)"


@pytest.mark.parametrize(
    ("rule", "error", "match"),
    [
        ({"stge": "a", "relu": 1}, ValueError, "key of a rule 'stge' is not known; did you mean 'stage'"),
        ({"stage": "a", "reluu": 1}, ValueError, "did you mean 'relu'"),
        ({"stage": "a"}, ValueError, "decides nothing: add a choice, such as relu: 0.5"),
        ({"relu": "much"}, ValueError, "relu.*'much'"),
        ({"operation": "reluu", "relu": 1}, ValueError, "operation 'reluu' is not known; did you mean 'relu'"),
        ({"call": -1, "relu": 1}, ValueError, "call takes a number from 0 on"),
        ({"call": "3:2", "relu": 1}, ValueError, "call takes"),
        ({"call": "", "relu": 1}, ValueError, "call takes"),
        ({"call": True, "relu": 1}, ValueError, "call takes"),
        ({"name": "/(/", "relu": 1}, ValueError, "not a regular expression"),
        ({"name": 3, "relu": 1}, TypeError, "name takes a glob"),
        ({"stage": 3, "relu": 1}, TypeError, "stage takes a name"),
        ({"module": "a*", "relu": 1}, ValueError, "Globs and expressions go into name"),
        ({"module": "/a/", "relu": 1}, ValueError, "module takes a class"),
        ("layer1", TypeError, "a rule is a mapping"),
    ],
    ids=str,
)
def test_mistakes_in_rules(rule, error, match):
    with pytest.raises(error, match=match):
        Plan([rule])


def test_mistakes_in_rule_objects():
    with pytest.raises(TypeError, match="Jacobians or a mapping"):
        Rule(0.5)
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        Rule({"reluu": 1})


def test_a_rule_that_matches_nothing_is_pointed_out():
    with pytest.warns(
        PatchWarning, match=r"rule 1 \(stage='layr1'\) matches no module of the model; close names: layer1"
    ):
        patch(Probe(), Plan([HALF, {"stage": "layr1", "relu": 1}]))


def test_compiled_plans_for_modules():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU()))
    for conv in (model[0], model[2][0]):
        nn.init.zeros_(conv.bias), nn.init.zeros_(conv.weight)
    nn.init.ones_(model[2][0].weight)
    patch(model, Plan([HALF, {"stage": "2", "relu": 0.25}]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled(torch.ones(1, 1, 1, 1))
    with using(compiled, Jacobians(relu=2.0)):
        assert torch.autograd.grad(out.sum(), model[0].bias, retain_graph=True)[0].tolist() == [8.0, 8.0]
    assert torch.autograd.grad(out.sum(), model[0].bias)[0].tolist() == [0.25, 0.25]  # 2 * 0.5 * 0.25
    torch._dynamo.reset()


@pytest.mark.parametrize("rule", [{"name": "layer2.0", "relu": 1}, {"name": "shared", "call": 1, "relu": 1}], ids=str)
def test_compiled_plans_that_cannot_be_told_apart_are_refused(rule):
    torch._dynamo.reset()
    model = Probe()
    patch(model, Plan([rule]))
    with pytest.raises(Exception, match="does not show which module calls"):
        torch.compile(model, backend="aot_eager", fullgraph=True)()
    torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_under_a_checkpoint_are_refused(reentrant):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(1, 1), nn.ReLU())

        def forward(self, x):
            return checkpoint(self.inner, checkpoint(self.inner, x, use_reentrant=reentrant), use_reentrant=reentrant)

    model, x = Twice(), torch.ones(1, 1, requires_grad=True)
    patch(model, Plan([{"call": 1, "relu": 1}]))
    with pytest.raises(RuntimeError, match=r"inner\.1 takes its Jacobian of relu by the number.*checkpoint"):
        model(x)
    unpatch(model)
    patch(model, Plan([{"stage": "inner", "relu": 1}]))
    nn.init.zeros_(model.inner[0].weight), nn.init.zeros_(model.inner[0].bias)
    model(x).sum().backward()
    assert model.inner[0].bias.grad.tolist() == [1.0]


def test_a_checkpoint_around_other_parts_than_those_that_are_counted():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Sequential(nn.Linear(1, 1), nn.ReLU()), nn.ReLU()

        def forward(self, x):
            return self.last(self.last(checkpoint(self.inner, x, use_reentrant=False)))

    model, x = Twice(), torch.ones(1, 1)
    nn.init.zeros_(model.inner[0].weight), nn.init.zeros_(model.inner[0].bias)
    patch(model, Plan([Jacobians(relu=1), {"name": "last", "call": 1, "relu": 0.5}]))
    model(x).sum().backward()
    assert model.inner[0].bias.grad.tolist() == [0.5]


def test_calls_of_one_function_under_two_rules_have_a_row_each():
    class Twice(nn.Module):
        def forward(self, x):
            return F.relu(F.relu(x))

    x = torch.zeros(1, requires_grad=True)
    report = patch(Twice(), Plan([{"call": 1, "relu": 0.5}]), example=x)
    assert [(s.kind, s.choice, s.calls) for s in report.sites] == [("relu", 0.0, 1), ("relu", 0.5, 1)]


def test_the_fingerprint_names_the_rules():
    marks = [
        patch(Probe(), spelling).fingerprint
        for spelling in (
            HALF,
            Plan([HALF, {"stage": "layer1", "relu": 1}]),
            Plan([HALF, {"stage": "layer2", "relu": 1}]),
            Plan([HALF, {"stage": "layer1", "relu": 1}, {"stage": "layer2", "relu": 1}]),
            Plan([HALF, {"stage": "layer2", "relu": 1}, {"stage": "layer1", "relu": 1}]),
        )
    ]
    assert len(set(marks)) == 5
    assert patch(Probe(), Plan([HALF])).fingerprint == marks[0]


# ------------------------------------------------------------------------------------ models and command line
QUIET = {
    "logger": False,
    "limit_val_batches": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def classifier(**options):
    torch.manual_seed(0)
    return ImageClassifier("torchvision/resnet18", 3, (3, 32, 32), **options)


def data():
    return DataLoader(TensorDataset(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])), 2)


def saved(model, file="m.ckpt"):
    trainer = Trainer(max_steps=1, accelerator="cpu", **QUIET)
    trainer.fit(model, data(), data())
    trainer.save_checkpoint(file)
    return file


def test_a_classifier_with_rules_and_its_checkpoint():
    sites = [{"stage": "layer1", "relu": 0.5}, {"stage": "layer4.1", "relu": 1.0}]
    model = classifier(jacobians=Jacobians(max_pool="minimal"), sites=sites)
    assert {s.name: s.choice for s in model.patch_report.sites if s.operation == "relu"} == {
        "relu": 0.0,
        **{f"layer{i}.{k}.relu": {(1, 0): 0.5, (1, 1): 0.5, (4, 1): 1.0}.get((i, k), 0.0)
           for i in range(1, 5) for k in range(2)},
    }  # fmt: skip
    file = saved(model)
    content = torch.load(file, weights_only=True)
    assert content["hyper_parameters"]["sites"] == sites == content["nslightning"]["sites"]
    assert content["nslightning"]["fingerprint"] == model.patch_report.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error", PatchWarning)
        loaded = ImageClassifier.load_from_checkpoint(file, on_mismatch="refuse")
        Trainer(max_steps=2, accelerator="cpu", **QUIET).fit(
            classifier(jacobians=model.jacobians, sites=[Rule({"relu": 0.5}, stage="layer1"), sites[1]]),
            data(),
            data(),
            ckpt_path=file,
        )
    assert loaded.patch_report.fingerprint == model.patch_report.fingerprint
    x = torch.randn(2, 3, 32, 32)
    loss, other = model.eval()(x).sum(), loaded.eval()(x).sum()
    for a, b in zip(
        torch.autograd.grad(loss, list(model.parameters())),
        torch.autograd.grad(other, list(loaded.parameters())),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_checkpoint_under_other_rules_warns_or_is_refused():
    file = saved(classifier(sites=[{"stage": "layer1", "relu": 0.5}]))
    message = r"made under sites=\[\{\"stage\": \"layer1\", \"relu\": 0\.5\}\], and this run has sites=\[\]"
    with pytest.warns(PatchWarning, match=message):
        ImageClassifier.load_from_checkpoint(file, sites=None)
    with pytest.raises(ValueError, match=message):
        ImageClassifier.load_from_checkpoint(file, sites=None, on_mismatch="refuse")
    with pytest.raises(ValueError, match=r"made under relu=0\.0, and this run has relu=1\.0"):
        ImageClassifier.load_from_checkpoint(file, jacobians=Jacobians(relu=1.0), on_mismatch="refuse")
    for model, outcome in (
        (classifier(), pytest.warns(PatchWarning, match=message)),
        (classifier(on_mismatch="refuse"), pytest.raises(ValueError, match=message)),
    ):
        with outcome:
            Trainer(max_steps=2, accelerator="cpu", **QUIET).fit(model, data(), data(), ckpt_path=file)
    # Sites that differ under the same choice: here a checkpoint that says so.
    content = torch.load(file, weights_only=True)
    content["nslightning"]["fingerprint"] = "0123456789ab"
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"other patched sites.*0123456789ab"):
        ImageClassifier.load_from_checkpoint(file, on_mismatch="refuse")
    del content["nslightning"]
    torch.save(content, file)
    with pytest.raises(ValueError, match="does not say"):
        ImageClassifier.load_from_checkpoint(file, on_mismatch="refuse")


def test_mistaken_rules_of_a_model():
    with pytest.raises(ValueError, match="is for all sites: put it into jacobians"):
        classifier(sites=[{"relu": 1}])
    with pytest.raises(ValueError, match="on_mismatch is 'warn' or 'refuse'"):
        classifier(on_mismatch="ask")
    with pytest.raises(ValueError, match="random"):
        classifier(sites=[{"stage": "maxpool", "max_pool": "random"}], compile=True)


def test_a_language_model_with_rules():
    options = {
        "activation": "relu",
        "vocab_size": 17,
        "block_size": 8,
        "config": {"n_layer": 3, "n_embd": 8, "n_head": 2},
    }
    model = LanguageModel("mini", **options, sites=[{"stage": "transformer.h.0-1", "relu": 0.5}])
    assert [s.choice for s in model.patch_report.sites] == [0.5, 0.5, 0.0]


class Sorts(nn.Module):
    def forward(self, x):
        return x.flatten(1).topk(3)[0]


def test_strict_models(monkeypatch):
    monkeypatch.setattr(
        "nslightning.models.classifier.create_backbone", lambda *a, **k: nn.Sequential(_scale(), Sorts())
    )
    with pytest.raises(UnreachedError, match=r"1 calls topk, which has no choice.*--model\.strict=false"):
        classifier()
    with pytest.warns(PatchWarning, match="nothing to patch"):
        model = classifier(strict=False)
    assert [(s.name, s.operation) for s in model.patch_report.unreached] == [("1", "topk")]


def _scale():
    return nn.Conv2d(3, 1, 1)


def test_rules_from_the_command_line(tmp_path):
    """From a file and from flags; kept in config, checkpoint and report."""
    (tmp_path / "rules.yaml").write_text("model:\n  sites:\n    - {stage: relu1, relu: 0.5}\n")
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    short.append("--trainer.log_every_n_steps=2")
    rule = '--model.sites+={"module": "ReLU", "name": "/2$/", "relu": 1}'
    arguments = ["--config=configs/quickstart.yaml", "--config=rules.yaml", "--name=rules", rule]
    assert main(["fit", *arguments, *short, "--model.on_mismatch=refuse", "--trainer.max_epochs=1"]) == 0
    folder = tmp_path / "runs" / "rules" / "001"
    want = [{"stage": "relu1", "relu": 0.5}, {"module": "ReLU", "name": "/2$/", "relu": 1}]
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["sites"] == want
    report = json.loads((folder / "patch_report.json").read_text())
    assert report["rules"] == want
    assert [s["choice"] for s in report["sites"] if s["operation"] == "relu"] == [0.5, 1, 0, 0]
    assert json.loads((folder / "run.json").read_text())["patch"]["fingerprint"] == report["fingerprint"]
    again = ["fit", f"--config={folder}/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=2", *short]
    assert main(again) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["sites"] == want
    assert main([*again, "--model.sites=null"]) == 2


@pytest.mark.parametrize("rule", ["{stage: a}", "{stage: a, reluu: 1}", "{relu: 1}"])
def test_mistaken_rules_on_the_command_line(rule, capfd):
    assert main(["fit", "--config=configs/quickstart.yaml", f"--model.sites=[{rule}]"]) == 2
    assert "error:" in capfd.readouterr().err


def test_the_guide_runs(repo_root):
    failed, tried = doctest.testfile(
        str(repo_root / "docs" / "surgery.md"),
        module_relative=False,
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert (failed, tried > 15) == (0, True)


def test_the_guides_config_patches_as_it_says(repo_root):
    text = (repo_root / "docs" / "surgery.md").read_text()
    written = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["model"]
    model = ImageClassifier(
        written["backbone"], 3, (3, 32, 32), Jacobians(**written["jacobians"]), sites=written["sites"]
    )
    choice = {s.name: s.choice for s in model.patch_report.sites}
    assert choice["maxpool"] == "minimal"
    assert [choice[f"layer{i}.0.act1"] for i in (1, 2, 3, 4)] == [1, 0.5, 0.5, 0]


class _Calls(nn.Module):
    """Stages whose activations are calls."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU6())

    def forward(self, x):
        return F.relu(self.head(F.max_pool1d(self.encoder(x), 1)))


@pytest.mark.parametrize("example", [None, torch.ones(2, 4)], ids=["", "example"])
@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([{"stage": "head", "relu": 0.5}], r"rule 1 \(stage='head'\) decides nothing: .*relu, .*they evaluate relu6"),
        ([{"stage": "encoder", "relu": 0.5}], r"rule 1 \(stage='encoder'\) decides nothing: .*do not evaluate$"),
        ([{"operation": "relu", "relu": 0.5}], None),
        ([{"stage": "head", "relu": 0.5, "relu6": [1, 1]}], None),
        ([{"stage": "head", "call": "1:", "relu6": [1, 1]}], None),
    ],
)  # fmt: skip
def test_a_rule_that_decides_nothing_is_named(sites, message, example):
    model, plan = _Calls(), Plan([Jacobians(), *sites])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch(model, plan, example=example)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
    hints = [str(w.message) for w in caught if "decides nothing" in str(w.message)]
    assert len(hints) == (message is not None)
    assert all(re.search(message, hint) for hint in hints)


def test_a_rule_that_decides_nothing_is_named_when_modules_are_the_sites():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU6())
    with pytest.warns(PatchWarning, match=r"rule 1 \(stage='1'\) decides nothing.*they evaluate relu6"):
        patch(model, Plan([Jacobians(), {"stage": "1", "relu": 0.5}]))
