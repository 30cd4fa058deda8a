"""One experiment, one YAML file: the settings that vary, those that stay, and the published numbers to compare with."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from nslightning.experiments.cells import KINDS, Cell, TrainCell, settings
from nslightning.experiments.published import searched_learning_rate
from nslightning.spelling import did_you_mean

__all__ = ["SCALES", "Experiment", "Planned", "setting"]

#: From a check that everything runs, on the embedded data, to the published setting.
SCALES = ("smoke", "small", "paper")

_KEYS = ("kind", "title", "note", "figures", "fixed", "vary", "grids", "compare", "resources", "scales")
#: A file's keys on the computation; no cell's name depends on them.
_RESOURCES = ("gpus_per_cell", "ray", "submitit")


class Planned(NamedTuple):
    """A cell with its place in the grid.

    Args:
        id: Names its file; made from kind and settings, so that a grid may grow without losing what is finished.
        varied: The settings that vary in the grid, with its values.
        cell: All its settings.
    """

    id: str
    varied: dict[str, Any]
    cell: Cell


@dataclass(frozen=True)
class Experiment:
    """A grid of runs, read from YAML.

    Args:
        name: Name of the folder of results.
        kind: Kind of its cells: ``train``, ``twins`` or ``zones``.
        scale: One of :data:`SCALES`.
        title: One line.
        note: Remarks for the reader of the result.
        figures: The figures that are drawn from it.
        fixed: The settings that all cells share.
        grids: Each a mapping of settings to lists of values; the experiment is the union of their products, the first
            setting varying slowest. ``optimizer_options.beta`` is an entry of a setting that is a mapping, and
            ``{from: 0, count: 3}`` stands for 0, 1, 2.
        compare: The published numbers to compare with; see :mod:`nslightning.experiments.compare`.
        as_published: Every cell takes the released procedure, quirks included
            (:meth:`nslightning.experiments.Cell.as_published`).
        gpus_per_cell: Share of a GPU that a cell takes where it is computed on one.
        executor_options: Options of the executors, by executor.
    """

    name: str
    kind: str
    scale: str
    title: str = ""
    note: str = ""
    figures: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    grids: tuple[Mapping[str, Sequence[Any]], ...] = ({},)
    compare: tuple[Mapping[str, Any], ...] = ()
    as_published: bool = False
    gpus_per_cell: float | None = None
    executor_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        file: str | Path,
        scale: str = "small",
        overrides: Mapping[str, Any] | None = None,
        as_published: bool = False,
    ) -> Experiment:
        """Read an experiment at one scale.

        The file has ``kind``, ``fixed``, ``vary`` (one grid) or ``grids`` (several), ``compare``, and under ``scales``
        for each scale what is otherwise there: ``fixed`` is merged, ``vary`` replaces the values of single settings in
        every grid that has them (or adds them, where there is one grid), ``grids`` and ``compare`` replace all.
        ``resources`` says what a cell takes, ``{gpus_per_cell: 0.25}``, and has options of the executors,
        ``{submitit: {slurm_partition: gpu, timeout_min: 120}}``; the command line wins over it.

        Args:
            file: The YAML file.
            scale: One of :data:`SCALES`.
            overrides: Settings that win over the file's, in every cell. They become part of the name, so that the
                results have their own folder.
            as_published: Take the released procedure, quirks included; the results have their own folder.

        Returns:
            The experiment.

        Raises:
            ValueError: If the file is not an experiment, or has no such scale.
        """
        path = Path(file)
        try:
            content = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(content, dict) or "kind" not in content:
            raise ValueError(f"{path} is not an experiment: it names no kind. configs/experiments has examples")
        _check_keys(str(path), content, _KEYS)
        scales = content.get("scales") or {}
        if not isinstance(scales, dict):
            raise ValueError(f"{path}: scales is a mapping of {', '.join(SCALES)}; given {scales!r}")
        _check_keys(f"{path}: scales", scales, SCALES)
        if scale not in scales:
            raise ValueError(
                f"{path} has no scale {scale!r}{did_you_mean(scale, scales)} It has {', '.join(scales) or 'none'}"
            )
        change = scales[scale] or {}
        if not isinstance(change, dict):
            raise ValueError(f"{path}: scales.{scale} is a mapping of what is otherwise there; given {change!r}")
        _check_keys(f"{path}: scales.{scale}", change, ("fixed", "vary", "grids", "compare"))
        for part in (content, change):
            for name, kind in {"fixed": dict, "vary": dict, "grids": list}.items():
                if part.get(name) is not None and not isinstance(part[name], kind):
                    words = "a mapping of settings" if kind is dict else "a list of mappings"
                    raise ValueError(f"{path}: {name} is {words}; given {part[name]!r}")
        grids = content.get("grids") or [content.get("vary") or {}]
        if "grids" in change:
            grids = change["grids"]
        for name, values in (change.get("vary") or {}).items():
            having = [g for g in grids if name in g] or (grids if len(grids) == 1 else [])
            if not having:
                raise ValueError(f"{path}: scales.{scale}.vary.{name} is not in any of the grids")
            grids = [{**g, name: values} if g in having else g for g in grids]
        fixed = {**(content.get("fixed") or {}), **(change.get("fixed") or {}), **(overrides or {})}
        grids = [{k: _values(path, k, v) for k, v in g.items() if k not in (overrides or {})} for g in grids]
        resources = content.get("resources") or {}
        if not isinstance(resources, dict):
            raise ValueError(f"{path}: resources is a mapping of {', '.join(_RESOURCES)}; given {resources!r}")
        _check_keys(f"{path}: resources", resources, _RESOURCES)
        compare = change.get("compare", content.get("compare")) or []
        return cls(
            name=path.stem
            + "".join(f"+{k}={v}".replace("/", "-") for k, v in (overrides or {}).items())
            + "+as-published" * as_published,
            kind=content["kind"],
            scale=scale,
            title=content.get("title", ""),
            note=content.get("note", ""),
            figures=tuple(content.get("figures") or ()),
            fixed=fixed,
            grids=tuple(grids),
            compare=tuple(compare if isinstance(compare, list) else [compare]),
            as_published=as_published,
            gpus_per_cell=resources.get("gpus_per_cell"),
            executor_options={name: options for name, options in resources.items() if name != "gpus_per_cell"},
        )

    def cells(self, only: Mapping[str, Sequence[Any]] | None = None) -> list[Planned]:
        """Expand the grids.

        Args:
            only: Values to keep, by setting.

        Returns:
            Every cell once, in the order of the file.

        Raises:
            ValueError: If a setting is unknown, or ``only`` leaves nothing.
        """
        if not only:
            return list(self._planned)
        names = sorted(self._varying)
        planned = self._planned
        known = list(dict.fromkeys([*(f.name for f in dataclasses.fields(KINDS[self.kind])), *names]))
        unknown = [name for name in only if name not in known]
        if unknown:
            raise ValueError(
                f"--only {unknown[0]}: there is no such setting{did_you_mean(unknown[0], known)} "
                f"The grid varies {', '.join(names)}, and has {', '.join(k for k in known if k not in names)}"
            )
        kept = [p for p in planned if all(any(_same(setting(p.cell, n), v) for v in vs) for n, vs in only.items())]
        if not kept:
            asked = ", ".join(f"{n}={'|'.join(map(str, v))}" for n, v in only.items())
            have = "; ".join(f"{n}: {_listed(setting(p.cell, n) for p in planned)}" for n in only)
            raise ValueError(f"--only {asked} leaves no cell; the grid has {have}")
        return kept

    @property
    def _varying(self) -> set[str]:
        """The settings that vary in some grid."""
        return {name for grid in self.grids for name in grid}

    @cached_property
    def _planned(self) -> tuple[Planned, ...]:
        """Every cell once."""
        by_id: dict[str, Planned] = {}
        names = sorted(self._varying)
        for grid in self.grids:
            for values in itertools.product(*grid.values()):
                cell = settings(self.kind, _nested({**self.fixed, **dict(zip(grid, values, strict=True))}))
                cell = _with_learning_rate(cell.as_published() if self.as_published else cell)
                planned = Planned(_identifier(self.kind, cell), {name: setting(cell, name) for name in names}, cell)
                by_id.setdefault(planned.id, planned)
        return tuple(by_id.values())


def setting(cell: Cell, name: str) -> Any:
    """A setting of a cell; ``options.entry`` is an entry of a mapping, None where it has none.

    Args:
        cell: The cell.
        name: Name of the setting.

    Returns:
        Its value.
    """
    outer, dot, inner = name.partition(".")
    value = getattr(cell, outer)
    return value.get(inner) if dot else value


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the entries of mappings put into them."""
    plain = {name: value for name, value in settings.items() if "." not in name}
    for name, value in settings.items():
        outer, dot, inner = name.partition(".")
        if dot:
            plain[outer] = {**(plain.get(outer) or {}), inner: value}
    return plain


