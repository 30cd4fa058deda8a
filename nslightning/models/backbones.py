"""Networks by name: ``timm/<name>``, ``torchvision/<name>``, ``paper/<name>``, and the user's own.

timm and torchvision are imported when a name asks for them, not before.

Example:
    >>> from nslightning.models.backbones import create_backbone
    >>> network = create_backbone("paper/lenet5", num_classes=10, image_shape=(1, 28, 28), batch_norm=True)
    >>> network.classifier
    Linear(in_features=84, out_features=10, bias=True)
"""

import fnmatch
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import nn

from nslightning.models import paper
from nslightning.models.own import is_own, own_network
from nslightning.models.paper.common import check_image_shape
from nslightning.names import FAMILIES
from nslightning.spelling import closest, did_you_mean

__all__ = ["DownloadError", "create_backbone", "input_channels", "list_backbones"]


class DownloadError(RuntimeError):
    """Pretrained weights are not on this machine, and cannot be fetched."""


def create_backbone(
    name: str,
    num_classes: int,
    image_shape: Sequence[int],
    pretrained: bool = False,
    **options: Any,
) -> nn.Module:
    """Build an image classifier by name.

    Args:
        name: ``paper/<name>`` (see :mod:`nslightning.models.paper`), ``timm/<name>``, with a pretrained tag
            (``timm/resnet50.a1_in1k``) or a source (``timm/hf-hub:...``) where wanted, or
            ``torchvision/<name>``, one of its image classifiers. :func:`list_backbones` lists them.
            ``my_package.nets:make`` is your own network: the function is called with those of
            ``num_classes``, ``image_shape`` and ``pretrained`` that it names.
        num_classes: size of the output.
        image_shape: (channels, height, width) of the images. A timm network is built for that many channels,
            and for that height and width where its layers depend on them (most vision transformers); a
            torchvision network always takes 3 channels, so the caller repeats a gray image three times (see
            :func:`input_channels`).
        pretrained: start from the library's default ImageNet weights, downloaded on first use. The last layer
            gets random weights where ``num_classes`` is not the number of classes of the weights.
        **options: handed to the network's own constructor. torchvision's GoogLeNet and Inception v3 are built
            without their auxiliary classifiers unless ``aux_logits=True``, since these turn the output in
            training into a tuple.

    Returns:
        A network that maps (N, :func:`input_channels`, H, W) to logits (N, num_classes).

    Raises:
        ValueError: for a name, an option or a shape that is not admissible.
        DownloadError: if pretrained weights cannot be fetched.
    """
    if is_own(name):
        offered = {"num_classes": num_classes, "image_shape": tuple(image_shape), "pretrained": pretrained}
        return own_network(name, offered, options)
    family, _, network = name.partition("/")
    if family not in FAMILIES or not network:
        raise _unknown(name, list_backbones())
    shape = check_image_shape(image_shape)
    if family == "paper":
        return _paper(network, num_classes, shape, pretrained, options)
    if family == "timm":
        return _timm(network, num_classes, shape, pretrained, options)
    return _torchvision(network, num_classes, shape, pretrained, options)


def input_channels(name: str, image_shape: Sequence[int]) -> int:
    """Tell how many channels the network that :func:`create_backbone` builds takes.

    Args:
        name: the backbone's name.
        image_shape: (channels, height, width) of the images.

    Returns:
        3 for torchvision's networks, the channels of the images for all others.

    Example:
        >>> input_channels("torchvision/vgg11", (1, 28, 28)), input_channels("timm/resnet18", (1, 28, 28))
        (3, 1)
    """
    return 3 if name.startswith("torchvision/") else check_image_shape(image_shape)[0]


