"""The packaged configurations, one YAML file per experiment; installed as `nslightning.configs`."""

import difflib
from pathlib import Path

__all__ = ["path"]


def path(name: str) -> Path:
    """Find a packaged configuration by name, from any folder.

    Args:
        name: The file's name, with or without `.yaml` and the leading `configs/`.

    Returns:
        The path of the YAML file in the installed package.

    Raises:
        FileNotFoundError: No packaged configuration has that name.

    Example:
        >>> path("quickstart") == path("configs/quickstart.yaml")
        True
    """
    folder = Path(__file__).parent
    packaged = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    wanted = name.replace("\\", "/").removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    if wanted in packaged:
        return packaged[wanted]
    close = difflib.get_close_matches(wanted.removesuffix(".yml"), packaged, n=1)
    raise FileNotFoundError(
        f"No packaged configuration is called {name!r}."
        + (f" Did you mean {close[0]!r}?" if close else "")
        + f" There are: {', '.join(sorted(name for name in packaged if not name.startswith('experiments/')))}."
        + " A file of your own is given by its path: --config ./mine.yaml"
    )
