"""The LightningModule that trains any backbone under a Jacobian choice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric, MetricCollection
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
        optimizer: Any optimizer class, given the parameters. A checkpoint of the command line holds its configuration;
            a callable given in Python is not stored, and is given again to ``load_from_checkpoint``.
        lr_scheduler: Any scheduler class, stepped after each epoch. ``ReduceLROnPlateau`` watches ``val/loss``, or
            what Lightning's own version of it is told to ``monitor``.
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
        compile: bool = False,  # torch's own word
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing is a share between 0 and 1; given {label_smoothing}")
        if compile and jacobians.max_pool == "random":
            raise ValueError('max_pool="random" draws inside the backward and cannot be compiled; use compile=False')
        # As plain data, so that checkpoints load with `weights_only`; Lightning's instantiator makes objects of it.
        self.save_hyperparameters()
        self.save_hyperparameters(ignore=[k for k in ("optimizer", "lr_scheduler") if callable(self.hparams[k])])
        self.hparams.update(jacobians=jacobians.to_dict(), _instantiator="lightning.pytorch.cli.instantiate_module")
        self.jacobians = jacobians
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        self._trained_with: str | None = None
        self._label_smoothing, self._compile, self._channels_last = label_smoothing, compile, channels_last
        self._channels = input_channels(backbone, image_shape)
        self.backbone = create_backbone(backbone, num_classes, image_shape, pretrained, **(backbone_options or {}))
        example = torch.zeros(2, self._channels, *image_shape[1:])
        try:
            self.patch_report: PatchReport = patch(self.backbone, jacobians, example=example, seed=seed)
        except RuntimeError as error:  # from the example's forward
            raise ValueError(f"{backbone} does not take images of shape {tuple(image_shape)}: {error}") from error
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        accuracy: dict[str, Metric | MetricCollection] = {"acc1": MulticlassAccuracy(num_classes, average="micro")}
        if num_classes > 5:
            accuracy["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        metrics = MetricCollection(accuracy)
        self._accuracy = nn.ModuleDict({f"{stage}_": metrics.clone(f"{stage}/") for stage in ("val", "test")})

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> ImageClassifier:
        """Load a model, under the Jacobian choice that it was trained under unless another is given.

        Args:
            checkpoint_path: A checkpoint of the command line or of a ``Trainer``.
            *args: As in Lightning.
            **kwargs: As in Lightning; arguments of this class win over those in the checkpoint.

        Returns:
            The model. A checkpoint of the command line brings its optimizer along; callables given in Python are
            not stored, and without them ``configure_optimizers`` warns.
        """
        if isinstance(kwargs.get("jacobians"), Jacobians):
            kwargs["jacobians"] = kwargs["jacobians"].to_dict()  # what Lightning's instantiator takes
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def setup(self, stage: str) -> None:
        """Set the precision, and compile the backbone if asked to; Lightning calls this before anything runs."""
        # Lightning does it after loading a checkpoint, whose float64 weights a float32 module would round.
        self.trainer.precision_plugin.convert_module(self)
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
        logits: Tensor = self.backbone(x)
        return logits

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch, logged with its accuracy."""
        logits, y, loss = self._loss(batch, self._label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc1", (logits.argmax(1) == y).float().mean(), prog_bar=True)
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

    def configure_optimizers(self) -> Any:
        """The optimizer, and the scheduler if there is one."""
        optimizer = self._optimizer(self.parameters())
        if self._trained_with not in (None, type(optimizer).__name__):
            warnings.warn(
                f"the checkpoint was trained with {self._trained_with}, and this model has {type(optimizer).__name__};"
                " give load_from_checkpoint the optimizer again: optimizer=...",
                PatchWarning,
                stacklevel=2,
            )
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            monitor = getattr(scheduler, "monitor", "val/loss")  # torch's own class does not name it
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": monitor}}
        return [optimizer], [scheduler]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which Jacobian the weights were trained under."""
        checkpoint["nslightning"] = {
            "jacobians": self.jacobians.to_dict(),
            "fingerprint": self.patch_report.fingerprint,
            "optimizer": type(self.trainer.optimizers[0]).__name__ if self.trainer.optimizers else None,
            "torch": str(torch.__version__),  # a class of its own, which `weights_only` refuses
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say so when a checkpoint was made under another choice or patch.

        Warns:
            PatchWarning: If the Jacobian choice or the patched sites differ.
        """
        made = checkpoint.get("nslightning")
        if made is None:
            what = "the checkpoint does not say under which Jacobian choice it was made"
            warnings.warn(what, PatchWarning, stacklevel=2)
            return
        self._trained_with = made.get("optimizer")
        then, now = made["jacobians"], self.jacobians.to_dict()
        changed = [k for k in now if _plain(then.get(k)) != _plain(now[k])]
        if changed:
            there, here = (", ".join(f"{k}={choice.get(k)!r}" for k in changed) for choice in (then, now))
            what = f"the checkpoint was made under {there}, and this run has {here}"
        elif made["fingerprint"] != self.patch_report.fingerprint:
            fingerprints = f"{made['fingerprint']}, now {self.patch_report.fingerprint}"
            what = f"the checkpoint was made with other patched sites ({fingerprints})"
        else:
            return
        warnings.warn(what, PatchWarning, stacklevel=2)

    def _loss(self, batch: Sequence[Tensor], label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self(x)
        # Cross-entropy in float32 at least: in half precision its sum over the classes loses the small gradients.
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.detach(), y, F.cross_entropy(wide, y, label_smoothing=label_smoothing)

    def _evaluate(self, stage: str, batch: Sequence[Tensor]) -> None:
        logits, y, loss = self._loss(batch)
        accuracy: Any = self._accuracy[f"{stage}_"]
        accuracy.update(logits, y)
        self.log(f"{stage}/loss", loss, batch_size=len(y), sync_dist=True, prog_bar=True)
        self.log_dict(accuracy, batch_size=len(y), prog_bar=True)


def _plain(value: Any) -> Any:
    """A choice as configs and checkpoints may hold it: with lists for tuples."""
    return tuple(value) if isinstance(value, list) else value
