"""The zoo's rows against counts that know nothing of the surgery: their own module hooks and function mode."""

import importlib
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

zoo = importlib.import_module("benchmarks.zoo")

MODULES = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.MaxPool2d)
FUNCTIONS = {
    "relu", "relu_", "relu6", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "abs", "max_pool2d", "clamp",
    "clamp_", "amax", "max", "maximum", "normalize", "norm",
}  # fmt: skip
WITHOUT_CHOICE = {"topk", "median", "cummax"}


class Calls(TorchFunctionMode):
    """Counts differentiable calls that modules of ``MODULES`` do not make."""

    def __init__(self):
        super().__init__()
        self.inside, self.counts = 0, Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if not self.inside and name in FUNCTIONS | WITHOUT_CHOICE and args[0].requires_grad:
            self.counts[name.rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def counted(model, size):
    """Modules that ran, and calls of functions, in one forward of a model that nobody patched."""
    ran, calls = set(), Calls()

    def enter(module, args):
        ran.add(module)
        calls.inside += 1

    def leave(module, args, output):
        calls.inside -= 1

    for module in model.modules():
        if isinstance(module, MODULES):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
    with calls:
        model.eval()(zoo.batch(size))
    return len(ran), calls.counts


MODELS = {
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 64),
    "shufflenet_v2_x0_5": (torchvision.models.shufflenet_v2_x0_5, 64),
    "squeezenet1_0": (torchvision.models.squeezenet1_0, 64),
    "resnet18": (torchvision.models.resnet18, 64),  # modules that run several times
    "densenet121": (torchvision.models.densenet121, 64),  # F.relu once
    "swin_v2_t": (torchvision.models.swin_v2_t, 64),  # clamp and normalize
    "a rank": (lambda: Net(lambda x: F.relu(x).topk(2, 3)[0]), 64),
    "timm hard-swish": (lambda: timm.create_model("mobilenetv3_small_050"), 64),
    "timm GELU": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), 64),
    "timm amax": (lambda: timm.create_model("hiera_tiny_224", stages=(1, 1, 1, 1)), 224),
}


@pytest.mark.parametrize("name", MODELS)
def test_row_against_independent_counts(name):
    build, size = MODELS[name]
    torch.manual_seed(0)
    modules, functions = counted(build(), size)
    torch.manual_seed(0)
    row = zoo.measure(build(), (size,))
    left = Counter({k: n for k, n in functions.items() if k in WITHOUT_CHOICE})
    assert row["modules"] == modules
    assert row["functional_calls"] == (functions - left).total()
    assert row["unreached"] == zoo.words(left)
    assert row["missed"] == ""
    assert row["forward"] == row["gradients"] == "equal"
    assert int(row["nonzero"].split("/")[0]) > 0.9 * int(row["nonzero"].split("/")[1])  # something was compared
    match name:
        case "timm GELU":
            assert (modules, functions.total(), row["moved"]) == (0, 0, 0)
        case "squeezenet1_0" | "resnet18" | "mobilenet_v3_small":
            assert row["moved"] > 0  # ties were met, so the equal bits are ours
        case "densenet121":
            assert row["functional"] == 1
            assert row["moved"] > 0
        case "swin_v2_t":
            assert functions["clamp"] == functions["normalize"] / 2 > 0
        case "timm amax":
            assert functions["amax"] > 0
        case "a rank":
            assert left["topk"] == 1


class Net(nn.Module):
    """One convolution, then what a test gives."""

    def __init__(self, after):
        super().__init__()
        self.first, self.after, self.last = nn.Conv2d(3, 4, 3), after, nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.after(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (lambda x: x.relu().clamp(min=0) + x.abs(), {"relu": 1, "clamp": 1, "abs": 1}),
        (nn.functional.elu, {}),  # smooth
        (nn.functional.selu, {"elu": 1}),
        (lambda x: nn.functional.elu(x, 0.5), {"elu": 1}),
        (lambda x: x.amax(1, keepdim=True) + x.sort(1)[0], {"max": 1, "sort": 1}),
        (lambda x: nn.functional.normalize(x), {"norm": 1, "clamp": 1}),
        (nn.functional.gelu, {}),
    ],
)
def test_graph_counts_nodes(after, expected):
    assert zoo.graph(Net(after)(zoo.batch(8))) == expected


def test_what_the_surgery_does_not_know_is_missed():
    assert zoo.measure(Net(lambda x: x.logit(0.1)), (8,))["missed"] == "1 logit"


