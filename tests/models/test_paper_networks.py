"""The paper networks against published counts, independent constructions and closed-form initialisations."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from nslightning.models import paper
from nslightning.models.paper import initialize

CIFAR, MNIST, IMAGENET = (3, 32, 32), (1, 28, 28), (3, 224, 224)

# name, options, image shape, classes, parameters, batch norms, max poolings, ReLU evaluations per image.
# Counted on the papers' own networks.
SIZES = [
    ("vgg11", {"batch_norm": False}, CIFAR, 10, 9225610, 0, 5, 151552),
    ("vgg13", {"batch_norm": False}, CIFAR, 10, 9410122, 0, 5, 249856),
    ("vgg16", {"batch_norm": False}, CIFAR, 10, 14719818, 0, 5, 276480),
    ("vgg19", {"batch_norm": False}, CIFAR, 10, 20029514, 0, 5, 303104),
    ("resnet18", {"batch_norm": False, "stem_pool": "3x3"}, CIFAR, 10, 11164362, 0, 1, 188416),
    ("resnet18", {"batch_norm": False, "stem_pool": "2x2"}, CIFAR, 10, 11164362, 0, 1, 188416),
    ("resnet34", {"batch_norm": False, "stem_pool": "2x2"}, CIFAR, 10, 21265098, 0, 1, 290816),
    ("resnet50", {"batch_norm": False, "stem_pool": "2x2"}, CIFAR, 10, 23467722, 0, 1, 784384),
    ("densenet121", {"batch_norm": False}, CIFAR, 10, 6880458, 0, 1, 319744),
    ("lenet5", {"batch_norm": False}, MNIST, 10, 44426, 0, 2, 4684),
    ("fc", {"batch_norm": False}, MNIST, 10, 10020874, 0, 0, 6144),
    ("vgg11", {"batch_norm": True}, CIFAR, 10, 9231114, 8, 5, 151552),
    ("vgg13", {"batch_norm": True}, CIFAR, 10, 9416010, 10, 5, 249856),
    ("vgg16", {"batch_norm": True}, CIFAR, 10, 14728266, 13, 5, 276480),
    ("vgg19", {"batch_norm": True}, CIFAR, 10, 20040522, 16, 5, 303104),
    ("resnet18", {"batch_norm": True, "stem_pool": "3x3"}, CIFAR, 10, 11173962, 20, 1, 188416),
    ("resnet18", {"batch_norm": True, "stem_pool": "2x2"}, CIFAR, 10, 11173962, 20, 1, 188416),
    ("resnet34", {"batch_norm": True, "stem_pool": "2x2"}, CIFAR, 10, 21282122, 36, 1, 290816),
    ("resnet50", {"batch_norm": True, "stem_pool": "2x2"}, CIFAR, 10, 23520842, 53, 1, 784384),
    ("densenet121", {"batch_norm": True}, CIFAR, 10, 6882634, 2, 1, 319744),
    ("lenet5", {"batch_norm": True}, MNIST, 10, 44878, 4, 2, 4684),
    ("fc", {"batch_norm": True}, MNIST, 10, 10033162, 3, 0, 6144),
    ("fc", {"hidden": (256, 256, 256)}, MNIST, 10, 335114, 0, 0, 768),
    ("fc", {"hidden": (2000, 128)}, MNIST, 10, 1827418, 0, 0, 2128),
    ("fc", {"hidden": (4000, 256), "activation": "relu6"}, MNIST, 10, 4166826, 0, 0, 4256),
    ("resnet50", {"stem": "imagenet", "stem_pool": "3x3"}, IMAGENET, 10, 23528522, 53, 1, 9608704),
    ("resnet50", {"stem": "imagenet", "stem_pool": "2x2"}, IMAGENET, 1000, 25557032, 53, 1, 9608704),
]


def relu_evaluations(network, shape):
    """Entries that pass through ReLU (or ReLU6) modules in the forward pass of one image."""
    counts = []
    for module in network.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.register_forward_hook(lambda module, args, out: counts.append(out.numel()))
    with torch.no_grad():
        network.eval()(torch.empty(1, *shape, device="meta"))
    return sum(counts)


@pytest.mark.parametrize(
    ("name", "options", "shape", "classes", "parameters", "norms", "pools", "relus"),
    SIZES,
    ids=lambda value: "" if isinstance(value, int) else None,
)
def test_sizes_are_those_of_the_papers(name, options, shape, classes, parameters, norms, pools, relus):
    with torch.device("meta"):  # shapes without values: nothing is computed
        network = paper.NETWORKS[name](classes, shape, **options)
    modules = list(network.modules())
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in modules) == norms
    assert sum(isinstance(module, nn.MaxPool2d) for module in modules) == pools
    assert not any(getattr(module, "inplace", False) for module in modules)
    assert relu_evaluations(network, shape) == relus


# ------------------------------------------------------------------ forward against other constructions


def perturbed(network):
    """Give batch norms weights and statistics that a mistake would show in."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


