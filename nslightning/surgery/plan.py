"""Decides which Jacobian each site takes: rules by operation, module, name, stage and call."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from nslightning.choices import named_choices, to_jacobians
from nslightning.jacobians import Jacobians
from nslightning.ops.record import OPERATIONS
from nslightning.spelling import did_you_mean

__all__ = [
    "AnyChoice",
    "One",
    "Plan",
    "Rule",
    "Selector",
    "matches",
    "selectors",
    "text",
    "to_choice",
    "to_choices",
]


Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Iterable[Selector]"
One: TypeAlias = "str | re.Pattern[str] | type[nn.Module]"
#: A choice in every way it may be written: for each site, for all, its fields, a word, or a preset's name.
AnyChoice: TypeAlias = "Plan | Jacobians | str | Mapping[str, Any]"

_WHERE = ("operation", "module", "name", "stage", "call")


@dataclass(frozen=True)
class Rule:
    """A Jacobian choice for the sites that match all the matchers; a rule without matchers is for all sites.

    Each of ``operation``, ``module``, ``name`` and ``stage`` may be a list, of which one has to match. There is no
    matcher for training and evaluation mode: the backward reads the choice, and ``using(model, ...)`` sets another
    choice for some backwards.

    Args:
        jacobians: A mapping such as ``{"relu": 0.5}`` decides on these operations only; a whole
            :class:`~nslightning.Jacobians` decides on all.
        operation: Fields of :class:`~nslightning.Jacobians`, such as ``"relu"``.
        module: Classes, or their names (``"ReLU"``, ``"torchvision.ops.misc.ConvNormActivation"``), subclasses
            included. A functional call is one of the module that makes it.
        name: Globs over the qualified names of modules (``"layer1.*"``; the star also takes dots), or regular
            expressions to be found in them, compiled or between slashes (``"/^layer[12]/"``).
        stage: A module by its name, with all that is inside it: ``"layer1"``, ``"blocks.3"``; a star for any part of a
            name between dots (``"*.downsample"``), two numbers for the range from one to the other
            (``"features.0-10"``, ``"layer1-2"``).
        call: Evaluations of the operation by one module, counted from 0 in each forward: a number, or a range
            as in Python (``"1:3"``, ``"2:"``, ``range(1, 3)``).

    Raises:
        ValueError: If an operation or a field is unknown, or a range is malformed.
        TypeError: If an argument has another type.

    Example:
        >>> Rule({"relu": 0.5}, stage="layer1", operation="relu")
        Rule({'relu': 0.5}, operation='relu', stage='layer1')
        >>> Rule({"relu": 0.5}, stage="layer1-2").matches(["layer2.0.act"], nn.ReLU())
        True
    """

    jacobians: Jacobians | Mapping[str, Any]
    operation: Any = None
    module: Any = None
    name: Any = None
    stage: Any = None
    call: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.jacobians, Mapping):
            for field in self.jacobians:
                _known("Jacobian", field, (*OPERATIONS, "rule"))
            whole = Jacobians(**self.jacobians)
            object.__setattr__(self, "jacobians", {field: getattr(whole, field) for field in self.jacobians})
        elif not isinstance(self.jacobians, Jacobians):
            raise TypeError(f"a rule takes Jacobians or a mapping such as {{'relu': 0.5}}; given {self.jacobians!r}")
        for matcher in ("operation", "stage"):
            value = getattr(self, matcher)
            several = () if value is None else (value,) if isinstance(value, str) else value
            several = tuple(several) if isinstance(several, Iterable) else (several,)
            if not all(isinstance(one, str) for one in several):
                raise TypeError(f"{matcher} takes a name or several; given {value!r}")
            object.__setattr__(self, matcher, several)
        for operation in self.operation:
            _known("operation", operation, tuple(OPERATIONS))
        object.__setattr__(self, "module", tuple(map(_class, selectors("module", self.module))))
        object.__setattr__(self, "name", selectors("name", self.name))
        object.__setattr__(self, "call", _range(self.call))

    @property
    def unconditional(self) -> bool:
        """Return whether this rule decides for every site."""
        return not any(getattr(self, matcher) for matcher in _WHERE)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that this rule decides on, with their values."""
        return dict(self.jacobians) if isinstance(self.jacobians, Mapping) else self.jacobians.to_dict()

    def matches(self, names: Sequence[str], module: nn.Module) -> bool:
        """Return whether this rule selects calls of a module.

        Args:
            names: The module's qualified names.
            module: The module.

        Returns:
            True if class, name and stage match.
        """
        if self.module and not any(_is(module, one) for one in self.module):
            return False
        if self.name and not any(matches(one, names, module) for one in self.name):
            return False
        return not self.stage or any(_in_stage(name, stage) for name in names for stage in self.stage)

    def covers(self, operation: str, call: int) -> bool:
        """Return whether it is for a call of an operation, of a module that it matches.

        Args:
            operation: The field of :class:`~nslightning.Jacobians`.
            call: The number of the call.

        Returns:
            Whether operation and call match.
        """
        if self.operation and operation not in self.operation:
            return False
        if self.call is None:
            return True
        first, end = self.call
        return first <= call and (end is None or call < end)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Rule:
        """A rule from a mapping of a config, which has matchers and choices side by side.

        Args:
            mapping: Such as ``{"stage": "layer1", "relu": 0.5}``.

        Returns:
            The rule.

        Raises:
            ValueError: If a key is neither a matcher nor a field of :class:`~nslightning.Jacobians`, or if
                there is no field.

        Example:
            >>> Rule.from_dict({"name": "/act$/", "relu": 0.5})
            Rule({'relu': 0.5}, name='/act$/')
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(f"a rule is a mapping such as {{stage: layer1, relu: 0.5}}; given {mapping!r}")
        for key in mapping:
            _known("key of a rule", key, (*_WHERE, *OPERATIONS, "rule"))
        choice = {key: value for key, value in mapping.items() if key not in _WHERE}
        if not choice:
            raise ValueError(f"the rule {dict(mapping)} decides nothing: add a choice, such as relu: 0.5")
        return cls(choice, **{key: value for key, value in mapping.items() if key in _WHERE})

    def to_dict(self) -> dict[str, Any]:
        """The rule as plain data.

        Returns:
            JSON-ready values, of which :meth:`from_dict` makes the rule again.
        """
        data: dict[str, Any] = {}
        for matcher in _WHERE[:-1]:
            if several := [text(one, path=True) for one in getattr(self, matcher)]:
                data[matcher] = several[0] if len(several) == 1 else several
        if self.call is not None:
            first, end = self.call
            data["call"] = first if end == first + 1 else f"{first}:{'' if end is None else end}"
        return data | {k: list(v) if isinstance(v, tuple) else v for k, v in self.changes.items()}

    @property
    def where(self) -> str:
        """Its matchers as text for a table."""
        return ", ".join(f"{k}={v!r}" for k, v in self.to_dict().items() if k in _WHERE) or "everywhere"

    def __repr__(self) -> str:
        where = "" if self.unconditional else f", {self.where}"
        return f"Rule({self.jacobians!r}{where})"


@dataclass(frozen=True, init=False)
class Plan:
    """One Jacobian choice for every site of a model: rules, of which later ones win.

    Args:
        rules: Rules; also plain :class:`~nslightning.Jacobians`, which are for all sites, and mappings as in a
            config (:meth:`Rule.from_dict`). A field that no rule decides takes the reference choice.

    Example:
        >>> plan = Plan([Jacobians(relu=1.0), Rule({"relu": 0.5}, stage="layer1"), {"stage": "layer1.0", "relu": 0}])
        >>> plan.choice(plan.matching(["layer1.1.act"], nn.ReLU())).relu
        0.5
        >>> print(plan.explain((0, 1, 2), "relu"))
        rule 2 (stage='layer1.0') over rule 1 (0.5), the choice for all sites (1.0)
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: Iterable[Rule | Jacobians | Mapping[str, Any]]) -> None:
        made = (
            rule if isinstance(rule, Rule) else Rule(rule) if isinstance(rule, Jacobians) else Rule.from_dict(rule)
            for rule in rules
        )
        object.__setattr__(self, "rules", tuple(made))

    @classmethod
    def of(cls, choice: AnyChoice) -> Plan:
        """A choice as a plan.

        Args:
            choice: A plan, or the choice for all sites, as :func:`to_choice` reads it.

        Returns:
            The plan.

        Raises:
            TypeError: If the choice is of a type that is not known.
            ValueError: If a field, a preset or a value is not admissible.
        """
        read = to_choice(choice)
        return read if isinstance(read, Plan) else cls([read])

    @property
    def base(self) -> Jacobians:
        """The choice of the rules that are for all sites."""
        return self.choice([i for i, rule in enumerate(self.rules) if rule.unconditional])

    @property
    def sites(self) -> list[Rule]:
        """The rules that are for some sites only."""
        return [rule for rule in self.rules if not rule.unconditional]

    @property
    def calls(self) -> list[int]:
        """The numbers of calls from which on another choice may hold."""
        ends = (end for rule in self.rules if rule.call is not None for end in rule.call if end is not None)
        return sorted({0, *ends})

    def matching(self, names: Sequence[str], module: nn.Module) -> tuple[int, ...]:
        """The rules that are for some calls of a module.

        Args:
            names: The module's qualified names.
            module: The module.

        Returns:
            Their indices.
        """
        return tuple(i for i, rule in enumerate(self.rules) if rule.matches(names, module))

    def covering(self, matching: Sequence[int], operation: str, call: int) -> tuple[int, ...]:
        """The rules that are for one call of a module.

        Args:
            matching: The rules that are for some calls of it.
            operation: The field of :class:`~nslightning.Jacobians`.
            call: The number of the call.

        Returns:
            Their indices.
        """
        return tuple(i for i in matching if self.rules[i].covers(operation, call))

    def choice(self, rules: Iterable[int]) -> Jacobians:
        """The choice of several rules together.

        Args:
            rules: Their indices.

        Returns:
            The choice; for each field the last rule that decides on it wins.
        """
        chosen = Jacobians()
        for i in rules:
            chosen = dataclasses.replace(chosen, **self.rules[i].changes)
        return chosen

    def explain(self, rules: Sequence[int], operation: str) -> str:
        """The rule that decides on an operation, and the rules that it overrides.

        Args:
            rules: Their indices.
            operation: The field of :class:`~nslightning.Jacobians`.

        Returns:
            One line; empty if only one rule for all sites decides, or no rule does.
        """
        deciding = [i for i in rules if operation in self.rules[i].changes]
        if not deciding:
            return ""
        *others, last = deciding
        if self.rules[last].unconditional and not others:
            return ""
        lost = [f"{self._called(i)} ({self.rules[i].changes[operation]})" for i in reversed(others)]
        return f"{self._called(last)} ({self.rules[last].where})" + (f" over {', '.join(lost)}" if lost else "")

    def number(self, rule: int) -> int:
        """The number of a rule in messages.

        A plan that begins with the choice for all sites, as ``jacobians`` and ``sites`` of a config make it, has the
        number 0 for that, and from 1 on the rules as they stand in ``sites``.

        Args:
            rule: Its index.

        Returns:
            The number.
        """
        return rule if self.rules[0].unconditional else rule + 1

    def _called(self, rule: int) -> str:
        number = self.number(rule)
        return f"rule {number}" if number else "the choice for all sites"

    def to_list(self) -> list[dict[str, Any]]:
        """The plan as plain data.

        Returns:
            One mapping per rule; ``Plan`` makes the same plan of the list.
        """
        return [rule.to_dict() for rule in self.rules]

    def __repr__(self) -> str:
        if len(self.rules) == 1 and self.rules[0].unconditional:
            return repr(self.base)
        return f"Plan([{', '.join(map(repr, self.rules))}])"