def _with_learning_rate(cell: Cell) -> Cell:
    if not isinstance(cell, TrainCell):
        return cell
    if cell.learning_rate == "searched":
        return dataclasses.replace(cell, learning_rate=searched_learning_rate(cell))
    return dataclasses.replace(cell, learning_rate=float(cell.learning_rate))


def _identifier(kind: str, cell: Cell) -> str:
    """Twelve hexadecimal digits of kind and settings that are not at their default: new settings keep old names."""
    settings = {
        f.name: getattr(cell, f.name)
        for f in dataclasses.fields(cell)
        if f.default is dataclasses.MISSING or getattr(cell, f.name) != f.default
    }
    text = json.dumps([kind, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _values(path: Path, name: str, values: Any) -> list[Any]:
    if isinstance(values, dict) and set(values) == {"from", "count"}:
        return list(range(values["from"], values["from"] + values["count"]))
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: {name} varies over a list of values, or {{from: 0, count: 3}}; given {values!r}")
    return values


def _same(value: Any, wanted: Any) -> bool:
    return (type(value) is type(wanted) and value == wanted) or str(value) == str(wanted) or _number(value, wanted)


def _number(value: Any, wanted: Any) -> bool:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (value, wanted))
    return numbers and float(value) == float(wanted)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def _check_keys(where: str, content: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Raise if a mapping of a file has a key that does not belong there."""
    for key in content:
        if key not in known:
            if "fixed" in known and any(key == f.name for kind in KINDS.values() for f in dataclasses.fields(kind)):
                hint = "; a setting stands under fixed, or under vary with a list of values."
            else:
                hint = did_you_mean(key, known)
            raise ValueError(f"{where} has the key {key!r}{hint} Allowed there: {', '.join(known)}")