class Functional:
    """Layers as plain functions of a state dict."""

    def __init__(self, network, training):
        self.state = {key: value.clone() for key, value in network.state_dict().items()}
        self.training = training

    def conv(self, x, key, stride=1, padding=0):
        return F.conv2d(x, self.state[f"{key}.weight"], self.state.get(f"{key}.bias"), stride, padding)

    def linear(self, x, key):
        return F.linear(x, self.state[f"{key}.weight"], self.state[f"{key}.bias"])

    def norm(self, x, key):
        if f"{key}.weight" not in self.state:
            return x
        mean, variance = self.state[f"{key}.running_mean"], self.state[f"{key}.running_var"]
        weight, bias = self.state[f"{key}.weight"], self.state[f"{key}.bias"]
        return F.batch_norm(x, mean, variance, weight, bias, self.training)


def lenet5_by_hand(f, x):
    x = f.norm(F.max_pool2d(F.relu(f.conv(x, "conv1")), 2, 2), "bn1")
    x = f.norm(F.max_pool2d(F.relu(f.conv(x, "conv2")), 2, 2), "bn2").reshape(len(x), -1)
    x = f.norm(F.relu(f.linear(x, "fc3")), "bn3")
    x = f.norm(F.relu(f.linear(x, "fc4")), "bn4")
    return f.linear(x, "classifier")


def vgg11_by_hand(f, x):
    for stage, convolutions in enumerate([["1"], ["1"], ["1", "2"], ["1", "2"], ["1", "2"]], start=1):
        for index in convolutions:
            x = f.conv(x, f"features.conv{stage}_{index}", padding=1)
            x = F.relu(f.norm(x, f"features.bn{stage}_{index}"))
        x = F.max_pool2d(x, 2, 2)
    return f.linear(x.reshape(len(x), 512), "classifier")


def resnet18_by_hand(f, x):
    x = F.relu(f.norm(f.conv(x, "conv1", 1, 1), "bn1"))
    x = F.max_pool2d(x, 3, 2, 1)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            key = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(f.norm(f.conv(x, f"{key}.conv1", stride, 1), f"{key}.bn1"))
            y = f.norm(f.conv(y, f"{key}.conv2", 1, 1), f"{key}.bn2")
            if stride == 2:
                x = f.norm(f.conv(x, f"{key}.downsample.0", 2), f"{key}.downsample.1")
            x = F.relu(y + x)
    return f.linear(x.mean((2, 3)), "fc")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "bn"])
@pytest.mark.parametrize(
    ("name", "by_hand", "shape"),
    [
        ("lenet5", lenet5_by_hand, MNIST),
        ("lenet5", lenet5_by_hand, (3, 32, 32)),
        ("vgg11", vgg11_by_hand, CIFAR),
        ("resnet18", resnet18_by_hand, CIFAR),
    ],
)
def test_forward_equals_functions_of_the_state_dict(name, by_hand, shape, batch_norm, training):
    torch.manual_seed(0)
    network = perturbed(paper.NETWORKS[name](10, shape, batch_norm=batch_norm)).train(training)
    x = torch.randn(4, *shape)
    with torch.no_grad():
        expected = by_hand(Functional(network, training), x)
        assert torch.equal(network(x), expected)
    assert expected.shape == (4, 10)
    assert expected.std() > 0


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_imagenet_resnets_are_torchvisions(name):
    torch.manual_seed(0)
    reference = perturbed(torchvision.models.get_model(name, num_classes=7)).eval()
    network = paper.NETWORKS[name](7, (3, 64, 64), stem="imagenet", stem_pool="3x3").eval()
    network.load_state_dict(reference.state_dict())  # strict: the names agree too
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(x), reference(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_stem_pools_differ_where_they_should(name):
    with torch.device("meta"):
        networks = {pool: paper.NETWORKS[name](10, CIFAR, stem_pool=pool) for pool in ("3x3", "2x2", None)}
    states = [list(network.state_dict()) for network in networks.values()]
    assert states[0] == states[1] == states[2]  # a pooling has no parameters
    assert (networks["3x3"].maxpool.kernel_size, networks["3x3"].maxpool.stride) == (3, 2)
    assert networks["3x3"].maxpool.padding == 1
    assert (networks["2x2"].maxpool.kernel_size, networks["2x2"].maxpool.stride) == (2, 2)
    assert networks["2x2"].maxpool.padding == 0
    x = torch.empty(1, *CIFAR, device="meta")
    shapes = {pool: network[: list(dict(network.named_children())).index("layer2")](x).shape[2:]
              for pool, network in networks.items()}  # fmt: skip
    assert shapes == {"3x3": (16, 16), "2x2": (16, 16), None: (32, 32)}


def test_densenet_with_all_norms_is_torchvisions_but_for_the_pool():
    torch.manual_seed(0)
    reference = perturbed(torchvision.models.densenet121(num_classes=7)).eval()
    reference.features.pool0 = nn.MaxPool2d(2, 2)
    network = paper.densenet121(7, (3, 64, 64), norm_in_blocks=True).eval()
    network.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(x), reference(x))


