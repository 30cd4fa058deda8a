"""Reads a Jacobian choice as a person writes it in YAML, in Python or on a command line.

A choice is a :class:`~nslightning.Jacobians`, its fields as a mapping (``{"relu": 1}``), its fields in one word
(``relu=1,max_pool=minimal``), or the name of a preset (``jax``). Several choices are a mapping of names to choices, or
a list of words ``NAME:FIELD=VALUE[,FIELD=VALUE...]``, where a preset may stand under its own name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nslightning.jacobians import Jacobians, unknown_field
from nslightning.ops.record import OPERATIONS
from nslightning.spelling import short

__all__ = ["Choice", "Choices", "choice_label", "choice_word", "named_choice", "named_choices", "to_jacobians"]

#: One choice, in every way it may be written.
Choice = Jacobians | str | dict[str, Any]
#: Several choices by name, or as a list of words.
Choices = dict[str, Jacobians | str | dict[str, Any]] | list[str]


def to_jacobians(choice: Choice | Mapping[str, Any]) -> Jacobians:
    """Read one choice.

    Args:
        choice: A choice, its fields, or a word.

    Returns:
        The choice.

    Raises:
        ValueError: If a field or a preset is not known, or a value is not admissible.
        TypeError: If the choice is of a type that is not known.

    Example:
        >>> to_jacobians({"relu": 1}) == to_jacobians("relu=1") == Jacobians(relu=1.0)
        True
        >>> to_jacobians("jax") == Jacobians.preset("jax")
        True
    """
    if isinstance(choice, Jacobians):
        return choice
    if isinstance(choice, str):
        return _of_fields(_fields(choice)) if "=" in choice else Jacobians.preset(choice)
    if isinstance(choice, Mapping):
        return _of_fields(choice)
    raise TypeError(
        "a choice is a Jacobians, its fields as {'relu': 1.0} or 'relu=1,max_pool=minimal', or a preset such as 'jax'; "
        f"given {choice!r}"
    )


def named_choice(word: str) -> tuple[str, Jacobians]:
    """Read a choice and its name, as a command line writes them.

    Args:
        word: ``NAME:FIELD=VALUE[,FIELD=VALUE...]``, a value JSON or a word; ``NAME:PRESET``, or a preset under its own
            name.

    Returns:
        The name and the choice.

    Raises:
        ValueError: If it is not of that form, or the choice is not admissible.

    Example:
        >>> named_choice("mine:relu=0.5,relu6=[0,1],max_pool=minimal")
        ('mine', Jacobians(relu=0.5, relu6=(0.0, 1.0), max_pool='minimal'))
        >>> named_choice("pytorch")
        ('pytorch', Jacobians())
    """
    name, colon, rest = word.partition(":")
    if not name or (not colon and "=" in word):
        raise ValueError(f"choice {word!r}: write NAME:FIELD=VALUE[,FIELD=VALUE...], as relu1:relu=1")
    try:
        return name, to_jacobians(rest if colon else name)
    except ValueError as error:
        form = "" if "=" in rest else "; write NAME:FIELD=VALUE, as relu1:relu=1"
        raise ValueError(f"choice {word!r}: {error}{form}") from error


def named_choices(choices: Mapping[str, Any] | Sequence[str]) -> dict[str, Jacobians]:
    """Read several choices.

    Args:
        choices: Choices by name, or words as :func:`named_choice` takes them.

    Returns:
        The choices by name, in their order.

    Raises:
        ValueError: If one is not admissible, or two have one name.
        TypeError: If the choices are of a type that is not known.

    Example:
        >>> named_choices({"relu1": {"relu": 1}, "pytorch": "pytorch"})
        {'relu1': Jacobians(relu=1.0), 'pytorch': Jacobians()}
        >>> named_choices(["relu1:relu=1"])
        {'relu1': Jacobians(relu=1.0)}
    """
    if isinstance(choices, Mapping):
        read: dict[str, Jacobians] = {}
        for name, choice in choices.items():
            try:
                read[str(name)] = to_jacobians(choice)
            except (TypeError, ValueError) as error:
                raise type(error)(f"choice {name!r}: {error}") from error
        return read
    if not isinstance(choices, Sequence) or isinstance(choices, str) or not all(isinstance(c, str) for c in choices):
        raise TypeError(f"choices are a mapping of names to choices, or a list of NAME:FIELD=VALUE; given {choices!r}")
    pairs = [named_choice(word) for word in choices]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"two choices have one name: {' '.join(choices)}")
    return dict(pairs)


def choice_label(jacobians: Mapping[str, Any] | None) -> str:
    """Describe the changes of a Jacobian choice, in short.

    Args:
        jacobians: The choice as plain data; None where it is not known.

    Returns:
        Such as ``"relu=1, max_pool=minimal"``; ``"native"`` where it is stock PyTorch's choice.

    Example:
        >>> choice_label({"relu": 1.0, "relu6": [0.0, 0.0], "max_pool": "minimal", "rule": "exact"})
        'relu=1, max_pool=minimal'
        >>> choice_label(Jacobians().to_dict()), choice_label({"max_pool": "native"})
        ('native', 'native')
    """
    if jacobians is None:
        return "unknown"
    reference = Jacobians().to_dict()
    words = {field: choice_word(field, value) for field, value in jacobians.items() if value is not None}
    changed = [f"{k}={word}" for k, word in words.items() if k not in reference or word != choice_word(k, reference[k])]
    return ", ".join(changed) or "native"


def choice_word(field: str, value: Any) -> str:
    """One field of a choice as every output writes it (:meth:`nslightning.ops.Operation.written`).

    Args:
        field: An operation, also one that is not registered here, or ``rule``.
        value: Its value.

    Returns:
        The word.

    Example:
        >>> choice_word("max_pool", 0.0), choice_word("relu", 0.5), choice_word("of_another_package", [0.0, 1.0])
        ('native', '0.5', '[0, 1]')
    """
    if field in OPERATIONS:
        return OPERATIONS[field].written(value)
    return "native" if value is None else short(value)


def _fields(word: str) -> dict[str, Any]:
    """The fields of a word ``relu=1,max_pool=minimal``."""
    fields: dict[str, Any] = {}
    for part in re.split(r",(?=\w+=)", word):
        field, _, value = part.partition("=")
        if field in fields:
            raise ValueError(f"{field} is given twice")
        try:
            fields[field] = json.loads(value)
        except json.JSONDecodeError:
            fields[field] = value
    return fields


def _of_fields(fields: Mapping[str, Any]) -> Jacobians:
    if message := unknown_field(fields):
        raise ValueError(message)
    return Jacobians(**fields)
