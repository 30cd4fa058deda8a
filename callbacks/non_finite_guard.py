"""Finds the origin of the first NaN or infinity of a training."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from nslightning._torch import is_compiled
from nslightning.jacobians import Jacobians
from nslightning.probes import counting
from nslightning.probes.ties import TieCounts
from nslightning.surgery import selections, using

from .gradient_divergence import loss_scale, undisturbed
from .measurements import log_step, run_folder, starts_at_first_step
from .replay import NoLossError, ReplayedStep, silent, takes_iterator

__all__ = ["NonFinite", "NonFiniteError", "NonFiniteGuard"]


@dataclass
class NonFinite:
    """The origin of the first value that is not finite.

    Args:
        step: The optimizer step.
        batch: The batch in its epoch.
        kind: ``"weight"`` (before the step: an optimizer step made it), ``"batch"``, ``"activation"``, ``"loss"``,
            ``"gradient"``, or ``"not reproduced"`` where the batch, run again, gave finite values.
        where: The parameter, or the module that was given finite values and returned others, in its forward or its
            backward.
        ties: Ties met in this forward, by site: at the sites that fed the value. Those are the ones evaluated up to the
            module for an activation, and from it on for a gradient, which comes from above.
        finite_under_reference: For a gradient, whether stock PyTorch's choice makes it finite: then the choice at a tie
            made it what it is. None where that was not asked.
    """

    step: int
    batch: int
    kind: str
    where: str = ""
    ties: dict[str, int] = field(default_factory=dict)
    finite_under_reference: bool | None = None

    def __str__(self) -> str:
        origin = {
            "activation": f"the output of {self.where}",
            "gradient": f"a gradient, from the backward of {self.where}",
            "weight": f"the weight {self.where}",
        }.get(self.kind, f"the {self.kind}")
        text = f"step {self.step}, batch {self.batch}: the first value that is not finite is {origin}"
        if self.kind == "not reproduced":
            text = f"step {self.step}, batch {self.batch}: loss or gradients were not finite, and are when run again"
        if self.ties:
            text += "; ties fed it: " + ", ".join(f"{n:,} at {site}" for site, n in self.ties.items())
        elif self.kind in ("activation", "gradient"):
            text += "; no tie fed it"
        if self.finite_under_reference is not None:
            verdict = "is finite" if self.finite_under_reference else "is not finite either"
            text += f"; under stock PyTorch's choice it {verdict}"
        return text


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a weight is not finite; the message says where that began."""


