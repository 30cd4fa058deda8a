"""Backbones by name: what is built, and what is said when it cannot be."""

import importlib.util
import re
import socket
import subprocess
import sys
import warnings

import pytest
import torch
import torchvision

from nslightning.commands.endings import ending_of
from nslightning.models import backbones
from nslightning.models.backbones import create_backbone, input_channels, list_backbones


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("paper/fc", (1, 28, 28), {"hidden": [16, 16]}),
        ("paper/lenet5", (1, 28, 28), {"batch_norm": True}),
        ("paper/vgg11", (3, 32, 32), {"init": "kaiming_uniform"}),
        ("paper/resnet18", (4, 32, 32), {"stem_pool": None}),
        ("timm/resnet10t", (1, 32, 32), {}),
        ("timm/resnet10t.c3_in1k", (3, 32, 32), {"drop_rate": 0.1}),
        ("timm/mobilenetv3_small_050", (5, 32, 32), {}),
        ("timm/test_vit", (1, 48, 32), {}),  # built for that height and width
        ("timm/vit_tiny_patch16_224", (3, 224, 224), {"depth": 1}),
        ("torchvision/squeezenet1_1", (3, 64, 64), {}),
        ("torchvision/squeezenet1_1", (1, 64, 64), {}),
        ("torchvision/mobilenet_v3_small", (3, 32, 32), {"dropout": 0.1}),
        ("torchvision/googlenet", (3, 64, 64), {}),
        ("torchvision/inception_v3", (3, 80, 80), {}),
        ("torchvision/vit_b_16", (3, 32, 32), {}),  # likewise
    ],
)
def test_forward_shape_in_training_and_evaluation(name, shape, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # GoogLeNet and Inception v3 warn unless told how to initialise
        network = create_backbone(name, 7, shape, **options)
    x = torch.randn(2, input_channels(name, shape), *shape[1:])
    with torch.no_grad():
        assert network.eval()(x).shape == (2, 7)
        out = network.train()(x)
    assert isinstance(out, torch.Tensor)  # no named tuple of auxiliary outputs
    assert out.shape == (2, 7)


def test_options_reach_the_constructor():
    assert create_backbone("timm/resnet10t", 7, (3, 32, 32), drop_rate=0.25).drop_rate == 0.25
    assert create_backbone("torchvision/squeezenet1_1", 7, (3, 32, 32), dropout=0.25).classifier[0].p == 0.25
    assert create_backbone("timm/test_vit", 7, (3, 48, 48), img_size=32).patch_embed.img_size == (32, 32)
    assert create_backbone("torchvision/googlenet", 7, (3, 64, 64), aux_logits=True).aux1 is not None


def test_input_channels():
    assert input_channels("torchvision/vgg11", (1, 28, 28)) == 3
    assert input_channels("timm/resnet18", (1, 28, 28)) == 1
    assert input_channels("paper/vgg11", (4, 32, 32)) == 4


# ------------------------------------------------------------------ lists


def test_list_backbones():
    assert list_backbones("paper/*") == [
        "paper/densenet121",
        "paper/fc",
        "paper/lenet5",
        "paper/resnet18",
        "paper/resnet34",
        "paper/resnet50",
        "paper/vgg11",
        "paper/vgg13",
        "paper/vgg16",
        "paper/vgg19",
    ]
    assert list_backbones("*/resnet18") == ["paper/resnet18", "timm/resnet18", "torchvision/resnet18"]
    assert list_backbones("t*/vgg11") == ["timm/vgg11", "torchvision/vgg11"]
    everything = list_backbones()
    assert everything == sorted(set(everything))
    assert list_backbones("*vgg1[13]") == [name for name in everything if re.search("vgg1[13]$", name)]
    assert not list_backbones("nothing/*")
    # classifiers only: detection, segmentation, quantised and optical flow networks have other outputs
    assert not list_backbones("torchvision/*rcnn*")
    assert not list_backbones("torchvision/*quantized*")


def test_a_paper_network_needs_neither_timm_nor_torchvision(monkeypatch):
    for library in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)  # `import timm` now raises ImportError
    spec = importlib.util.spec_from_file_location("a_fresh_copy", backbones.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "paper/fc" in module.list_backbones("paper/*")
    module.create_backbone("paper/lenet5", 10, (1, 28, 28))
    with pytest.raises(ValueError, match="did you mean paper/lenet5"):
        module.create_backbone("paper/lenet", 10, (1, 28, 28))
    with pytest.raises(ImportError):
        module.create_backbone("timm/resnet10t", 10, (1, 28, 28))


# ------------------------------------------------------------------ names and options that do not exist


@pytest.mark.parametrize(
    ("name", "suggested", "pattern"),
    [
        ("paper/vgg12", "paper/vgg1", "paper/*"),
        ("paper/resnet-18", "paper/resnet18", "paper/*"),
        ("timm/resnet5O", "timm/resnet50", "timm/*"),
        ("timm/resnet50.a1_in1", "timm/resnet50.a1_in1k", "timm/*"),
        ("torchvision/vgg11bn", "torchvision/vgg11_bn", "torchvision/*"),
        ("resnet50", "paper/resnet50, timm/resnet50, torchvision/resnet50", "*"),
        ("Timm/resnet50", "paper/resnet50, timm/resnet50, torchvision/resnet50", "*"),
        ("timm", "", "*"),
    ],
)
def test_an_unknown_name_says_what_is_close_and_how_to_list(name, suggested, pattern):
    with pytest.raises(ValueError) as error:
        create_backbone(name, 10, (3, 32, 32))
    message = str(error.value)
    assert f"there is no backbone {name!r}" in message
    assert suggested in message
    assert f"list_backbones('{pattern}')" in message
    assert "\n" not in message  # the command stays one line


def test_the_command_of_the_message_is_a_command():
    with pytest.raises(ValueError) as error:
        create_backbone("paper/vgg12", 10, (3, 32, 32))
    code = re.search('python -c "(.*)"$', str(error.value))[1]
    compile(code, "message", "exec")
    assert code.endswith(r"print(*list_backbones('paper/*'), sep='\n')")


@pytest.mark.slow
def test_the_command_of_the_message_lists_the_names():
    code = r"from nslightning.models import list_backbones; print(*list_backbones('paper/vgg*'), sep='\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["paper/vgg11", "paper/vgg13", "paper/vgg16", "paper/vgg19"]


@pytest.mark.parametrize(
    ("name", "option", "suggested", "accepted"),
    [
        ("paper/vgg11", "batchnorm", "batch_norm", "batch_norm, init"),
        ("paper/resnet18", "pool", "stem_pool", "batch_norm, stem, stem_pool, init"),
        ("timm/resnet10t", "droprate", "drop_rate", "drop_path_rate"),
        ("timm/efficientnet_b0", "drop_raet", "drop_rate", "block_args"),
        ("torchvision/vgg11", "drop_out", "dropout", "init_weights, dropout"),
        ("torchvision/resnet18", "zero_init", "zero_init_residual", "replace_stride_with_dilation"),
    ],
)
def test_an_unknown_option_says_which_there_are(name, option, suggested, accepted):
    with pytest.raises(ValueError) as error:
        create_backbone(name, 10, (3, 32, 32), **{option: 1})
    message = str(error.value)
    assert f"{name} has no option {option!r}" in message
    assert f"{suggested!r}" in message
    assert accepted in message
    assert "num_classes" not in message


@pytest.mark.parametrize(("name", "option"), [("timm/resnet10t", "in_chans"), ("torchvision/resnet18", "weights")])
def test_an_option_that_is_set_already_is_refused(name, option):
    with pytest.raises(ValueError, match=f"option '{option}' of {name} is set already"):
        create_backbone(name, 10, (3, 32, 32), **{option: None})


def test_an_error_inside_a_constructor_is_not_disguised():
    def norm_layer(channels):
        raise TypeError("f() got an unexpected keyword argument 'g'")

    with pytest.raises(TypeError, match="'g'"):
        create_backbone("torchvision/resnet18", 10, (3, 32, 32), norm_layer=norm_layer)


def test_shapes_are_checked():
    for name in ("paper/fc", "timm/resnet10t", "torchvision/resnet18"):
        with pytest.raises(ValueError, match="three positive integers"):
            create_backbone(name, 10, (32, 32))
    with pytest.raises(ValueError, match="torchvision/resnet18 takes images of 3 channels"):
        create_backbone("torchvision/resnet18", 10, (4, 32, 32))
    with pytest.raises(ValueError, match="too small for paper/vgg11"):
        create_backbone("paper/vgg11", 10, (1, 28, 28))


# ------------------------------------------------------------------ pretrained weights


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "head", "num_classes"),
    [
        ("resnet18", "fc", 7),
        ("resnet18", "fc", 1000),
        ("squeezenet1_1", "classifier.1", 7),
        ("mobilenet_v3_small", "classifier.3", 7),
        ("shufflenet_v2_x0_5", "fc", 7),
        ("googlenet", "fc", 7),
        ("inception_v3", "fc", 7),
    ],
)
def test_pretrained_torchvision_networks_get_a_new_head_where_needed(monkeypatch, name, head, num_classes):
    torch.manual_seed(0)
    full = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    weights = torchvision.models.get_model(name, weights=None, **full).state_dict()
    # in place of the download alone; building and loading are torchvision's
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: weights)
    network = create_backbone(f"torchvision/{name}", num_classes, (3, 80, 80), pretrained=True)
    state = network.state_dict()
    assert state.keys() == {key for key in weights if not key.startswith(("aux", "Aux"))}
    for key, value in state.items():
        if num_classes == 7 and key.startswith(f"{head}."):
            assert value.shape[0] == 7
        else:
            assert torch.equal(value, weights[key]), key
    with torch.no_grad():
        assert network.train()(torch.randn(2, 3, 80, 80)).shape == (2, num_classes)


