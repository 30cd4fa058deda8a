"""The Clarke subdifferential of a small program, exactly, and whether a gradient lies in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

__all__ = ["Clarke", "Number", "clarke"]

Vector = tuple[Fraction, ...]
Program = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Clarke:
    """The Clarke subdifferential of a function at a point: the convex hull of the limits of its gradients.

    Args:
        value: The function's value.
        limits: The distinct limits of gradients at nearby points (the Bouligand subdifferential).
        undecided: Further gradients of branches, of which first-order information does not show whether nearby points
            take them. Empty for every piecewise affine program.
        autodiff: The gradient along the branches that the program takes at the point itself, which is what automatic
            differentiation of its control flow returns.
        patterns: Number of sign patterns of the comparisons that nearby points reach.
        programs: Number of linear programs that were solved for it.

    Example:
        >>> hull = clarke(lambda x: abs(x[0]), [0])
        >>> sorted(map(int, (g for (g,) in hull.limits)))
        [-1, 1]
        >>> hull.contains([0.5]), hull.contains([2]), hull.differentiable
        (True, False, False)
    """

    value: Fraction
    limits: tuple[Vector, ...]
    undecided: tuple[Vector, ...]
    autodiff: Vector
    patterns: int
    programs: int

    @property
    def differentiable(self) -> bool | None:
        """Return whether the limit is one; None where that is not decided.

        A piecewise affine function is differentiable where it has one limit of gradients. A function of another kind
        is strictly differentiable there.
        """
        if len(self.limits) > 1:
            return False
        return None if self.undecided else True

    def distance(self, gradient: Iterable[Any], undecided: bool = False) -> Fraction:
        """Return how far a gradient is from the convex hull, in the largest entry.

        Args:
            gradient: As many numbers as the program has inputs; floats count as what they are exactly.
            undecided: The hull of all gradients, those that are undecided included.

        Returns:
            The distance; 0 where it lies in the hull.

        Raises:
            ValueError: If the gradient has another length.
        """
        goal = tuple(map(_fraction, gradient))
        points = self.limits + (self.undecided if undecided else ())
        if len(goal) != len(self.autodiff):
            raise ValueError(f"the program has {len(self.autodiff)} inputs; given a gradient of {len(goal)} entries")
        # Weights w >= 0 of all points but the first, and by how much the farthest entry comes nearer, s >= 0.
        first, *others = points
        offset = [g - f for g, f in zip(goal, first, strict=True)]
        start = max(map(abs, offset), default=Fraction(0))
        rows = [[sign * (p[i] - first[i]) for p in others] + [1] for i in range(len(goal)) for sign in (1, -1)]
        bounds = [start + sign * o for o in offset for sign in (1, -1)]
        rows += [[*[1] * len(others), 0], [*[0] * len(others), 1]]
        nearer, _ = _greatest([*[0] * len(others), 1], rows, [*bounds, 1, start])
        return start - nearer

    def contains(self, gradient: Iterable[Any], tolerance: Any = 0) -> bool | None:
        """Return whether a gradient lies in the Clarke subdifferential.

        Args:
            gradient: As many numbers as the program has inputs.
            tolerance: Largest distance, in one entry, by which it may lie outside: a gradient of floats is rounded.

        Returns:
            Whether it does; None where that depends on gradients that are undecided.
        """
        goal = tuple(map(_fraction, gradient))
        if self.distance(goal) <= _fraction(tolerance):
            return True
        return None if self.undecided and self.distance(goal, undecided=True) <= _fraction(tolerance) else False


def clarke(program: Program, at: Iterable[Any]) -> Clarke:
    r"""Enumerate the limits of a program's gradients at a point.

    The program is ordinary Python, of sums, products, quotients and comparisons: ``max``, ``min``, ``abs`` and ``if``
    are comparisons. It is run on :class:`Number`, once for each sign pattern that its comparisons take at nearby
    points. Where two numbers are equal at the point, a direction d decides by the sign of :math:`\langle g, d\rangle`,
    with g the gradient of their difference along the branches taken so far; a pattern is reached where the open cone of
    all these inequalities is not empty. That is decided in rational numbers, by one linear program for each sign that a
    known direction does not show already.

    For piecewise affine programs the result is exact. Where values that are compared are no affine functions of the
    inputs (products of inputs, as the weights of a network with several layers), a pattern whose open cone is not
    empty is reached all the same; one whose open cone is empty may or may not be, and its gradient is ``undecided``.

    The number of patterns may grow exponentially with the number of inputs. No algorithm is known that avoids it: with
    matrices as input, finding two distinct elements is NP-hard (Bolte, Boustany, Pauwels, Pesquet-Popescu 2023).

    Args:
        program: A function of a sequence of numbers that returns a number.
        at: The point: integers, fractions, or floats, which count as what they are exactly.

    Returns:
        The subdifferential.

    Raises:
        TypeError: If the program does something else with its inputs.
        ValueError: If an input is not finite.

    Example:
        >>> def program(x):  # relu(x) - relu(-x) is x
        ...     return max(0, x[0]) - max(0, -x[0])
        >>> hull = clarke(program, [0])
        >>> hull.limits, hull.autodiff, hull.contains(hull.autodiff)
        (((Fraction(1, 1),),), (Fraction(0, 1),), False)
    """
    point = tuple(map(_fraction, at))
    own = _Branches(len(point), None)
    value, autodiff = own.run(program, point)
    limits: dict[Vector, None] = {}
    undecided: dict[Vector, None] = {}
    patterns = programs = 0
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        branches = _Branches(len(point), waiting.pop())
        _, gradient = branches.run(program, point)
        (limits if branches.reached else undecided)[gradient] = None
        patterns += branches.reached
        programs += branches.programs
        waiting += branches.others
    return Clarke(value, tuple(limits), tuple(g for g in undecided if g not in limits), autodiff, patterns, programs)


class Number:
    """A number of a program near a point: its value there, and its gradient along the branches taken.

    Args:
        value: Its value at the point.
        gradient: Its gradient with respect to the inputs.
        affine: Whether it is an affine function of the inputs along these branches.
        branches: The record that decides comparisons.
    """

    __slots__ = ("affine", "branches", "gradient", "value")
    __hash__ = None  # type: ignore[assignment] # equality is a question about nearby points

    def __init__(self, value: Fraction, gradient: Vector, affine: bool, branches: _Branches) -> None:
        self.value = value
        self.gradient = gradient
        self.affine = affine
        self.branches = branches

    def _with(self, value: Fraction, a: Fraction, other: Number, b: Fraction, affine: bool) -> Number:
        gradient = tuple(a * g + b * h for g, h in zip(self.gradient, other.gradient, strict=True))
        return Number(value, gradient, affine, self.branches)

    def _lifted(self, other: Any) -> Number:
        if isinstance(other, Number):
            return other
        return Number(_fraction(other), (Fraction(0),) * len(self.gradient), True, self.branches)

    @property
    def _constant(self) -> bool:
        return self.affine and not any(self.gradient)

    def __add__(self, other: Any) -> Number:
        """The sum."""
        b = self._lifted(other)
        return self._with(self.value + b.value, Fraction(1), b, Fraction(1), self.affine and b.affine)

    def __mul__(self, other: Any) -> Number:
        """The product."""
        b = self._lifted(other)
        affine = (self._constant and b.affine) or (b._constant and self.affine)
        return self._with(self.value * b.value, b.value, b, self.value, affine)

    def __truediv__(self, other: Any) -> Number:
        """The quotient."""
        b = self._lifted(other)
        affine = b._constant and self.affine
        return self._with(self.value / b.value, 1 / b.value, b, -self.value / b.value**2, affine)

    def __neg__(self) -> Number:
        """The negative."""
        return self.__mul__(-1)

    def __pos__(self) -> Number:
        """The number."""
        return self

    def __sub__(self, other: Any) -> Number:
        """The difference."""
        return self + -self._lifted(other)

    def __rtruediv__(self, other: Any) -> Number:
        """The quotient the other way round."""
        return self._lifted(other) / self

    def __rsub__(self, other: Any) -> Number:
        """The difference the other way round."""
        return self._lifted(other) - self

    __radd__ = __add__
    __rmul__ = __mul__

    def __pow__(self, exponent: int) -> Number:
        """A whole power."""
        power = self._lifted(1)
        for _ in range(operator.index(exponent)):
            power = power * self
        return power

    def __abs__(self) -> Number:
        """The absolute value: a comparison with 0."""
        return self if self._sign() > 0 else -self

    def _sign(self, other: Any = 0) -> int:
        return self.branches.sign(self - other)

    def __gt__(self, other: Any) -> bool:
        """Return whether it is greater at nearby points."""
        return self._sign(other) > 0

    def __ge__(self, other: Any) -> bool:
        """Return whether it is not less at nearby points."""
        return self._sign(other) >= 0

    def __lt__(self, other: Any) -> bool:
        """Return whether it is less at nearby points."""
        return self._sign(other) < 0

    def __le__(self, other: Any) -> bool:
        """Return whether it is not greater at nearby points."""
        return self._sign(other) <= 0

    def __eq__(self, other: object) -> bool:
        """Return whether it is equal at nearby points."""
        return self._sign(other) == 0

    def __bool__(self) -> bool:
        """Return whether it is not 0 at nearby points."""
        return self._sign() != 0


class _Branches:
    """One run of a program: how its comparisons come out, and which other ways nearby points take.

    Args:
        inputs: Number of the program's inputs.
        signs: Outcomes of the first ties; those after them come out as a direction has it, and the other sign is
            added to ``others`` where nearby points take it. None: as at the point itself, where equal is equal.
    """

    def __init__(self, inputs: int, signs: tuple[int, ...] | None) -> None:
        self.inputs = inputs
        self.signs = signs
        self.taken: list[int] = []
        self.rows: list[tuple[Vector, bool]] = []  # the inequalities <row, d> > 0, and whether each is the whole truth
        self.reached = True  # whether the open cone is not empty
        self.direction: Vector | None = None
        self.others: list[tuple[int, ...]] = []
        self.programs = 0

    def run(self, program: Program, point: Vector) -> tuple[Fraction, Vector]:
        """The program's value and gradient along its branches."""
        unit = [tuple(Fraction(int(i == j)) for j in range(self.inputs)) for i in range(self.inputs)]
        inputs = [Number(v, g, True, self) for v, g in zip(point, unit, strict=True)]
        result = program(inputs)
        if not isinstance(result, Number):
            return _fraction(result), (Fraction(0),) * self.inputs
        return result.value, result.gradient

    def sign(self, difference: Number) -> int:
        """The sign of a number at nearby points."""
        if difference.value:
            return 1 if difference.value > 0 else -1
        if self.signs is None or difference._constant:
            return 0
        if len(self.taken) < len(self.signs):
            sign = self.signs[len(self.taken)]
            self._add(sign, difference)
            if len(self.taken) == len(self.signs):
                self._look()
            return sign
        row = difference.gradient
        ahead = sum(map(operator.mul, row, self.direction), Fraction(0)) if self.direction else Fraction(0)
        first = -1 if ahead < 0 else 1
        known = ahead != 0  # the direction lies on the first side
        if not known and self._possible(first, difference) is None:
            first = -first
        elif self._possible(-first, difference) is not None:
            self.others.append((*self.taken, -first))
        self._add(first, difference)
        if not known:
            self._look()
        return first

    def _add(self, sign: int, difference: Number) -> None:
        self.taken.append(sign)
        self.rows.append((tuple(sign * g for g in difference.gradient), difference.affine))

    def _look(self) -> None:
        """Find a direction of the open cone."""
        self.direction = self._inside([row for row, _ in self.rows])
        self.reached = self.direction is not None

    def _possible(self, sign: int, difference: Number) -> Vector | None:
        """A direction that a further sign leaves, or the best that is known of one; None where there is none."""
        rows = [*self.rows, (tuple(sign * g for g in difference.gradient), difference.affine)]
        inside = self._inside([row for row, _ in rows])
        if inside is not None or all(affine for _, affine in rows):
            return inside
        # Nearby points may lie off the open cone, where second-order terms decide: what is affine still has to hold.
        if self._inside([row for row, affine in rows if affine]) is None:
            return None
        return self._along([row for row, _ in rows])

    def _inside(self, rows: list[Vector]) -> Vector | None:
        """A direction with <row, d> > 0 for all rows."""
        if not rows:
            return (Fraction(0),) * self.inputs
        if not all(map(any, rows)):
            return None
        self.programs += 1  # the greatest c <= 1 with <row, d> >= c for all rows
        greatest, best = _greatest(
            [*[0] * (2 * self.inputs), 1],
            [[*(-g for g in row), *row, 1] for row in rows] + [[*[0] * (2 * self.inputs), 1]],
            [0] * len(rows) + [1],
        )
        return self._parted(best) if greatest > 0 else None

    def _along(self, rows: list[Vector]) -> Vector | None:
        """A direction other than 0 with <row, d> >= 0 for all rows."""
        inputs = range(self.inputs)
        signs = [(i, sign) for i in inputs for sign in (1, -1)]
        ends = [[Fraction(s * sign * (i == j)) for s in (1, -1) for j in inputs] for i, sign in signs]
        cone = [[*(-g for g in row), *row] for row in rows]
        for goal in ends:  # the greatest and the least of each entry
            self.programs += 1
            greatest, best = _greatest(goal, cone + ends, [0] * len(cone) + [1] * len(ends))
            if greatest > 0:
                return self._parted(best)
        return None

    def _parted(self, x: Sequence[Fraction]) -> Vector:
        """A vector from its positive and its negative part."""
        return tuple(a - b for a, b in zip(x[: self.inputs], x[self.inputs :], strict=False))


