"""Measures while training how far the gradients of other Jacobian choices are from the one in use."""

import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakSet

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nslightning._torch import hooks_of, is_compiled, keep_saved_buffers, runs_module_hooks, scale_of
from nslightning.choices import Choices, named_choices
from nslightning.exact_csv import read_exactly
from nslightning.jacobians import Jacobians
from nslightning.models import Twins
from nslightning.models.captured import eagerly
from nslightning.probes import (
    NORMS,
    Divergence,
    Recording,
    UnseenError,
    gradients,
    measure,
    measure_differences,
    recording,
)
from nslightning.probes.graph import opaque_nodes, reachable, reruns_forward
from nslightning.probes.propagation import agrees, refuse_random, refuse_unseen
from nslightning.probes.shards import is_shard, reshard
from nslightning.runs import choice_changes, comparable_from
from nslightning.surgery import selections

from .measurements import (
    append_rows,
    choice_in_use,
    interval,
    log_step,
    own_name,
    run_folder,
    start_table,
    starts_at_first_step,
)
from .showing import show_figure, show_table, summarise
from .verdict import divergence_in_words

__all__ = ["GradientDivergence"]

_RESERVED = {"seconds", "share", "per_layer"}  # divergence/... that are no choice
_EXTRA = WeakSet[nn.Module]()  # modules on which passes run that are not the training's own
_FIRST_WAIT = 10  # steps that an adaptive interval is timed on


