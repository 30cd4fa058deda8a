"""The LightningModule that trains any backbone under a Jacobian choice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from nslightning.jacobians import Jacobians
from nslightning.models.backbones import create_backbone, input_channels
from nslightning.surgery import PatchReport, PatchWarning, patch

__all__ = ["ImageClassifier"]


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class ImageClassifier(LightningModule):
    """An image classifier whose nonsmooth operations take a chosen Jacobian.

    The backbone is built by name, patched, and trained with cross-entropy. Logged: ``train/loss`` and ``train/acc1``
    per step, ``val/loss``, ``val/acc1``, ``val/acc5`` (where there are more than five classes), and the same for
    ``test``. Accuracies are fractions.

    Args:
        backbone: ``timm/<name>``, ``torchvision/<name>`` or ``paper/<name>``.
        num_classes: Size of the output.
        image_shape: (channels, height, width) of the images. A gray image is repeated over the channels of a backbone
            that only takes three.
        jacobians: The choice of the Jacobian at ties, in force while training.
        backbone_options: Handed to the backbone's constructor, such as ``{batch_norm: true}``.
        pretrained: Start from the library's ImageNet weights.
        optimizer: Any optimizer class, given the parameters.
        lr_scheduler: Any scheduler class, stepped after each epoch; a plateau scheduler names what it monitors.
        label_smoothing: Share of the target spread over all classes.
        compile: Compile the backbone with ``torch.compile``. One compiled backward serves every choice.
        channels_last: Keep images and weights in the channels-last memory format.
        seed: Seeds the ``"random"`` Jacobian choice.

    Raises:
        ValueError: If a name, option or shape is not admissible, or ``"random"`` is to be compiled.

    Example:
        >>> model = ImageClassifier("paper/lenet5", jacobians=Jacobians(relu=1.0, max_pool="minimal"))
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

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
        label_smoothing: float = 0.0,
        compile: bool = False,  # noqa: A002 # torch's own word
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if compile and jacobians.max_pool == "random":
            raise ValueError('max_pool="random" draws inside the backward and cannot be compiled; use compile=False')
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler", "jacobians"])
        self.jacobians = jacobians
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._label_smoothing, self._compile, self._channels_last = label_smoothing, compile, channels_last
        self._channels = input_channels(backbone, image_shape)
        self.backbone = create_backbone(backbone, num_classes, image_shape, pretrained, **(backbone_options or {}))
        self.patch_report: PatchReport = patch(
            self.backbone, jacobians, example=torch.zeros(2, self._channels, *image_shape[1:]), seed=seed
        )
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stub lacks it
        accuracy = {"acc1": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            accuracy["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self._accuracy = nn.ModuleDict(
            {
                "train_": MulticlassAccuracy(num_classes, average="micro"),
                "val_": MetricCollection(dict(accuracy), prefix="val/").clone(),
                "test_": MetricCollection(dict(accuracy), prefix="test/").clone(),
            }
        )

    def setup(self, stage: str) -> None:
        """Compile the backbone, if asked to; Lightning calls this before anything runs."""
        if self._compile and self.backbone._compiled_call_impl is None:
            self.backbone.compile()

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
        return self.backbone(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch, logged with its accuracy."""
        logits, y, loss = self._loss(batch, self._label_smoothing)
        accuracy = self._accuracy["train_"](logits, y)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc1", accuracy, prog_bar=True)
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
        return self(x).float().softmax(1)

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        optimizer = self._optimizer(self.parameters())
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return [optimizer], [scheduler]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which Jacobian the weights were trained under."""
        checkpoint["nslightning"] = {
            "jacobians": self.jacobians.to_dict(),
            "fingerprint": self.patch_report.fingerprint,
            "torch": torch.__version__,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say so when a checkpoint was made under another choice or patch.

        Warns:
            PatchWarning: If the Jacobian choice, the patched sites or PyTorch's version differ.
        """
        made = checkpoint.get("nslightning")
        now = {"jacobians": self.jacobians.to_dict(), "fingerprint": self.patch_report.fingerprint}
        if made is None:
            warnings.warn("the checkpoint does not say under which Jacobian choice it was made", PatchWarning, stacklevel=2)
        elif made["fingerprint"] != now["fingerprint"]:
            # Configs and checkpoints hold lists where the choice holds tuples.
            then = Jacobians(**made["jacobians"])
            what = (
                f"under {then!r}, and this run has {self.jacobians!r}"
                if then != self.jacobians
                else f"with other patched sites ({made['fingerprint']}, now {now['fingerprint']})"
            )
            warnings.warn(f"the checkpoint was made {what}", PatchWarning, stacklevel=2)

    def _loss(self, batch: Sequence[Tensor], label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self(x)
        # Cross-entropy in float32 at least: in half precision its sum over the classes loses the small gradients.
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.detach(), y, F.cross_entropy(wide, y, label_smoothing=label_smoothing)

    def _evaluate(self, stage: str, batch: Sequence[Tensor]) -> None:
        logits, y, loss = self._loss(batch)
        accuracy = self._accuracy[f"{stage}_"]
        accuracy.update(logits, y)
        self.log(f"{stage}/loss", loss, batch_size=len(y), sync_dist=True, prog_bar=True)
        self.log_dict(accuracy, batch_size=len(y), prog_bar=True)
