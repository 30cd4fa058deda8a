"""The cells of an experiment: the settings of each kind of cell, and its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from nslightning.arithmetic import Arithmetic
from nslightning.experiments.optimizers import check_optimizer
from nslightning.jacobians import Jacobians, Rule, ShareName
from nslightning.spelling import did_you_mean

__all__ = ["KINDS", "Cell", "Outcome", "TrainCell", "TwinCell", "ZoneCell", "settings"]

Row = dict[str, Any]

#: A setting that counts something.
Count = Annotated[int, Field(ge=1)]

#: Data modules that hold images out for validation by default.
_WITH_HOLDOUT = ("MNIST", "FashionMNIST", "CIFAR10", "CIFAR100", "SVHN", "Food101")


class Outcome(NamedTuple):
    """The results of a cell.

    Args:
        rows: Each ``{"metric": name, "value": number}`` with what it is indexed by, such as ``"epoch"`` or ``"theta"``.
        provenance: Facts besides the settings that the numbers depend on: data variant, device, dtype, patch
            fingerprint.
    """

    rows: list[Row]
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The settings that all kinds of cells share: a network under a choice, and images.

    Args:
        backbone: As for ``nslightning fit``, such as ``paper/lenet5``.
        backbone_options: More of its options, such as ``{stem_pool: 2x2}`` or ``{norm_in_blocks: true}``.
        batch_norm: With batch normalisation; None where the backbone has no such option.
        width: Neurons of each hidden layer of ``paper/fc``.
        depth: Hidden layers of ``paper/fc``.
        dropout: Probability of the dropout of ``paper/fc``.
        pool: ``norm`` replaces every max pooling by the Euclidean norm of its window (paper B's NormPool); the choice
            at windows of zeros is ``norm`` in :class:`~nslightning.Jacobians`.
        relu: ReLU'(0).
        max_pool: How max pooling shares its gradient over ties: a number beta, or a name.
        rule: ``exact``, or ``published``: the released code's arithmetic.
        precision: 16: all in half. 24: fp16 autocast over float32 weights. 32. 64: all in double.
        arithmetic: How sums are ordered and rounded, and PyTorch's switches, such as ``bias_last`` or ``tf32``
            (:class:`nslightning.arithmetic.Arithmetic`). 16 bits on a CPU have float32 sums besides.
        data: A data set of :mod:`nslightning.data`.
        data_options: Its arguments.
        train_images: Number of training images that are used, from the first on; None for all.
        normalise: False leaves pixels in [0, 1], as paper A's notebooks did.
        augment: Crop and flip where the data set has it.
        batch_size: Images per batch.
        seed: Seed of the weights, of the order and of the augmentation.
    """

    backbone: str
    backbone_options: dict[str, Any] = field(default_factory=dict)
    batch_norm: bool | None = None
    width: Count | None = None
    depth: Count | None = None
    dropout: float | None = None
    pool: Literal["max", "norm"] = "max"
    relu: float | Literal["random"] = 0.0
    max_pool: float | ShareName = 0.0
    rule: Rule = "exact"
    precision: Literal[16, 24, 32, 64] = 32
    arithmetic: str = "native"
    data: str = "MNIST"
    data_options: dict[str, Any] = field(default_factory=dict)
    train_images: Count | None = None
    normalise: bool = True
    augment: bool = True
    batch_size: Count = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in (16, 24, 32, 64):
            raise ValueError(f"precision={self.precision} is not one of 16, 24, 32, 64 bits")
        if self.pool not in ("max", "norm"):
            raise ValueError(f"pool={self.pool!r} is not one of max, norm")
        if (self.width is None) != (self.depth is None):
            raise ValueError("width and depth come together: the hidden layers of paper/fc")
        self.jacobians  # noqa: B018 # refuses what is no choice
        self.computed  # noqa: B018 # refuses what is no arithmetic

    @property
    def computed(self) -> Arithmetic:
        """The arithmetic."""
        return Arithmetic.parse(self.arithmetic)

    def as_published(self) -> Self:
        """Return the settings with everything that the released code did otherwise.

        Returns:
            Under the published rule, without images held out: nothing is selected on other images than the test's.
        """
        options = self.data_options | ({"holdout": 0} if self.data in _WITH_HOLDOUT else {})
        return dataclasses.replace(self, rule="published", data_options=options)

    @property
    def jacobians(self) -> Jacobians:
        """The choice."""
        return Jacobians(relu=self.relu, max_pool=self.max_pool, rule=self.rule)

    @property
    def options(self) -> dict[str, Any]:
        """The backbone's options."""
        options = dict(self.backbone_options)
        for name in ("batch_norm", "dropout"):
            if getattr(self, name) is not None:
                options[name] = getattr(self, name)
        if self.width is not None and self.depth is not None:
            options["hidden"] = [self.width] * self.depth
        return options


