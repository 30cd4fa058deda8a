"""The parts that the paper networks share: initialisation, checks, and a few layers."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

Init = Literal["torch", "kaiming_uniform", "kaiming_normal_fan_out", "kaiming_normal_fan_in"]


def initialize(network: nn.Module, init: Init) -> None:
    """Draw the parameters of a network again, in place, from the default generator.

    Convolutions, linear layers and batch norms end as in a freshly built network (weight 1, bias 0, running
    mean 0 and running variance 1 for batch norm); other modules are left as they are. Both papers draw
    one parameter vector after another on the same network; where they let the batch norms keep what they had
    (paper A's volumes, paper B's ImageNet runs), a later draw depended on the earlier ones. Here it does not.

    Args:
        network: any module.
        init: the distribution, with ``fan_in`` and ``fan_out`` the number of inputs and outputs of one unit

            - ``"torch"``: PyTorch's own, weights and biases uniform in ±1/sqrt(fan_in). Training of the fully
              connected net, LeNet-5 and VGG in both papers; paper A's volume experiments, paper B's
              threshold histograms and its ImageNet runs, whatever the network.
            - ``"kaiming_normal_fan_out"``: convolutions N(0, 2/fan_out), linear layers as ``"torch"``.
              Training of the ResNets in both papers.
            - ``"kaiming_normal_fan_in"``: convolutions N(0, 2/fan_in), linear weights as ``"torch"``, linear
              biases 0. Training of DenseNet121 in paper B.
            - ``"kaiming_uniform"``: convolutions uniform in ±sqrt(6/fan_in), linear weights N(0, 0.01²),
              linear biases 0. Paper B's volume, lock-step and norm pooling experiments.

            All but ``"torch"`` set the biases of convolutions to 0.

    Raises:
        ValueError: If ``init`` has another value.
    """
    if init not in get_args(Init):
        raise ValueError(f"init={init!r} is not one of {', '.join(map(repr, get_args(Init)))}")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()  # PyTorch's defaults, which the other choices then amend
        if init == "torch":
            continue
        if isinstance(module, nn.Conv2d):
            if init == "kaiming_uniform":
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            else:
                mode: Literal["fan_in", "fan_out"] = "fan_in" if init.endswith("fan_in") else "fan_out"
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            if init == "kaiming_uniform":
                nn.init.normal_(module.weight, 0.0, 0.01)
            if init != "kaiming_normal_fan_out" and module.bias is not None:
                nn.init.zeros_(module.bias)


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Check that a shape is (channels, height, width).

    Args:
        image_shape: three positive integers.

    Returns:
        The same, as a tuple.

    Raises:
        ValueError: if it is anything else.
    """
    shape = tuple(image_shape)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(
            f"image_shape={image_shape!r} is not (channels, height, width), three positive integers such as (3, 32, 32)"
        )
    return shape[0], shape[1], shape[2]


def checked(network: str, num_classes: int, image_shape: Sequence[int], side: int) -> tuple[int, int, int]:
    """Return the image shape after refusing one smaller than ``side`` and a number of classes below 1."""
    channels, height, width = check_image_shape(image_shape)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} for paper/{network}: at least one class is needed")
    if min(height, width) < side:
        raise ValueError(
            f"image_shape={(channels, height, width)} is too small for paper/{network}: its poolings and "
            f"strides need images of at least {side}x{side}; enlarge the images (transforms.Resize or Pad) "
            "or take a network with fewer poolings"
        )
    return channels, height, width


def conv(channels: int, size: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size of the image, but for the stride."""
    return nn.Conv2d(channels, size, kernel, stride, padding=kernel // 2, bias=False)


def norm(size: int, batch_norm: bool) -> nn.Module:
    """Return a batch norm, or nothing in its place."""
    return nn.BatchNorm2d(size) if batch_norm else nn.Identity()


def classifier_after(features: OrderedDict[str, nn.Module], channels: int, num_classes: int, init: Init) -> nn.Module:
    """Average what ``features`` gives over the image and classify it by one linear layer."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["features"] = nn.Sequential(features)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(channels, num_classes)
    return initialized(layers, init)


def initialized(layers: OrderedDict[str, nn.Module], init: Init) -> nn.Module:
    """Chain the layers and draw their parameters."""
    network = nn.Sequential(layers)
    initialize(network, init)
    return network
