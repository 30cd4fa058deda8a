"""Small wrong changes to the core modules, one at a time: do their tests see each of them?

A mutant is one module with one change: a comparison, a constant, an operator, a returned value or a statement left
out. Each runs in a process forked from one that has imported PyTorch, so that it costs only its tests. The changed
source takes the module's place before its first import. Processes that a test starts by a command line import the
source as it stands, so a module's tests below are those that call it in their own process.

``make mutants`` (``MUTANTS='--sample 200 --seed 1'``) draws some, prints the survivors, and writes every outcome to
``build/mutants.csv``. A survivor is equivalent, or it asks for a test.
"""

from __future__ import annotations

import argparse
import ast
import csv
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTCOMES = ROOT / "build" / "mutants.csv"

# The tests that call a module in their own process, the quickest to see a change first.
TESTS: dict[str, tuple[str, ...]] = {
    "nslightning/ops/autograd/selection.py": ("selection", "maxima", "groups", "spellings", "native_nodes"),
    "nslightning/ops/autograd/fused.py": ("overwritten_output", "max_pool", "pool_composition", "native_nodes"),
    "nslightning/ops/autograd/pooling.py": ("max_pool", "pools", "pool_composition", "cpu_kernels"),
    "nslightning/ops/maxima.py": ("maxima", "spellings", "views", "modules"),
    "nslightning/probes/propagation.py": ("graph", "propagation", "probes", "waiting"),
    "nslightning/probes/graph.py": ("graph", "propagation", "unseen"),
    "nslightning/probes/zone.py": ("zone", "branches"),
    "nslightning/probes/worst.py": ("worst", "unseen::test_worst_choice_refuses"),
    "nslightning/experiments/compare.py": (
        "experiments::test_means_over_runs_are_held_against_the_published_ones",
        "experiments::test_published_numbers_stand_beside_their_own_data_only",
        "experiments::test_shares_are_held_against_the_published_ones",
        "experiments::test_a_share_is_outside_from_two_standard_deviations_of_both_sides_on",
        "experiments::test_a_mean_is_outside_above_two_published_standard_deviations",
        "experiments::test_a_probability_is_outside_from_two_standard_deviations_of_both_sides_on",
        "experiments::test_a_share_of_mini_batches_is_outside_from_students_limit_on",
        "experiments::test_mini_batches_of_one_draw_are_not_independent",
        "experiments::test_a_ratio_is_that_of_the_sums",
        "experiments::test_a_run_is_one_with_nan_if_it_ended_with_it",
        "experiments::test_each_setting_is_listed_once_for_each_entry_that_matches_it",
    ),
    "nslightning/callbacks/gradient_divergence.py": (
        "waiting::test_without_a_scaler_the_accumulation_alone_scales_the_loss",
        "callbacks",
        "callbacks_shared",
    ),
    "nslightning/callbacks/non_finite_guard.py": ("watching", "callbacks_shared"),
    "nslightning/callbacks/tie_monitor.py": ("callbacks", "callbacks_shared"),
    "nslightning/callbacks/zone_monitor.py": ("watching", "callbacks_shared"),
    "nslightning/callbacks/weight_divergence.py": ("watching", "callbacks_shared"),
    "nslightning/callbacks/twin_divergence.py": ("twins",),
    "nslightning/callbacks/verdict.py": ("verdict",),
}

_COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_COMBINED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


# Warnings are errors in the tests, and pytest warns of plugins that `_warm` imported before it.
_IMPORTED_BEFORE = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


@dataclass(frozen=True)
class Change:
    """One change: in which node's field (and at which index of a list) which node stands instead."""

    holder: ast.AST
    field: str
    index: int | None
    old: ast.AST
    new: ast.AST

    @property
    def line(self) -> int:
        return self.old.lineno

    @property
    def text(self) -> str:
        old, new = (" ".join(ast.unparse(node).split()) for node in (self.old, self.new))
        return f"{old} -> {new}"

    def make(self) -> None:
        ast.copy_location(self.new, self.old)
        if self.index is None:
            setattr(self.holder, self.field, self.new)
        else:
            getattr(self.holder, self.field)[self.index] = self.new


