"""LightningModules, and backbones from timm, torchvision and the papers."""

from nslightning.models.backbones import create_backbone, input_channels, list_backbones
from nslightning.models.classifier import ImageClassifier
from nslightning.models.language import LanguageModel
from nslightning.models.mixing import Mixing
from nslightning.models.twins import Twins

__all__ = ["ImageClassifier", "LanguageModel", "Mixing", "Twins", "create_backbone", "input_channels", "list_backbones"]
