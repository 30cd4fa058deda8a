"""The measured cost of a gradient as plain data; :mod:`nslightning.report.cost_table` makes tables of it."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nslightning.files import write_text

__all__ = ["STOCK", "ChoiceCost", "CostReport", "CostScaling", "ModuleCost", "Timing", "slope"]

STOCK = "stock"  # the unpatched model, among the names of the choices


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one computation, in milliseconds.

    Args:
        minimum: The fastest, the least disturbed by whatever else the machine did.
        lower: First quartile.
        median: Second quartile.
        upper: Third quartile.
        n: Number of measurements.
    """

    minimum: float
    lower: float
    median: float
    upper: float
    n: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summarise measurements.

        Args:
            samples: Milliseconds, at least one.

        Returns:
            Minimum and quartiles (linear interpolation between order statistics).

        Example:
            >>> Timing.of([3.0, 1.0, 2.0])
            Timing(minimum=1.0, lower=1.5, median=2.0, upper=2.5, n=3)
        """
        minimum, lower, median, upper = (float(q) for q in np.quantile(samples, (0, 0.25, 0.5, 0.75)))
        return cls(minimum, lower, median, upper, len(samples))


@dataclass(frozen=True)
class ChoiceCost:
    """The cost of the gradient under one Jacobian choice.

    Args:
        name: The choice's name; ``"stock"`` is the unpatched model.
        jacobians: The choice as plain values; None for the unpatched model.
        gradient: Time of forward and backward together.
        spread: Quartiles of the ratio to the forward of the same round.
        peak_bytes: Most memory in use at one moment of forward and backward; None where it was not measured.
        max_difference: ``max |g - g_stock|`` over all parameters, the same batch and random numbers; NaN when
            a gradient is.
    """

    name: str
    jacobians: dict[str, Any] | None
    gradient: Timing
    spread: tuple[float, float, float]
    peak_bytes: int | None
    max_difference: float


@dataclass(frozen=True)
class ModuleCost:
    """The cost of one module, called alone with the input that it had in the model.

    Args:
        name: Its qualified name.
        kind: Its class.
        choice: The choice's name; ``"stock"`` is the unpatched module.
        calls: Number of its calls in one forward of the model.
        forward: Time of one call without a graph.
        gradient: Time of one call and its backward, to its parameters and to those inputs that need a
            gradient.
    """

    name: str
    kind: str
    choice: str
    calls: int
    forward: Timing
    gradient: Timing

    @property
    def ratio(self) -> float:
        """The module's own overhead ratio, of minima."""
        return _over(self.gradient.minimum, self.forward.minimum)


