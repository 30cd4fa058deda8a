"""LightningDataModules: the papers' data sets, one's own images, an embedded sample, and synthetic images."""

from nslightning.data.base import ImageDataModule
from nslightning.data.folder import ImageFolder, ImageNet
from nslightning.data.small import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, FashionMNISTSample, Synthetic
from nslightning.data.verify import DataError

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SVHN",
    "DataError",
    "FashionMNIST",
    "FashionMNISTSample",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "Synthetic",
]
