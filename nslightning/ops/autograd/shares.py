"""The named ways to share a gradient over the entries that reach a maximum together: of poolings and of maxima."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SHARES", "PoolWeights", "Shares", "pool_weights", "shares"]


class Shares(NamedTuple):
    """The shares of a gradient g that k tied entries receive.

    Args:
        native: Each entry receives its stock gradient times ``native``.
        share: Each entry receives ``g * share / k``.
        each: Each entry receives ``g * each`` more.
        first: The first entry receives ``g * first`` more.
        last: The last entry receives ``g * last`` more.
    """

    native: float = 0.0
    share: float = 0.0
    each: float = 0.0
    first: float = 0.0
    last: float = 0.0


class PoolWeights(NamedTuple):
    """The shares of a pooling window, in which one entry, the target, receives more than the others.

    Args:
        share: Each entry receives ``g * share / k``.
        whole: The target receives ``g * whole`` more.
        each: Each entry receives ``g * each`` more.
        last: 1 where the target is the last entry, 0 where it is the first.
    """

    share: float
    whole: float
    each: float
    last: float


SHARES: dict[str, Shares] = {
    "native": Shares(native=1.0),
    "first": Shares(first=1.0),
    "last": Shares(last=1.0),
    "minimal": Shares(share=1.0),
    "random": Shares(first=1.0),  # of the entries in an order that is drawn: the mechanisms draw it
    "sum": Shares(each=1.0),
}


def shares(choice: float | str | None) -> Shares:
    """Return how a choice shares a gradient.

    Args:
        choice: A number beta, which is ``beta * minimal + (1 - beta) * native``, a name, or None for the reference.

    Returns:
        The shares.

    Example:
        >>> shares(0.25)
        Shares(native=0.75, share=0.25, each=0.0, first=0.0, last=0.0)
    """
    if choice is None:
        return SHARES["native"]
    return SHARES[choice] if isinstance(choice, str) else Shares(native=1.0 - choice, share=choice)


def pool_weights(choice: float | str | None) -> PoolWeights:
    """Return how a choice shares a pooling window's gradient.

    Args:
        choice: As for :func:`shares`.

    Returns:
        The weights.

    Example:
        >>> pool_weights("last")
        PoolWeights(share=0.0, whole=1.0, each=0.0, last=1.0)
    """
    native, share, each, first, last = shares(choice)
    return PoolWeights(share, native + first + last, each, float(last != 0))
