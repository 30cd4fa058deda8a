"""The cost of enumerating a Clarke subdifferential, beside one run of the program, over units and inputs.

The program is a network with one hidden layer of n ReLUs on R^p, at 0, where all of them tie; the theory says that it
has 2 * sum of (n - 1 over k), k < p, sign patterns. Run `python -m benchmarks.clarke` (about five minutes on one core).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from nslightning.probes import clarke

CASES = [*((n, 2) for n in (2, 4, 8, 16, 32)), *((n, n) for n in range(3, 10))]


def measure(units: int, inputs: int) -> dict[str, float]:
    draw = random.Random(1000 * units + inputs)
    weights = [[draw.randint(-99, 99) for _ in range(inputs)] for _ in range(units)]

    def program(x: Sequence[Any]) -> Any:
        hidden = [max(0, sum(w * v for w, v in zip(row, x, strict=True))) for row in weights]
        return sum(2**i * h for i, h in enumerate(hidden))

    begun = time.thread_time()
    exact = clarke(program, [0] * inputs)
    seconds = time.thread_time() - begun
    away = [draw.randint(1, 10**6) for _ in range(inputs)]  # one pattern: the program run twice, without a tie
    begun = time.thread_time()
    clarke(program, away)
    return {
        "units": units,
        "inputs": inputs,
        "theory": 2 * sum(math.comb(units - 1, k) for k in range(inputs)),
        "patterns": exact.patterns,
        "linear_programs": exact.programs,
        "seconds": seconds,
        "one_run_seconds": (time.thread_time() - begun) / 2,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/clarke_cpu.json"))
    arguments = parser.parse_args()
    rows = []
    for units, inputs in CASES:
        rows.append(measure(units, inputs))
        print(rows[-1], flush=True)
    arguments.output.write_text(json.dumps({"machine": describe("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
