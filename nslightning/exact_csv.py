"""Tables whose numbers are read as they were written, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["read_exactly"]


def read_exactly(file: str | Path | IO[str], **options: Any) -> pd.DataFrame:
    """Read a CSV file; pandas before 3.1 rounds the last digits unless it is asked not to, later ones do it always.

    Args:
        file: The file, or its open text.
        **options: As of ``pandas.read_csv``.

    Returns:
        The table.
    """
    import pandas as pd

    if tuple(int(part) for part in pd.__version__.split(".")[:2]) < (3, 1):
        options["float_precision"] = "round_trip"
    table: pd.DataFrame = pd.read_csv(file, **options)
    return table
