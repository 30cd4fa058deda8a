"""Arithmetic as a setting: how floating-point sums and products are rounded, and the record of it."""

from nslightning.arithmetic.products import HalfProducts, Ordered, linear, sequential_product, split
from nslightning.arithmetic.record import record
from nslightning.arithmetic.rounding import RandomRounding
from nslightning.arithmetic.settings import Arithmetic

__all__ = [
    "Arithmetic",
    "HalfProducts",
    "Ordered",
    "RandomRounding",
    "linear",
    "record",
    "sequential_product",
    "split",
]
