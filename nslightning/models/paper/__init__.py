"""The networks of the two papers, as plain ``torch.nn`` modules.

Paper A is "Numerical influence of ReLU'(0) on backpropagation" (Bertoin, Bolte, Gerchinovitz and Pauwels,
NeurIPS 2021, arXiv 2106.12915); paper B is "On the numerical reliability of nonsmooth autodiff: a MaxPool
case study" (Boustany, TMLR 2024, arXiv 2401.02736). Every ReLU is an ``nn.ReLU`` and every max pooling an
``nn.MaxPool2d``, none in place, so that :func:`nslightning.patch` can give them another Jacobian afterwards.

Each factory takes ``num_classes``, ``image_shape`` (channels, height, width), ``batch_norm`` and ``init``
(see :func:`initialize`), and is found by its name in :data:`NETWORKS`. The defaults build what the paper
trained; what the papers did differently elsewhere is an option.

Example:
    >>> from nslightning.models.paper import vgg11
    >>> network = vgg11(num_classes=10, image_shape=(3, 32, 32), batch_norm=True)
    >>> sum(parameter.numel() for parameter in network.parameters())
    9231114
"""

from collections.abc import Callable

from torch import nn

from nslightning.models.paper.common import Init, initialize
from nslightning.models.paper.densenet import densenet121
from nslightning.models.paper.feedforward import fc, lenet5, vgg11, vgg13, vgg16, vgg19
from nslightning.models.paper.resnet import Stem, StemPool, resnet18, resnet34, resnet50

__all__ = [
    "NETWORKS",
    "Init",
    "Stem",
    "StemPool",
    "densenet121",
    "fc",
    "initialize",
    "lenet5",
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
]

#: The factories by the name that follows ``paper/``.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    factory.__name__: factory
    for factory in (fc, lenet5, vgg11, vgg13, vgg16, vgg19, resnet18, resnet34, resnet50, densenet121)
}
