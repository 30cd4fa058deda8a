"""Turns an image file into a network's input: the size, the crop, the interpolation and the scale of its pixels.

Pretrained weights expect the preprocessing that they were trained with. Another one costs points of accuracy, and
nothing fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.functional import InterpolationMode

from nslightning.spelling import did_you_mean

__all__ = ["HE2016", "MEAN", "STD", "Preprocessing", "preprocessing_of"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

#: From a PIL image to uint8 of shape (3, H, W).
ToBytes = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class Preprocessing:
    """A square centre crop of a resized image, and the mean and standard deviation that its pixels are scaled by.

    Attributes:
        name: Its source: ``he2016``, ``timm/<name>`` or ``torchvision/<name>``.
        size: Height and width of the result, in pixels.
        crop: Side of the crop as a share of the resized image's.
        interpolation: ``bilinear``, ``bicubic``, ``nearest``, ``lanczos`` ..., by Pillow.
        mean: One mean per channel, of pixels in [0, 1].
        std: One standard deviation per channel.
        fit: The way to a square: ``center`` keeps its proportions and crops, ``squash`` does not keep
            them, ``border`` keeps them and pads.
        rounding: Rounding of ``size / crop`` to a number of pixels; timm takes the floor.
    """

    name: str
    size: int
    crop: float
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    fit: str = "center"
    rounding: Literal["nearest", "floor"] = "nearest"

    def at(self, size: int | None) -> Preprocessing:
        """The same for another size of the result.

        Args:
            size: Height and width in pixels; None keeps them.

        Returns:
            The preprocessing.

        Example:
            >>> HE2016.at(64).size
            64
        """
        return self if size is None else replace(self, size=size)

    def same_as(self, other: Preprocessing) -> bool:
        """Return whether both make the same of every image, whatever they are called.

        Args:
            other: Another preprocessing.

        Returns:
            Whether all but the names are equal.
        """
        return self == replace(other, name=self.name)

    def evaluation(self) -> ToBytes:
        """The transform of images that are evaluated.

        Returns:
            From a PIL image to uint8 of shape (3, size, size).
        """
        if self.fit == "border":
            from timm.data.transforms_factory import transforms_imagenet_eval

            padded: ToBytes = transforms_imagenet_eval(
                self.size, self.crop, self.fit, None, self.interpolation, self.mean, normalize=False
            )
            return padded
        side = self.size / self.crop
        side = math.floor(side) if self.rounding == "floor" else round(side)
        resize = v2.Resize([side, side] if self.fit == "squash" else side, self.interpolation_mode)
        cropped: ToBytes = v2.Compose([resize, v2.CenterCrop(self.size), v2.PILToTensor()])
        return cropped

    @property
    def interpolation_mode(self) -> InterpolationMode:
        """The interpolation in torchvision's words."""
        return InterpolationMode(self.interpolation)


#: He et al. (2016), and both papers: a side of 256 of which 224 are kept, bilinear.
HE2016 = Preprocessing("he2016", 224, 224 / 256)


def preprocessing_of(name: str) -> Preprocessing:
    """The preprocessing that a recipe, or the pretrained weights of a network, go with. Nothing is downloaded.

    Args:
        name: ``he2016``; ``timm/<name>``, with a tag where wanted (``timm/resnet50.a1_in1k``);
            ``torchvision/<name>``, whose default weights are taken.

    Returns:
        The preprocessing.

    Raises:
        ValueError: If there is no such name, or its weights say nothing.

    Example:
        >>> preprocessing_of("torchvision/resnet50").evaluation()
        Compose(
              Resize(size=[232], interpolation=InterpolationMode.BILINEAR, antialias=True)
              CenterCrop(size=(224, 224))
              PILToTensor()
        )
    """
    if name == HE2016.name:
        return HE2016
    family, _, network = name.partition("/")
    if family == "timm":
        return _timm(name, network)
    if family == "torchvision":
        return _torchvision(name, network)
    raise ValueError(
        f"there is no preprocessing {name!r}{did_you_mean(name, [HE2016.name])} It is {HE2016.name}, or that of a "
        "network's weights: timm/<name> or torchvision/<name>"
    )


def _timm(name: str, network: str) -> Preprocessing:
    import timm
    from timm.data.config import resolve_data_config
    from timm.models import get_pretrained_cfg

    try:
        weights = get_pretrained_cfg(network)
    except RuntimeError:
        weights = None
    if weights is None:
        architecture = network.partition(".")[0]
        known = [architecture, *timm.list_pretrained(f"{architecture}.*")] if timm.is_model(architecture) else []
        raise ValueError(
            f"timm knows no weights {network!r}{did_you_mean(network, known or timm.list_models())} "
            "Its preprocessing is not known"
        )
    config: dict[str, Any] = resolve_data_config(pretrained_cfg=weights.to_dict())
    _, height, width = config["input_size"]
    if height != width:
        raise ValueError(f"{name} takes images of {height} x {width} pixels; only squares can be prepared here")
    return Preprocessing(
        name,
        height,
        config["crop_pct"],
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
        config["crop_mode"],
        "floor",
    )


def _torchvision(name: str, network: str) -> Preprocessing:
    import torchvision

    networks = torchvision.models.list_models(module=torchvision.models)
    if network not in networks:
        raise ValueError(
            f"torchvision has no image classifier {network!r}{did_you_mean(network, networks)} Its preprocessing is "
            "not known"
        )
    transform: Any = torchvision.models.get_model_weights(network)["DEFAULT"].transforms()
    (size,), (side,) = transform.crop_size, transform.resize_size
    mean, std = tuple(transform.mean), tuple(transform.std)
    return Preprocessing(name, size, size / side, transform.interpolation.value, mean, std)