class NonFiniteGuard(Callback):
    """Finds the first layer at which a NaN or an infinity appears, and whether a tie fed it.

    As long as all is finite, each batch costs one check of the loss and of the largest gradient. When it fails, weights
    are still those before the step: the batch runs again under the same random numbers, with every module watched, and
    the origin is written to ``nonfinite.json`` in the run folder. Training up to there is bit for bit what it is
    without the callback.

    With fp16 loss scaling, gradients overflow now and then and the scaler skips the step: that is its way of working.
    Gradients are reported only once the scale has fallen below 1; the loss always is. Of compiled parts, the replay
    runs the eager code, and counts no ties. Under DDP each process looks at its own batch, as soon as one has found
    something, and the first one's finding is reported unless it had nothing to reproduce.

    Logged once something was found and training goes on:

    ===================== =======================================================
    ``nonfinite/batches`` batches so far with a loss or gradients not finite
    ===================== =======================================================

    Args:
        action: ``"raise"`` a :class:`NonFiniteError`, ``"stop"`` the training after this step, or ``"log"`` and go on;
            only the first finding is looked into then.
    """

    def __init__(self, action: Literal["raise", "stop", "log"] = "raise") -> None:
        if action not in ("raise", "stop", "log"):
            raise ValueError(f"action is 'raise', 'stop' or 'log'; given {action!r}")
        self.action = action
        self.finding: NonFinite | None = None
        self.batches = 0
        self._batch: Any = None
        self._batch_idx = 0
        self._random: list[Tensor] = []
        self._loss: Tensor | None = None
        self._open = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training."""
        if starts_at_first_step(trainer, stage):
            self.finding, self.batches = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the finding and the count."""
        return {"batches": self.batches, "finding": None if self.finding is None else asdict(self.finding)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.batches = state_dict["batches"]
        self.finding = None if state_dict["finding"] is None else NonFinite(**state_dict["finding"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module whose step cannot be run again."""
        if not pl_module.automatic_optimization:
            raise ValueError("NonFiniteGuard runs the training step again, and a manual one would train")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what running the batch again takes."""
        self._batch, self._batch_idx = batch, batch_idx
        self._keep_random(pl_module)
        if takes_iterator(pl_module):  # the batch is fetched inside the step: only the iterator sees it
            self._batch = self._open.enter_context(_keeping_fetched(pl_module, lambda: self._keep_random(pl_module)))

    def _keep_random(self, module: LightningModule) -> None:
        self._random = [torch.get_rng_state()]
        if module.device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(module.device))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss."""
        self._open.close()
        self._loss = loss.detach()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, and look closer where the check fails."""
        assert self._loss is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        values = [self._loss.abs().max()]
        if scaler is None or loss_scale(trainer) * trainer.accumulate_grad_batches < 1:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            values.append(torch.nn.utils.get_total_norm(gradients, math.inf))
        bad = not bool(torch.isfinite(torch.stack([v.double() for v in values])).all())
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            self.batches += 1
            self._report(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Let go of the batch; log the count."""
        self._open.close()
        self._batch, self._loss = None, None
        if self.batches:
            log_step(trainer, {"nonfinite/batches": float(self.batches)})

    def on_exception(self, *_: Any) -> None:
        """Leave nothing behind."""
        self._open.close()
        self._batch, self._loss = None, None

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        if self.finding is None:
            self.finding = self._look(trainer, module)
            if trainer.world_size > 1:
                everyone: list[Any] = [None] * trainer.world_size
                torch.distributed.all_gather_object(everyone, self.finding)
                self.finding = next((f for f in everyone if f.kind != "not reproduced"), everyone[0])
            file = run_folder(trainer) / "nonfinite.json"  # on all ranks: Lightning broadcasts the folder
            if trainer.is_global_zero:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(asdict(self.finding), indent=2) + "\n")
            if self.action != "raise":
                rank_zero_warn(str(self.finding))
        if self.action == "raise":
            raise NonFiniteError(str(self.finding))
        if self.action == "stop":
            trainer.should_stop = True

    def _look(self, trainer: Trainer, module: LightningModule) -> NonFinite:
        """Run the batch again and watch."""
        finding = NonFinite(trainer.global_step, self._batch_idx, "not reproduced")
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not _finite(tensor):
                finding.kind, finding.where = "weight", name
                return finding
        if not all(_finite(t) for t in tree_leaves(self._batch) if isinstance(t, Tensor)):
            finding.kind = "batch"
            return finding
        step = ReplayedStep(module, self._batch_idx, loss_scale(trainer))
        with ExitStack() as stack:
            stack.enter_context(undisturbed(module, trainer.global_step))
            torch.set_rng_state(self._random[0])
            if len(self._random) > 1:
                torch.cuda.set_rng_state(self._random[1], module.device)
            stack.enter_context(silent(module))
            stack.enter_context(torch.enable_grad())
            compiled = any(map(is_compiled, module.modules()))
            if compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            counts = stack.enter_context(counting(module)) if selections(module) and not compiled else TieCounts()
            calls = stack.enter_context(_watching(module, counts))
            try:
                with trainer.precision_plugin.train_step_context():
                    loss = step(self._batch)
            except NoLossError:  # the step decides by what it keeps for itself
                return finding
            counts.read()
            bad = next((c for c in calls if not (c.finite_in and c.finite_out)), None)
            if bad is not None:
                finding.kind = "activation"
                finding.where = bad.name if bad.finite_in else f"a function that runs before {bad.name}"
            elif not _finite(loss):
                finding.kind = "loss"
            if bad is not None or finding.kind == "loss":
                met = bad.ties_after if bad is not None else {s: t.tied for s, t in counts.items()}
                finding.ties = {site: n for site, n in met.items() if n}
                return finding
            named = {n: p for n, p in module.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
            if all(_finite(g) for g in gradients if g is not None):
                return finding
            source = next((c for c in reversed(calls) if c.finite_above and not c.finite_below), None)
            finding.kind = "gradient"
            finding.where = source.name if source is not None else "a function between the modules"
            before = source.ties_before if source is not None else {}
            after = {site: t.tied - before.get(site, 0) for site, t in counts.items()}
            finding.ties = {site: n for site, n in after.items() if n}
            if selections(module):
                finding.finite_under_reference = _finite_under_reference(loss, module, list(named.values()))
        return finding


@contextmanager
def _keeping_fetched(module: LightningModule, fetched: Callable[[], None]) -> Iterator[list[Any]]:
    """Keep what the training step of a module takes from its iterator inside the block.

    Args:
        module: The module trained.
        fetched: Called after each fetch.
    """
    kept: list[Any] = []
    step, replaced = module.training_step, vars(module).get("training_step")

    class Kept(Iterator[Any]):
        def __init__(self, source: Any) -> None:
            self._source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

        def __next__(self) -> Any:
            kept.append(next(self._source))
            fetched()
            return kept[-1]

    def training_step(dataloader_iter: Any) -> Any:
        return step(Kept(dataloader_iter))

    module.training_step = training_step  # type: ignore[method-assign] # of this instance
    try:
        yield kept
    finally:
        del module.training_step
        if replaced is not None:
            module.training_step = replaced  # type: ignore[method-assign] # of this instance


@dataclass
class _Call:
    """One call of a module without children, and what was finite in it."""

    name: str
    ties_before: dict[str, int]
    ties_after: dict[str, int] = field(default_factory=dict)
    finite_in: bool = True
    finite_out: bool = True
    finite_above: bool = True  # the gradient that came to its output
    finite_below: bool = True  # those that its backward handed on, to its input and parameters


@contextmanager
def _watching(module: nn.Module, counts: TieCounts) -> Iterator[list[_Call]]:
    """Note of each call of a leaf module, in order, whether what goes in and out is finite, and its gradients."""
    calls: list[_Call] = []
    hooks: list[RemovableHandle] = []

    def note(call: _Call, attribute: str, gradient: Tensor) -> None:
        setattr(call, attribute, getattr(call, attribute) and _finite(gradient))

    def follow(call: _Call, attribute: str, values: Any) -> None:
        for t in tree_leaves(values):
            if isinstance(t, Tensor) and t.requires_grad:
                hooks.append(t.register_hook(lambda g: note(call, attribute, g)))

    def tied() -> dict[str, int]:
        counts.read()
        return {site: ties.tied for site, ties in counts.items()}

    def before(name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        call = _Call(name, tied())
        calls.append(call)
        call.finite_in = all(_finite(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        follow(call, "finite_below", (args, kwargs, list(part.parameters())))

    def after(name: str, output: Any) -> None:
        call = next(c for c in reversed(calls) if c.name == name)
        call.ties_after = tied()
        call.finite_out = all(_finite(t) for t in tree_leaves(output) if isinstance(t, Tensor))
        follow(call, "finite_above", output)

    for name, part in module.named_modules():
        if not any(part.children()):
            hooks += [
                part.register_forward_pre_hook(
                    lambda part, args, kwargs, name=name: before(name, part, args, kwargs), with_kwargs=True
                ),
                part.register_forward_hook(lambda part, args, output, name=name: after(name, output)),
            ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _finite_under_reference(loss: Tensor, module: nn.Module, parameters: list[nn.Parameter]) -> bool | None:
    """Return whether stock PyTorch's choice gives finite gradients; None where it cannot be taken after the forward."""
    try:
        with using(module, Jacobians()):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    except ValueError:  # the published rule's forward depends on the choice
        return None
    return all(_finite(g) for g in gradients if g is not None)


def _finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(torch.isfinite(t.detach()).all())
