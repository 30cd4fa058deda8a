"""LightningDataModules: the papers' data sets, your own images or text, a sample, synthetic images."""

from nslightning.data.augmentation import Augmentation
from nslightning.data.base import ImageDataModule, ResumableDataModule
from nslightning.data.folder import ImageFolder, ImageNet
from nslightning.data.food101 import Food101
from nslightning.data.preprocessing import Preprocessing, preprocessing_of
from nslightning.data.small import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, FashionMNISTSample, Synthetic
from nslightning.data.tokens import TokenFile
from nslightning.data.verify import DataError

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "SVHN",
    "Augmentation",
    "DataError",
    "FashionMNIST",
    "FashionMNISTSample",
    "Food101",
    "ImageDataModule",
    "ImageFolder",
    "ImageNet",
    "Preprocessing",
    "ResumableDataModule",
    "Synthetic",
    "TokenFile",
    "preprocessing_of",
]