@dataclass(frozen=True, kw_only=True)
class TrainCell(Cell):
    """A training run.

    The defaults are what one should do; what the published scripts did differently is an option, off by default.

    Args:
        epochs: Passes over the training images.
        optimizer: ``sgd`` (with momentum and weight decay) or ``adam`` (PyTorch's defaults, no decay), as the papers;
            or any by name: of torch.optim, such as ``AdamW``; ``INNA`` or ``INNAprop``; of timm, such as ``timm/lion``;
            or a class by its path.
        optimizer_options: Its arguments besides the learning rate, such as ``{alpha: 0.1, beta: 0.9}``.
        momentum: Momentum of ``sgd``.
        learning_rate: The first one; or ``searched``: the one that the paper's search found (published/).
        paper: Whose search.
        shared_lr: Published quirk (B): every value of the choice takes the rate found for 0. Off: each its own.
        weight_decay: Weight decay of ``sgd``.
        schedule: ``cosine`` to zero at the end, by epoch; or ``constant``.
        schedule_epochs: The epochs after which ``cosine`` is at zero; None is ``epochs``.
        eval_batch_size: Images per test batch.
        init: The initialisation; None is the backbone's own.
        shuffle: False keeps the images in their order, as paper A's zero counts did.
        half_loss: Published quirk (16 bits): cross-entropy in half as well. Off: from float32 logits.
        eval_float32: Published quirk (24 bits): the test runs without autocast. Off: as the training.
        shared_scaler: Published quirk (24 bits): one loss scaler for all runs of a process, in the order they come;
            after one diverged run its scale may be 0. Off: each run has its own.
        count_zeros: Count the exact zeros at ReLU inputs, per epoch.
    """

    epochs: Count = 10
    optimizer: str = "sgd"
    optimizer_options: dict[str, Any] | None = None
    learning_rate: float | Literal["searched"] = 0.01
    paper: Literal["A", "B"] = "B"
    shared_lr: bool = False
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    schedule_epochs: Count | None = None
    eval_batch_size: Count = 500
    init: str | None = None
    shuffle: bool = True
    half_loss: bool = False
    eval_float32: bool = False
    shared_scaler: bool = False
    count_zeros: bool = False

    def as_published(self) -> Self:
        """Return the settings with everything that the released code did otherwise.

        Returns:
            Besides: the loss in half precision (16 bits), evaluation in float32 and one loss scaler for all runs (24
            bits), and paper B's rate of beta = 0 for every beta.
        """
        quirks: dict[str, Any] = {"half_loss": True, "eval_float32": True, "shared_scaler": True}
        if self.paper == "B":
            quirks["shared_lr"] = True
        return dataclasses.replace(super().as_published(), **quirks)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule={self.schedule!r} is not one of cosine, constant")
        if self.optimizer in ("sgd", "adam") and self.optimizer_options:
            raise ValueError(
                f"optimizer={self.optimizer} has the papers' settings; with optimizer_options name the class: "
                f"optimizer: {'SGD' if self.optimizer == 'sgd' else 'Adam'}"
            )
        check_optimizer(self.optimizer)


@dataclass(frozen=True, kw_only=True)
class TwinCell(TrainCell):
    """Networks that train in lockstep.

    Args:
        choices: The fields in which each twin's choice differs from the cell's, by the twin's name, such as
            ``{"0": {}, "10": {max_pool: 10}}``; the distances are to the first.
        control: Train the first choice twice; the second is called ``control``.
        steps: Measure before each of this number of steps, not before each epoch.
    """

    choices: dict[str, dict[str, Any]]
    control: bool = True
    steps: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.choices) + self.control < 2:
            raise ValueError("twins are two at least: give more choices, or control: true")
        for choice in self.choices.values():
            dataclasses.replace(self.jacobians, **choice)