def changes(tree: ast.AST) -> Iterator[Change]:
    """Every change, in the order of the source; types, messages and text are left alone."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST):
                continue
            if isinstance(node, ast.expr | ast.stmt):
                for new in _instead(node):
                    yield Change(tree, field, index, node, new)
            if not isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert) and not _for_types(node):
                yield from changes(node)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _instead(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    match node:
        case ast.Compare(left, [op], right):
            for other in _COMPARED[type(op)]:
                yield ast.Compare(left, [other()], right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.And() if isinstance(op, ast.Or) else ast.Or(), values)
        case ast.BinOp(left, op, right) if type(op) in _COMBINED and not isinstance(left, ast.JoinedStr):
            yield ast.BinOp(left, _COMBINED[type(op)](), right)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Return(value) if value is not None and not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.If(test) if not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp) and not _for_types(node):
            yield ast.If(ast.UnaryOp(ast.Not(), test), node.body, node.orelse)


@dataclass(frozen=True)
class Mutant:
    """The change with one number in one file; ``number`` None is the file as it stands."""

    file: Path
    number: int | None
    line: int = 0
    text: str = ""

    @property
    def module(self) -> str:
        """The name that the file is imported by."""
        inside = self.file.relative_to(ROOT) if self.file.is_relative_to(ROOT) else Path(self.file.name)
        return ".".join(inside.with_suffix("").parts)

    def tree(self) -> ast.Module:
        tree = ast.parse(self.file.read_text())
        if self.number is not None:
            next(change for n, change in enumerate(changes(tree)) if n == self.number).make()
        return ast.fix_missing_locations(tree)


def mutants(file: Path) -> list[Mutant]:
    """Every mutant of a file."""
    candidates = changes(ast.parse(file.read_text()))
    return [Mutant(file, number, change.line, change.text) for number, change in enumerate(candidates)]


class _InPlace(importlib.abc.MetaPathFinder):
    """Imports the mutant where the module is asked for."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, fullname, path, target=None):
        if fullname != self.mutant.module:
            return None
        code = compile(self.mutant.tree(), str(self.mutant.file), "exec")

        class Loader(SourceFileLoader):
            def get_code(self, fullname):
                return code

        loader = Loader(fullname, str(self.mutant.file))
        return importlib.util.spec_from_file_location(fullname, self.mutant.file, loader=loader)


def outcome(mutant: Mutant, tests: Sequence[str], limit: float, log: Path) -> str:
    """Run a mutant's tests in a separate process.

    Returns:
        ``killed``: a test fails. ``slow``: they take more than ``limit`` seconds. ``survived``. ``not run``: pytest
        could not run the tests as they are asked for.
    """
    if mutant.module in sys.modules:
        raise ValueError(f"{mutant.module} is imported already, so that a mutant of it would not be seen")
    sys.stdout.flush()
    if (pid := os.fork()) == 0:
        status = 70
        try:
            os.setsid()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            sys.meta_path.insert(0, _InPlace(mutant))
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests, *_IMPORTED_BEFORE])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "slow"
        time.sleep(0.02)
    with suppress(ProcessLookupError):  # what its tests left running
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    # 2: the module no longer imports, so the tests cannot be collected; a signal: the change broke the process.
    return {0: "survived", 4: "not run", 5: "not run", 70: "not run"}.get(code, "killed")


def _path(test: str) -> str:
    file, _, name = test.partition("::")
    (path,) = (ROOT / "tests").rglob(f"test_{file}.py")
    return str(path) + (f"::{name}" if name else "")


def _warm() -> None:
    """Import what the tests import, but nothing of the package."""
    for name in (
        "torch",
        "torchvision",
        "lightning.pytorch",
        "pandas",
        "scipy.stats",
        "matplotlib.pyplot",
        "hypothesis",
    ):
        importlib.import_module(name)
    imported = [name for name in sys.modules if name.startswith("nslightning")]
    assert not imported, imported


def main() -> int:
    """Draw mutants, run their tests, tell the survivors; 1 where tests fail without a change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="only these modules' files (default: all)", metavar="FILE")
    parser.add_argument("--sample", type=int, default=100, help="how many mutants are drawn (default: 100; 0: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no mutant after so many minutes")
    asked = parser.parse_args()
    for name in asked.files:
        if name not in TESTS:
            parser.error(f"{name} has no tests in tests/mutants.py; it knows {', '.join(TESTS)}")
    begin = time.monotonic()
    os.chdir(ROOT)
    OUTCOMES.parent.mkdir(exist_ok=True)
    log = OUTCOMES.with_suffix(".log")
    every = [mutant for name in asked.files or TESTS for mutant in mutants(ROOT / name)]
    drawn = random.Random(asked.seed).sample(every, min(asked.sample, len(every))) if asked.sample else every
    print(f"{len(drawn)} of {len(every)} mutants, seed {asked.seed}")
    _warm()
    times: dict[tuple[str, ...], float] = {}
    counts: Counter[str] = Counter()
    with OUTCOMES.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["outcome", "file", "line", "change", "seconds"])
        for mutant in drawn:
            if time.monotonic() - begin > 60 * asked.minutes:
                print(f"{sum(counts.values())} of the {len(drawn)} were run: the time is over")
                break
            name = str(mutant.file.relative_to(ROOT))
            tests = tuple(_path(test) for test in TESTS[name])
            if tests not in times:
                start = time.monotonic()
                if (plain := outcome(Mutant(mutant.file, None), tests, 900, log)) != "survived":
                    print(f"the tests of {name} without a change: {plain}\n{log.read_text()}", file=sys.stderr)
                    return 1
                times[tests] = time.monotonic() - start
                print(f"the tests of {name} take {times[tests]:.0f} s", flush=True)
            start = time.monotonic()
            end = outcome(mutant, tests, 20 + 4 * times[tests], log)
            counts[end] += 1
            table.writerow([end, name, mutant.line, mutant.text, f"{time.monotonic() - start:.1f}"])
            file.flush()
            if end != "killed":
                print(f"{end}: {name}:{mutant.line}: {mutant.text}", flush=True)
    seen = counts["killed"] + counts["slow"]
    print(f"{seen} of {sum(counts.values())} killed ({dict(counts)}); {OUTCOMES.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