def test_a_wrong_gradient_is_seen(monkeypatch):
    stock = zoo.gradients
    runs = []

    def wrong(*args, **kwargs):
        returned = stock(*args, **kwargs)
        runs.append(returned)
        if len(runs) == 2:  # under the reference choice
            returned[0].view(-1)[0].mul_(1 + 2**-20)
        return returned

    monkeypatch.setattr(zoo, "gradients", wrong)
    row = zoo.measure(Net(nn.ReLU()), (8,))
    assert (row["forward"], row["gradients"]) == ("equal", "DIFFERS")


def test_a_model_that_fails_once_patched_says_so(monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("not this one")

    monkeypatch.setattr(zoo, "patch", broken)
    error = zoo.run("f", "net", lambda: Net(nn.ReLU()), 8, 30)["error"]
    assert error == "RuntimeError: fails once patched: not this one"


def test_sizes_limit_and_failures_become_rows(monkeypatch):
    row = zoo.run("f", "pool", lambda: Net(nn.MaxPool2d(70)), 96, 30)
    assert row["input"] == 96  # 64 is too small for it
    assert "too small" in zoo.run("f", "pool", lambda: Net(nn.MaxPool2d(700)), 96, 30)["error"]

    def endless(x):
        while True:
            x = x + 0

    assert "longer than 1 s" in zoo.run("f", "endless", lambda: Net(endless), 8, 1)["error"]
    monkeypatch.setattr(zoo, "MAX_PARAMETERS", 10)
    assert zoo.run("f", "big", lambda: Net(nn.ReLU()), 8, 30)["error"].startswith("not run")


def test_resumes_and_writes_the_page(tmp_path, monkeypatch, capsys):
    built = []

    def models():
        for name, after in (("a", nn.ReLU()), ("b", nn.MaxPool2d(700))):
            yield "torchvision", name, lambda name=name, after=after: built.append(name) or Net(after), 8

    monkeypatch.setattr(zoo, "torchvision_models", models)
    monkeypatch.setattr(
        "sys.argv", ["zoo", "--family=torchvision", f"--out={tmp_path}/zoo.md", f"--csv={tmp_path}/zoo.csv"]
    )
    zoo.main()
    before = (tmp_path / "zoo.csv").read_text()
    ran = len(built)
    zoo.main()
    assert (tmp_path / "zoo.csv").read_text() == before
    assert len(built) == ran
    page = (tmp_path / "zoo.md").read_text()
    assert "2 models, 1 run; 1 sites reached as modules" in page
    assert "| b | torchvision | RuntimeError" in page


def test_smallest_of_a_family():
    assert zoo.smallest("vgg") == "vgg11"
    assert zoo.smallest("mobilenetv3") == "mobilenetv3_small_050"


def test_all_small_models_are_run_and_none_twice(tmp_path, monkeypatch):
    sizes = {"a": {"big": 13_000_000, "small": 9}, "b": {"tiny": 3, "densenet121": 5}}
    built = []
    monkeypatch.setattr(zoo, "list_modules", lambda: list(sizes))
    monkeypatch.setattr(zoo, "parameters", sizes.__getitem__)
    monkeypatch.setattr(zoo, "image_size", lambda name: 8)
    monkeypatch.setattr(zoo.timm, "create_model", lambda name: built.append(name) or Net(nn.ReLU()))
    file = tmp_path / "zoo.csv"
    base = ["zoo", f"--out={tmp_path}/zoo.md", f"--csv={file}"]
    monkeypatch.setattr(zoo, "MODELS", {})
    monkeypatch.setattr(
        zoo, "torchvision_models", lambda: iter([("torchvision", "densenet121", lambda: Net(nn.ReLU()), 8)])
    )
    monkeypatch.setattr("sys.argv", [*base, "--family=timm", "--minutes=0", "--all"])
    zoo.main()
    assert zoo.read(file) == []
    for extra in ([], ["--all"], ["--all"]):
        monkeypatch.setattr("sys.argv", [*base, *extra])
        zoo.main()
    rows = [(r["family"], r["model"]) for r in zoo.read(file)]
    assert rows == [("torchvision", "densenet121"), ("timm/a", "small"), ("timm/b", "tiny"), ("timm/b", "densenet121")]
    assert set(built) == {"small", "tiny", "densenet121"}


def test_bits_of_any_layout():
    odd = torch.randn(6).as_strided((2, 1), (1, 4))  # contiguous, and yet no stride of 1 at the end
    assert torch.equal(zoo.bits(odd), zoo.bits(odd.flatten().clone().view(2, 1)))
    assert not torch.equal(zoo.bits(torch.zeros(2)), zoo.bits(-torch.zeros(2)))
