"""The paper networks without branches: fully connected, LeNet-5 and VGG."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

from torch import nn

from nslightning.models.paper.common import Init, checked, classifier_after, initialized


def fc(
    num_classes: int,
    image_shape: Sequence[int],
    batch_norm: bool = False,
    hidden: Sequence[int] = (2048, 2048, 2048),
    dropout: float = 0.0,
    activation: Literal["relu", "relu6"] = "relu",
    first_activation: bool = True,
    init: Init = "torch",
) -> nn.Module:
    """Fully connected network: linear, batch norm, ReLU, dropout for each hidden layer, then linear.

    Input (N, C, H, W), hidden layers (N, width), output (N, num_classes). Paper A trained
    784-2048-2048-2048-10 on MNIST, plain, with batch norm and with dropout (10 020 874 parameters, 6144 ReLU
    evaluations per image); its volume experiments used ``hidden=(256, 256, 256)`` and other widths and
    depths, its introduction ``hidden=(2000, 128)``, and ``hidden=(4000, 256), activation="relu6"``.

    Args:
        num_classes: size of the output.
        image_shape: (channels, height, width) of the images.
        batch_norm: put a batch norm before every activation.
        hidden: width of each hidden layer.
        dropout: probability of the dropout after every activation; 0 leaves the dropout out.
        activation: the nonsmooth operation after every hidden layer.
        first_activation: False leaves out the activation after the first hidden layer, as paper A's notebook
            of MNIST volumes did: "3 hidden layers" are two ReLU layers there.
        init: see :func:`initialize`.

    Returns:
        The network.

    Raises:
        ValueError: if a shape, a width, the probability or a name is not admissible.
    """
    channels, height, width = checked("fc", num_classes, image_shape, side=1)
    if any(not isinstance(size, int) or size < 1 for size in hidden):
        raise ValueError(f"hidden={hidden!r}: each width is a positive integer")
    activations: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}
    if activation not in activations:
        raise ValueError(f"activation={activation!r} is not one of 'relu', 'relu6'")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    features = channels * height * width
    for index, size in enumerate(hidden, start=1):
        layers[f"fc{index}"] = nn.Linear(features, size)
        if batch_norm:
            layers[f"bn{index}"] = nn.BatchNorm1d(size)
        if index > 1 or first_activation:
            layers[f"{activation}{index}"] = activations[activation]()
        if dropout:
            layers[f"dropout{index}"] = nn.Dropout(dropout)
        features = size
    layers["classifier"] = nn.Linear(features, num_classes)
    return initialized(layers, init)


def lenet5(num_classes: int, image_shape: Sequence[int], batch_norm: bool = False, init: Init = "torch") -> nn.Module:
    """LeNet-5 as paper B trained it on MNIST, with ReLU and max pooling.

    For a 28x28 image: convolution 5x5 without padding (N, 6, 24, 24), ReLU, pooling 2x2 (N, 6, 12, 12), the
    same again (N, 16, 8, 8) and (N, 16, 4, 4), then linear 256-120, ReLU, 120-84, ReLU, 84-num_classes. 44
    426 parameters for 10 classes, 4684 ReLU evaluations per image. For a 32x32 image the first linear layer
    has 400 inputs, as in the network of LeCun et al. (1998).

    Args:
        num_classes: size of the output.
        image_shape: (channels, height, width) of the images; at least 16x16.
        batch_norm: put a batch norm after each pooling and after each hidden ReLU; it follows the nonsmooth
            operations here, where in the other networks it precedes them.
        init: see :func:`initialize`.

    Returns:
        The network.

    Raises:
        ValueError: if a shape or a name is not admissible.
    """
    channels, height, width = checked("lenet5", num_classes, image_shape, side=16)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, size in enumerate((6, 16), start=1):
        layers[f"conv{index}"] = nn.Conv2d(channels, size, 5)
        layers[f"relu{index}"] = nn.ReLU()
        layers[f"pool{index}"] = nn.MaxPool2d(2)
        if batch_norm:
            layers[f"bn{index}"] = nn.BatchNorm2d(size)
        channels, height, width = size, (height - 4) // 2, (width - 4) // 2
    layers["flatten"] = nn.Flatten()
    features = channels * height * width
    for index, size in enumerate((120, 84), start=3):
        layers[f"fc{index}"] = nn.Linear(features, size)
        layers[f"relu{index}"] = nn.ReLU()
        if batch_norm:
            layers[f"bn{index}"] = nn.BatchNorm1d(size)
        features = size
    layers["classifier"] = nn.Linear(features, num_classes)
    return initialized(layers, init)


def vgg11(num_classes: int, image_shape: Sequence[int], batch_norm: bool = False, init: Init = "torch") -> nn.Module:
    """VGG11 for small images: 8 convolutions 3x3 in five stages, each stage ended by a 2x2 max pooling.

    For a 32x32 image the stages give (N, 64, 16, 16), (N, 128, 8, 8), (N, 256, 4, 4), (N, 512, 2, 2) and
    (N, 512, 1, 1); one linear layer 512-num_classes follows. Convolutions have biases; batch norm, where
    asked for, stands between convolution and ReLU. 9 225 610 parameters for 10 classes, 151 552 ReLU
    evaluations per image. Both papers trained it on CIFAR-10 and SVHN; it is paper B's lock-step network.
    Larger images are averaged over what remains of them before the linear layer; at 32x32 that changes
    nothing.

    Args:
        num_classes: size of the output.
        image_shape: (channels, height, width) of the images; at least 32x32 for the five poolings.
        batch_norm: put a batch norm between each convolution and its ReLU.
        init: see :func:`initialize`.

    Returns:
        The network.

    Raises:
        ValueError: if a shape or a name is not admissible.
    """
    return _vgg("vgg11", (1, 1, 2, 2, 2), num_classes, image_shape, batch_norm, init)


def vgg13(num_classes: int, image_shape: Sequence[int], batch_norm: bool = False, init: Init = "torch") -> nn.Module:
    """VGG13: as :func:`vgg11` with 2, 2, 2, 2, 2 convolutions a stage.

    Both papers define it; paper B's study of the depth measures it. 9 410 122 parameters.
    """
    return _vgg("vgg13", (2, 2, 2, 2, 2), num_classes, image_shape, batch_norm, init)


def vgg16(num_classes: int, image_shape: Sequence[int], batch_norm: bool = False, init: Init = "torch") -> nn.Module:
    """VGG16: as :func:`vgg11` with 2, 2, 3, 3, 3 convolutions a stage.

    Both papers define it; paper B's study of the depth measures it. 14 719 818 parameters.
    """
    return _vgg("vgg16", (2, 2, 3, 3, 3), num_classes, image_shape, batch_norm, init)


def vgg19(num_classes: int, image_shape: Sequence[int], batch_norm: bool = False, init: Init = "torch") -> nn.Module:
    """VGG19: as :func:`vgg11` with 2, 2, 4, 4, 4 convolutions a stage.

    Both papers define it; paper B's study of the depth measures it. 20 029 514 parameters.
    """
    return _vgg("vgg19", (2, 2, 4, 4, 4), num_classes, image_shape, batch_norm, init)


def _vgg(
    name: str,
    convolutions: tuple[int, ...],
    num_classes: int,
    image_shape: Sequence[int],
    batch_norm: bool,
    init: Init,
) -> nn.Module:
    channels, _, _ = checked(name, num_classes, image_shape, side=32)
    features: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (count, size) in enumerate(zip(convolutions, (64, 128, 256, 512, 512), strict=True), start=1):
        for index in range(1, count + 1):
            features[f"conv{stage}_{index}"] = nn.Conv2d(channels, size, 3, padding=1)
            if batch_norm:
                features[f"bn{stage}_{index}"] = nn.BatchNorm2d(size)
            features[f"relu{stage}_{index}"] = nn.ReLU()
            channels = size
        features[f"pool{stage}"] = nn.MaxPool2d(2)
    return classifier_after(features, channels, num_classes, init)