@dataclass(frozen=True, kw_only=True)
class ZoneCell(Cell):
    """Monte Carlo over parameters: on which mini-batches do the gradients of two choices differ?

    Args:
        against: The fields in which the second choice differs from the cell's, such as ``{relu: 1}``.
        thetas: Number of parameter vectors, drawn one after another.
        init: How.
        batches: Mini-batches per parameter vector; None goes through all training images.
        shuffle: Whether each parameter vector meets the images in its own order (and augmentation).
        norm: ``bitwise_first_layer``: whether any bit of the first layer's weight gradient differs (paper A);
            ``linf_sum``, ``l1_sum``: the Linf or L1 norms of the difference, summed over the parameter tensors
            (paper B). ``zone``: whether any bit of any gradient differs, and mini-batches by their zone
            (:func:`nslightning.probes.zone`), which needs no threshold.
        tau: A mini-batch counts where the norm is above.
        stop_at_first: Stop a parameter vector at its first mini-batch that counts, as paper A did.
        histogram: Report the norms by decade.
        nan_differs: Published quirk (A): a mini-batch whose gradients are NaN under both choices counts. Off: it is
            counted apart.
        estimator: ``sampling`` draws biases and looks whether gradients differ; ``exact`` counts, given the weights,
            the biases that put some ReLU input at 0 (:mod:`nslightning.experiments.exact`).
    """

    against: dict[str, Any]
    thetas: Count = 1
    init: str = "torch"
    batches: Count | None = None
    shuffle: bool = True
    norm: Literal["bitwise_first_layer", "linf_sum", "l1_sum", "zone"] = "bitwise_first_layer"
    tau: float = 0.0
    stop_at_first: bool = False
    histogram: bool = False
    nan_differs: bool = False
    estimator: Literal["sampling", "exact"] = "sampling"

    def as_published(self) -> Self:
        """Return the settings with everything that the released code did otherwise.

        Returns:
            Besides: gradients that are NaN under both choices count as different where bits are compared (paper A).

        Raises:
            ValueError: For zones over the reals, which no paper measured.
        """
        return dataclasses.replace(super().as_published(), nan_differs=self.norm == "bitwise_first_layer")

    def __post_init__(self) -> None:
        super().__post_init__()
        norms = ("bitwise_first_layer", "linf_sum", "l1_sum", "zone")
        if self.norm not in norms:
            raise ValueError(f"norm={self.norm!r} is not one of {', '.join(norms)}")
        if self.precision == 24:
            raise ValueError("zones are measured at 16, 32 or 64 bits: 24 is a training precision")
        if self.norm == "zone" and (self.rule == "published" or self.histogram):
            raise ValueError("zones over the reals are of the exact rule's choices, and have no norm for a histogram")
        self.alternative  # noqa: B018 # refuses what is no choice
        if self.estimator == "exact":
            from nslightning.experiments.exact import refuse_inexact

            refuse_inexact(self)

    @property
    def alternative(self) -> Jacobians:
        """The second choice."""
        return dataclasses.replace(self.jacobians, **self.against)


#: The kinds of cells, by their settings; :mod:`~nslightning.experiments.computing` computes them.
KINDS: dict[str, type[Cell]] = {"train": TrainCell, "twins": TwinCell, "zones": ZoneCell}


def settings(kind: str, values: Mapping[str, Any]) -> Cell:
    """The settings of one cell, checked.

    Args:
        kind: A key of :data:`KINDS`.
        values: The settings by name.

    Returns:
        The cell.

    Raises:
        ValueError: If the kind, a name or a value is not known.

    Example:
        >>> settings("train", {"backbone": "paper/lenet5", "max_pool": 10}).jacobians
        Jacobians(max_pool=10.0)
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known{did_you_mean(kind, KINDS)} There are: {', '.join(KINDS)}")
    types = _types(kind)
    for name in values:
        if name not in types:
            raise ValueError(
                f"a {kind} cell has no setting {name!r}{did_you_mean(name, types)} It has: {', '.join(types)}"
            )
    read = {name: _read(name, value, types[name]) for name, value in values.items()}
    try:
        return KINDS[kind](**read)
    except TypeError as error:  # a setting without a default is missing
        raise ValueError(f"a {kind} cell: {error}") from error


class _Setting(NamedTuple):
    """The type of a setting, and what checks a value against it."""

    allowed: Any
    checked: TypeAdapter[Any]


@cache  # a check takes a millisecond to make, and a grid may have ten thousand cells
def _types(kind: str) -> dict[str, _Setting]:
    hints = get_type_hints(KINDS[kind], include_extras=True)
    return {f.name: _Setting(hints[f.name], TypeAdapter(hints[f.name])) for f in dataclasses.fields(KINDS[kind])}


def _read(name: str, value: Any, setting: _Setting) -> Any:
    """A value of a setting's type; a number that YAML takes for a word, such as 1e-3, as a number."""
    allowed, checked = setting
    try:
        checked.validate_python(value, strict=True)
        return value  # as it was written: a cell's name is made of it
    except ValidationError as error:
        wrong = error.errors()
    if isinstance(value, str):
        with suppress(ValueError):  # pydantic's own is one
            return checked.validate_python(float(value), strict=True)
    if below := next((e["ctx"]["ge"] for e in wrong if e["type"] == "greater_than_equal"), None):
        raise ValueError(f"{name}={value}: at least {below} is needed")
    expected = dict.fromkeys(_EXPECTED.get(e["type"]) or f"one of {_names(allowed)}" for e in wrong)
    if type(None) in get_args(allowed):
        expected["null"] = None
    hint = did_you_mean(value, _names(allowed).split(", "), otherwise="")
    raise ValueError(f"{name}={value!r} is not {' or '.join(expected)}{hint}")


#: pydantic's kinds of errors, in words; what is left is a name that is none of several.
_EXPECTED = {
    "float_type": "a number",
    "int_type": "an integer",
    "bool_type": "true or false",
    "string_type": "a name",
    "dict_type": "a mapping",
}


def _names(allowed: Any) -> str:
    """The names, or numbers, that a setting may be."""
    options = get_args(allowed)
    if get_origin(allowed) is Literal:
        return ", ".join(map(str, options))
    return ", ".join(filter(None, map(_names, options)))
