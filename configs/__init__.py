"""The packaged configurations, one YAML file per experiment; installed as `nslightning.configs`."""

from pathlib import Path

from nslightning.spelling import did_you_mean

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
    hint = did_you_mean(wanted.removesuffix(".yml"), packaged)
    raise FileNotFoundError(
        f"there is no file {name}, and no packaged config of that name{hint} `nslightning` without a command lists "
        "them; a file of your own is named by its path, as in --config ./mine.yaml"
    )