def test_published_densenet_normalises_twice():
    names = [name for name, module in paper.densenet121(10, CIFAR).named_modules()
             if isinstance(module, nn.BatchNorm2d)]  # fmt: skip
    assert names == ["features.norm0", "features.norm5"]
    with pytest.raises(ValueError, match="norm_in_blocks=True needs batch_norm=True"):
        paper.densenet121(10, CIFAR, batch_norm=False, norm_in_blocks=True)


def test_layers_of_the_fully_connected_net():
    def kinds(**options):
        return [type(layer).__name__ for layer in paper.fc(10, MNIST, hidden=(8, 8), **options)]

    assert kinds() == ["Flatten", "Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert kinds(batch_norm=True, dropout=0.3) == (
        ["Flatten"] + 2 * ["Linear", "BatchNorm1d", "ReLU", "Dropout"] + ["Linear"]
    )
    assert kinds(first_activation=False) == ["Flatten", "Linear", "Linear", "ReLU", "Linear"]
    assert kinds(activation="relu6")[2] == "ReLU6"
    assert paper.fc(10, MNIST, hidden=(8,), dropout=0.3).dropout1.p == 0.3


def test_one_relu_is_shared_inside_a_residual_block():
    calls = []
    network = paper.resnet50(10, CIFAR).eval()
    network.layer1[0].relu.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    network(torch.randn(1, *CIFAR))
    assert calls == [64, 64, 256]


# ------------------------------------------------------------------ images that do not fit


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("fc", {"hidden": (8,)}, 1),
        ("lenet5", {}, 16),
        ("vgg11", {}, 32),
        ("vgg19", {}, 32),
        ("resnet18", {"stem_pool": "3x3"}, 1),
        ("resnet18", {"stem_pool": "2x2"}, 2),
        ("resnet18", {"stem_pool": "2x2", "stem": "imagenet"}, 3),
        ("resnet18", {"stem_pool": None, "stem": "imagenet"}, 1),
        ("densenet121", {}, 31),
    ],
)
def test_the_smallest_image_is_accepted_and_a_smaller_one_refused(name, options, side):
    with torch.device("meta"):
        network = paper.NETWORKS[name](5, (2, side, side + 3), **options).eval()
    assert network(torch.empty(1, 2, side, side + 3, device="meta")).shape == (1, 5)
    if side > 1:
        with pytest.raises(ValueError, match=rf"too small for paper/{name}.*at least {side}x{side}"):
            paper.NETWORKS[name](5, (2, side + 3, side - 1), **options)
        with pytest.raises(RuntimeError):  # the bound is not stricter than the network
            network(torch.empty(1, 2, side, side - 1, device="meta"))


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28, 1), (1, 28, 0), (1, 28, 28.0), (-1, 28, 28)])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match="three positive integers"):
        paper.lenet5(10, shape)


def test_larger_images_and_lists_are_accepted():
    with torch.no_grad():
        assert paper.vgg11(5, [3, 64, 70]).eval()(torch.randn(1, 3, 64, 70)).shape == (1, 5)
        assert paper.fc(5, [3, 8, 8], hidden=[4]).eval()(torch.randn(1, 3, 8, 8)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg11", {"init": "kaiming"}, "init='kaiming' is not one of 'torch', 'kaiming_uniform'"),
        ("resnet18", {"stem": "7x7"}, "stem='7x7' is not one of 'small', 'imagenet'"),
        ("resnet18", {"stem_pool": "4x4"}, "stem_pool='4x4' is not one of '3x3', '2x2' or None"),
        ("fc", {"activation": "tanh"}, "activation='tanh' is not one of 'relu', 'relu6'"),
        ("fc", {"hidden": (16, 0)}, "each width is a positive integer"),
        ("fc", {"dropout": 1.5}, "dropout probability"),
        ("fc", {"num_classes": 0}, "at least one class"),
    ],
)
def test_options_that_do_not_exist_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        paper.NETWORKS[name](**{"num_classes": 10, "image_shape": CIFAR, **options})


# ------------------------------------------------------------------ initialisation