def list_backbones(pattern: str = "*") -> list[str]:
    """List the names that :func:`create_backbone` knows.

    Args:
        pattern: as in a shell, for the whole name: ``paper/*``, ``timm/resnet*``, ``*/resnet18``. Libraries
            that it rules out are not imported.

    Returns:
        The names, sorted.

    Example:
        >>> list_backbones("paper/vgg*")
        ['paper/vgg11', 'paper/vgg13', 'paper/vgg16', 'paper/vgg19']
    """
    wanted = pattern.partition("/")[0] if "/" in pattern else "*"
    names = [
        f"{family}/{network}"
        for family in FAMILIES
        if fnmatch.fnmatchcase(family, wanted)
        for network in _networks(family)
    ]
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def _networks(family: str) -> Iterable[str]:
    if family == "paper":
        return paper.NETWORKS
    if family == "timm":
        import timm

        return list(timm.list_models())
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))  # the image classifiers alone


def _paper(
    network: str, num_classes: int, shape: tuple[int, int, int], pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    name = f"paper/{network}"
    if network not in paper.NETWORKS:
        raise _unknown(name, list_backbones("paper/*"))
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights: the papers published none; use pretrained=False")
    fixed = {"num_classes": num_classes, "image_shape": shape}
    return _build(name, paper.NETWORKS[network], paper.NETWORKS[network].__module__, fixed, options)


def _timm(
    network: str, num_classes: int, shape: tuple[int, int, int], pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg, model_entrypoint

    name = f"timm/{network}"
    fixed: dict[str, Any] = {"num_classes": num_classes, "in_chans": shape[0], "pretrained": pretrained}
    module = timm.__name__
    if ":" not in network:  # hf-hub:... and local-dir:... are not in the registry
        architecture = network.partition(".")[0]
        if not timm.is_model(architecture):
            raise _unknown(name, list_backbones("timm/*"))
        try:
            config = get_pretrained_cfg(network)
        except RuntimeError as error:
            tagged = [f"timm/{known}" for known in timm.list_models(f"{architecture}.*", pretrained=True)]
            raise _unknown(name, tagged) from error
        module = model_entrypoint(architecture).__module__
        if config is not None and config.fixed_input_size and "img_size" not in options:
            fixed["img_size"] = shape[1:]

    def factory(**kwargs: Any) -> nn.Module:
        return timm.create_model(network, **kwargs)

    return _build(name, factory, module, fixed, options, downloads=pretrained)


#: torchvision's networks with auxiliary classifiers, and where they keep them.
_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


def _torchvision(
    network: str, num_classes: int, shape: tuple[int, int, int], pretrained: bool, options: dict[str, Any]
) -> nn.Module:
    import torchvision

    name = f"torchvision/{network}"
    if network not in _networks("torchvision"):
        raise _unknown(name, list_backbones("torchvision/*"))
    if shape[0] not in (1, 3):
        raise ValueError(
            f"{name} takes images of 3 channels, or gray ones repeated three times, not image_shape={shape}; "
            "timm's networks take any number of channels"
        )
    builder = torchvision.models.get_model_builder(network)
    fixed: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if network.startswith("vit_") and shape[1] == shape[2] and "image_size" not in options:
        fixed["image_size"] = shape[1]  # the position embedding depends on it
    auxiliary = _AUXILIARY.get(network, ())
    keep = bool(auxiliary) and options.pop("aux_logits", False)
    if not pretrained:
        fixed["num_classes"] = num_classes
        if auxiliary:
            fixed |= {"aux_logits": keep, "init_weights": options.pop("init_weights", True)}
        return _build(name, builder, builder.__module__, fixed, options)

    # torchvision builds the network that the weights are for, classes and auxiliary classifiers included.
    if keep:
        fixed["aux_logits"] = True
    model: Any = _build(name, builder, builder.__module__, fixed, options, downloads=True)
    if auxiliary and not keep:
        model.aux_logits = False
        for head in auxiliary:
            setattr(model, head, None)
    classes = len(torchvision.models.get_model_weights(network)["DEFAULT"].meta["categories"])
    if num_classes != classes:
        _replace_head(name, model, classes, num_classes)
    return cast("nn.Module", model)


def _replace_head(name: str, model: nn.Module, classes: int, num_classes: int) -> None:
    """Replace, for another number of classes, each layer that gives one output per class of the weights."""
    heads = [
        (path, layer)
        for path, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) and layer.out_features == classes)
        or (isinstance(layer, nn.Conv2d) and layer.out_channels == classes)
    ]
    if not heads:
        raise ValueError(
            f"the last layer of {name}, pretrained for {classes} classes, was not found to be replaced for "
            f"{num_classes}; use num_classes={classes}, pretrained=False, or the same network of timm"
        )
    for path, layer in heads:
        parent, _, attribute = path.rpartition(".")
        new: nn.Module
        if isinstance(layer, nn.Linear):
            new = nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
        else:  # SqueezeNet classifies by a 1x1 convolution
            new = nn.Conv2d(layer.in_channels, num_classes, 1, bias=layer.bias is not None)
        setattr(model.get_submodule(parent), attribute, new)


