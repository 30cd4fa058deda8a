"""The LightningModule that trains GPT-2 under a Jacobian choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from nslightning.jacobians import Jacobians
from nslightning.models.patched import PatchedModule, at_least_float32
from nslightning.spelling import did_you_mean

__all__ = ["SIZES", "LanguageModel"]

#: Layers, heads and width. The configuration of the INNAprop experiments' "mini" was not released: this is
#: our choice, the size that nanoGPT trains on small corpora.
SIZES = {"mini": (6, 6, 384), "small": (12, 12, 768), "medium": (24, 16, 1024)}


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)


class LanguageModel(PatchedModule):
    """GPT-2, trained from scratch, whose nonsmooth operations take a chosen Jacobian.

    The network is ``GPT2LMHeadModel`` of Hugging Face transformers, built from its configuration alone:
    nothing is downloaded. GPT-2's own activation is smooth, and then there is nothing to choose; ``relu`` and
    its relatives have ties. Logged: ``train/loss`` per step, ``val/loss`` and ``val/perplexity`` (its
    exponential), and the same for ``test``; losses are means over tokens, in nats, computed in float32 at
    least.

    Weight decay acts on the matrices of the linear layers only, not on embeddings, layer norms and biases, as
    in the code of the INNAprop experiments. Unlike there, the layers have biases, as in GPT-2 itself:
    transformers' network has no option to leave them out. The scheduler is stepped after each optimizer step.

    Args:
        size: ``mini``, ``small`` or ``medium``: 6, 12 or 24 layers of width 384, 768 or 1024.
        vocab_size: Number of different tokens.
        block_size: The longest sequence.
        activation: The activation of each block's hidden layer, by transformers' name: ``gelu_new`` is
            GPT-2's; ``relu``, ``relu2`` (its square), ``relu6`` and ``leaky_relu`` have ties.
        dropout: Probability of dropout after embeddings, attention and blocks.
        jacobians: The choice of the Jacobian at ties, in force while training.
        config: Further fields of transformers' ``GPT2Config``, such as ``{n_layer: 4, n_embd: 128,
            n_head: 4}``; they win over ``size``.
        optimizer: Any optimizer class, given the parameters in two groups (see above).
        lr_scheduler: Any scheduler class, stepped after each optimizer step, such as
            :class:`~nslightning.optim.WarmupCosine`. ``ReduceLROnPlateau`` watches ``val/loss`` at
            the end of each epoch.
        compile: Compile the network with ``torch.compile``. One compiled backward serves every choice.
        seed: Seeds the ``"random"`` Jacobian choice.
        sites: Rules for some of the network's sites, later ones winning, such as
            ``{stage: transformer.h.0-2, relu: 0.5}`` (:class:`~nslightning.surgery.Rule`); everywhere else
            ``jacobians`` holds.
        strict: Refuse a network with an operation that no choice can reach, instead of naming it in the report.
        on_mismatch: Whether to warn or to refuse when a checkpoint is loaded that was made under another choice or
            with other patched sites.
        cuda_graph: Run training steps of a full batch from CUDA graphs, as in
            :class:`~nslightning.models.ImageClassifier`. On one GPU, without accumulated gradients.

    Attributes:
        title: Name of the network in reports, such as ``GPT-2 small``.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If a name or a number is not admissible.

    Example:
        >>> choice = Jacobians(relu=1.0)
        >>> model = LanguageModel("mini", vocab_size=257, block_size=32, activation="relu", jacobians=choice)
        >>> model(torch.zeros(2, 32, dtype=torch.long)).shape
        torch.Size([2, 32, 257])
    """

    scheduled_by: ClassVar[Literal["epoch", "step"]] = "step"
    network: nn.Module

    def __init__(
        self,
        size: Literal["mini", "small", "medium"] = "small",
        vocab_size: int = 50257,
        block_size: int = 1024,
        activation: str = "gelu_new",
        dropout: float = 0.0,
        jacobians: Jacobians = Jacobians(),  # noqa: B008 # frozen
        config: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = _adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        compile: bool = False,
        seed: int = 0,
        sites: list[dict[str, Any]] | None = None,
        strict: bool = True,
        on_mismatch: Literal["warn", "refuse"] = "warn",
        cuda_graph: bool = False,
    ) -> None:
        super().__init__(jacobians, optimizer, lr_scheduler, compile, sites, strict, on_mismatch, cuda_graph)
        self.title, self.block_size = f"GPT-2 {size}", block_size
        network = _gpt2(size, vocab_size, block_size, activation, dropout, config or {})
        self.patch_network("network", network, torch.zeros(1, min(block_size, 8), dtype=torch.long), seed)
        self._val_loss, self._test_loss = MeanMetric(), MeanMetric()

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict each next token.

        Args:
            tokens: int64 of shape (N, T), T at most ``block_size``.

        Returns:
            Logits of shape (N, T, vocab_size); those at position t have seen tokens 0 to t.

        Raises:
            ValueError: If the sequences are too long.
        """
        if tokens.shape[1] > self.block_size:
            raise ValueError(
                f"sequences of {tokens.shape[1]} tokens are longer than block_size={self.block_size}: build"
                " the model with a larger block_size, or make the data's smaller"
            )
        logits: Tensor = self.run_network(tokens).logits
        return logits

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The linear layers' matrices, and everything else without weight decay.

        Returns:
            Two parameter groups; the first takes the optimizer's own weight decay.
        """
        # transformers' Conv1D is a linear layer whose matrix is stored transposed. The output layer shares
        # the token embedding's.
        linear = {
            id(module.weight)
            for module in self.network.modules()
            if type(module).__name__ == "Conv1D" or isinstance(module, nn.Linear)
        } - {id(module.weight) for module in self.network.modules() if isinstance(module, nn.Embedding)}
        decayed = [p for p in self.parameters() if id(p) in linear]
        rest = [p for p in self.parameters() if id(p) not in linear]
        return [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        loss = self._loss(batch)
        value = loss.detach()
        self.log_step(lambda: {"train/loss": value})
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """The loss of one validation batch."""
        self._val_loss.update(self._loss(batch), batch[1].numel())

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all validation tokens."""
        self._log_mean("val", self._val_loss)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """The loss of one test batch."""
        self._test_loss.update(self._loss(batch), batch[1].numel())

    def on_test_epoch_end(self) -> None:
        """Log the mean over all test tokens."""
        self._log_mean("test", self._test_loss)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities of the token after each sequence, of shape (N, vocab_size)."""
        tokens = batch[0] if isinstance(batch, (tuple, list)) else batch
        return at_least_float32(self(tokens)[:, -1]).softmax(1)

    def _loss(self, batch: Sequence[Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(at_least_float32(self(tokens)).flatten(0, 1), targets.flatten())

    def _log_mean(self, stage: str, metric: MeanMetric) -> None:
        loss = metric.compute()  # over all processes
        metric.reset()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/perplexity": loss.exp()}, prog_bar=True)


def _gpt2(
    size: str, vocab_size: int, block_size: int, activation: str, dropout: float, config: dict[str, Any]
) -> nn.Module:
    """GPT-2 with random weights."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
        from transformers.activations import ACT2FN
    except ImportError as error:
        raise ImportError(
            f"LanguageModel takes GPT-2 from transformers, which cannot be imported ({error}):"
            " pip install nslightning[language]"
        ) from error
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; it is one of {', '.join(SIZES)}")
    if activation not in ACT2FN:
        names = ", ".join(sorted(ACT2FN))
        raise ValueError(f"there is no activation {activation!r}{did_you_mean(activation, ACT2FN)} There are: {names}")
    for name, value in (("vocab_size", vocab_size), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be a probability, 0 <= dropout < 1")
    n_layer, n_head, n_embd = SIZES[size]
    fields: dict[str, Any] = {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "n_positions": block_size,
        "activation_function": activation,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "use_cache": False,
        # They matter for generation only, and GPT-2's own may lie outside the vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    known = GPT2Config().to_dict()
    if unknown := sorted(set(config) - set(known)):
        hint = did_you_mean(unknown[0], known, otherwise="; transformers' GPT2Config lists them")
        raise ValueError(f"GPT-2's configuration has no field {unknown[0]!r}{hint}")
    fields |= config
    if fields["n_embd"] % fields["n_head"]:
        raise ValueError(f"n_embd={fields['n_embd']} must be a multiple of n_head={fields['n_head']}")
    return GPT2LMHeadModel(GPT2Config(**fields))