def fans(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    area = layer.kernel_size[0] * layer.kernel_size[1]
    return layer.in_channels * area, layer.out_channels * area


def assert_uniform(tensor, bound):
    n = tensor.numel()
    assert tensor.abs().max() <= bound * (1 + 1e-6)
    assert tensor.abs().max() >= bound * (1 - 20 / n)  # the chance to miss this is exp(-20)
    std = bound / math.sqrt(3)
    assert abs(tensor.square().mean().sqrt().item() - std) <= 6 * std * math.sqrt(0.2 / n)
    assert abs(tensor.mean().item()) <= 6 * std / math.sqrt(n)


def assert_normal(tensor, std):
    n = tensor.numel()
    assert abs(tensor.square().mean().sqrt().item() - std) <= 6 * std * math.sqrt(0.5 / n)
    assert abs(tensor.mean().item()) <= 6 * std / math.sqrt(n)
    # a normal sample has 31.7 % of its values beyond one standard deviation, a uniform one of that std 42.3 %
    beyond = (tensor.abs() > std).double().mean().item()
    assert abs(beyond - 0.3173) <= 6 * math.sqrt(0.3173 * 0.6827 / n)


def assert_initialized(network, init):
    """Every parameter against the closed form of its distribution."""
    seen = 0
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()
            assert (layer.running_mean == 0).all()
            assert (layer.running_var == 1).all()
            assert layer.num_batches_tracked == 0
            seen += 2
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        fan_in, fan_out = fans(layer)
        weight, conv = layer.weight.detach(), isinstance(layer, nn.Conv2d)
        zero_bias = (conv and init != "torch") or init in ("kaiming_uniform", "kaiming_normal_fan_in")
        if init == "kaiming_uniform" and not conv:
            assert_normal(weight, 0.01)
        elif init == "kaiming_uniform":
            assert_uniform(weight, math.sqrt(6 / fan_in))
        elif init.startswith("kaiming_normal") and conv:
            assert_normal(weight, math.sqrt(2 / (fan_in if init.endswith("fan_in") else fan_out)))
        else:
            assert_uniform(weight, 1 / math.sqrt(fan_in))
        seen += 1
        if layer.bias is not None:
            seen += 1
            if zero_bias:
                assert (layer.bias == 0).all()
            else:
                assert layer.bias.abs().max() <= 1 / math.sqrt(fan_in) * (1 + 1e-6)
                assert layer.bias.abs().max() > 0.5 / math.sqrt(fan_in)  # 6 values at least: chance 2**-6 to miss
    assert seen == len(list(network.parameters()))


PUBLISHED = {
    "fc": (MNIST, "torch"),
    "lenet5": (MNIST, "torch"),
    "vgg11": (CIFAR, "torch"),
    "resnet18": (CIFAR, "kaiming_normal_fan_out"),
    "resnet50": (CIFAR, "kaiming_normal_fan_out"),
    "densenet121": (CIFAR, "kaiming_normal_fan_in"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_default_initialisation_is_that_of_the_training_experiment(name):
    torch.manual_seed(2)
    shape, init = PUBLISHED[name]
    assert_initialized(paper.NETWORKS[name](10, shape, batch_norm=True), init)


@pytest.mark.parametrize("init", ["torch", "kaiming_uniform", "kaiming_normal_fan_out", "kaiming_normal_fan_in"])
@pytest.mark.parametrize("name", ["fc", "lenet5", "vgg11", "resnet18"])
def test_every_initialisation_on_every_kind_of_network(name, init):
    torch.manual_seed(2)
    shape = PUBLISHED[name][0]
    assert_initialized(paper.NETWORKS[name](10, shape, batch_norm=True, init=init), init)


def test_the_checks_of_the_initialisation_tell_the_schemes_apart():
    torch.manual_seed(2)
    for built in ("torch", "kaiming_uniform", "kaiming_normal_fan_out", "kaiming_normal_fan_in"):
        network = paper.resnet18(10, CIFAR, init=built)
        for other in {"torch", "kaiming_uniform", "kaiming_normal_fan_out", "kaiming_normal_fan_in"} - {built}:
            with pytest.raises(AssertionError):
                assert_initialized(network, other)


def test_initialize_makes_a_used_network_new():
    torch.manual_seed(2)
    network = perturbed(paper.lenet5(10, MNIST, batch_norm=True))
    network(torch.randn(8, *MNIST))
    parameters = list(network.parameters())
    for init in ("kaiming_uniform", "torch"):
        before = [parameter.detach().clone() for parameter in parameters]
        initialize(network, init)
        assert_initialized(network, init)
        assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))  # optimizers hold on
        weights = [(a, b) for a, b in zip(before, parameters, strict=True) if a.ndim > 1]
        assert not any(torch.equal(a, b) for a, b in weights)
    torch.manual_seed(3)
    initialize(network, "torch")
    once = {key: value.clone() for key, value in network.state_dict().items()}
    torch.manual_seed(3)
    initialize(network, "torch")
    assert all(torch.equal(value, once[key]) for key, value in network.state_dict().items())
