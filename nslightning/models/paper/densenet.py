"""The DenseNet121 of paper B (Huang et al., 2017, with another pooling and most norms left out)."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nslightning.models.paper.common import Init, checked, classifier_after, conv, norm

_GROWTH = 32  # channels that each layer of DenseNet121 adds
_BOTTLENECK = 4 * _GROWTH


def densenet121(
    num_classes: int,
    image_shape: Sequence[int],
    batch_norm: bool = True,
    norm_in_blocks: bool = False,
    init: Init = "kaiming_normal_fan_in",
) -> nn.Module:
    """DenseNet121 as paper B trained it on CIFAR-10: the ImageNet stem on small images.

    For a 32x32 image: convolution 7x7 of stride 2 (N, 64, 16, 16), batch norm, ReLU, max pooling (N, 64, 8,
    8), blocks of 6, 12, 24 and 16 layers that each add 32 channels, with transitions (1x1 convolution to
    half the channels, average pooling 2x2) between them down to (N, 1024, 1, 1), batch norm, ReLU, linear
    1024-num_classes. 6 882 634 parameters with batch norm and 10 classes, 319 744 ReLU evaluations per
    image. Parameter names are torchvision's.

    Args:
        num_classes: size of the output.
        image_shape: (channels, height, width) of the images; at least 31x31.
        batch_norm: normalise after the stem and before the classifier.
        norm_in_blocks: normalise inside the blocks and transitions as well, as Huang et al. (2017) define the
            network. Paper B's code did not hand the choice down: its "batch norm" is the two outer layers.
        init: see :func:`initialize`.

    Returns:
        The network.

    Raises:
        ValueError: if a shape or a name is not admissible, or for ``norm_in_blocks`` without ``batch_norm``.
    """
    channels, _, _ = checked("densenet121", num_classes, image_shape, side=31)
    if norm_in_blocks and not batch_norm:
        raise ValueError("norm_in_blocks=True needs batch_norm=True")
    features: OrderedDict[str, nn.Module] = OrderedDict()
    features["conv0"] = conv(channels, 64, 7, stride=2)
    features["norm0"] = norm(64, batch_norm)
    features["relu0"] = nn.ReLU()
    features["pool0"] = nn.MaxPool2d(2)
    channels = 64
    for block, count in enumerate((6, 12, 24, 16), start=1):
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, count + 1):
            layers[f"denselayer{index}"] = _DenseLayer(channels, norm_in_blocks)
            channels += _GROWTH
        features[f"denseblock{block}"] = nn.Sequential(layers)
        if block < 4:
            transition: OrderedDict[str, nn.Module] = OrderedDict()
            transition["norm"] = norm(channels, norm_in_blocks)
            transition["relu"] = nn.ReLU()
            transition["conv"] = conv(channels, channels // 2, 1)
            transition["pool"] = nn.AvgPool2d(2)
            features[f"transition{block}"] = nn.Sequential(transition)
            channels //= 2
    features["norm5"] = norm(channels, batch_norm)
    features["relu5"] = nn.ReLU()
    return classifier_after(features, channels, num_classes, init)


class _DenseLayer(nn.Sequential):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; its 32 channels join the input's."""

    def __init__(self, channels: int, batch_norm: bool) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["norm1"] = norm(channels, batch_norm)
        layers["relu1"] = nn.ReLU()
        layers["conv1"] = conv(channels, _BOTTLENECK, 1)
        layers["norm2"] = norm(_BOTTLENECK, batch_norm)
        layers["relu2"] = nn.ReLU()
        layers["conv2"] = conv(_BOTTLENECK, _GROWTH, 3)
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, channels + 32, H, W)."""
        return torch.cat([x, super().forward(x)], dim=1)
