"""Names of networks and data sets, without the import of what they name: a mistyped one is refused at once."""

__all__ = ["DATA_SETS", "FAMILIES", "PAPER_NETWORKS"]

#: The sources of networks: ``FAMILY/NAME``.
FAMILIES = ("paper", "timm", "torchvision")

#: The networks of the two papers (:data:`nslightning.models.paper.NETWORKS`).
PAPER_NETWORKS = (
    "fc", "lenet5", "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34", "resnet50", "densenet121",
)  # fmt: skip

#: The data sets of images in :mod:`nslightning.data` that need no folder.
DATA_SETS = (
    "CIFAR10", "CIFAR100", "MNIST", "SVHN", "FashionMNIST", "FashionMNISTSample", "Food101", "ImageNet", "Synthetic",
)  # fmt: skip