# ------------------------------------------------------------------------------------------------- selectors
def selectors(keyword: str, selector: Any) -> tuple[One, ...]:
    """The single selectors in a selector. It is read once, because it may be an iterator.

    Args:
        keyword: The selector's name, for the error.
        selector: A glob, a regular expression, a module class, several of these, or None.

    Returns:
        The single ones; a string between slashes has become a regular expression.

    Raises:
        TypeError: If it is something else.
        ValueError: If the regular expression is malformed.
    """
    if selector is None:
        return ()
    if isinstance(selector, str) and len(selector) > 2 and selector[0] == selector[-1] == "/":
        try:
            return (re.compile(selector[1:-1]),)
        except re.error as error:
            raise ValueError(f"{keyword}={selector} is not a regular expression: {error}") from error
    if isinstance(selector, (str, re.Pattern)) or (isinstance(selector, type) and issubclass(selector, nn.Module)):
        return (selector,)
    if isinstance(selector, Iterable):
        return tuple(one for several in selector for one in selectors(keyword, several))
    raise TypeError(
        f"{keyword} takes a glob such as 'layer1.*', a compiled regular expression, a subclass of nn.Module, or "
        f"several of these; given {selector!r}"
    )


def text(selector: One, *, path: bool = False) -> str:
    """A selector as text.

    Args:
        selector: One selector.
        path: Name a class with the module that it is from.

    Returns:
        The glob, ``/expression/`` or the class's name.
    """
    if isinstance(selector, str):
        return selector
    if isinstance(selector, re.Pattern):
        return f"/{selector.pattern}/"
    return f"{selector.__module__}.{selector.__qualname__}" if path else selector.__qualname__