class GradientDivergence(Callback):
    """Measures the divergence between the Jacobian choice in use and other ones, on the loss being trained.

    At a measured step the training forward and backward serve, too: their graph is kept for what each choice adds to
    it. Training is bit for bit what it is without the callback: parameters' ``grad``, random streams and buffers are
    left as they were.

    By default a step is measured whenever that keeps the time spent on measuring under ``budget`` as a share of the
    time spent on training. Which steps that are depends on the clock: ``divergence.csv`` says which they were, and a
    resumed run goes on with the account. A number for ``every_n_steps`` measures the same steps in each run.

    Gradients are unscaled (fp16 loss scaling, gradient accumulation) and, under DDP, taken on each process's own batch
    for all choices and then averaged over the processes, as DDP does with the gradients it trains on; all processes
    measure in the same way. Under FSDP2 gradients are subtracted shard by shard, and the norms added up. With gradient
    accumulation the first batch of the step is measured. Where scaled gradients overflow, the values are not finite.

    Logged at each measured step:

    =============================== ==================================================================
    ``divergence/<choice>/l1``      sum of the absolute differences of all parameter gradients
    ``divergence/<choice>/l2``      Euclidean norm of the difference
    ``divergence/<choice>/linf``    largest absolute difference
    ``divergence/<choice>/relative``  ``l2`` over the norm of the gradient in use
    ``divergence/<choice>/cosine``  cosine of the angle between the two gradients
    ``divergence/seconds``          time that the measurement took
    ``divergence/share``            time that all measurements took over the time of all training steps so far, without
                                    them; from the second measured step on
    ``divergence/per_layer``        at the end: a table of the same norms per parameter, for loggers that take tables
    =============================== ==================================================================

    The run folder gets ``divergence.csv``, one row per step, choice and parameter (an empty ``parameter`` is the
    total) with the method that measured it. ``reference`` is the choice that trains: ``native`` for stock
    PyTorch's, and where rules give sites several choices, all of them, as in ``max_pool=minimal | native``. At the end
    come ``divergence.pdf`` and ``.png``, the relative divergence against the step.
    A second GradientDivergence of the same run logs as ``divergence-2/...`` and writes ``divergence-2.csv``.

    Attributes:
        measures_backward: Whether the batch that has begun is to be measured: its step must not come from a captured
            graph.

    Args:
        choices: The choices to compare with the one in use, by the name they are logged under: each a
            :class:`~nslightning.Jacobians`, its fields as ``{"relu": 1.0}``, or a preset such as ``"jax"``.
        every_n_steps: Optimizer steps between two measurements; ``"auto"`` keeps them within the budget.
        per_layer: Also record every parameter's divergence.
        method: ``"propagate"`` carries the difference itself down from the ties
            (:func:`nslightning.probes.recording`): exact zeros where no tie matters, elsewhere the rounding of the
            difference's own terms, not of the gradients, and no backward where no tie was met. ``"subtract"`` compares
            whole gradients, one backward for each choice: what rounding makes of another order of summation counts
            too. ``"auto"`` propagates unless a choice is ``"random"``, and says so. Each loss's own graph decides
            whether it can be done: where operations hide from it (in compiled parts, reentrant checkpoints,
            ``torch.vmap``, custom functions), gradients are subtracted. So they are from the step on at which one
            subtraction shows that differences do not add up: it is made at the first one that is measured, and wherever
            parameters or modules have backward hooks. Both are said once.
        budget: The share of the training time that an automatic interval spends on measuring.

    Raises:
        ValueError: If there is no choice, a name cannot be part of a metric's name, or the interval or the budget is
            not positive.

    Example:
        >>> callback = GradientDivergence({"relu1": Jacobians(relu=1.0)}, every_n_steps=10)
    """

    def __init__(
        self,
        choices: Choices,
        every_n_steps: int | Literal["auto"] = "auto",
        per_layer: bool = True,
        method: Literal["auto", "propagate", "subtract"] = "auto",
        budget: float = 0.05,
    ) -> None:
        self.choices = checked_names("GradientDivergence", "divergence/<choice>/<norm>", choices, _RESERVED)
        if not budget > 0:
            raise ValueError(f"budget is a share of the training time, such as 0.05; given {budget}")
        self.per_layer, self.method = per_layer, method
        self.every_n_steps = every_n_steps if every_n_steps == "auto" else interval(every_n_steps)
        self.budget = budget
        self._spent, self._trained, self._next = 0.0, 0.0, 0  # seconds, seconds, and a step
        self._subtracts = ""  # why it does at every step, if it does
        self._said: set[str] = set()
        self._checked = self._hooked = False
        self._loss: Tensor | None = None
        self.measures_backward = False
        self._measured_step = -1
        self._batch_start = 0.0
        self._recorded: Recording | None = None
        self._others: dict[str, dict[str, Tensor]] = {}
        self._own: dict[str, Tensor] = {}
        self._before: dict[str, Tensor | None] = {}  # of parameters that are distributed
        self._hooks: list[RemovableHandle] = []
        self._seconds = 0.0
        self._name, self._folder = "divergence", Path()
        self._reference, self._began = "", False
        self._settings, self._open = ExitStack(), ExitStack()

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return self._generate_state_key(
            choices={name: repr(choice) for name, choice in self.choices.items()},
            every_n_steps=self.every_n_steps,
            per_layer=self.per_layer,
            method=self.method,
            budget=self.budget,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training; of one that goes on, the checkpoint's account comes after this."""
        if starts_at_first_step(trainer, stage):
            self._spent, self._trained, self._next = 0.0, 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """The account of the time spent, for a run that goes on."""
        return {"spent": self._spent, "trained": self._trained, "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the account."""
        self._spent, self._trained, self._next = (state_dict[k] for k in ("spent", "trained", "next"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured; keep a compiled backward's graph usable more than once."""
        if not selections(pl_module):
            raise ValueError(
                "GradientDivergence needs a patched model: call `patch(model, Jacobians())` before training"
            )
        if not pl_module.automatic_optimization:
            raise ValueError("GradientDivergence measures at Lightning's own backward; manual optimization has none")
        if isinstance(pl_module, Twins):
            raise ValueError("GradientDivergence compares the choices in one network; twins have TwinDivergence")
        in_use = [selection.jacobians for selection in selections(pl_module).values()]
        self._subtracts, self._checked = "as it was asked to" if self.method == "subtract" else "", False
        if not self._subtracts:
            try:
                refuse_random(*in_use, *self.choices.values())
                if type(pl_module).backward is not LightningModule.backward:
                    raise ValueError("a backward of the module's own cannot be told to keep the graph")
            except ValueError as reason:
                if self.method == "propagate":
                    raise
                self._subtracts = str(reason)
                self._say(self._subtracts)
        measurable = isinstance(trainer.strategy, (DDPStrategy, ModelParallelStrategy))
        if isinstance(trainer.strategy, ParallelStrategy) and not measurable:
            raise ValueError(
                "GradientDivergence reads gradients parameter by parameter: train on one device, with "
                "--trainer.strategy=ddp or with FSDP2 (ModelParallelStrategy), not "
                f"{type(trainer.strategy).__name__}"
            )
        self._measured_step = -1
        self._name, self._folder = own_name(trainer, self, "divergence"), run_folder(trainer)
        if any(map(is_compiled, pl_module.modules())):
            # A compiled backward may overwrite what the forward saved ("donated buffers"); it could not run once per
            # choice then. The setting holds for what is compiled under it, so what is compiled already goes.
            self._settings.enter_context(keep_saved_buffers())
            torch.compiler.reset()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows that this run will write again; only now does Lightning know at which step it resumes."""
        start_table(trainer, self._file)
        if trainer.is_global_zero:
            summarise(trainer, self._name)
        self._began = True
        self._reference = choice_in_use(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._batch_start, self._seconds = time.perf_counter(), 0.0
        self.measures_backward = self._is_due(trainer.global_step)

    def _is_due(self, step: int) -> bool:
        due = step >= self._next if self.every_n_steps == "auto" else step % self.every_n_steps == 0
        return due and step != self._measured_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the account."""
        self._trained += max(0.0, time.perf_counter() - self._batch_start - self._seconds)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Take the other choices' gradients before the training backward frees the graph, or have it keep the graph."""
        step = trainer.global_step
        if not self._is_due(step):
            return
        self._measured_step = step
        reshard(pl_module)
        if trainer.world_size > 1 and _any_process(trainer, reruns_forward(loss)):
            # Gradients that arrive in `grad` alone would start DDP's exchange.
            self._say("a checkpoint with use_reentrant=True under DDP", "measures no step with")
            return
        reason = _agreed(trainer, self._subtracts or _unseen(loss, pl_module))
        if reason:
            if not self._subtracts:
                self._say(reason)
            clock = _Clock(pl_module.device)
            with undisturbed(pl_module, step):
                self._others = gradients(loss, pl_module, self.choices, retain_graph=True)
            self._seconds = clock.seconds()
        else:
            ours = sum(bool(c._hooks) for c in _alike(trainer))
            self._hooked = any(len(hooks_of(p)) > ours for p in pl_module.parameters())
            self._hooked |= any(map(runs_module_hooks, reachable([loss.grad_fn])))
            # Operations report to one recording at a time: another GradientDivergence's serves this one as well.
            self._recorded = next((c._recorded for c in _alike(trainer) if c._recorded is not None), None)
            if self._recorded is None:
                self._recorded = self._open.enter_context(recording(pl_module))
                self._open.enter_context(_keeping_graph(pl_module, self._recorded))
            if _any_process(trainer, self._hooked or not self._checked or any(opaque_nodes(loss))):
                self._recorded.whole, self._loss = True, loss

        # FSDP2 assigns the gradients of its shards, which pass no hook; what was there is of an earlier batch.
        self._before = {
            name: None if p.grad is None else p.grad.detach().clone()
            for name, p in pl_module.named_parameters()
            if p.requires_grad and is_shard(p)
        }

        def keep(name: str, gradient: Tensor) -> None:
            # A copy: the engine may hand this very tensor on to `grad`, where DDP and the scaler overwrite it. A
            # reentrant checkpoint comes to a parameter that it shares by a second backward.
            if pl_module not in _EXTRA:  # another callback's passes are not the training's
                before = self._own.get(name)
                self._own[name] = gradient.detach().clone() if before is None else before + gradient

        self._own = {}
        self._hooks = [
            p.register_hook(lambda g, name=name: keep(name, g))
            for name, p in pl_module.named_parameters()
            if p.requires_grad and not is_shard(p)
        ]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with the gradients that the training backward has just produced."""
        if not self._hooks and not self._before:
            return
        clock = _Clock(pl_module.device)
        scale = _coming_loss_scale(trainer)
        recorded, others, own, loss = self._recorded, self._others, self._own, self._loss
        named = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        for name, before in self._before.items():
            after = named[name].grad
            if after is not None:
                own[name] = after.detach().clone() if before is None else after.detach() - before
        self._forget()
        shared = any(c._recorded is recorded for c in _alike(trainer))
        # A parameter that the loss does not depend on got no gradient.
        own = {name: own.get(name, torch.zeros_like(p)) for name, p in named.items()}
        with undisturbed(pl_module, trainer.global_step):
            reason = "" if recorded is None or loss is None else _agreed(trainer, _strangers(recorded, loss))
            measured: dict[str, Divergence] = {}
            if recorded is not None and not reason:
                carried = recorded.carried(self.choices, named, retain_graph=shared or loss is not None)
                differences = ((choice, _means(trainer, d)) for choice, d in carried)
                measured = measure_differences(differences, _means(trainer, own))
                measured = {choice: replace(d, method="propagate") for choice, d in measured.items()}
                check = loss is not None and _any_process(trainer, self._hooked or not self._checked)
                if check and loss is not None and any(d.l2 for d in measured.values()):
                    reason = self._nonlinear(trainer, pl_module, recorded, loss, own, measured)
            if reason:
                self._say(reason)
                assert loss is not None  # without it nothing was looked for
                others = gradients(loss, pl_module, self.choices, retain_graph=shared)
        if recorded is None or reason:
            mean = _means(trainer, own)
            measured = {choice: measure(_means(trainer, other), mean) for choice, other in others.items()}
        self._seconds += clock.seconds()  # the norms have come from the device: all that it waits for is done
        factor = scale()
        measured = {choice: _unscaled(d, factor) for choice, d in measured.items()}
        self._account(trainer)
        self._record(trainer, measured)

    def _nonlinear(
        self,
        trainer: Trainer,
        module: LightningModule,
        recorded: Recording,
        loss: Tensor,
        own: Mapping[str, Tensor],
        measured: Mapping[str, Divergence],
    ) -> str:
        """Return why differences do not add up, by one subtraction for the choice of the largest; empty if they do."""
        choice = max(measured, key=lambda name: measured[name].l2 if math.isfinite(measured[name].l2) else 0.0)
        one = {choice: self.choices[choice]}
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        ((_, d),) = recorded.carried(one, named)
        (other,) = gradients(loss, module, one).values()
        reason = ""
        try:
            agrees(loss, other, own, d)
        except UnseenError as error:
            reason = error.cause
        self._checked = True
        self._subtracts = _agreed(trainer, reason)
        return self._subtracts

    def _say(self, reason: str, doing: str = "subtracts gradients instead of propagating differences:") -> None:
        """Warn once that the callback measures otherwise than asked for, and name the reason."""
        if reason not in self._said:
            self._said.add(reason)
            rank_zero_warn(f"GradientDivergence {doing} {reason}")

    def _account(self, trainer: Trainer) -> None:
        """Note the time spent, and when the budget allows the next measurement."""
        self._spent += self._seconds
        wait = _FIRST_WAIT
        if trainer.global_step and self._trained:
            until = (self._spent + self._seconds) / self.budget  # so long training takes to pay for another one, too
            wait = max(1, math.ceil((until - self._trained) * trainer.global_step / self._trained))
        self._next = trainer.global_step + wait
        if trainer.world_size > 1:  # one clock for all processes
            self._next = trainer.strategy.broadcast(self._next)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the figure, put the measurements into words, and send both to the loggers."""
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self._file.exists():
            from nslightning.figures import divergence_by_step

            # Only a number's "nan" is one: an empty parameter and any choice's name are text.
            numbers = {norm: ["nan"] for norm in NORMS}
            rows = read_exactly(self._file, dtype={"choice": str}, keep_default_na=False, na_values=numbers)
            totals = rows[rows["parameter"] == ""]
            if not len(totals):
                return
            divergence_by_step(totals, self._file.with_suffix(".pdf"), choice_changes(self._folder))
            figure = self._file.with_suffix(".png")
            since = comparable_from(self._folder)  # rows before it have another reference, or another precision
            words = divergence_in_words(totals[totals["step"] >= since], str(trainer.precision), self._reference)
            if since and words:
                words.insert(0, f"since step {since}, with which a segment of another choice or precision begins:")
            if not trainer.fast_dev_run:  # type: ignore[attr-defined] # set by a connector; its folder goes with it
                words.append(f"figure: {figure}")
            rank_zero_info("\n".join(words))
            columns = ["step", "choice", "parameter", *NORMS]
            show_table(
                trainer, f"{self._name}/per_layer", columns, rows[rows["parameter"] != ""][columns].values.tolist()
            )
            show_figure(trainer, f"{self._name}/figure", figure)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind but the figure of the measurements: Lightning calls no ``teardown`` then."""
        self._forget()
        self._settings.close()
        if self._began:
            self._draw(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the compiler its setting back."""
        self._settings.close()

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._name}.csv"

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._open.close()
        self._others, self._own, self._hooks, self._recorded, self._loss = {}, {}, [], None, None
        self._before = {}

    def _record(self, trainer: Trainer, measured: Mapping[str, Divergence]) -> None:
        step, name = trainer.global_step, self._name
        metrics = {f"{name}/{c}/{norm}": v for c, d in measured.items() for norm, v in d.norms().items()}
        share = {f"{name}/share": self._spent / self._trained} if self._trained else {}
        log_step(trainer, metrics | {f"{name}/seconds": self._seconds} | share)
        if not trainer.is_global_zero:
            return
        rows: list[dict[str, Any]] = []
        for choice, d in measured.items():
            parts = {"": d, **(d.per_layer if self.per_layer else {})}
            at = {"step": step, "choice": choice, "reference": self._reference}
            rows += [{**at, "parameter": p, **e.norms(), "method": d.method} for p, e in parts.items()]
        append_rows(self._file, rows)


def _alike(trainer: Trainer) -> list[GradientDivergence]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined] # set in Trainer.__init__
    return [c for c in callbacks if isinstance(c, GradientDivergence)]


@contextmanager
def _keeping_graph(module: LightningModule, recorded: Recording) -> Iterator[None]:
    """Let the training backward keep of its graph what differences are carried through."""
    module.backward = recorded.backward  # type: ignore[method-assign] # of this instance
    try:
        yield
    finally:
        del module.backward


def loss_scale(trainer: Trainer) -> float:
    """Return the factor of the loss before its backward: fp16 scaling and gradient accumulation.

    Args:
        trainer: The trainer.

    Returns:
        The factor; to read a scaler's is to wait for its device.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return (scaler.get_scale() if scaler is not None else 1.0) / trainer.accumulate_grad_batches


def _coming_loss_scale(trainer: Trainer) -> Callable[[], float]:
    """Return a function that reads the loss scale without waiting, if it is called after a later transfer.

    The scale lies on the device: its copy to the host starts here.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = scale_of(scaler) if scaler is not None else 1.0
    copy = scale.to("cpu", non_blocking=True) if isinstance(scale, Tensor) else torch.tensor(scale)
    # `numpy` reads the host's memory and refuses a device's.
    return lambda: float(copy.numpy()) / trainer.accumulate_grad_batches


def _any_process(trainer: Trainer, decision: bool) -> bool:
    """Return whether a process decides so: then all do, for what they average has to be of one kind."""
    return trainer.strategy.reduce_boolean_decision(decision, all=False) if trainer.world_size > 1 else decision


def _agreed(trainer: Trainer, reason: str) -> str:
    """Return why all processes subtract gradients if one has to; empty if each carries differences."""
    one_cannot = _any_process(trainer, bool(reason))
    return reason or ("another process cannot propagate differences" if one_cannot else "")


def _means(trainer: Trainer, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Average gradients of this process over all processes; its own stay what they are.

    Those that are distributed are the averages already.
    """
    if trainer.world_size == 1:
        return gradients
    means = {}
    for name, g in gradients.items():
        if is_shard(g):
            means[name] = g
            continue
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        # A copy: Lightning averages in place.
        copy = torch.empty_like(g, dtype=dtype, memory_format=torch.contiguous_format).copy_(g)
        means[name] = trainer.strategy.reduce(copy, reduce_op="mean")
    return means


def _unscaled(d: Divergence, scale: float) -> Divergence:
    """A divergence of gradients that had not been multiplied by the loss scale."""
    layers = {name: _unscaled(layer, scale) for name, layer in d.per_layer.items()}
    return replace(d, l1=d.l1 / scale, l2=d.l2 / scale, linf=d.linf / scale, per_layer=layers)


class _Clock:
    """The time that work takes, on a CUDA device from when the work before it is done; it waits only to be read.

    Args:
        device: The device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._start = device, time.perf_counter()
        self._event = self._mark() if device.type == "cuda" else None

    def seconds(self) -> float:
        """The time since the clock was made."""
        if self._event is None:
            return time.perf_counter() - self._start
        end = self._mark()
        end.synchronize()
        return float(self._event.elapsed_time(end)) / 1000

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _unseen(loss: Tensor, module: LightningModule) -> str:
    """Return why differences cannot be carried through a loss's graph; empty if they can."""
    try:
        refuse_unseen(loss, dict(module.named_parameters()))
    except UnseenError as error:
        return error.cause
    return ""


def _strangers(recorded: Recording, loss: Tensor) -> str:
    """Return why a loss's backward does not record all differences; empty if it does."""
    try:
        recorded.refuse_strangers(loss)
    except UnseenError as error:
        return error.cause
    return ""


def checked_names(callback: str, key: str, choices: Choices, reserved: Collection[str] = ()) -> dict[str, Jacobians]:
    """Check that choices can be logged under their names.

    Args:
        callback: Class name of the callback, for errors.
        key: Pattern of the logged names, such as ``divergence/<choice>/<norm>``.
        choices: The choices by name, in any way they may be written.
        reserved: Names that it logs something else under.

    Returns:
        The choices.

    Raises:
        ValueError: If there is none, one is not admissible, or a name cannot be part of a metric's name.
    """
    if not choices:
        raise ValueError(f"{callback} takes at least one choice, such as {{'relu1': {{'relu': 1.0}}}}")
    read = named_choices(choices)
    bad = [name for name in read if not re.fullmatch(r"[\w.+-]+", name) or name in reserved]
    if bad:
        but = f", and not {' or '.join(sorted(reserved))}" if reserved else ""
        raise ValueError(
            f"a choice's name becomes part of {key}: letters, digits and _.+- only{but}; "
            f"given {', '.join(map(repr, bad))}"
        )
    return read


@contextmanager
def undisturbed(module: nn.Module, step: int) -> Iterator[None]:
    """Put random streams and buffers back after extra backward passes, which no recording sees.

    A checkpointed region runs its forward again in every backward, and the ``"random"`` choice draws in it.

    Args:
        module: The module trained, with its patched parts.
        step: The training step; the ``"random"`` choice draws other numbers inside the block than in training, and
            others at each step.
    """
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    own = selections(module).values()
    recorders = [selection.recorder for selection in own]
    with ExitStack() as streams:
        streams.enter_context(eagerly(module))
        streams.enter_context(torch.random.fork_rng(devices))
        for selection in own:
            streams.enter_context(selection.other_streams(selection.seed + 1 + step))
            selection.recorder = None
        _EXTRA.add(module)
        try:
            yield
        finally:
            _EXTRA.discard(module)
            for selection, recorder in zip(own, recorders, strict=True):
                selection.recorder = recorder
    # Whether they changed is not asked, for that waits for a device (and no version counter tells it: batch norm counts
    # none). `data`, for autograd may have saved them, whose values are the same again.
    for name, buffer in module.named_buffers():
        buffer.data.copy_(buffers[name])
