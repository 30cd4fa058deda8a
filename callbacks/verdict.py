"""Puts the measurements of a run into words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["divergence_in_words"]

# Bits of the significand, by the first part of Lightning's name of a precision.
_BITS = {"bf16": 8, "16": 11, "32": 24, "64": 53}
_NAMES = {"bf16": "bf16", "16": "fp16", "32": "fp32", "64": "fp64"}


def divergence_in_words(rows: pd.DataFrame, precision: str, trained: str = "native") -> list[str]:
    r"""Return how far the gradients of other choices were from the one that trains, one line for each choice.

    Args:
        rows: One row per step and choice, with columns ``choice`` and ``relative``.
        precision: Lightning's name of the precision, such as ``"bf16-mixed"``.
        trained: The choice that trains, as :func:`~nslightning.choices.choice_label` writes it. The lines name it
            where it is not ``"native"``, stock PyTorch's.

    Returns:
        The lines; below them, where a choice made more than a hundredth of a per cent, or rounding alone, why.

    Example:
        >>> import pandas as pd
        >>> rows = pd.DataFrame({"choice": ["relu1", "beta10"], "relative": [0.0, 0.05]})
        >>> print("\n".join(divergence_in_words(rows, "bf16-mixed")))
        relu1: exactly the same gradient on 1 of 1 step
        beta10: another gradient on 1 of 1 step; it differs by 5 % (median; at most 5 %) in bf16
        why: bf16 keeps 8 bits of a number, so two entries of a pooling window are often equal, and there the choice ...
    """
    kind = precision.split("-")[0]
    name, bits = _NAMES.get(kind, precision), _BITS.get(kind)
    named = "" if trained == "native" else f"the gradient that trains ({trained})"
    lines, large, small = [], False, False
    for choice, of in rows.groupby("choice", sort=False)["relative"]:
        n, odd = len(of), int(of.isna().sum())
        finite = of[of.notna()]
        other = finite[finite > 0]
        steps = f"{n} step{'s' * (n != 1)}"
        if odd:
            lines.append(f"{choice}: not finite on {odd} of {steps}")
        if not len(finite):
            continue
        if not len(other):
            lines.append(f"{choice}: exactly {named or 'the same gradient'} on {len(finite)} of {steps}")
            continue
        median, most = float(other.median()), float(other.max())
        lines.append(
            f"{choice}: another gradient on {len(other)} of {steps}; it differs by {_share(median)} "
            f"(median; at most {_share(most)}) in {name}{named and f' from {named}'}"
        )
        large, small = large or most > 1e-4, small or most <= 1e-4
    if large and bits is not None and bits < 24:
        lines.append(
            f"why: {name} keeps {bits} bits of a number, so two entries of a pooling window are often equal, and there "
            "the choice decides; --trainer.precision=32-true measures the same with 24 bits"
        )
    elif small and not large:
        lines.append(
            f"why: with {bits or 'its'} bits of a number, almost only zeros tie, and their gradients are, but for "
            "rounding, the same for every choice; --trainer.precision=bf16-mixed makes many more ties"
        )
    return lines


def _share(relative: float) -> str:
    """A relative difference as a person reads it.

    Example:
        >>> [_share(x) for x in (0.0497, 0.00418, 9.7e-9, 12.0)]
        ['5 %', '0.42 %', '1e-08', '12 times']
    """
    if relative >= 10:
        return f"{relative:.3g} times"
    return f"{100 * relative:.2g} %" if relative >= 1e-4 else f"{relative:.1g}"