def matches(selector: One, names: Sequence[str], module: nn.Module) -> bool:
    """Return whether a selector selects a module.

    Args:
        selector: One selector.
        names: The module's qualified names.
        module: The module.

    Returns:
        Whether one of the names, or the class, is selected.
    """
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(name, selector) for name in names)
    if isinstance(selector, re.Pattern):
        return any(selector.search(name) is not None for name in names)
    return isinstance(module, selector)


def _is(module: nn.Module, cls: Any) -> bool:
    """Return whether a module is of a class, which may be given by its name, short or with its path."""
    if not isinstance(cls, str):
        return isinstance(module, cls)
    return any(cls in (c.__name__, f"{c.__module__}.{c.__qualname__}") for c in type(module).__mro__)


def _class(selector: One) -> One:
    """A class or the name of one."""
    if isinstance(selector, re.Pattern) or (isinstance(selector, str) and not re.fullmatch(r"[\w.<>]+", selector)):
        raise ValueError(
            f"module takes a class or its name, such as 'ReLU'; given {text(selector)!r}. Globs and expressions go "
            "into name=..."
        )
    return selector


def _in_stage(name: str, stage: str) -> bool:
    """Return whether a qualified name is that of a stage, or of a module inside the stage."""
    wanted, parts = stage.split("."), name.split(".")
    return len(parts) >= len(wanted) and all(map(_part_matches, wanted, parts))