def _build(
    name: str,
    factory: Callable[..., nn.Module],
    module: str,
    fixed: dict[str, Any],
    options: dict[str, Any],
    downloads: bool = False,
) -> nn.Module:
    """Call a factory, with its complaints about an option or a download in this package's words.

    Args:
        name: the backbone's full name.
        factory: what builds it.
        module: the module in which the class or function that refuses an option is looked up.
        fixed: the arguments that :func:`create_backbone` sets.
        options: the arguments that the caller set.
        downloads: whether the factory fetches weights.
    """
    twice = fixed.keys() & options.keys()
    if twice:
        raise ValueError(
            f"option {', '.join(map(repr, sorted(twice)))} of {name} is set already, from num_classes, "
            "image_shape and pretrained; leave it out of the options"
        )
    try:
        return factory(**fixed, **options)
    except TypeError as error:
        refusal = re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if refusal is None or refusal[2] not in options:
            raise
        raise _unknown_option(name, refusal[2], getattr(sys.modules[module], refusal[1], None)) from error
    except OSError as error:
        if not downloads:
            raise
        raise DownloadError(
            f"the pretrained weights of {name} could not be downloaded ({error}). Use pretrained=False, or "
            "fetch them once on a machine with a connection and copy its cache here: the folder that HF_HOME "
            "names (~/.cache/huggingface) for timm, TORCH_HOME (~/.cache/torch) for torchvision"
        ) from error
    except RuntimeError as error:  # timm's way to say it
        if not downloads or "No pretrained weights exist" not in str(error):
            raise
        raise ValueError(f"{name} has no pretrained weights: use pretrained=False") from error


def _unknown_option(name: str, option: str, refusing: Any) -> ValueError:
    """Say which options the class or function that refused one takes, where it can be known."""
    set_here = {"self", "num_classes", "image_shape", "in_chans"}
    accepted = []
    if callable(refusing):
        accepted = [
            parameter.name
            for parameter in inspect.signature(refusing).parameters.values()
            if parameter.name not in set_here and parameter.kind is not parameter.VAR_KEYWORD
        ]
    return ValueError(
        f"{name} has no option {option!r}"
        + did_you_mean(option, accepted, most=3)
        + (f" It takes: {', '.join(accepted)}." if accepted else " Its constructor's source lists what it takes.")
    )


def _unknown(name: str, known: list[str]) -> ValueError:
    """Say which names are close to one that is not known, and how to list them all."""
    family, _, network = name.rpartition("/")
    same = [candidate for candidate in known if candidate.rpartition("/")[2] == network]
    close = list(dict.fromkeys(same + closest(name, known, most=4)))
    pattern = f"{family}/*" if family in FAMILIES else "*"
    listing = f"print(*list_backbones({pattern!r}), sep='\\n')"
    return ValueError(
        f"there is no backbone {name!r}"
        + (f"; did you mean {', '.join(close)}?" if close else ".")
        + f" Names are {', '.join(f'{known_family}/<name>' for known_family in FAMILIES)}, or package.module:factory"
        + " for your own network; list them with"
        + f' python -c "from nslightning.models import list_backbones; {listing}"'
    )
