"""The Clarke subdifferential of small programs, against subdifferentials worked out by hand."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch

import nslightning
from nslightning.experiments.examples import max_of_scan, program_of_formula, zero_of_relus
from nslightning.probes import clarke
from nslightning.probes.clarke import _greatest


def relu(x: Any) -> Any:
    """As autodiff has it with ReLU'(0) = 0."""
    return max(0, x)


def limits(program: Callable[[Sequence[Any]], Any], at: Sequence[Any]) -> set[tuple[float, ...]]:
    jacobians = clarke(program, at)
    assert not jacobians.undecided
    return {tuple(map(float, g)) for g in jacobians.limits}


@pytest.mark.parametrize(
    ("program", "at", "expected"),
    [
        (lambda x: relu(x[0]), [0], {(0,), (1,)}),
        (lambda x: relu(x[0]), [2], {(1,)}),
        (lambda x: abs(x[0]), [0], {(-1,), (1,)}),
        (lambda x: relu(x[0]) - relu(-x[0]), [0], {(1,)}),
        (lambda x: relu(-x[0]) + x[0] - relu(x[0]), [0], {(0,)}),  # the zero function
        (lambda x: relu(x[0]) + relu(-x[0]), [0], {(-1,), (1,)}),
        (max, [1, 1, 0], {(1, 0, 0), (0, 1, 0)}),
        (max, [1, 1, 1], {(1, 0, 0), (0, 1, 0), (0, 0, 1)}),
        (min, [2, 2], {(1, 0), (0, 1)}),
        (lambda x: max(x) - sorted(x)[-1], [3, 3, 3], {(0, 0, 0)}),
        # The median of three equal numbers: any of them is in the middle somewhere nearby.
        (lambda x: sorted(x)[1], [0, 0, 0], {(1, 0, 0), (0, 1, 0), (0, 0, 1)}),
        # ReLU6 at both kinks at once: an image at 0 and one at 6, which move together.
        (lambda x: min(max(x[0], 0), 6) + min(max(x[0] + 6, 0), 6), [0], {(1,)}),
        # Not regular: neither convex nor concave at 0.
        (lambda x: abs(x[0]) - abs(x[1]), [0, 0], {(1, 1), (1, -1), (-1, 1), (-1, -1)}),
        # A two-layer network. Where the hidden units agree, |x| + |y| - |x + y| ...
        (lambda x: relu(abs(x[0]) + abs(x[1]) - abs(x[0] + x[1])), [0, 0], {(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)}),
    ],
)
def test_against_subdifferentials_worked_out_by_hand(program: Any, at: Any, expected: Any) -> None:
    assert limits(program, at) == expected


def test_a_network_with_a_tie_behind_a_tie() -> None:
    # relu(relu(x) - relu(y)) at 0: 0 where y >= x or x < 0; x - y where x > y > 0; x where x > 0 > y.
    assert limits(lambda x: relu(relu(x[0]) - relu(x[1])), [0, 0]) == {(0, 0), (1, -1), (1, 0)}


def test_the_hull_is_decided_exactly() -> None:
    jacobians = clarke(max, [1, 1, 1])
    assert jacobians.contains([Fraction(1, 3)] * 3)
    assert jacobians.contains([0.5, 0.25, 0.25])
    assert not jacobians.contains([Fraction(1, 3), Fraction(1, 3), Fraction(1, 3) + Fraction(1, 10**30)])
    assert jacobians.distance([1, 1, 1]) == Fraction(2, 3)  # to (1/3, 1/3, 1/3)
    assert jacobians.distance([2, 0, 0]) == 1  # to (1, 0, 0)
    assert jacobians.contains([1.1, -0.05, -0.05], tolerance=0.11)
    with pytest.raises(ValueError, match="3 inputs"):
        jacobians.contains([1, 0])


def test_the_choice_decides_whether_autodiff_is_in_it() -> None:
    """relu2 - relu at 0: 1 - 2 alpha, and the function is 0."""
    jacobians = clarke(lambda x: relu(-x[0]) + x[0] - relu(x[0]), [0])
    inside = []
    for alpha in (0.0, 0.25, 0.5, 1.0):
        t = torch.zeros(1, requires_grad=True)
        (gradient,) = torch.autograd.grad(zero_of_relus(t, at_zero=alpha).sum(), t)
        inside.append(jacobians.contains(gradient))
    assert inside == [False, False, True, False]