def _part_matches(wanted: str, part: str) -> bool:
    """Return whether one part of a name, between dots, matches a glob or a range of numbers behind a common prefix."""
    if (span := re.fullmatch(r"(.*?)(\d+)-(\d+)", wanted)) is None:
        return fnmatch.fnmatchcase(part, wanted)
    start, first, last = span.groups()
    number = part.removeprefix(start)
    return part.startswith(start) and number.isdecimal() and int(first) <= int(number) <= int(last)


def _range(call: Any) -> tuple[int, int | None] | None:
    """A call's number or a range of numbers as (first, end)."""
    if call is None:
        return None
    if isinstance(call, (tuple, list)) and len(call) == 2:  # as kept by a rule
        first, end = call
    elif isinstance(call, int) and not isinstance(call, bool):
        first, end = call, call + 1
    elif isinstance(call, range) and call.step == 1:
        first, end = call.start, call.stop
    elif isinstance(call, str) and (span := re.fullmatch(r"(\d*)(:?)(\d*)", call)) and any(span.groups()):
        first = int(span[1] or 0)
        end = int(span[3]) if span[3] else (None if span[2] else first + 1)
    else:
        first, end = -1, None
    if first < 0 or (end is not None and end <= first):
        raise ValueError(f"call takes a number from 0 on, or a range such as '1:3' or '2:'; given {call!r}")
    return first, end


def _known(kind: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{kind} {value!r} is not known{did_you_mean(value, allowed)} Allowed: {', '.join(allowed)}")


def to_choice(choice: AnyChoice) -> Jacobians | Plan:
    """Read a choice as Python code writes it.

    Args:
        choice: A plan, or what :func:`nslightning.choices.to_jacobians` reads.

    Returns:
        The plan, or the choice for all sites.

    Raises:
        ValueError: If a field, a preset or a value is not admissible.
        TypeError: If the choice is of a type that is not known.

    Example:
        >>> to_choice({"relu": 1}), to_choice("relu=1") == to_choice({"relu": 1})
        (Jacobians(relu=1.0), True)
    """
    return choice if isinstance(choice, Plan) else to_jacobians(choice)


def to_choices(choices: Mapping[str, AnyChoice] | Sequence[str]) -> dict[str, Jacobians | Plan]:
    """Read choices by name as Python code writes them.

    Args:
        choices: Choices by name, or words such as ``"relu1:relu=1"``.

    Returns:
        The choices by name, in their order.

    Raises:
        ValueError: If one is not admissible, or two have one name.
        TypeError: If the choices are of a type that is not known.

    Example:
        >>> to_choices({"jax": "jax"})["jax"] == Jacobians.preset("jax")
        True
    """
    if not isinstance(choices, Mapping):
        return dict(named_choices(choices))
    return {
        name: choice if isinstance(choice, Plan) else named_choices({name: choice})[str(name)]
        for name, choice in choices.items()
    }