@dataclass(frozen=True)
class CostReport:
    """The cheap-gradient report of one model, batch and list of choices.

    All ratios are to ``forward``, and of minima. Compare ratios of one machine only.

    Args:
        model: Name of the model.
        parameters: p, the number of trainable numbers.
        batch: The inputs' first dimension.
        dtype: Dtype of the parameters.
        training: Whether the model was in training mode.
        environment: Machine, clock and versions.
        forward: Time of the stock model's loss without a graph.
        recorded: The same, recording the graph.
        jvp: One Jacobian-vector product of the stock model in a random parameter direction; None where
            forward mode does not support the model.
        jvp_note: The reason why ``jvp`` is None.
        flops: The forward's operations as :mod:`torch.utils.flop_counter` counts them (matrix products and
            convolutions).
        flop_ratio: Operations of forward and backward over those of the forward; None where nothing is counted.
        peak_bytes: Most memory in use during the forward, parameters and batch included.
        memory_method: The way in which memory was measured.
        ties: Evaluations at a tie in this batch: where there are none, all choices are the stock operation.
        evaluations: All evaluations of patched operations.
        bound: The theoretical bound that the verdict compares with.
        choices: The stock model first, then one entry per choice.
        modules: Stock modules, and the patched ones again under each choice.
        unmeasured: Modules that could not be called alone, with the reason.
    """

    model: str
    parameters: int
    batch: int
    dtype: str
    training: bool
    environment: dict[str, Any]
    forward: Timing
    recorded: Timing
    jvp: Timing | None
    jvp_note: str
    flops: int
    flop_ratio: float | None
    peak_bytes: int | None
    memory_method: str
    ties: int
    evaluations: int
    bound: float
    choices: tuple[ChoiceCost, ...]
    modules: tuple[ModuleCost, ...] = ()
    unmeasured: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, choice: str) -> ChoiceCost:
        for entry in self.choices:
            if entry.name == choice:
                return entry
        raise KeyError(f"no choice {choice!r} in this report; it has {', '.join(c.name for c in self.choices)}")

    def ratio(self, choice: str = STOCK) -> float:
        """The overhead ratio omega_b.

        Args:
            choice: The choice's name.

        Returns:
            (time of forward and backward) / (time of the forward), of minima.
        """
        return _over(self[choice].gradient.minimum, self.forward.minimum)

    def memory_ratio(self, choice: str = STOCK) -> float | None:
        """Peak memory of forward and backward over that of the forward.

        Args:
            choice: The choice's name.

        Returns:
            The ratio, parameters and batch included in both; None where memory was not measured.
        """
        peak = self[choice].peak_bytes
        return None if peak is None or not self.peak_bytes else peak / self.peak_bytes

    @property
    def recorded_ratio(self) -> float:
        """Time of the forward that records its graph over that of the one that does not."""
        return _over(self.recorded.minimum, self.forward.minimum)

    @property
    def jvp_ratio(self) -> float | None:
        """Time of one Jacobian-vector product over that of the forward."""
        return None if self.jvp is None else _over(self.jvp.minimum, self.forward.minimum)

    @property
    def forward_mode_ratio(self) -> float | None:
        """An estimate for the whole gradient by forward mode: one Jacobian-vector product per parameter."""
        return None if self.jvp_ratio is None else self.parameters * self.jvp_ratio

    def holds(self, choice: str = STOCK) -> bool:
        """Return whether the overhead ratio is within the bound.

        Args:
            choice: The choice's name.

        Returns:
            ``ratio(choice) <= bound``.
        """
        return self.ratio(choice) <= self.bound

    def responsible(self, choice: str = STOCK) -> list[ModuleCost]:
        """The modules that take an overhead ratio over the bound.

        A module's excess is ``calls * (gradient - bound * forward)``: a view whose ratio is 20 and whose time
        is a microsecond is not to blame.

        Args:
            choice: The choice's name.

        Returns:
            The modules with at least a twentieth of the model's excess, the largest first; empty where the
            bound holds.
        """
        if self.holds(choice):
            return []
        modules = {m.name: m for m in self.modules if m.choice == STOCK}
        modules |= {m.name: m for m in self.modules if m.choice == choice}
        total = self[choice].gradient.minimum - self.bound * self.forward.minimum
        excess = {name: m.calls * (m.gradient.minimum - self.bound * m.forward.minimum) for name, m in modules.items()}
        names = sorted((name for name in modules if excess[name] >= total / 20), key=lambda name: -excess[name])
        return [modules[name] for name in names]

    def verdict(self, choice: str = STOCK) -> str:
        """Return whether the cheap gradient principle is seen to hold, in one line.

        Args:
            choice: The choice's name.

        Returns:
            The ratio and the bound; where it is exceeded, the modules responsible.
        """
        ratio = self.ratio(choice)
        if self.holds(choice):
            return f"{choice}: cheap gradient holds, {ratio:.2f} <= {self.bound:g}"
        modules = self.responsible(choice)
        named = ", ".join(
            f"{m.name} ({m.kind}, {m.ratio:.1f}{f', {m.calls} calls' * (m.calls > 1)})" for m in modules[:5]
        )
        more = f" and {len(modules) - 5} more" if len(modules) > 5 else ""
        if modules:
            why = f"responsible: {named}{more}"
        elif self.modules:
            why = (
                "no module exceeds it alone: what remains is operations called as functions, the loss, "
                "and the fixed cost of each operation, which a larger batch hides"
            )
        else:
            why = "measure with per_module=True to see which modules are responsible"
        return f"{choice}: exceeds the bound, {ratio:.2f} > {self.bound:g}; {why}"

    def rows(self) -> list[dict[str, Any]]:
        """The report as a tidy table.

        Returns:
            One flat row per choice; times in milliseconds, memory in bytes.
        """
        common = {
            "model": self.model,
            "parameters": self.parameters,
            "batch": self.batch,
            "dtype": self.dtype,
            "training": self.training,
            **self.environment,
            "forward_ms": self.forward.minimum,
            "recorded_ratio": self.recorded_ratio,
            "jvp_ratio": self.jvp_ratio,
            "forward_mode_ratio": self.forward_mode_ratio,
            "flop_ratio": self.flop_ratio,
            "ties": self.ties,
        }
        return [
            common
            | {
                "choice": c.name,
                "gradient_ms": c.gradient.minimum,
                "ratio": self.ratio(c.name),
                "ratio_lower": c.spread[0],
                "ratio_median": c.spread[1],
                "ratio_upper": c.spread[2],
                "n": c.gradient.n,
                "memory_ratio": self.memory_ratio(c.name),
                "max_difference": c.max_difference,
                "holds": self.holds(c.name),
            }
            for c in self.choices
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, the derived figures under ``"summary"``.

        Returns:
            JSON-ready values; :meth:`from_dict` gives the report back.
        """
        verdicts = {c.name: self.verdict(c.name) for c in self.choices}
        return asdict(self) | {"summary": self.rows(), "verdicts": verdicts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostReport:
        """A report from its plain data.

        Args:
            data: A dict that :meth:`to_dict` returned, also after a way through JSON.

        Returns:
            The report.
        """
        values = {name: data[name] for name in cls.__dataclass_fields__}
        values["forward"], values["recorded"] = Timing(**data["forward"]), Timing(**data["recorded"])
        values["jvp"] = None if data["jvp"] is None else Timing(**data["jvp"])
        values.pop("grouped", None)  # of reports written when grouped convolutions were miscounted
        values["choices"] = tuple(_choice(c) for c in data["choices"])
        values["modules"] = tuple(
            ModuleCost(**m | {"forward": Timing(**m["forward"]), "gradient": Timing(**m["gradient"])})
            for m in data["modules"]
        )
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, or as CSV with one row per choice.

        Args:
            path: A file ending in ``.json`` or ``.csv``; its folder is created.

        Returns:
            The path written.

        Raises:
            ValueError: If the ending is another one.
        """
        return _save(path, self.to_dict(), self.rows())

    @classmethod
    def load(cls, path: str | Path) -> CostReport:
        """Read a report.

        Args:
            path: A JSON file that :meth:`save` wrote.

        Returns:
            The report.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        """The verdicts, a line for each choice."""
        return "\n".join(self.verdict(c.name) for c in self.choices)


@dataclass(frozen=True)
class CostScaling:
    """The cost of one family of models at growing widths.

    Args:
        widths: The widths.
        reports: One report per width.
    """

    widths: tuple[int, ...]
    reports: tuple[CostReport, ...]

    def slopes(self) -> dict[str, float]:
        """The growth of the ratios with the number of parameters p.

        Returns:
            Least-squares slopes in log-log scale: for each choice that of ``B/F`` (theory: 0), and under
            ``"forward mode"`` that of ``p J/F`` (theory: 1) where the JVP was measured.

        Raises:
            ValueError: If there are fewer than two numbers of parameters.
        """
        p = [r.parameters for r in self.reports]
        slopes = {c.name: slope(p, [r.ratio(c.name) for r in self.reports]) for c in self.reports[0].choices}
        forward = [r.forward_mode_ratio for r in self.reports]
        if all(value is not None for value in forward):
            slopes["forward mode"] = slope(p, [value for value in forward if value is not None])
        return slopes

    def rows(self) -> list[dict[str, Any]]:
        """All reports as one tidy table.

        Returns:
            One flat row per width and choice.
        """
        return [{"width": w} | row for w, r in zip(self.widths, self.reports, strict=True) for row in r.rows()]

    def to_dict(self) -> dict[str, Any]:
        """The scaling as plain data.

        Returns:
            JSON-ready values; :meth:`from_dict` gives the scaling back.
        """
        return {
            "widths": list(self.widths),
            "slopes": self.slopes(),
            "reports": [r.to_dict() for r in self.reports],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostScaling:
        """A scaling from its plain data.

        Args:
            data: A dict that :meth:`to_dict` returned, also after a way through JSON.

        Returns:
            The scaling.
        """
        return cls(tuple(data["widths"]), tuple(CostReport.from_dict(r) for r in data["reports"]))

    def save(self, path: str | Path) -> Path:
        """Write the scaling as JSON, or as CSV with one row per width and choice.

        Args:
            path: A file ending in ``.json`` or ``.csv``; its folder is created.

        Returns:
            The path written.

        Raises:
            ValueError: If the ending is another one.
        """
        return _save(path, self.to_dict(), self.rows())

    @classmethod
    def load(cls, path: str | Path) -> CostScaling:
        """Read a scaling.

        Args:
            path: A JSON file that :meth:`save` wrote.

        Returns:
            The scaling.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def __str__(self) -> str:
        """The slopes, a line for each choice."""
        return "\n".join(f"{name}: slope {value:+.2f}" for name, value in self.slopes().items())


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of log y against log x.

    Args:
        x: Positive numbers, at least two distinct ones.
        y: Positive numbers, one for each x.

    Returns:
        The exponent of the power law that fits best.

    Raises:
        ValueError: If there are fewer than two distinct x, or a number is not positive.

    Example:
        >>> round(slope([1, 10, 100], [2, 20, 200]), 12)
        1.0
    """
    if len(set(x)) < 2:
        raise ValueError(f"a slope needs models of at least two sizes; given sizes {sorted(set(x))}")
    if min(*x, *y) <= 0:
        raise ValueError("a slope in log-log scale needs positive numbers")
    u, v = np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float))
    u -= u.mean()
    return float(u @ v / (u @ u))


def _over(a: float, b: float) -> float:
    return a / b if b else math.inf


def _choice(data: Mapping[str, Any]) -> ChoiceCost:
    jacobians = data["jacobians"]
    if jacobians is not None and jacobians["relu6"] is not None:
        jacobians = jacobians | {"relu6": tuple(jacobians["relu6"])}
    difference = math.nan if data["max_difference"] is None else data["max_difference"]
    known = {
        "jacobians": jacobians,
        "gradient": Timing(**data["gradient"]),
        "spread": tuple(data["spread"]),
        "max_difference": difference,
    }
    return ChoiceCost(**{**data, **known})


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save(path: str | Path, data: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    path = Path(path)
    if path.suffix == ".json":
        text = json.dumps(_finite(data), indent=1, allow_nan=False) + "\n"
    elif path.suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    else:
        raise ValueError(f"a cost report is saved as .json or .csv; given {path.name!r}")
    write_text(path, text)
    return path
