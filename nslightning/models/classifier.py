"""The LightningModule that trains any backbone under a Jacobian choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from nslightning.jacobians import Jacobians
from nslightning.models.backbones import create_backbone, input_channels
from nslightning.models.mixing import Mixing
from nslightning.models.patched import PatchedModule, at_least_float32
from nslightning.optim import parameter_groups

__all__ = ["ImageClassifier"]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class ImageClassifier(PatchedModule):
    """An image classifier whose nonsmooth operations take a chosen Jacobian.

    The backbone is built by name, patched, and trained with cross-entropy. Logged: ``train/loss`` and ``train/acc1`` of
    the steps that show them, ``val/loss``, ``val/acc1``, ``val/acc5`` (where there are more than five classes), and the
    same for ``test``. Accuracies are fractions.

    Args:
        backbone: ``timm/<name>``, ``torchvision/<name>``, ``paper/<name>``, or ``my_package.nets:make`` for your own
            network.
        num_classes: Size of the output.
        image_shape: (channels, height, width) of the images. A gray image is repeated over the channels of a backbone
            that only takes three.
        jacobians: The choice of the Jacobian at ties, in force while training.
        backbone_options: Handed to the backbone's constructor, such as ``{batch_norm: true}``.
        pretrained: Start from the library's ImageNet weights.
        optimizer: Any optimizer class, given the parameters. A checkpoint of the command line holds its configuration;
            a callable given in Python is not stored, and is given again to ``load_from_checkpoint``.
        lr_scheduler: Any scheduler class. ``ReduceLROnPlateau`` watches ``val/loss``, or
            what Lightning's own version of it has to ``monitor``.
        lr_interval: Whether the scheduler is stepped after each ``epoch`` or each ``step``; by default after each step
            for those made for it (``OneCycleLR``, ``CyclicLR``), and after each epoch for all others.
        parameter_rules: Settings of the optimizer for some of the parameters, such as
            ``{match: vectors, weight_decay: 0}`` (:func:`~nslightning.optim.parameter_groups`).
        layer_decay: Learning rate of a layer as a share of the next one's, for timm's networks.
        label_smoothing: Share of the target spread over all classes.
        mixing: Mixup and CutMix of training batches (:class:`~nslightning.models.Mixing`); ``train/acc1`` then counts
            the label with the larger share.
        compile: Compile the backbone with ``torch.compile``. One compiled backward serves every choice.
        channels_last: Keep images and weights in the channels-last memory format.
        seed: Seeds the ``"random"`` Jacobian choice.
        sites: Rules for some of the network's sites, later ones winning, such as ``{stage: layer1, relu: 0.5}``
            (:class:`~nslightning.surgery.Rule`); everywhere else ``jacobians`` holds.
        strict: Refuse a backbone with an operation that no choice can reach, instead of naming it in the report.
        on_mismatch: Whether to warn or to refuse when a checkpoint is loaded that was made under another choice or
            with other patched sites.
        cuda_graph: Run training steps of a full batch from CUDA graphs, in which the host starts one graph in place of
            each operation: for networks that are small for their GPU. Measured steps, and the last batch where it is
            smaller, run as without it. On one GPU, without accumulated gradients.

    Raises:
        ValueError: If a name, option or shape is not admissible, or ``"random"`` is to be compiled or captured.

    Example:
        >>> model = ImageClassifier("paper/lenet5", jacobians=Jacobians(relu=1.0, max_pool="minimal"))
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    backbone: nn.Module

    def __init__(
        self,
        backbone: str = "paper/lenet5",
        num_classes: int = 10,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        jacobians: Jacobians = Jacobians(),  # noqa: B008 # frozen
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool = False,
        optimizer: OptimizerCallable = _sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] | None = None,
        parameter_rules: list[dict[str, Any]] | None = None,
        layer_decay: float | None = None,
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
        compile: bool = False,  # torch's own word
        channels_last: bool = False,
        seed: int = 0,
        sites: list[dict[str, Any]] | None = None,
        strict: bool = True,
        on_mismatch: Literal["warn", "refuse"] = "warn",
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(jacobians, optimizer, lr_scheduler, compile, sites, strict, on_mismatch, cuda_graph)
        self.title, self.num_classes = backbone, num_classes
        self._lr_interval, self._mixing = lr_interval, mixing
        self._parameter_rules, self._layer_decay = parameter_rules or [], layer_decay
        if mixing is not None:
            self.hparams.update(mixing=asdict(mixing))  # plain data, so that checkpoints load with `weights_only`
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is a share between 0 and 1; given {label_smoothing}")
        self._label_smoothing, self._channels_last = label_smoothing, channels_last
        self._channels = input_channels(backbone, image_shape)
        network = create_backbone(backbone, num_classes, image_shape, pretrained, **(backbone_options or {}))
        example = torch.zeros(2, self._channels, *image_shape[1:])
        try:
            self.patch_network("backbone", network, example, seed)
        except RuntimeError as error:  # from the example's forward
            raise ValueError(f"{backbone} does not take images of shape {tuple(image_shape)}: {error}") from error
        self.parameter_groups()  # so that a mistaken rule raises here
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        accuracy: dict[str, Metric | MetricCollection] = {"acc1": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            accuracy["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        metrics = MetricCollection(accuracy)
        self._accuracy = nn.ModuleDict({f"{stage}_": metrics.clone(f"{stage}/") for stage in ("val", "test")})

    def forward(self, x: Tensor) -> Tensor:
        """Classify images.

        Args:
            x: Images of shape (N, C, H, W).

        Returns:
            Logits of shape (N, num_classes).
        """
        if x.shape[1] != self._channels:
            x = x.expand(-1, self._channels, -1, -1)
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.run_network(x)
        return logits

    def parameter_groups(self) -> Any:
        """The parameters, in groups where rules or a layer decay make them.

        Returns:
            All parameters, or groups of them.
        """
        if not self._parameter_rules and self._layer_decay is None:
            return self.parameters()
        return parameter_groups(self.backbone, self._parameter_rules, self._layer_decay)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch, logged with its accuracy."""
        if self._mixing is not None:
            batch = self._mixing(batch[0], batch[1], self.num_classes)
        logits, y, loss = self._loss(batch, self._label_smoothing)
        value = loss.detach()

        def metrics() -> dict[str, Tensor]:
            labels = y if y.ndim == 1 else y.argmax(1)
            return {"train/loss": value, "train/acc1": (logits.argmax(1) == labels).float().mean()}

        self.log_step(metrics)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracies on one validation batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Loss and accuracies on one test batch."""
        self._evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities of shape (N, num_classes)."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        logits: Tensor = self(x)
        return logits.float().softmax(1)

    def _loss(self, batch: Sequence[Tensor], label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self(x)
        wide = at_least_float32(logits)
        return wide.detach(), y, F.cross_entropy(wide, y, label_smoothing=label_smoothing)

    def _evaluate(self, stage: str, batch: Sequence[Tensor]) -> None:
        logits, y, loss = self._loss(batch)
        accuracy: Any = self._accuracy[f"{stage}_"]
        accuracy.update(logits, y)
        self.log(f"{stage}/loss", loss, batch_size=len(y), sync_dist=True, prog_bar=True)
        self.log_dict(accuracy, batch_size=len(y), prog_bar=True)
