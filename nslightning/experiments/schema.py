"""The JSON schema of experiment files, made of the cells' own types."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from pydantic import Field, create_model

from nslightning.experiments.cells import KINDS
from nslightning.experiments.grid import SCALES

__all__ = ["experiment_schema"]

_RANGE = {
    "type": "object",
    "properties": {"from": {"type": "integer"}, "count": {"type": "integer", "minimum": 1}},
    "required": ["from", "count"],
    "additionalProperties": False,
}

_RESOURCES = {
    "type": "object",
    "description": "The resources of a cell, and options of the executors",
    "properties": {
        "gpus_per_cell": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "ray": {"type": "object"},
        "submitit": {"type": "object"},
    },
    "additionalProperties": False,
}


def experiment_schema() -> dict[str, Any]:
    """Make the schema.

    Returns:
        The schema as plain data, of draft 2020-12: an experiment of one of the kinds, with a description of each
        setting.

    Example:
        >>> sorted(experiment_schema()["$defs"])
        ['train', 'train_parts', 'twins', 'twins_parts', 'zones', 'zones_parts']
    """
    settings = {kind: _settings(cell) for kind, cell in KINDS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An experiment of nslightning: a grid of runs",
        "type": "object",
        "required": ["kind", "scales"],
        "properties": {"kind": {"enum": list(KINDS)}},
        "allOf": [{"if": {"properties": {"kind": {"const": kind}}}, "then": _file(kind)} for kind in settings],
        "$defs": {kind: {"properties": names} for kind, names in settings.items()}
        | {f"{kind}_parts": {"properties": _parts(kind, names)} for kind, names in settings.items()},
    }


def _settings(cell: type) -> dict[str, Any]:
    """The settings of a kind of cells, each with its type and the words of its docstring."""
    hints = get_type_hints(cell, include_extras=True)
    words = {name: text for kind in reversed(cell.__mro__) for name, text in _described(kind).items()}
    fields: dict[str, Any] = {name: (hint, Field(description=words.get(name))) for name, hint in hints.items()}
    made: dict[str, Any] = create_model(cell.__name__, **fields).model_json_schema()["properties"]
    for setting in made.values():
        setting.pop("title", None)
    return made


def _parts(kind: str, names: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of a file of one kind and of its scales."""
    setting = {name: {"$ref": f"#/$defs/{kind}/properties/{name}"} for name in names}
    # An entry of a setting that is a mapping is `options.entry`.
    entries: dict[str, Any] = {r"^\w+\.": {}}
    fixed = {"type": "object", "properties": setting, "patternProperties": entries, "additionalProperties": False}
    values = {
        name: {"anyOf": [{"type": "array", "items": one, "minItems": 1}, _RANGE]} for name, one in setting.items()
    }
    vary = {"type": "object", "properties": values, "patternProperties": {r"^\w+\.": {"type": ["array", "object"]}},
            "additionalProperties": False}  # fmt: skip
    grids = {"type": "array", "items": {"$ref": f"#/$defs/{kind}_parts/properties/vary"}, "minItems": 1}
    compare = {"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]}
    return {"fixed": fixed, "vary": vary, "grids": grids, "compare": compare}


def _file(kind: str) -> dict[str, Any]:
    """Return the entries of a file of one kind."""
    parts = {
        part: {"$ref": f"#/$defs/{kind}_parts/properties/{part}"} for part in ("fixed", "vary", "grids", "compare")
    }
    scale = {"type": ["object", "null"], "properties": parts, "additionalProperties": False}
    return {
        "properties": {
            "kind": {"const": kind},
            "title": {"type": "string"},
            "note": {"type": "string"},
            "figures": {"type": "array", "items": {"type": "string"}},
            **parts,
            "resources": _RESOURCES,
            "scales": {"type": "object", "properties": dict.fromkeys(SCALES, scale), "additionalProperties": False},
        },
        "additionalProperties": False,
    }


def _described(cell: type) -> dict[str, str]:
    """The arguments of a class, as its docstring describes them."""
    described: dict[str, str] = {}
    _, _, section = (inspect.getdoc(cell) or "").partition("\nArgs:\n")
    for line in section.splitlines():
        if not line.strip():
            break
        if not line.startswith("        "):
            name, _, text = line.strip().partition(": ")
            described[name] = text
        elif described:
            described[list(described)[-1]] += f" {line.strip()}"
    return described