def _fraction(value: Any) -> Fraction:
    try:
        return Fraction(value.item() if hasattr(value, "item") else value)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{value!r} is not a finite number") from error


def _greatest(goal: Sequence[Any], rows: Sequence[Sequence[Any]], bounds: Sequence[Any]) -> tuple[Fraction, Vector]:
    """The greatest of ``<goal, x>`` with ``rows x <= bounds`` and ``x >= 0``, where ``bounds >= 0`` and it is bounded.

    The simplex method in rational numbers, from x = 0, with Bland's rule, which ends. SymPy has one
    (``sympy.solvers.simplex.linprog``, 1.14), which returns a wrong result for unbounded variables and is slower.
    """
    height, width = len(rows), len(goal)
    table = [
        [*map(Fraction, row), *(Fraction(int(i == j)) for j in range(height)), Fraction(bound)]
        for i, (row, bound) in enumerate(zip(rows, bounds, strict=True))
    ]
    costs = [*(-Fraction(g) for g in goal), *[Fraction(0)] * (height + 1)]
    basis = list(range(width, width + height))
    while (enters := next((j for j in range(width + height) if costs[j] < 0), None)) is not None:
        leaves = min(
            (i for i in range(height) if table[i][enters] > 0),
            key=lambda i: (table[i][-1] / table[i][enters], basis[i]),
        )
        pivot = table[leaves] = [a / table[leaves][enters] for a in table[leaves]]
        basis[leaves] = enters
        for row in (*(table[i] for i in range(height) if i != leaves), costs):
            if factor := row[enters]:
                row[:] = [a - factor * b if b else a for a, b in zip(row, pivot, strict=True)]
    x = dict(zip(basis, (row[-1] for row in table), strict=True))
    return costs[-1], tuple(x.get(j, Fraction(0)) for j in range(width))