def test_pretrained_torchvision_network_keeps_auxiliary_classifiers_when_asked(monkeypatch):
    weights = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: weights)
    with pytest.warns(UserWarning, match="auxiliary heads"):
        network = create_backbone("torchvision/googlenet", 7, (3, 64, 64), pretrained=True, aux_logits=True)
    out = network.train()(torch.randn(2, 3, 64, 64))
    assert [logits.shape for logits in out] == [(2, 7)] * 3


def test_a_head_that_is_not_found_is_named():
    with pytest.raises(ValueError, match=r"last layer of torchvision/x, pretrained for 1000 classes"):
        backbones._replace_head("torchvision/x", torch.nn.Sequential(torch.nn.Linear(3, 4)), 1000, 7)


def test_pretrained_timm_network_from_a_file(tmp_path):
    torch.manual_seed(0)
    source = create_backbone("timm/resnet10t", 1000, (3, 32, 32))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    network = create_backbone("timm/resnet10t", 7, (1, 32, 32), pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(network.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    assert network.fc.weight.shape[0] == 7
    assert network.conv1[0].in_channels == 1


def test_no_weights_and_no_connection_are_said(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # fails at once, without its retries
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = "pretrained weights of {} could not be downloaded .*Use pretrained=False"
    with pytest.raises(RuntimeError, match=said.format("torchvision/squeezenet1_1")):
        create_backbone("torchvision/squeezenet1_1", 10, (3, 32, 32), pretrained=True)
    with pytest.raises(RuntimeError, match=said.format("timm/resnet10t")) as raised:
        create_backbone("timm/resnet10t", 10, (3, 32, 32), pretrained=True, cache_dir=str(tmp_path))
    ending = ending_of(raised.value, began=False)
    assert ending is not None
    assert (ending.status, ending.message) == (1, str(raised.value))
    with pytest.raises(ValueError, match="paper/vgg11 has no pretrained weights"):
        create_backbone("paper/vgg11", 10, (3, 32, 32), pretrained=True)
    with pytest.raises(ValueError, match="timm/halonet_h1 has no pretrained weights: use pretrained=False"):
        create_backbone("timm/halonet_h1", 10, (3, 256, 256), pretrained=True)