def test_programs_of_torch_and_of_numbers_are_the_same_program() -> None:
    at = torch.tensor([1.5, 2.0, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(max_of_scan(list(at)), at)
    jacobians = clarke(max_of_scan, at.tolist())
    assert tuple(map(float, jacobians.autodiff)) == tuple(gradient.tolist()) == (0, 1, 0)
    assert jacobians.contains(gradient)


def test_every_beta_of_max_pooling_in_the_unit_interval_is_inside_and_no_other() -> None:
    jacobians = clarke(max, [1, 1, 0, 1])
    for beta, inside in (
        (0.0, True),
        (0.5, True),
        (1.0, True),
        (1.5, True),
        (1.6, False),
        (10.0, False),
        (-0.1, False),
    ):
        x = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
        pooled = nslightning.ops.max_pool2d(x.view(1, 1, 2, 2), 2, jacobian=beta)
        (gradient,) = torch.autograd.grad(pooled.sum(), x)
        assert jacobians.contains(gradient, tolerance=1e-12) is inside, beta


def layer(x: Sequence[Any], weights: Sequence[Sequence[int]]) -> list[Any]:
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in weights]


@pytest.mark.parametrize(("units", "inputs"), [(3, 2), (6, 2), (5, 3), (6, 4), (5, 5), (6, 6)])
def test_the_cost_grows_as_the_number_of_cells(units: int, inputs: int) -> None:
    """Hyperplanes in general position part space into 2 * sum of (n - 1 over k), k < p, cells (Schlaefli, Cover)."""
    draw = random.Random(units * 10 + inputs)
    weights = [[draw.randint(-99, 99) for _ in range(inputs)] for _ in range(units)]
    jacobians = clarke(lambda x: sum(2**i * relu(y) for i, y in enumerate(layer(x, weights))), [0] * inputs)
    cells = 2 * sum(math.comb(units - 1, k) for k in range(inputs))
    assert jacobians.patterns == len(jacobians.limits) == cells
    assert jacobians.programs >= cells


def test_limits_are_gradients_at_nearby_points() -> None:
    """A deep network at 0, against gradients at random points: all of them are limits, and every limit is met."""
    draw = random.Random(0)
    first = [[draw.randint(-3, 3) for _ in range(2)] for _ in range(3)]
    second = [[draw.randint(-3, 3) for _ in range(3)] for _ in range(2)]

    def program(x: Sequence[Any]) -> Any:
        hidden = [relu(y) for y in layer(layer(x, first), [[1, 0, 0], [0, 1, 0], [0, 0, 1]])]
        return relu(layer(hidden, second)[0]) - relu(layer(hidden, second)[1])

    met = {clarke(program, [draw.uniform(-1, 1), draw.uniform(-1, 1)]).autodiff for _ in range(400)}
    assert met == set(clarke(program, [0, 0]).limits)


@pytest.mark.parametrize(
    "clauses",
    [
        [[1]],
        [[1], [-1]],
        [[1, 2], [-1, 2], [1, -2]],
        [[1, 2], [-1, 2], [1, -2], [-1, -2]],
        [[1, 2, 3], [-1, -2, -3], [1, -2], [2, -3], [3, -1]],
        [[1, 2], [-2, 3], [-1, 3]],
    ],
)
def test_a_formula_has_a_solution_where_its_program_has_a_kink(clauses: list[list[int]]) -> None:
    variables = max(abs(literal) for clause in clauses for literal in clause)
    solvable = any(
        all(any((literal > 0) == values[abs(literal) - 1] for literal in clause) for clause in clauses)
        for values in itertools.product([False, True], repeat=variables)
    )
    assert clarke(program_of_formula(clauses), [0] * variables).differentiable is not solvable


def test_what_first_order_does_not_decide_is_undecided() -> None:
    # relu(x^2) is x^2: the difference's gradient is 0, and both branches stay open.
    jacobians = clarke(lambda x: relu(x[0] ** 2) + x[0], [0])
    assert (jacobians.limits, jacobians.undecided) == ((), ((Fraction(1),),))
    # relu(x y) at 0 has gradient 0 on either branch.
    assert clarke(lambda x: relu(x[0] * x[1]), [0, 0]).undecided == ((0, 0),)
    # x > 0 and y^2 - x > 0 hold together near 0, where no line shows it: the gradient (1, 5) is a limit.
    jacobians = clarke(lambda x: x[0] + 5 * x[1] if x[0] > 0 and x[1] ** 2 - x[0] > 0 else 0 * x[0], [0, 0])
    assert (1, 5) in jacobians.undecided
    assert jacobians.contains([1, 5]) is None
    assert jacobians.contains([7, 7]) is False
    assert jacobians.differentiable is None


def test_products_of_inputs_at_a_tie() -> None:
    # w relu(v x) as a function of (w, v), x = 1, at v = 0: limits (0, 0) and (0, w).
    assert limits(lambda p: p[0] * relu(p[1]), [3, 0]) == {(0, 0), (0, 3)}
    assert limits(lambda p: relu(p[0]) / p[1], [0, 2]) == {(0, 0), (0.5, 0)}


def test_quotients_have_the_derivatives_of_the_quotient_rule() -> None:
    # a / b at (3, 2): 1 / b and -a / b^2. Behind a tie: relu(v) / b + 3 / b, at b = 4 and v = 0.
    assert limits(lambda x: x[0] / x[1], [3, 2]) == {(0.5, -0.75)}
    assert limits(lambda x: 5 / x[0], [2]) == {(-1.25,)}
    assert limits(lambda x: (relu(x[0]) + 3) / x[1], [0, 4]) == {(0, -3 / 16), (0.25, -3 / 16)}


def test_only_a_quotient_by_a_constant_is_affine() -> None:
    """y - y / (1 + y) is y^2 near 0: where 0 < x < y^2 both comparisons hold, and no line shows it.

    Counted as affine, the quotient would rule these points out.
    """
    curved = clarke(lambda x: 7 * x[1] if x[0] > 0 and x[1] - x[1] / (1 + x[1]) > x[0] else 0 * x[0], [0, 0])
    assert (0, 7) in curved.undecided
    straight = clarke(lambda x: 7 * x[1] if x[0] > 0 and x[1] / 2 - x[1] / 2 > x[0] else 0 * x[0], [0, 0])
    assert (straight.limits, straight.undecided) == (((0, 0),), ())


def test_what_cannot_hold_together_is_ruled_out_where_first_order_shows_it() -> None:
    # x > 0 and x^2 - x > 0, though the second is curved; x > 0 and -x > 0, though a curved one stands between.
    ruled_out = clarke(lambda x: 5 * x[0] if x[0] > 0 and x[0] ** 2 - x[0] > 0 else 0 * x[0], [0])
    assert (ruled_out.limits, ruled_out.undecided) == (((0,),), ())
    opposite = lambda x: 5 * x[0] if x[0] > 0 and x[1] + x[1] ** 2 > 0 and -x[0] > 0 else 0 * x[0]  # noqa: E731
    ruled_out = clarke(opposite, [0, 0])
    assert (ruled_out.limits, ruled_out.undecided) == (((0, 0),), ())


def test_what_follows_a_tie_off_the_open_cone_is_looked_for() -> None:
    """Where 0 < x < y^2 a further tie decides: both of its sides are found, on one branch each."""

    def program(x: Sequence[Any]) -> Any:
        if x[0] > 0 and x[1] * x[1] / (1 + x[1]) > x[0]:
            return 3 * x[1] if x[1] > 0 else 5 * x[1]
        return 0 * x[0]

    jacobians = clarke(program, [0, 0])
    assert {(0, 3), (0, 5)} <= set(jacobians.undecided)
    assert jacobians.contains([0, 4]) is None
    assert jacobians.contains([0, 6]) is False


@pytest.mark.parametrize(
    ("program", "at", "error"),
    [
        (lambda x: x[0], [math.nan], ValueError),
        (lambda x: x[0], [math.inf], ValueError),
        (lambda x: math.exp(x[0]), [0], TypeError),
        (lambda x: x[0] ** 0.5, [1], TypeError),
    ],
)
def test_what_is_no_rational_program_is_refused(program: Any, at: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        clarke(program, at)


def test_the_simplex_method_against_corners() -> None:
    """The best corner of small polygons, found by trying every pair of edges."""
    draw = random.Random(3)
    for _ in range(50):
        goal = [draw.randint(-5, 5) for _ in range(2)]
        rows = [[draw.randint(-4, 4) for _ in range(2)] for _ in range(4)] + [[1, 0], [0, 1]]
        bounds = [draw.randint(0, 6) for _ in range(4)] + [5, 5]
        edges = [*zip(rows, bounds, strict=True), ([-1, 0], 0), ([0, -1], 0)]
        corners = []
        for ((a, b), e), ((c, d), f) in itertools.combinations(edges, 2):
            if det := a * d - b * c:
                corner = Fraction(e * d - b * f, det), Fraction(a * f - e * c, det)
                if all(r[0] * corner[0] + r[1] * corner[1] <= bound for r, bound in edges):
                    corners.append(corner)
        value, x = _greatest(goal, rows, bounds)
        assert value == max(goal[0] * c[0] + goal[1] * c[1] for c in corners)
        assert value == goal[0] * x[0] + goal[1] * x[1]
        assert all(r[0] * x[0] + r[1] * x[1] <= bound for r, bound in edges)
