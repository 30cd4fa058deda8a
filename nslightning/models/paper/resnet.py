"""The ResNets of both papers (He et al., 2016, with another stem)."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from nslightning.models.paper.common import Init, checked, conv, initialized, norm

StemPool = Literal["3x3", "2x2"]
Stem = Literal["small", "imagenet"]


def resnet18(
    num_classes: int,
    image_shape: Sequence[int],
    batch_norm: bool = True,
    stem: Stem = "small",
    stem_pool: StemPool | None = "3x3",
    init: Init = "kaiming_normal_fan_out",
) -> nn.Module:
    """ResNet18 as both papers trained it on CIFAR-10: a small-image stem that keeps the max pooling.

    For a 32x32 image: convolution 3x3 (N, 64, 32, 32), ReLU, max pooling (N, 64, 16, 16), four stages of two
    blocks (N, 64, 16, 16), (N, 128, 8, 8), (N, 256, 4, 4), (N, 512, 2, 2), average over the image, linear
    512-num_classes. A block adds its input before the last ReLU, and uses one ReLU module throughout; no
    convolution has a bias, so without batch norm a patch of zeros gives exactly 0 at a ReLU. 11 173 962
    parameters with batch norm and 10 classes, 188 416 ReLU evaluations per image. Parameter names are
    torchvision's.

    Args:
        num_classes: size of the output.
        image_shape: (channels, height, width) of the images.
        batch_norm: normalise after each convolution.
        stem: ``"small"`` starts with a 3x3 convolution of stride 1, ``"imagenet"`` with a 7x7 convolution of
            stride 2.
        stem_pool: ``"3x3"`` pools with stride 2 and padding 1 (paper A, and torchvision), ``"2x2"`` with
            stride 2 (paper B, on ImageNet too), None leaves the pooling out, as CIFAR ResNets usually do.
        init: see :func:`initialize`. Paper B's ImageNet runs had ``"torch"``.

    Returns:
        The network.

    Raises:
        ValueError: if a shape or a name is not admissible.
    """
    return _resnet("resnet18", _BasicBlock, (2, 2, 2, 2), num_classes, image_shape, batch_norm, stem, stem_pool, init)


def resnet34(
    num_classes: int,
    image_shape: Sequence[int],
    batch_norm: bool = True,
    stem: Stem = "small",
    stem_pool: StemPool | None = "3x3",
    init: Init = "kaiming_normal_fan_out",
) -> nn.Module:
    """ResNet34: as :func:`resnet18` with 3, 4, 6, 3 blocks a stage.

    In the code of both papers, in the training results of neither. 21 282 122 parameters.
    """
    return _resnet("resnet34", _BasicBlock, (3, 4, 6, 3), num_classes, image_shape, batch_norm, stem, stem_pool, init)


def resnet50(
    num_classes: int,
    image_shape: Sequence[int],
    batch_norm: bool = True,
    stem: Stem = "small",
    stem_pool: StemPool | None = "3x3",
    init: Init = "kaiming_normal_fan_out",
) -> nn.Module:
    """ResNet50: as :func:`resnet18` with 3, 4, 6, 3 bottleneck blocks a stage.

    The stride is in the 3x3 convolution of a block. This is the ImageNet network of both papers, there with
    ``stem="imagenet"``: torchvision's ResNet50 in paper A, ``stem_pool="2x2", init="torch"`` in paper B.
    25 557 032 parameters for 1000 classes, 9 608 704 ReLU evaluations per image of 224x224. (Paper A's script
    was released with 10 classes, fewer than ImageNet's labels need.)
    """
    return _resnet("resnet50", _Bottleneck, (3, 4, 6, 3), num_classes, image_shape, batch_norm, stem, stem_pool, init)


def _shortcut(channels: int, size: int, stride: int, batch_norm: bool) -> nn.Module:
    if stride == 1 and channels == size:
        return nn.Identity()
    return nn.Sequential(conv(channels, size, 1, stride), norm(size, batch_norm))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut; one ``relu`` used twice."""

    expansion = 1

    def __init__(self, channels: int, size: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = conv(channels, size, 3, stride)
        self.bn1 = norm(size, batch_norm)
        self.relu = nn.ReLU()
        self.conv2 = conv(size, size, 3)
        self.bn2 = norm(size, batch_norm)
        self.downsample = _shortcut(channels, size, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, size, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


class _Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 (with the stride) and 1x1, and the shortcut; one ``relu`` used three times."""

    expansion = 4

    def __init__(self, channels: int, size: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = conv(channels, size, 1)
        self.bn1 = norm(size, batch_norm)
        self.relu = nn.ReLU()
        self.conv2 = conv(size, size, 3, stride)
        self.bn2 = norm(size, batch_norm)
        self.conv3 = conv(size, 4 * size, 1)
        self.bn3 = norm(4 * size, batch_norm)
        self.downsample = _shortcut(channels, 4 * size, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, 4 * size, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + self.downsample(x))
        return out


def _resnet(
    name: str,
    block: type[_BasicBlock] | type[_Bottleneck],
    blocks: tuple[int, ...],
    num_classes: int,
    image_shape: Sequence[int],
    batch_norm: bool,
    stem: Stem,
    stem_pool: StemPool | None,
    init: Init,
) -> nn.Module:
    if stem not in get_args(Stem):
        raise ValueError(f"stem={stem!r} is not one of {', '.join(map(repr, get_args(Stem)))}")
    if stem_pool is not None and stem_pool not in get_args(StemPool):
        raise ValueError(f"stem_pool={stem_pool!r} is not one of '3x3', '2x2' or None (null in YAML)")
    smallest = 1 if stem_pool != "2x2" else 2 if stem == "small" else 3
    channels, _, _ = checked(name, num_classes, image_shape, smallest)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = conv(channels, 64, 3) if stem == "small" else conv(channels, 64, 7, stride=2)
    layers["bn1"] = norm(64, batch_norm)
    layers["relu"] = nn.ReLU()
    if stem_pool is not None:
        layers["maxpool"] = nn.MaxPool2d(3, 2, 1) if stem_pool == "3x3" else nn.MaxPool2d(2)
    channels = 64
    for stage, (count, size) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        stage_blocks = []
        for index in range(count):
            stride = 2 if stage > 1 and index == 0 else 1
            stage_blocks.append(block(channels, size, stride, batch_norm))
            channels = block.expansion * size
        layers[f"layer{stage}"] = nn.Sequential(*stage_blocks)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    return initialized(layers, init)
