"""LightningModules, and backbones from timm, torchvision and the papers."""

from nslightning.models.backbones import create_backbone, input_channels, list_backbones
from nslightning.models.classifier import ImageClassifier
from nslightning.models.language import LanguageModel

__all__ = ["ImageClassifier", "LanguageModel", "create_backbone", "input_channels", "list_backbones"]
